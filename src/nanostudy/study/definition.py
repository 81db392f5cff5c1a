"""A study's definition: reads and writes a few lines of YAML, checks them, and applies the command line's changes."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.reading import read_text
from nanostudy.settings import CORPORA, FIELDS, Experiment, check_value, names_of
from nanostudy.settings_files import PATHS, located
from nanostudy.text import counted, value_text
from nanostudy.validation import NO_CHARACTER, canonical, check, check_names, setting
from nanostudy.yaml_input import LARGEST_FILE, parse_documents, parse_yaml

Axes = dict[str, tuple[Any, ...]]

DEFINITION = "study.yaml"  # the file in a study's folder
LARGEST_DEFINITION = 2**26  # bytes
MOST_EXPERIMENTS = 2_000_000  # a million are planned in half a minute and a gigabyte
BEST = r"best ([1-9]\d{0,8})"  # N weights that stay, of all
ONE_PER_EXPERIMENT = "one per experiment"
GIVEN_ELSEWHERE = {  # settings that a study gives once for all of its experiments
    "seed": "use `seeds: [1, 2, 3]` or `seeds: one per experiment`, outside settings, grid and parts",
    "sample_prompt": "use `prompts: [...]`, outside settings, grid and parts",
    "sample_tokens": "it stands outside settings, grid and parts",
}


@dataclass(frozen=True)
class Study:
    """A study's definition. Making one checks it and converts its values to the settings' types. Raises UsageError."""

    name: str
    settings: dict[str, Any]  # fixed; never the seed
    grid: Axes  # the last axis varies fastest
    parts: dict[str, Axes]  # a part's own axes come before the grid's, and replace those of the same names
    seeds: tuple[int, ...] | None  # None: one per experiment, its number within its part
    prompts: tuple[str | None, ...] = (None,)  # None: a new line
    sample_tokens: int = setting(300, "option", "length of each sample, in tokens", low=0, high=10**6)
    keep: str = setting(
        "all", "option", "all, final, best N (for example best 5) or none", pattern=rf"all|final|none|{BEST}"
    )
    skip_impossible: bool = setting(False, "option", "leave out combinations of values that are no experiment")
    description: str = setting("", "option", "in quotes where YAML would read a number")

    def __post_init__(self) -> None:
        _check_settings(self.settings, "settings")
        _check_parts(self.parts)
        checked = {
            "settings": {name: _fixed(name, value) for name, value in self.settings.items()},
            "grid": _axes(self.grid, "grid"),
            "parts": {part: _axes(axes, f"part {part}") for part, axes in self.parts.items()},
            "seeds": None if self.seeds is None else _values("seed", self.seeds, "seeds"),
            "prompts": _values("sample_prompt", self.prompts, "prompts"),
            "keep": " ".join(self.keep.split()) if isinstance(self.keep, str) else self.keep,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check(self)
        if not isinstance(self.name, str) or NO_CHARACTER.search(self.name):
            raise UsageError(f"name={self.name!r:.80} must be text (in quotes where YAML would read a number).")
        for name in self.grid:
            if name in self.settings:
                raise UsageError(f"{name} is both fixed (settings) and an axis (grid): keep one of the two.")
        _check_size(self)


KEYS = [field.name for field in dataclasses.fields(Study)]


def kept_best(keep: str) -> int | None:
    """N of `best N`; None for all, final and none."""
    best = re.fullmatch(BEST, keep)
    return int(best[1]) if best else None


# --- checks


def _check_settings(settings: Any, where: str) -> None:
    if not isinstance(settings, Mapping):
        raise UsageError(f"{where} must hold lines of the form `setting: value`.")
    check_names(settings, FIELDS)
    for name, instead in GIVEN_ELSEWHERE.items():
        if name in settings:
            raise UsageError(f"{where} cannot hold {name}: {instead}.")


def _check_parts(parts: Mapping[Any, Any]) -> None:
    if not parts:
        raise UsageError("parts is empty: name at least one, or leave parts out.")
    for part in parts:  # a part's name becomes a folder's
        if not isinstance(part, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{0,99}[A-Za-z0-9_-]", part):
            raise UsageError(f"part {part!r}: a part's name is text of letters, digits, and _ - . between them.")
    if len({part.casefold() for part in parts}) < len(parts):
        raise UsageError(
            f"Two parts differ only in letter case, which is one folder on some machines: {', '.join(parts)}."
        )


def _fixed(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not FIELDS[name].form:
        raise UsageError(f"settings holds several values of {name}: an axis belongs under `grid:`.")
    return check_value(name, value)


def _values(name: str, values: Any, where: str) -> tuple[Any, ...]:
    values = values if isinstance(values, (list, tuple)) else (values,)
    if not values:
        raise UsageError(f"{where}: {name} has no values; list at least one, or leave it out.")
    values = tuple(check_value(name, value) for value in values)
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{where}: {name} lists {value_text(value)} {'twice' if times == 2 else f'{times} times'}.")
    return values


def _axes(axes: Any, where: str) -> Axes:
    _check_settings(axes, where)
    for name in names_of("record"):
        if name in axes:
            raise UsageError(f"{where}: {name} changes no result, so it cannot be an axis; put it under `settings:`.")
    return {name: _values(name, values, where) for name, values in axes.items()}


def _check_size(study: Study) -> None:
    """Before anything is expanded. Raises UsageError."""
    total, seeds = 0, len(study.seeds or (None,))
    for part, own in study.parts.items():
        axes = {**study.grid, **own}
        total += math.prod(len(values) for values in axes.values()) * seeds
        if total > MOST_EXPERIMENTS:
            product = " × ".join(f"{len(values):,} {name}" for name, values in axes.items())
            raise UsageError(
                f"This study has {total:,} experiments or more ({product} in part {part}, {counted(seeds, 'seed')}), and "
                f"{MOST_EXPERIMENTS:,} is the most. Take fewer values, or several studies."
            )


# --- study files and folders


def folder_of(source: str) -> Path:
    """`source` itself where it is a study's folder, else the default folder of a study by this name. Raises NanostudyError."""
    path = Path(source)
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    return path if has_study(path) or not name.strip(".") else Path("studies") / name


