"""What each column of somebody's table is: proposed from its heading and its cells, or stated by a person.

A heading is compared by its letters and digits. Settings are found under their own and other usual names; what is no setting and
no measure is a factor where its values repeat.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nanostudy.analysis.frames import columns as own_columns
from nanostudy.analysis.table_cells import DECIMAL, LOGARITHMS, LOSSES, one_line, setting_value
from nanostudy.analysis.table_files import METRICS, Column, Table, bare
from nanostudy.errors import UsageError
from nanostudy.measures import MEASURES, stored
from nanostudy.settings import FIELDS
from nanostudy.text import counted, listed
from nanostudy.validation import ALIASES, letters

PUBLISHED = {"train_loss": "Train Loss", "val_loss": "Val Loss", "gap": "Loss Gap", "parameters": "Total Params"}
ROLES: dict[str, str] = {  # a measure or a text, and the spellings of its column, the first that is there is taken
    "name": "experiment name expname experimentname runname run trialname label trialid runid expid exp expdir configname "
    "trial commit modelname logdir",
    "val_loss": "valloss validationloss finalvalloss finalvalidationloss validloss finalvalidloss evalloss finalevalloss devloss "
    "lastvalloss vallossmean meanvalloss validationlossmean evallossmean valbpb valbpc valppl valperplexity bestvalloss minvalloss "
    "minvalidationloss bestvalidationloss lowestvalidationloss bestloss minloss testloss finalloss loss meanloss bpb bpc perplexity objective value values0",
    "train_loss": "trainloss trainingloss finaltrainloss finaltrainingloss lasttrainloss trainlossmean meantrainloss loss",
    "test_loss": "testloss finaltestloss",
    "best_val_loss": "bestvalloss minvalloss lowestvalidationloss minvalidationloss bestvalidationloss",
    "gap": "lossgap gap valtraingap generalizationgap",
    "parameters": "parameters params totalparams totalparameters nparams numparams numparameters nparameters parametercount "
    "paramcount numparamsm paramsm trainableparams trainableparameters",
    "seconds": "seconds duration runtime trainingtimesec trainingtimeseconds trainingtimes totaltimes timetotals elapseds "
    "elapsedseconds elapsed trainingtime totaltrainingtime walltime time runtimemean",
    "updates": "updates iter iteration iternum globalstep laststep step",
    "best_step": "beststep iteratmin bestiter bestiteration",
    "tokens": "tokens tokensseen",
    "id": "id expnum expidx expid experimentid number trialnumber index runnumber num",
    "part": "part member group person student worker",
    "status": "status state runstatus trialstatus",
    "reason": "reason error errormessage errormsg",
    "seed": "seed randomseed rngseed torchseed",
    "source": "source",
    "study": "study",
    "config_path": "configpath",
}
SPELLINGS = {role: text.split() for role, text in ROLES.items()} | {
    name: list(dict.fromkeys((name.replace("_", ""), *ROLES.get(name, "").split()))) for name in stored()
}
SETTINGS = {letters(name): name for name in FIELDS} | {
    spelling: name
    for spelling, name in ALIASES.items()
    if name != "corpus"  # "data" may be anything
}
MEASURED_WORDS = """
    loss acc accuracy err error errors time sec secs seconds ms us ns minutes hours duration elapsed memory mem vram gb mb bytes flops
    mfu tok tokens throughput speed ppl perplexity bpb bpc score f1 auc r2 mae mse rmse std stderr sem gap gradnorm params parameters
    count url path dir file date datetime timestamp created host hostname pid node ip git sha hash commit notes note comment
    description user tags wandb device gpu cuda checkpoint ckpt logdir done unnamed best samples sample attrs iter iteration step
    runtime sweep
"""
MEASURED = frozenset(MEASURED_WORDS.split())  # in a heading they tell a result, a note or a place from a setting
OWN = {"id", "name", "part", "status", "train_loss", "val_loss", "loss_gap"}
COLUMN_WORDS = "name cell place i value mean low high step loss label effect level term n"
RESERVED = frozenset(COLUMN_WORDS.split())  # columns of the tables and figures of a report
MOST_NAMED = 8
LONGEST_FACTOR = 40  # characters


@dataclass(frozen=True)
class Stated:
    """What a person says of a table's columns. An empty one is proposed."""

    loss: str = ""
    name: str = ""
    factors: tuple[str, ...] = ()


NOTHING_STATED = Stated()


