"""A study's experiments: their order, ids, parts, seeds and names, as in the published grid; extending and selecting them."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from nanostudy.errors import UsageError
from nanostudy.settings import FIELDS, Experiment, check_value, names_of
from nanostudy.study.definition import Study
from nanostudy.text import listed, value_text
from nanostudy.validation import canonical, check_names

Cell = tuple[Any, ...]  # the values of CELL_SETTINGS: all that decides a result, except the seed

CELL_SETTINGS = tuple(name for name in FIELDS if name not in names_of("record") and name != "seed")
_cell = operator.attrgetter(*CELL_SETTINGS)  # an experiment's cell
DEFAULTS = {name: field.default for name, field in FIELDS.items()}
IN_PUBLISHED_NAME = ("block_size", "n_layer", "n_head", "n_embd", "batch_size", "max_iters", "dropout")
LONGEST_NAME = 200  # bytes; file systems take 255, and names of files beside a run folder are longer
MOST_NAMED = 8  # values in a message
MOST_IDS = 40  # in an option


@dataclass(frozen=True)
class Entry:
    """One experiment of a study."""

    id: int  # counts from 1, and is never given twice
    name: str  # unique in the study, whatever the letter case; the run folder's name
    part: str
    experiment: Experiment


def extend(existing: Sequence[Entry], study: Study, older: bool = False) -> tuple[list[Entry], list[str]]:
    """The existing entries, then the study's new ones, with `older` names; and, in words, the combinations that it skips.

    Seeds stay as they are while a study grows: with one seed per experiment, a new cell gets its part's next number.
    Raises UsageError at duplicates, and at an impossible combination unless the study skips those.
    """
    entries, skipped, cells = list(existing), [], _cells(study)
    seeds: defaultdict[Cell, set[int]] = defaultdict(set)
    last_seed: Counter[str] = Counter()
    for entry in existing:
        seeds[_cell(entry.experiment)].add(entry.experiment.seed)
        last_seed[entry.part] = max(last_seed[entry.part], entry.experiment.seed)
    columns = zip(CELL_SETTINGS, zip(*{**seeds, **cells}, strict=True), strict=True)
    varying = [n for n, values in columns if n not in IN_PUBLISHED_NAME and len(set(values)) > 1]
    taken = {entry.name.casefold() for entry in existing}
    next_id = max((entry.id for entry in existing), default=0) + 1
    for cell, (part, axes) in cells.items():
        there = seeds.get(cell, set())
        one = () if there else (last_seed[part] + 1,)
        try:
            new = [Experiment(**{**study.settings, **axes, "seed": s}) for s in study.seeds or one if s not in there]
        except UsageError as problem:
            if not study.skip_impossible:
                raise UsageError(
                    f"{study.name}: {_words(axes, part)}: {problem} Or say `skip_impossible: true`."
                ) from None
            skipped.append(f"{_words(axes, part)}: {problem}")
            continue
        for experiment in new:
            name = _name(experiment, varying, taken, older)
            taken.add(name.casefold())
            entries.append(Entry(next_id, name, part, experiment))
            last_seed[part], next_id = max(last_seed[part], experiment.seed), next_id + 1
    if len(skipped) == len(cells):
        raise UsageError(f"{study.name}: every combination is impossible, for example {skipped[0]}")
    return entries, skipped


def requested(entries: Iterable[Entry], study: Study) -> list[Entry]:
    """The entries that the study contains, in order of ids."""
    cells, met, chosen, seeds = _cells(study), set(), [], set(study.seeds or ())
    for entry in sorted(entries, key=lambda entry: entry.id):
        cell = _cell(entry.experiment)
        wanted = cell not in met if study.seeds is None else entry.experiment.seed in seeds
        if cell in cells and wanted:
            met.add(cell)
            chosen.append(entry)
    return chosen


def changed_settings(before: Sequence[Study], now: Study) -> str | None:
    """In words, the settings that the earlier definitions and this one all fix, if only by default, at different values."""
    changes = []
    for name in CELL_SETTINGS:
        if any(name in axes for study in (*before, now) for axes in (study.grid, *study.parts.values())):
            continue
        there = [study.settings.get(name, DEFAULTS[name]) for study in before]
        value = now.settings.get(name, DEFAULTS[name])
        if there and value not in there:
            changes.append(f"{name} {value_text(there[-1])} there, {value_text(value)} requested")
    return ", ".join(changes) or None


def select(entries: Sequence[Entry], parts: Sequence[str] = (), only: str | None = None) -> list[Entry]:
    """The entries of these parts that `only` ('n_embd=256,dropout=0.1') describes.

    Its keys are settings, id, name and part; a key given twice means either value. Raises UsageError where nothing
    is left, and names the values that exist.
    """
    wanted: dict[str, list[Any]] = {}
    for piece in only.split(",") if only is not None else ():
        key, equals, text = (side.strip() for side in piece.partition("="))
        if not equals:
            raise UsageError(f"--only: {piece!r} is not of the form setting=value. Either of two values: a=1,a=2.")
        key = canonical(key)
        check_names([key], (*FIELDS, "id", "name", "part"))
        wanted.setdefault(key, []).append(text if key in ("id", "name", "part") else check_value(key, text))
    names = list(dict.fromkeys(entry.part for entry in entries))
    for part in (*parts, *wanted.get("part", ())):
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"There is no part {part!r}. {meant}Parts: {', '.join(names)}.")
    chosen, passed = list(entries), ""
    for key, values in [*([("part", list(parts))] if parts else []), *wanted.items()]:
        there = list(dict.fromkeys(_of(entry, key) for entry in chosen))
        described = " or ".join(f"{key}={value_text(value)}" for value in values)
        chosen = [entry for entry in chosen if _of(entry, key) in values]
        if not chosen:
            texts = [value_text(value) for value in there]
            if len(texts) > MOST_NAMED:
                texts = [f"{', '.join(texts[:3])}, ..., {texts[-1]} ({len(texts)} values)"]
            existing = f"{listed(texts, conjunction='or')}{' there' if passed else ''}"
            raise UsageError(f"No experiment has {passed}{described}. {key} is {existing}.")
        passed += f"{described} and "
    return chosen


def options_for(ids: Collection[int], entries: Sequence[Entry]) -> list[str]:
    """The --part and --only with which `select` chooses the entries of these ids: exactly these, but for many without a pattern,
    which get those of their parts.
    """
    own = [entry for entry in entries if entry.id in ids]
    varied = [key for key in ("part", *CELL_SETTINGS, "seed") if len({_of(entry, key) for entry in entries}) > 1]
    wanted = {key: list(dict.fromkeys(_of(entry, key) for entry in own)) for key in varied}
    if _chosen(entries, wanted) > len(own) or any(
        "," in value_text(value) for values in wanted.values() for value in values
    ):
        key = "id" if len(own) <= MOST_IDS else "part"
        wanted = {key: list(dict.fromkeys(_of(entry, key) for entry in own))}
    for key in reversed(list(wanted)):
        fewer = {other: values for other, values in wanted.items() if other != key}
        if _chosen(entries, fewer) == _chosen(entries, wanted):
            wanted = fewer
    parts = [word for part in wanted.pop("part", []) for word in ("--part", part)]
    only = ",".join(f"{key}={value_text(value)}" for key, values in wanted.items() for value in values)
    return [*parts, *(("--only", only) if only else ())]


def _chosen(entries: Sequence[Entry], wanted: Mapping[str, Sequence[Any]]) -> int:
    return sum(all(_of(entry, key) in values for key, values in wanted.items()) for entry in entries)


def _cells(study: Study) -> dict[Cell, tuple[str, dict[str, Any]]]:
    """Every combination in order, with its part and its values on the axes. Raises UsageError at duplicates."""
    cells: dict[Cell, tuple[str, dict[str, Any]]] = {}
    fixed = {**DEFAULTS, **study.settings}
    for part, own in study.parts.items():
        axes = {**own, **{name: values for name, values in study.grid.items() if name not in own}}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            settings = {**fixed, **chosen}
            cell = tuple(settings[name] for name in CELL_SETTINGS)
            if cell in cells:
                part_before, before = cells[cell]
                raise UsageError(f"duplicate experiments: {_words(before, part_before)} and {_words(chosen, part)}.")
            cells[cell] = part, chosen
    return cells


def _name(experiment: Experiment, varying: Iterable[str], taken: set[str], older: bool) -> str:
    """The published pattern, then the varying settings. Safe as a file's name, and not one of the `taken` (casefolded)."""
    others = (f"_{name}={safe(getattr(experiment, name), older)}" for name in varying)
    whole = experiment.name + "".join(others)
    name = whole if len(whole) <= LONGEST_NAME else _cut(whole, whole)
    for attempt in itertools.count():
        if name.casefold() not in taken:
            break
        name = _cut(whole, f"{experiment} {attempt}")
    return name


def _cut(name: str, hashed: str) -> str:
    return f"{name[: LONGEST_NAME - 9]}_{hashlib.sha256(hashed.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def stem(path: str) -> str:
    """On every system, whichever slashes it has."""
    return PurePosixPath(re.split(r"[\\/]", path.rstrip("\\/"))[-1]).stem


def safe(value: Any, older: bool = False) -> str:
    """A value in a folder's name. Older versions of nanostudy left out letters that such a name has not, and no more."""
    if isinstance(value, str):
        value = stem(value)
        plain = re.sub(r"[^A-Za-z0-9._-]", "", value).strip(".")
        left_out = not older and (not plain or any(c.isalnum() and not c.isascii() for c in value))
        return plain + (hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:8] if left_out else "")
    return str(value).lower().removesuffix(".0")


def _words(axes: Mapping[str, Any], part: str) -> str:
    return f"{', '.join(f'{name}={value_text(value)}' for name, value in axes.items()) or 'the only experiment'} (part {part})"


def _of(entry: Entry, key: str) -> Any:
    return str(getattr(entry, key)) if key in ("id", "name", "part") else getattr(entry.experiment, key)