def existing_folder(name: str) -> Path:
    """As folder_of. Raises UsageError where there is no study."""
    path = folder_of(name)
    if not has_study(path):
        there = sorted(file.parent.as_posix() for file in Path("studies").glob(f"*/{DEFINITION}"))
        others = f"There are {', '.join(there)}." if there else "`nanostudy study run` begins one."
        default = "" if path == Path(name) else f", and none in {path.as_posix()}"
        raise UsageError(f"There is no study in {name}{default}. {others}")
    return path


def has_study(path: Path) -> bool:
    try:
        return (path / DEFINITION).is_file()
    except OSError as problem:
        raise NanostudyError(f"{path} cannot be read: {problem.strerror}.") from problem


def keep_of(path: Path) -> str:
    """Which weights the study in this folder keeps: all, final, best N or none; none where there is no study."""
    studies = definitions(path)
    return studies[-1].keep if studies else "none"


def command(verb: str, path: Path, *names: str) -> str:
    """What does something with a study's folder, as a person types it: nanostudy study retry studies/mine NAME."""
    return f"nanostudy study {verb} {shlex.join([str(path), *names])}"


def study_names() -> list[str]:
    """The studies that come with nanostudy."""
    folder = resources.files("nanostudy.study") / "studies"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def study_text(name: str) -> str:
    return (resources.files("nanostudy.study") / "studies" / f"{name}.yaml").read_text(encoding="utf-8")


def definitions(path: Path) -> list[Study]:
    """The study in this folder as it began and its extensions; empty where there is none. Raises NanostudyError."""
    file = path / DEFINITION
    try:
        found = parse_studies(read_text(file, LARGEST_DEFINITION), str(file)) if file.is_file() else []
        return [_with_paths(study, lambda value: located(value, path, begun=True)) for study in found]
    except OSError as problem:
        raise NanostudyError(f"{file} cannot be read: {problem}.") from problem