@dataclass
class Reading:
    """The columns of a table by what they are."""

    own: bool = False  # whether a study of this project wrote the table: its losses are exact
    roles: dict[str, Column] = field(default_factory=dict)  # measures, texts, seed and settings
    factors: dict[str, Column] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)  # heading: why

    @property
    def settings(self) -> dict[str, Column]:
        return {name: column for name, column in self.roles.items() if name in FIELDS and name != "seed"}

    @cached_property
    def unit(self) -> str:
        """Of the validation loss, where it is none in nats: a key of LOGARITHMS."""
        loss = self.roles.get("val_loss")
        return next((unit for unit in LOGARITHMS if loss and loss.key.endswith(unit)), "")

    @cached_property
    def decimal_comma(self) -> bool:
        losses = [self.roles[name] for name in (*LOSSES, "gap") if name in self.roles]
        return any(re.fullmatch(r"[+-]?\d*,\d+", cell) for loss in losses for cell in loss.cells)


def read_columns(table: Table, stated: Stated) -> Reading:
    """The reading of a table. Raises UsageError where a stated column is not there, or none is a loss."""
    reading = Reading(own=set(table.header) >= OWN)
    roles = reading.roles
    if stated.name:
        roles["name"] = _stated(table, stated.name, "--name")
    if stated.loss:
        roles["val_loss"] = _stated(table, stated.loss, "--loss")
    wanted = [_stated(table, one, "--factors") for one in stated.factors]
    for role, spellings in SPELLINGS.items():
        taken = (*roles.values(), *wanted)
        there = [one for one in table.columns if one.key in spellings and one not in taken and _may_be(role, one)]
        if role not in roles and there:
            roles[role] = _first(table, there, role)
    loss = roles.get("val_loss")
    if loss and letters(loss.heading) in SPELLINGS["best_val_loss"]:
        roles.setdefault("best_val_loss", loss)
    if not loss and "train_loss" not in roles:
        raise UsageError(
            f"{table.where} has no column that is a loss, such as Val Loss, final_val_loss, val/loss or eval_loss. Say which it is with "
            f"--loss COLUMN (of which less is better), and if need be --name COLUMN and --factors A,B. Its columns: {_some(table.header)}."
        )
    taken = tuple(roles.values())
    some_configured = any(one.configured for one in table.columns)
    for column in _take_settings(reading, [one for one in table.columns if one not in taken], wanted):
        why = "" if wanted else _no_factor(column, some_configured)
        if not why:
            reading.factors[_factor_name(bare(column.heading), reading.factors)] = column
        elif column.key != "configpath":
            reading.unread[column.heading or f"column {table.columns.index(column) + 1}"] = why
    if not wanted:
        _drop_labels(reading)
    return reading


def _stated(table: Table, wanted: str, option: str) -> Column:
    for same in (str, bare, letters, lambda heading: letters(bare(heading))):
        columns = [column for column in table.columns if same(column.heading) == same(wanted)]
        if len(columns) == 1:
            return columns[0]
        if columns:
            raise UsageError(
                f"{table.where} has {len(columns)} columns {wanted!r}: {option} needs a name that only one has."
            )
    near = difflib.get_close_matches(wanted, table.header, n=1)
    hint = f" Did you mean {one_line(near[0])!r}?" if near else f" Columns: {_some(table.header)}."
    raise UsageError(f"{table.where} has no column {one_line(wanted)!r} ({option}).{hint}")


def _may_be(role: str, column: Column) -> bool:
    """Whether its place and its cells allow what its heading says."""
    if role == "id" and not all(re.fullmatch(r"\d{1,15}(\.0)?", cell) for cell in column.cells if cell):
        return False
    if role == "updates" and column.heading.startswith("_"):
        return False  # Weights & Biases counts what was logged, not what was updated
    return role == "seed" or not column.configured


def _first(table: Table, columns: Sequence[Column], role: str) -> Column:
    """The column with the first of the role's spellings. Raises UsageError where two have it, and differ."""
    first = min(columns, key=lambda column: SPELLINGS[role].index(column.key))
    same = [column for column in columns if column.key == first.key and column.cells != first.cells]
    if same and role in ("val_loss", "train_loss", "name"):
        option = {"val_loss": " Say which with --loss COLUMN.", "name": " Say which with --name COLUMN."}.get(role, "")
        both = f"{first.heading!r} and {same[0].heading!r} both hold {role}"
        raise UsageError(f"{table.where}: the columns {both}, and differ.{option}")
    return first


