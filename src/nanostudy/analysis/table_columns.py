"""What each column of somebody's table is: proposed from its heading and its cells, or stated by a person.

A heading is compared by its letters and digits. Settings are found under their own and other usual names; what is no setting and
no measure is a factor where its values repeat.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nanostudy.analysis.frames import columns as own_columns
from nanostudy.errors import UsageError
from nanostudy.measures import MEASURES, stored
from nanostudy.settings import FIELDS, check_value
from nanostudy.text import counted, listed
from nanostudy.validation import ALIASES, letters

PUBLISHED = {"train_loss": "Train Loss", "val_loss": "Val Loss", "gap": "Loss Gap", "parameters": "Total Params"}
CONFIG = re.compile(
    r"(?:config|params?|cfg|hparams?|hyperparameters|args|settings|hp)\s*(?:[/.:]|(?<=params)_|(?<=cfg)_)\s*", re.I
)
METRICS = re.compile(r"(?:summary|metrics?|user_attrs|system_attrs|results?)\s*(?:[/.:]|(?<=attrs)_)\s*", re.I)
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
LOGARITHMS = {"bpb": "bits per byte", "bpc": "bits per character", "ppl": "perplexity", "perplexity": "perplexity"}
OWN = {"id", "name", "part", "status", "train_loss", "val_loss", "loss_gap"}
RESERVED = {
    "name",
    "cell",
    "place",
    "i",
    "value",
    "mean",
    "low",
    "high",
    "step",
    "loss",
    "label",
    "effect",
    "level",
    "term",
    "n",
}
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
    """The columns of a table by what they are; places are those in its header."""

    roles: dict[str, int] = field(default_factory=dict)  # measures, texts, seed and settings
    factors: dict[str, int] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)  # heading: why
    unit: str = ""  # of the loss, where it is none in nats: a key of LOGARITHMS
    own: bool = False  # whether a study of this project wrote the table: its losses are exact


def bare(heading: str) -> str:
    """Without config/, params_ and the like before it."""
    return CONFIG.sub("", heading, count=1) if CONFIG.match(heading) else METRICS.sub("", heading, count=1)


def read_columns(where: str, header: Sequence[str], rows: Sequence[Sequence[str]], stated: Stated) -> Reading:
    """The reading of a table, `where`. Raises UsageError where a stated column is not there, or none is a loss."""
    reading, taken = Reading(own=set(header) >= OWN), set[int]()
    cells = [[row[place] if place < len(row) else "" for row in rows] for place in range(len(header))]

    def take(role: str, place: int) -> None:
        reading.roles[role] = place
        taken.add(place)

    if stated.name:
        take("name", _place(where, header, stated.name, "--name"))
    if stated.loss:
        take("val_loss", _place(where, header, stated.loss, "--loss"))
    wanted = [_place(where, header, one, "--factors") for one in stated.factors]
    keys = {place: letters(bare(heading)) for place, heading in enumerate(header)}
    configured = {place for place, heading in enumerate(header) if CONFIG.match(heading)}
    for role, spellings in SPELLINGS.items():
        places = [place for place in keys if keys[place] in spellings and place not in taken and place not in wanted]
        places = [place for place in places if role == "seed" or place not in configured]
        if role == "updates":  # Weights & Biases counts what was logged, not what was updated
            places = [place for place in places if not header[place].startswith("_")]
        if (
            role not in reading.roles
            and places
            and (place := _first(where, header, cells, keys, places, spellings, role)) is not None
        ):
            take(role, place)
    low = reading.roles.get("best_val_loss")
    if (
        "val_loss" in reading.roles
        and letters(header[reading.roles["val_loss"]]) in SPELLINGS["best_val_loss"]
        and low is None
    ):
        reading.roles["best_val_loss"] = reading.roles["val_loss"]
    if "val_loss" not in reading.roles and "train_loss" not in reading.roles:
        raise UsageError(_no_loss(where, header))
    if "val_loss" in reading.roles:
        tail = keys[reading.roles["val_loss"]]
        reading.unit = next((unit for unit in LOGARITHMS if tail.endswith(unit)), "")
    _take_settings(where, reading, header, cells, keys, taken, wanted if stated.factors else None)
    chosen = wanted if stated.factors else [place for place in keys if place not in taken]
    for place in chosen:
        if place in taken:
            continue
        why = "" if stated.factors else _no_factor(header[place], cells[place], place in configured, bool(configured))
        if not why:
            reading.factors[_factor_name(bare(header[place]), reading.factors)] = place
        elif why != "config_path":
            reading.unread[header[place] or f"column {place + 1}"] = why
    if not stated.factors:
        _drop_labels(reading, header, cells)
    return reading


def _place(where: str, header: Sequence[str], wanted: str, option: str) -> int:
    for same in (str, bare, letters, lambda heading: letters(bare(heading))):
        places = [place for place, heading in enumerate(header) if same(heading) == same(wanted)]
        if len(places) == 1:
            return places[0]
        if places:
            raise UsageError(f"{where} has {len(places)} columns {wanted!r}: {option} needs a name that only one has.")
    near = difflib.get_close_matches(wanted, header, n=1)
    hint = f" Did you mean {one_line(near[0])!r}?" if near else f" Columns: {_some(header)}."
    raise UsageError(f"{where} has no column {one_line(wanted)!r} ({option}).{hint}")


def _first(
    where: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    keys: dict[int, str],
    places: Sequence[int],
    spellings: Sequence[str],
    role: str,
) -> int | None:
    """The column with the first of the spellings. Raises UsageError where two have it, and differ."""
    if role == "id":
        places = [
            place for place in places if all(re.fullmatch(r"\d{1,15}(\.0)?", cell) for cell in cells[place] if cell)
        ]
    if not places:
        return None
    first = min(places, key=lambda place: (spellings.index(keys[place]), place))
    same = [place for place in places if keys[place] == keys[first] and cells[place] != cells[first]]
    if same and role in ("val_loss", "train_loss", "name"):
        other = header[same[0]]
        option = {"val_loss": " Say which with --loss COLUMN.", "name": " Say which with --name COLUMN."}.get(role, "")
        raise UsageError(f"{where}: the columns {header[first]!r} and {other!r} both hold {role}, and differ.{option}")
    return first


def _no_loss(where: str, header: Sequence[str]) -> str:
    return (
        f"{where} has no column that is a loss, such as Val Loss, final_val_loss, val/loss or eval_loss. Say which it is with "
        f"--loss COLUMN (of which less is better), and if need be --name COLUMN and --factors A,B. Its columns: {_some(header)}."
    )


def _some(header: Sequence[str]) -> str:
    return listed([repr(one_line(heading)[:40]) for heading in header], MOST_NAMED)


def one_line(cell: str) -> str:
    """Without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in cell).split())


