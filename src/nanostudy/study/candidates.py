"""Studies of a few named recipes, each with the same seeds: what a referee trains, and what confirms a study's best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nanostudy.settings import FIELDS, Experiment, names_of
from nanostudy.study.definition import GIVEN_ELSEWHERE, Study


def candidates_study(name: str, recipes: Mapping[str, Experiment], seeds: Sequence[int], description: str) -> Study:
    """A part for each recipe, which holds what the recipes do not have in common. No samples, no weights.

    Settings that change no result are those of the first recipe.
    """
    first = next(iter(recipes.values()))
    values = {name: [getattr(recipe, name) for recipe in recipes.values()] for name in FIELDS}
    differing = [
        n
        for n in FIELDS
        if n not in names_of("record") and n != "seed" and values[n].count(values[n][0]) < len(recipes)
    ]
    fixed = {
        name: getattr(first, name)
        for name, field in FIELDS.items()
        if name not in differing and name not in GIVEN_ELSEWHERE and getattr(first, name) != field.default
    }
    parts = {part: {n: (getattr(recipe, n),) for n in differing} for part, recipe in recipes.items()}
    return Study(name, fixed, {}, parts, tuple(seeds), sample_tokens=0, keep="none", description=description)