def _some(header: Sequence[str]) -> str:
    return listed([repr(one_line(heading)[:40]) for heading in header], MOST_NAMED)


# --- settings


def _take_settings(reading: Reading, columns: Sequence[Column], wanted: Sequence[Column]) -> list[Column]:
    """Adds the columns of settings, of those `wanted` where there are any, and returns those left for factors.

    A column that holds none of the setting's values is left, too.
    """
    own = {name.replace("_", "") for name in FIELDS}
    columns = [column for column in columns if not wanted or column in wanted]
    left = []
    for column in sorted(columns, key=lambda column: column.key not in own):
        name = SETTINGS.get(column.key)
        if name in reading.roles and not wanted:
            reading.unread[column.heading] = f"{reading.roles[name].heading} holds {name}"
        elif name and name not in reading.roles and _has_value(name, column):
            reading.roles[name] = column
        else:
            left.append(column)
    return sorted(left, key=(wanted or columns).index)


def _has_value(name: str, column: Column) -> bool:
    """Whether a cell is a value of the setting, or all are empty."""
    cells = set(column.cells) - {""}
    return not cells or any(setting_value(name, cell, lenient=True) is not None for cell in cells)


# --- factors


def _no_factor(column: Column, some_configured: bool) -> str:
    """Why a column that is neither a measure nor a setting is no factor; empty where it is one."""
    there = [cell for cell in column.cells if cell]
    values = set(there)
    if len(values) < 2:
        return "the same in every row" if there else "empty"
    heading = bare(column.heading)
    words = set(re.findall(r"[a-z]+\d?|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", heading).casefold()))
    measures = {spelling for spellings in SPELLINGS.values() for spelling in spellings}
    if column.key in measures | {name.replace("_", "") for name in own_columns()}:
        return "a measure or a label"
    repeats = len(values) * 2 <= len(there)
    if column.configured:
        return "" if _numbers(values) or repeats else "another text in every row"
    if METRICS.match(column.heading) or words & MEASURED:
        return "a measure or a note"
    if some_configured:
        return "not among the table's configuration"
    return "" if repeats else "another value in most rows"


def _numbers(values: Iterable[str]) -> bool:
    return all(map(DECIMAL.fullmatch, values))


def _factor_name(heading: str, taken: Iterable[str]) -> str:
    """Letters, digits and underscores, as names of settings have; none that a column or a setting has."""
    name = re.sub(r"\W+", "_", heading).strip("_")[:LONGEST_FACTOR] or "column"
    if name[0].isdigit():
        name = f"_{name}"
    while name in {*own_columns(), *FIELDS, *MEASURES, *RESERVED, *taken}:
        name = f"{name}_"
    return name


def _drop_labels(reading: Reading) -> None:
    """A factor of words that says the values of two other columns is their label: with it, neither would have an effect of its own."""
    others = reading.settings | reading.factors
    for name, column in list(reading.factors.items()):
        values = set(column.cells)
        if _numbers(values):
            continue
        said = [
            other
            for other, there in others.items()
            if other != name
            and 1 < len(set(there.cells)) < len(values) == len(set(zip(column.cells, there.cells, strict=True)))
        ]
        if len(said) > 1:
            del reading.factors[name]
            reading.unread[column.heading] = f"a label: it says {listed(said, 3)}"


# --- in words


def described(table: Table, reading: Reading) -> str:
    """The reading in a sentence or two, with the options that say it otherwise."""
    measures = [
        f"{column.heading!r} as {MEASURES[role].title if role in MEASURES else role}"
        for role, column in reading.roles.items()
        if role not in reading.settings
    ]
    settings = [
        name if letters(column.heading) == name.replace("_", "") else f"{name} ({column.heading})"
        for name, column in reading.settings.items()
    ]
    varying = [
        f"{one_line(name)[:40]!r} ({why})" for name, why in reading.unread.items() if why != "the same in every row"
    ]
    parts = {
        "reads": listed([one_line(text) for text in measures]),
        "settings:": listed([one_line(text) for text in settings]),
        "factors:": listed(list(reading.factors)),
        "not read:": listed(varying, MOST_NAMED),
    }
    read = "; ".join(f"{what} {those}" for what, those in parts.items() if those)
    return f"{table.label}, {counted(len(table.rows), 'row')}, {read}. Otherwise: --name COLUMN, --loss COLUMN, --factors A,B."