def read_study(source: str, assignments: Mapping[str, str] = {}) -> Study:
    """A study that comes with nanostudy, by name, or a YAML file, by path; with key=value texts applied. Raises UsageError."""
    try:
        text = study_text(source) if source in study_names() else read_text(Path(source), LARGEST_FILE)
    except OSError:
        raise UsageError(f"There is no study or study file {source!r}. Studies: {', '.join(study_names())}.") from None
    study = _study(parse_yaml(text, source), source)
    if source not in study_names():
        study = _with_paths(study, lambda value: located(value, Path(source).parent, begun=False))
    return with_assignments(study, assignments)


def _with_paths(study: Study, place: Callable[[Any], Any]) -> Study:
    """The study with the paths of its texts and first weights where they are."""

    def placed(axes: Axes) -> Axes:
        return {name: tuple(map(place, values)) if name in PATHS else values for name, values in axes.items()}

    settings = {name: place(value) if name in PATHS else value for name, value in study.settings.items()}
    parts = {part: placed(axes) for part, axes in study.parts.items()}
    return dataclasses.replace(study, settings=settings, grid=placed(study.grid), parts=parts)


def paths_in(studies: Iterable[Study], name: str) -> list[str]:
    """The paths that they give for this setting, in order."""
    axes = [axes for study in studies for axes in (study.settings, study.grid, *study.parts.values())]
    values = [value for own in axes for value in (own[name] if isinstance(own.get(name), tuple) else [own.get(name)])]
    return list(dict.fromkeys(value for value in values if isinstance(value, str) and value not in CORPORA))


def as_before(study: Study, before: Sequence[Study]) -> Study:
    """The study with the earlier definitions' paths for the same files: a project may have been moved, or be run from elsewhere."""
    paths = sorted({path for name in PATHS for path in paths_in(before, name)})

    def place(value: Any) -> Any:
        return value if value in paths else next((path for path in paths if _same_file(path, value)), value)

    return _with_paths(study, place)


def _same_file(one: str, other: Any) -> bool:
    with contextlib.suppress(OSError):
        return isinstance(other, str) and (os.path.samefile(one, other) or filecmp.cmp(one, other, shallow=False))
    return False


def relocated(before: Sequence[Study], study: Study) -> list[Study]:
    """The earlier definitions with this study's paths in place of those where nothing is any more. Identities show whether
    what lies there is the same: as long as a text is, its path may change.
    """
    found: dict[str, str] = {}
    for name in PATHS:
        there = paths_in(before, name)
        given = [path for path in paths_in([study], name) if path not in there]
        lost = [path for path in there if not os.path.lexists(path)]
        alike = {Path(path).stem: path for path in given}
        found |= {path: alike[Path(path).stem] for path in lost if Path(path).stem in alike}
        if len(lost) == len(given) == 1:
            found[lost[0]] = given[0]
    return [_with_paths(one, lambda value: found.get(value, value)) for one in before] if found else list(before)


def parse_studies(text: str, source: str) -> list[Study]:
    """The definitions in a study folder's file: the study as begun, then its extensions. Raises UsageError."""
    return [_study(document, source) for document in parse_documents(text, source)]


def study_yaml(study: Study) -> str:
    """One document, without what is empty; parse_studies reads it as the same study."""
    document: dict[str, Any] = {"name": study.name, "description": study.description}
    document |= {key: getattr(study, key) for key in KEYS}
    parts = {part: {n: v[0] if len(v) == 1 else list(v) for n, v in axes.items()} for part, axes in study.parts.items()}
    document["grid"] = {name: list(values) for name, values in study.grid.items()}
    document["parts"] = {} if study.parts == {"all": {}} else parts
    document["seeds"] = ONE_PER_EXPERIMENT if study.seeds is None else list(study.seeds)
    document["prompts"] = list(study.prompts)
    return "---\n" + "".join(
        _yaml(key, value) for key, value in document.items() if key == "name" or value not in ({}, "")
    )