# --- settings


def _take_settings(
    where: str,
    reading: Reading,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    keys: dict[int, str],
    taken: set[int],
    wanted: Sequence[int] | None,
) -> None:
    """Adds the columns of settings. One that holds none of the setting's values is left for a factor."""
    exact = {name.replace("_", "") for name in FIELDS}
    for place in sorted((place for place in keys if place not in taken), key=lambda place: keys[place] not in exact):
        name = SETTINGS.get(keys[place])
        if name is None or name in reading.roles or (wanted is not None and place not in wanted):
            if name in reading.roles and wanted is None:
                taken.add(place)
                reading.unread[header[place]] = f"{header[reading.roles[name]]} holds {name}"
            continue
        values = list(dict.fromkeys(cell for cell in cells[place] if cell))
        if values and not any(_is_value(name, value) for value in values):
            continue
        reading.roles[name] = place
        taken.add(place)


def _is_value(name: str, text: str) -> bool:
    try:
        check_value(name, one_line(text) if name in ("corpus", "init_from") else text)
    except UsageError:
        return False
    return True


# --- factors


def _no_factor(heading: str, cells: Sequence[str], configured: bool, others_are: bool) -> str:
    """Why a column that is neither a measure nor a setting is no factor; empty where it is one."""
    key = letters(bare(heading))
    if key == "configpath":
        return "config_path"
    there = [cell for cell in cells if cell]
    values = set(there)
    if len(values) < 2:
        return "the same in every row" if there else "empty"
    words = set(re.findall(r"[a-z]+\d?|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", bare(heading)).casefold()))
    if any(key in spellings for spellings in SPELLINGS.values()) or key in {
        name.replace("_", "") for name in own_columns()
    }:
        return "a measure or a label"
    if configured:
        return "" if _numbers(values) or len(values) * 2 <= len(there) else "another text in every row"
    if METRICS.match(heading) or words & MEASURED:
        return "a measure or a note"
    if others_are:
        return "not among the table's configuration"
    return "" if len(values) * 2 <= len(there) else "another value in most rows"


def _numbers(values: Iterable[str]) -> bool:
    return all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value) for value in values)


def _factor_name(heading: str, taken: Iterable[str]) -> str:
    """Letters, digits and underscores, as names of settings have; none that a column or a setting has."""
    name = re.sub(r"\W+", "_", heading).strip("_")[:LONGEST_FACTOR] or "column"
    reserved = {*own_columns(), *FIELDS, *MEASURES, *RESERVED, *taken}
    while name in reserved or name[0].isdigit():
        name = f"{name}_" if not name[0].isdigit() else f"_{name}"
    return name


def _drop_labels(reading: Reading, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A factor of words that says the values of two other columns is their label: with it, neither would have an effect of its own."""
    others = {
        **{name: place for name, place in reading.roles.items() if name in FIELDS and name != "seed"},
        **reading.factors,
    }
    for name, place in list(reading.factors.items()):
        if _numbers(set(cells[place])):
            continue
        said = [
            other
            for other, there in others.items()
            if other != name
            and 1 < len(set(cells[there])) < len(set(cells[place]))
            and len(set(zip(cells[place], cells[there], strict=True))) == len(set(cells[place]))
        ]
        if len(said) > 1:
            del reading.factors[name]
            reading.unread[header[place]] = f"a label: it says {listed(said, 3)}"


# --- in words


def described(label: str, header: Sequence[str], rows: int, reading: Reading) -> str:
    """The reading in a sentence or two, with the options that say it otherwise."""
    measures = [
        f"{header[place]!r} as {MEASURES[role].title if role in MEASURES else role}"
        for role, place in reading.roles.items()
        if role not in FIELDS or role == "seed"
    ]
    settings = [
        name if letters(header[place]) == name.replace("_", "") else f"{name} ({header[place]})"
        for name, place in reading.roles.items()
        if name in FIELDS and name != "seed"
    ]
    parts = [f"reads {listed([one_line(text) for text in measures])}"]
    parts += [f"settings: {listed([one_line(text) for text in settings])}"] if settings else []
    parts += [f"factors: {listed(list(reading.factors))}"] if reading.factors else []
    varying = [
        f"{one_line(name)[:40]!r} ({why})" for name, why in reading.unread.items() if why != "the same in every row"
    ]
    parts += [f"not read: {listed(varying, MOST_NAMED)}"] if varying else []
    return (
        f"{label}, {counted(rows, 'row')}, {'; '.join(parts)}. Otherwise: --name COLUMN, --loss COLUMN, --factors A,B."
    )
