"""What decides between settings: how many seeds that takes, fresh seeds for a study's best, and a verdict on a change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanostudy.analysis import power, winner
from nanostudy.analysis.frames import AT_CONTEXT
from nanostudy.analysis.judgement import MARGIN, SEEDS, Judgement, Verdict, compare
from nanostudy.analysis.power import DIFFERENCE, Seeds
from nanostudy.analysis.results import read_results
from nanostudy.analysis.winner import CONFIRMATION, Confirmed
from nanostudy.api import run_study
from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.interop.nanogpt_config import read_config
from nanostudy.result import Result
from nanostudy.settings import FIELDS, RUN_OPTIONS, SETTINGS, Experiment, Resources, from_settings
from nanostudy.settings_files import parse_assignments, read_settings
from nanostudy.study.definition import Study, candidates_study, definitions, existing_folder
from nanostudy.study.pool import workers_alike
from nanostudy.study.progress import Listener
from nanostudy.study.store import FILE, Store
from nanostudy.training.evaluation import contexts_within
from nanostudy.training.inputs import Inputs
from nanostudy.validation import takes, usage_errors

JUDGEMENTS = Path("judgements")
LOOKS = "looks.json"  # in a judgement's folder: the numbers of seeds at which a verdict was given
MOST_CANDIDATES = 4
FEWEST_FRESH, MOST_FRESH = 5, 32  # seeds, where none are asked for
LONGEST_NAME = 80  # characters of a folder's name

Recipe = str | Path | Experiment | Mapping[str, Any]


# --- seeds


@usage_errors
def plan_seeds(study: str | Path, difference: float = DIFFERENCE) -> Seeds:
    """How many seeds tell so many nats per token apart, of each setting against the study's best. Raises UsageError."""
    if not 0 < difference < math.inf:
        raise UsageError(f"difference={difference} must be a number above 0, in nats per token.")
    return power.seeds(read_results([study]), difference)


# --- confirmation


def confirmation(
    study: str | Path, most: int = MOST_CANDIDATES, seeds: int | None = None, difference: float = DIFFERENCE
) -> tuple[Study, Path]:
    """The study of the settings tied for the best on fresh seeds, and its folder: one that was begun keeps its settings. Runs nothing."""
    path = existing_folder(str(study))
    folder, results = path / CONFIRMATION, read_results([path])
    with Store.read(path / FILE) as store:
        rows = {row.name: row for row in store.rows()}
    taken = {row.experiment.seed for row in rows.values()}
    begun = definitions(folder)
    if begun:
        fresh = [seed for one in begun for seed in one.seeds or ()]
        if taken & set(fresh):
            raise UsageError(
                f"Seed {min(taken & set(fresh))} of {folder} is in the study itself now, so it is not fresh any more. Move that folder away."
            )
        count = max(seeds or 0, max(fresh) - min(fresh) + 1)
        return dataclasses.replace(begun[-1], seeds=tuple(range(min(fresh), min(fresh) + count))), folder
    names = winner.candidates(results, most)
    if not names:
        raise UsageError(f"No experiment of {path} has finished: there is nothing to confirm.")
    count = seeds or _fresh_seeds(power.seeds(results, difference), len(names))
    recipes = {f"candidate-{i}": rows[name].experiment for i, name in enumerate(names, start=1)}
    which = f"The {len(names)} best settings" if len(names) > 1 else "The best setting"
    text = f"{which} of {results.title} again, on seeds that it never used"
    first = max(taken) + 1
    return candidates_study(f"{path.resolve().name}-{CONFIRMATION}", recipes, range(first, first + count), text), folder


def _fresh_seeds(needed: Seeds, candidates: int) -> int:
    """As many as tell the difference between the best and any other candidate."""
    counts = needed.table["paired"][: candidates - 1].dropna()
    return int(min(MOST_FRESH, max(FEWEST_FRESH, counts.max()))) if len(counts) else SEEDS


