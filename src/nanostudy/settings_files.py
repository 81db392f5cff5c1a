"""Settings as people give them: presets, YAML files, run folders, and key=value."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from nanostudy.errors import UsageError
from nanostudy.reading import read_text
from nanostudy.settings import CORPORA, FIELDS, IN_FILES, RESOURCE_NAMES, Experiment, Resources, from_settings
from nanostudy.validation import canonical, check_names
from nanostudy.yaml_input import LARGEST_FILE, parse_yaml

PATHS = ("corpus", "init_from")  # settings that may name a file
DEEPEST = 8  # folders upwards in which a moved file is looked for, and parts of its path that are tried
IMPORTED = "imported.safetensors"  # in a run folder converted from nanoGPT: the weights that it goes on from


def preset_names() -> list[str]:
    folder = resources.files("nanostudy") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    return (resources.files("nanostudy") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def read_settings(source: str) -> dict[str, Any]:
    """The settings of a preset, a YAML file, or a run folder. Raises UsageError."""
    if source in preset_names():
        return parse_yaml(preset_text(source), source)
    path = Path(source)
    path = path / "settings.yaml" if os.path.isdir(path) else path
    try:
        settings = parse_yaml(read_text(path, LARGEST_FILE), str(path))
    except OSError:
        if path.name == "settings.yaml" and path.with_name("ckpt.pt").is_file():
            raise UsageError(
                f"{source} holds a checkpoint of nanoGPT's. Make a run of it: nanostudy convert "
                f"{shlex.quote(str(path.with_name('ckpt.pt')))} --to RUN"
            ) from None
        if path.name == "settings.yaml" and path.with_name("train.bin").is_file():
            raise UsageError(_as_corpus(source)) from None
        if path.name == "settings.yaml" and path.with_name("study.yaml").is_file():
            raise UsageError(f"{source} is a study's folder: nanostudy study run {shlex.quote(source)}") from None
        raise UsageError(
            f"There is no preset, settings file or run folder {source!r}. Presets: {', '.join(preset_names())}."
        ) from None
    except UsageError:
        if path.suffix in (".yaml", ".yml") or not path.is_file():
            raise
        raise UsageError(_as_corpus(source)) from None
    if not set(settings).isdisjoint(("grid", "seeds", "parts")):
        raise UsageError(f"{source} is a study file: nanostudy study run {shlex.quote(source)}")
    if settings.get("init_from") == IMPORTED:  # lies in the run folder, wherever that was moved to
        settings["init_from"] = str(path.parent / IMPORTED)
    begun = (path.parent / "run.json").is_file()
    return {name: located(value, path.parent, begun) if name in PATHS else value for name, value in settings.items()}


def resume_command(folder: Path) -> str:
    """What goes on with a run folder, whatever it is called: a preset's name comes first in read_settings."""
    named = str(folder)
    named = os.path.join(".", named) if named in preset_names() else named
    return f"nanostudy train {shlex.quote(named)}"


def _as_corpus(source: str) -> str:
    return (
        f"{source} is no settings file but a text: name it as the corpus of a preset, "
        f"`nanostudy train quickstart corpus={shlex.quote(source)}`."
    )


def located(value: Any, folder: Path, begun: bool) -> Any:
    """A path as a file in `folder` gives it: relative to that folder, or to the working directory, where only that has it.

    Where neither has it and training has `begun`, so that checksums are compared, the project may have been moved: a file then
    serves whose path ends alike, in `folder` or above it.
    """
    if not isinstance(value, str) or value in CORPORA or not value:
        return value
    path, beside = Path(value), folder / value
    try:
        if beside.exists() or path.exists():
            return str(beside) if beside.exists() else value
        parts = [part for part in re.split(r"[\\/]", value) if part not in ("", ".", "..")]
        ends = [Path(*parts[i:]) for i in range(len(parts))][-DEEPEST:]
        above = [folder.resolve(), *folder.resolve().parents][:DEEPEST]
        places = (place / end for end in ends for place in above)
        moved = next((place for place in places if place.exists()), None) if begun else None
    except OSError:
        return value
    return str(moved or value)


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """key=value texts as a mapping. Raises UsageError."""
    settings: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.removeprefix("--").partition("=")
        if key == "dry-run":
            raise UsageError("--dry-run: `nanostudy study plan` says what a study would do and runs nothing.")
        if not equals or not key:
            like = f"{canonical(key)}=VALUE" if text.startswith("--") and key else "max_iters=500"
            raise UsageError(f"{text!r} is not of the form setting=value, for example {like}.")
        key = canonical(key)
        if key in settings:
            raise UsageError(f"{key} is given twice, as {settings[key]!r:.40} and {value!r:.40}: give it once.")
        settings[key] = value
    return settings


def experiment_and_resources(settings: Mapping[str, Any]) -> tuple[Experiment, Resources]:
    """Raises UsageError at an unknown name or a bad value."""
    check_names(settings, IN_FILES)
    resources = Resources(**{name: value for name, value in settings.items() if name in RESOURCE_NAMES})
    return from_settings({name: value for name, value in settings.items() if name in FIELDS}), resources
