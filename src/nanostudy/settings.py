"""Settings as people give them: presets, YAML files, run folders, and key=value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nanostudy.gpt.device import Resources
from nanostudy.gpt.errors import UsageError
from nanostudy.gpt.experiment import FIELDS, Experiment, check_names, from_settings

RESOURCE_NAMES = tuple(field.name for field in dataclasses.fields(Resources))


def preset_names() -> list[str]:
    folder = resources.files("nanostudy") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    return (resources.files("nanostudy") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def read_settings(source: str) -> dict[str, Any]:
    """The settings of a preset, a YAML file, or a run folder. Raises UsageError."""
    if source in preset_names():
        return _parse(preset_text(source), source)
    path = Path(source)
    try:
        path = path / "settings.yaml" if path.is_dir() else path
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path} cannot be read: {problem}.") from None
    except OSError:
        raise UsageError(
            f"There is no preset, settings file or run folder {source!r}. Presets: {', '.join(preset_names())}."
        ) from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise UsageError(f"{source} is not YAML: {problem}") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UsageError(f"{source} must hold lines of the form `setting: value`.")
    return settings


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """key=value texts as a mapping. Raises UsageError."""
    settings = {}
    for text in assignments:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is not of the form setting=value, for example max_iters=500.")
        settings[key] = value
    return settings


def experiment_and_resources(settings: Mapping[str, Any]) -> tuple[Experiment, Resources]:
    """Raises UsageError at an unknown name or a bad value."""
    check_names(settings, (*FIELDS, *RESOURCE_NAMES))
    of_machine = {name: value for name, value in settings.items() if name in RESOURCE_NAMES}
    return from_settings({name: value for name, value in settings.items() if name in FIELDS}), Resources(**of_machine)