@takes(SETTINGS[name] for name in RUN_OPTIONS)
@usage_errors
def confirm_study(
    study: str | Path,
    *,
    most: int = MOST_CANDIDATES,
    seeds: int | None = None,
    difference: float = DIFFERENCE,
    resources: Resources | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> Confirmed:
    """Trains the settings tied for a study's best again, at most so many, on seeds that it never used, in its folder.

    By default with as many seeds as tell `difference` nats per token apart. Goes on where an earlier call stopped; more `seeds` add to
    it. The options are those of run_study. Raises UsageError, NanostudyError.
    """
    plan, folder = confirmation(study, most, seeds, difference)
    run_study(plan, folder, resources=resources, listener=listener, **options)
    result = winner.confirmed(read_results([folder]), read_results([folder.parent]))
    if result is None:
        raise NanostudyError(f"None of the settings finished with a fresh seed; {folder} has the reasons.")
    return result


# --- judging a change


def read_recipe(recipe: Recipe, base: Experiment | None = None) -> Experiment:
    """A recipe's experiment; where it names settings alone, they are changes to `base`, or to the defaults. Raises UsageError.

    A text is a preset, a settings file, a nanoGPT configuration (.py) or a run folder, and setting=value after it: "quickstart dropout=0.1".
    """
    if isinstance(recipe, Experiment):
        return recipe
    settings: dict[str, Any] = base.as_dict() if base else {}
    if isinstance(recipe, Mapping):
        return from_settings({**settings, **recipe})
    text = str(recipe).strip()
    try:
        words = [text] if text and Path(text).exists() else shlex.split(text)
    except ValueError as problem:
        raise UsageError(f"The recipe {text!r} cannot be read: {problem}.") from None
    if not words:
        raise UsageError("A recipe is empty: name a preset, a settings file, a run folder, or setting=value.")
    source = words.pop(0) if "=" not in words[0] or Path(words[0]).exists() else None
    changes = parse_assignments(words)
    if source and source.endswith(".py"):
        settings = read_config(Path(source), changes).settings
    elif source:
        settings = {**read_settings(source), **changes}
    else:
        settings |= changes
    return from_settings({name: value for name, value in settings.items() if source is None or name in FIELDS})


@takes(SETTINGS[name] for name in RUN_OPTIONS)
@usage_errors
def judge(
    a: Recipe,
    b: Recipe,
    *,
    seeds: int = SEEDS,
    margin: float = MARGIN,
    most: int | None = None,
    out: str | Path | None = None,
    resources: Resources | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> Judgement:
    """Trains two recipes with the same `seeds` and says whether B is to be kept: see analysis.judgement.compare for the rule.

    A recipe is a text as on the command line, an Experiment, or a mapping of settings; b without a source is a with changes. `most`:
    while undecided, goes on with twice as many seeds, up to so many. The folder is `out`, by default one under judgements/ for these
    two recipes: a later call with more seeds goes on there, and its verdict is a further look. Where and how it trains is in the
    options, as for run_study; such settings in a recipe do not count. Raises UsageError, NanostudyError.
    """
    if seeds < 2 or (most is not None and most < seeds):
        raise UsageError(f"seeds={seeds}, most={most}: two seeds are the least, and `most` is no less than `seeds`.")
    if not math.isfinite(margin):
        raise UsageError(f"margin={margin} must be a finite number, in nats per token.")
    first = dataclasses.replace(read_recipe(a), seed=1)
    second = dataclasses.replace(read_recipe(b, first), seed=1)
    context = _comparable(first, second)
    names = _title(a, None), _title(b, a)
    folder = Path(out) if out is not None else JUDGEMENTS / _folder_name(names, first, second)
    while True:
        begun = [seed for one in definitions(folder) for seed in one.seeds or ()]
        plan = candidates_study(
            folder.name, {"A": first, "B": second}, range(1, max([seeds, *begun]) + 1), f"A: {names[0]}. B: {names[1]}."
        )
        rows = run_study(plan, folder, resources=resources, listener=listener, **options)
        result = _look(folder, rows, margin, context)
        if result.verdict is not Verdict.UNDECIDED or most is None or result.seeds >= most:
            return dataclasses.replace(result, a=names[0], b=names[1])
        seeds = min(2 * result.seeds, most)


def _comparable(a: Experiment, b: Experiment) -> int | None:
    """The context to compare at, None for their own. Raises UsageError where the losses would mean different things."""
    inputs = Inputs()
    text, other = ((one.sha256, one.tokenizer.kind, len(one.val.tokens)) for one in map(inputs.corpus, (a, b)))
    if text != other:
        raise UsageError("A and B read different texts, tokens or splits: a loss on one says nothing about another.")
    if inputs.identity(a) == inputs.identity(b):
        raise UsageError("A and B are the same recipe: they differ in no setting that changes a result.")
    if a.block_size == b.block_size:
        return None
    common = contexts_within(min(a.block_size, b.block_size))
    if not common:
        raise UsageError(
            f"A reads windows of {a.block_size} tokens and B of {b.block_size}, and their length alone changes a loss: both must be "
            "at least 32, where there is a common context to compare at."
        )
    return common[-1]


def _title(recipe: Recipe, base: Recipe | None) -> str:
    if isinstance(recipe, Experiment):
        return recipe.name
    if isinstance(recipe, Mapping):
        recipe = " ".join(f"{name}={value}" for name, value in recipe.items())
    text = str(recipe)
    changes = base is not None and text.split(" ")[0].count("=") and not Path(text).exists()
    return f"{_title(base, None)} {text}" if base is not None and changes else text


def _folder_name(names: tuple[str, str], a: Experiment, b: Experiment) -> str:
    """The same for the same two recipes: a settings file that was edited is another."""
    both = json.dumps([a.as_dict(), b.as_dict()], sort_keys=True)
    text = names[1] if names[1].startswith(names[0]) else "-".join(names)
    name = re.sub(r"[^\w.=+-]+", "-", text)[:LONGEST_NAME].strip("-.")
    return f"{name}-{hashlib.sha256(both.encode()).hexdigest()[:8]}"


def _look(folder: Path, rows: Sequence[Result], margin: float, context: int | None) -> Judgement:
    """The verdict on all seeds that both recipes have a result with; a look that it takes is recorded first."""
    by_part: dict[str, dict[int, Result]] = {"A": {}, "B": {}}
    for row in rows:
        if row.status.has_result:
            by_part[str(row.part)][row.experiment.seed] = row
    seeds = sorted(by_part["A"].keys() & by_part["B"].keys())
    if 2 * len(seeds) < len(rows):
        missing = next(row for row in rows if not row.status.has_result)
        raise NanostudyError(
            f"{missing.name} failed ({missing.reason}), so there is no verdict. Try it again with: "
            f"nanostudy study retry {shlex.quote(str(folder))}, then judge again."
        )
    looks = _looks(folder)
    if not looks or len(seeds) > looks[-1]:
        looks.append(len(seeds))
        write_atomically(folder / LOOKS, json.dumps(looks) + "\n")
    losses_a, losses_b = ([_loss(by_part[part][seed], context) for seed in seeds] for part in ("A", "B"))
    result = compare(losses_a, losses_b, looks, margin)
    shares = [(row.seconds or 0.0) / (row.members or 1) for row in rows]
    workers = workers_alike(str(rows[0].machine.get("device")), rows[0].machine.get("threads"))
    return dataclasses.replace(
        result,
        seed_seconds=sum(shares) / len(seeds) / workers,
        measure="val_loss" if context is None else f"{AT_CONTEXT}{context}",
        trainings=len(rows),
        seconds=sum(shares),
        folder=str(folder),
    )


def _looks(folder: Path) -> list[int]:
    try:
        looks = json.loads((folder / LOOKS).read_text(encoding="utf-8"))
        if isinstance(looks, list) and all(isinstance(n, int) for n in looks) and looks == sorted(set(looks)):
            return looks
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        pass
    raise NanostudyError(
        f"{folder / LOOKS} is damaged: it says at which numbers of seeds a verdict was given, as in [8, 16]."
    )


def as_record(result: Judgement) -> dict[str, Any]:
    """For JSON: None where a number is not known."""
    record = {**dataclasses.asdict(result), "reason": result.reason}
    record |= {"more_seeds": result.more_seeds, "more_seconds": result.more_seconds}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()}


def _loss(row: Result, context: int | None) -> float:
    """NaN where it diverged."""
    value = row.val_loss if context is None else row.context_losses.get(context)
    return math.nan if row.status != "finished" or value is None else float(value)