def _yaml(key: str, value: Any) -> str:
    # None: a list or a mapping that holds only scalars stands on one line
    flow = None if isinstance(value, (list, dict)) and key != "settings" else False
    form: dict[str, Any] = {"default_flow_style": flow, "sort_keys": False, "width": 10**9}
    text = yaml.safe_dump({key: value}, allow_unicode=True, **form)
    # PyYAML does not read back some characters that it writes unescaped, U+0085 for one.
    return text if text.replace("\n", "").isprintable() else yaml.safe_dump({key: value}, **form)


def _study(document: Mapping[str, Any], source: str) -> Study:
    try:
        for key in document:
            if key in FIELDS and key not in KEYS:
                instead = GIVEN_ELSEWHERE.get(key, "put it under `settings:` (one value) or `grid:` (several)")
                raise UsageError(f"{key} is no key of a study: {instead}.")
        check_names(document, KEYS)
        for key in ("settings", "grid", "parts"):
            if key in document and (not isinstance(document[key], Mapping) or not document[key]):
                raise UsageError(
                    f"{key} must hold lines of the form `{key[:4]}...: ...`; leave it out if there are none."
                )
        defaults = {"name": Path(source).stem, "settings": {}, "grid": {}, "parts": {"all": {}}}
        return Study(**{**defaults, **document, "seeds": _seeds(document.get("seeds", [1]))})
    except UsageError as problem:
        raise UsageError(f"{source}: {problem}") from None


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, (list, tuple, range)) else value_text(value)


def _seeds(seeds: Any) -> Any:
    """None for the text `one per experiment`. Study checks other values."""
    if isinstance(seeds, str) and " ".join(seeds.split()) == ONE_PER_EXPERIMENT:
        return None
    if seeds is None or (isinstance(seeds, str) and not seeds.strip().isdecimal()):
        raise UsageError(f"seeds={seeds!r} must be whole numbers, [1, 2, 3], or the text `{ONE_PER_EXPERIMENT}`.")
    return seeds


def study_of(document: Mapping[str, Any]) -> Study:
    """The study that a mapping describes as a study file does. Raises UsageError."""
    return _study({"name": "study", **document}, "the study")


def candidates_study(name: str, recipes: Mapping[str, Experiment], seeds: Sequence[int], description: str) -> Study:
    """Named recipes, each with the same seeds: a part for each, which holds what they do not have in common. No samples, no weights.

    Settings that change no result are those of the first recipe.
    """
    values = {n: [getattr(e, n) for e in recipes.values()] for n in FIELDS if n not in GIVEN_ELSEWHERE}
    differing = [n for n, own in values.items() if n not in names_of("record") and own.count(own[0]) < len(own)]
    fixed = {n: own[0] for n, own in values.items() if n not in differing and own[0] != FIELDS[n].default}
    parts = {part: {n: (getattr(recipe, n),) for n in differing} for part, recipe in recipes.items()}
    return Study(name, fixed, {}, parts, tuple(seeds), sample_tokens=0, keep="none", description=description)


def with_assignments(study: Study, assignments: Mapping[str, Any]) -> Study:
    """The study with changes applied: several values, [a, b] or the text "a,b", make an axis, and one value is fixed."""
    assignments = {canonical(key): _text(value) for key, value in assignments.items()}
    check_names(assignments, (*FIELDS, *KEYS))
    settings, grid = dict(study.settings), dict(study.grid)
    changes: dict[str, Any] = {}
    for key, text in assignments.items():
        values = [value.strip() for value in ([text] if key in FIELDS and FIELDS[key].form else text.split(","))]
        if key in ("seed", "seeds"):
            changes["seeds"] = _seeds(text) if len(values) == 1 else values
        elif key in ("keep", "sample_tokens", "skip_impossible"):
            changes[key] = text.strip()
        elif key in KEYS or key in GIVEN_ELSEWHERE:
            raise UsageError(f"{key} cannot be given on the command line; copy the study file and edit it there.")
        elif any(key in axes for axes in study.parts.values()):
            raise UsageError(f"{key} is set by the parts of this study; choose with --part: {', '.join(study.parts)}.")
        elif key in grid or len(values) > 1:
            settings.pop(key, None)
            grid[key] = tuple(values)
        else:
            settings[key] = values[0]
    return dataclasses.replace(study, settings=settings, grid=grid, **changes)
