"""What a study's experiments are called: short names that say only what varies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanostudy.settings import FIELDS, names_of
from nanostudy.study.definition import Study
from nanostudy.study.grid import stem
from nanostudy.text import brief_value

# how a short name begins a value, as folders of runs do; other settings stand as setting=value
SHORT = {
    **{"n_layer": "L", "n_head": "H", "n_embd": "E", "block_size": "b", "batch_size": "BS", "max_iters": "MI"},
    **{"dropout": "D", "seed": "s", "learning_rate": "lr=", "weight_decay": "wd=", "warmup_iters": "warmup="},
}
FEWEST = ("n_layer", "n_embd", "seed")  # in the label of a study's only experiment


def label(settings: Mapping[str, Any], varying: Sequence[str]) -> str:
    """L2 E128 D0 lr=0.004 s2: the values of these settings."""
    return " ".join(f"{SHORT.get(name, f'{name}=')}{word(settings.get(name))}" for name in varying or FEWEST)


def word(value: Any) -> str:
    """A value in one word, what a search drew in three digits; of a path the stem."""
    text = brief_value(value)
    path = isinstance(value, str) and ("/" in text or "\\" in text)
    return "_".join((stem(text) if path else text).split())


def varying(studies: Iterable[Study]) -> tuple[str, ...]:
    """The settings in which a study's experiments differ, in the order of their declaration, the seed last.

    It follows from the definitions alone: a study may have a million experiments.
    """
    values: dict[str, set[Any]] = {name: set() for name in FIELDS if name not in names_of("record")}
    for study in studies:
        values["seed"].update(study.seeds or (1, 2))  # one per experiment
        for own in study.parts.values():
            axes = {**study.grid, **own}
            for name in values.keys() - {"seed"}:
                values[name].update(axes.get(name, [study.settings.get(name, FIELDS[name].default)]))
    names = sorted(values, key=lambda name: name == "seed")
    return tuple(name for name in names if len(values[name]) > 1)
