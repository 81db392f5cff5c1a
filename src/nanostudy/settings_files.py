"""Settings as people give them: presets, YAML files, run folders, and key=value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nanostudy.errors import UsageError
from nanostudy.settings import FIELDS, IN_FILES, RESOURCE_NAMES, Experiment, Resources, check_names, from_settings

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
    try:
        path = path / "settings.yaml" if path.is_dir() else path
        settings = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path} cannot be read: {problem}.") from None
    except OSError:
        if path.name == "settings.yaml" and path.with_name("ckpt.pt").is_file():
            raise UsageError(
                f"{source} holds a checkpoint of nanoGPT's. Make a run of it: nanostudy convert {source}/ckpt.pt --to RUN"
            ) from None
        raise UsageError(
            f"There is no preset, settings file or run folder {source!r}. Presets: {', '.join(preset_names())}."
        ) from None
    if settings.get("init_from") == IMPORTED:  # lies in the run folder, wherever that was moved to
        settings["init_from"] = str(path.parent / IMPORTED)
    return settings


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The one mapping that a YAML text holds. Raises UsageError."""
    documents = parse_documents(text, source)
    if len(documents) != 1:
        raise UsageError(f"{source} must hold one document, and no line `---` between its settings.")
    return documents[0]


def parse_documents(text: str, source: str) -> list[dict[str, Any]]:
    """The mappings, at least one, that a YAML text holds, one a document. Raises UsageError."""
    try:
        documents = list(yaml.safe_load_all(text)) or [None]
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise UsageError(f"{source} is not YAML: {problem}") from None
    if not all(isinstance(settings, dict) and all(isinstance(key, str) for key in settings) for settings in documents):
        raise UsageError(f"{source} must hold lines of the form `setting: value`.")
    return documents


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
    check_names(settings, IN_FILES)
    resources = Resources(**{name: value for name, value in settings.items() if name in RESOURCE_NAMES})
    return from_settings({name: value for name, value in settings.items() if name in FIELDS}), resources
