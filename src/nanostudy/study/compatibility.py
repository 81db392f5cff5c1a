"""Whether folders are of one study, and results of one name of the same experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanostudy import version
from nanostudy.data.texts import NAMES
from nanostudy.errors import NanostudyError
from nanostudy.settings import FIELDS, names_of
from nanostudy.study.definition import Study, word
from nanostudy.study.folder import Texts, definitions
from nanostudy.study.grid import Entry, extend

PATHS = ("corpus", "init_from")  # settings that may name a file, which lies elsewhere on another machine


@dataclass(frozen=True)
class Result:
    """A run folder that holds a result, and its run.json."""

    path: Path
    metadata: Mapping[str, Any]


# --- one study


def one_study(sources: Sequence[Path], into: Path) -> list[Study]:
    """The definitions of the merged study: those of `into`, and what the longest of the others adds to them.

    Raises NanostudyError where one's definitions do not begin with the other's. Those that ask for no new
    experiment, such as for other prompts, do not count.
    """
    known = {path: definitions(path) for path in (into, *sources)}
    adding = {path: _adding(studies) for path, studies in known.items()}
    longest = max((into, *sources), key=lambda path: len(adding[path]))
    for path, places in adding.items():
        for place, other in zip(places, adding[longest], strict=False):
            differences = _differences(known[path][place], known[longest][other], path, longest)
            if differences:
                raise NanostudyError(
                    f"{path} and {longest} are not parts of one study: {'; '.join(differences)}. Nothing was copied."
                )
    if not known[into]:
        return known[longest]
    new = adding[longest][len(adding[into]) :]
    further = known[longest][new[0] :] if new else []
    return known[into] + [_with_paths_of(known[into][0], study) for study in further]


def _with_paths_of(first: Study, study: Study) -> Study:
    """With the texts and weights where the first definition has them: by another path, all experiments would be others."""
    paths = {name: first.settings[name] for name in PATHS if name in first.settings and name in study.settings}
    return replace(study, settings={**study.settings, **paths})


def _adding(studies: Sequence[Study]) -> list[int]:
    """Which of the definitions asked for new experiments."""
    entries: list[Entry] = []
    places = []
    for place, study in enumerate(studies):
        extended, _ = extend(entries, study)
        if len(extended) > len(entries):
            places.append(place)
        entries = extended
    return places


def _differences(a: Study, b: Study, path_a: Path, path_b: Path) -> list[str]:
    there, here = _deciding(a), _deciding(b)
    return [
        f"{what} {_word(there.get(what))} in {path_a}, {_word(here.get(what))} in {path_b}"
        for what in dict.fromkeys([*there, *here])
        if there.get(what) != here.get(what)
    ]


def _deciding(study: Study) -> dict[str, Any]:
    """All of a definition that decides its experiments, their names and ids.

    Of a text or weights given by a path, which differs between machines, only that: their checksums are in the identities.
    """
    settings = {name: study.settings.get(name, field.default) for name, field in FIELDS.items()}
    for name in (*names_of("record"), "seed", *study.grid):
        settings.pop(name, None)
    for name in PATHS:
        if settings.get(name) is not None and settings[name] not in NAMES:
            settings[name] = "by a path"
    axes = {f"axis {name}": values for name, values in study.grid.items()}
    parts = {f"part {part}": tuple(own.items()) for part, own in study.parts.items()}
    order = {"order of axes": tuple(study.grid), "order of parts": tuple(study.parts)}  # ids follow from it
    seeds = "one per experiment" if study.seeds is None else study.seeds
    return {**settings, **axes, **parts, "seeds": seeds, "skip_impossible": study.skip_impossible, **order}


def _word(value: Any) -> str:
    return f"({', '.join(_word(each) for each in value)})" if isinstance(value, tuple) else word(value)


# --- one identity a name


def check_identities(found: Sequence[Mapping[str, Result]], entries: Iterable[Entry]) -> None:
    """Raises NanostudyError where two results of one name, or one and what it would be here, are not the same experiment."""
    texts = Texts()
    for entry in entries:
        results = [results[entry.name] for results in found if entry.name in results]
        if not results:
            continue
        first = results[0]
        for other in results[1:]:
            if other.metadata["identity"] != first.metadata["identity"]:
                what = _unlike(first.metadata, other.metadata)
                raise NanostudyError(
                    f"{first.path} and {other.path} are not the same experiment: {what}. Nothing was copied."
                )
        if texts.identity(entry.experiment) != first.metadata["identity"]:
            text = texts.corpus(entry.experiment).as_dict()
            here = {"settings": entry.experiment.as_dict(), "corpus": text, "numerics_version": version.NUMERICS}
            raise NanostudyError(
                f"{first.path} is not what {entry.name} is here: {_unlike(first.metadata, here)}. Nothing was copied."
            )


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What differs between two runs, the second one's value last."""
    compared = (*names_of("shape"), *names_of("number"))
    values = [(name, a["settings"].get(name), b["settings"].get(name)) for name in compared]
    one, other = a["corpus"], b["corpus"]
    values += [
        ("the text's SHA-256", one.get("sha256"), other.get("sha256")),
        ("the tokenizer", (one.get("tokenizer") or {}).get("kind"), (other.get("tokenizer") or {}).get("kind")),
        ("the numerics version", a.get("numerics_version"), b.get("numerics_version")),
    ]
    words = [f"{what} {_word(one)} and {_word(other)}" for what, one, other in values if one != other]
    return ", ".join(words) or "the first weights"
