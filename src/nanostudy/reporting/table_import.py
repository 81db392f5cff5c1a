"""Somebody's table of results, taken over: the same in this project's columns, and a study that trains its experiments here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanostudy.analysis.frames import Results, known, levels
from nanostudy.atomic import whole_folder, write_atomically
from nanostudy.errors import UsageError
from nanostudy.reporting.data import shared
from nanostudy.reporting.phrases import are
from nanostudy.reporting.write import results_csv
from nanostudy.settings import FIELDS
from nanostudy.study.definition import Study, study_yaml
from nanostudy.text import counted, listed

TABLE, STUDY = "results.csv", "study.yaml"
SEEDS = (1, 2, 3)  # where the table names none
DECISIVE = (
    "corpus",
    "learning_rate",
    "gradient_accumulation_steps",
    "warmup_iters",
)  # of which tables often say nothing


@dataclass(frozen=True)
class Imported:
    """What `nanostudy study import` wrote."""

    table: Path
    study: Path | None  # None where the table's experiments make no study
    why: str  # there is none, or what the study takes for granted
    notes: Sequence[str]  # among them how the columns were read


def import_results(results: Results, folder: Path) -> Imported:
    """Writes the folder, which may not be there yet. Raises NanostudyError."""
    definition, why = _definition(results, folder.name)
    with whole_folder(folder) as place:
        write_atomically(place / TABLE, results_csv(results))
        if definition:
            write_atomically(place / STUDY, definition)
    return Imported(folder / TABLE, folder / STUDY if definition else None, why, results.notes)


def _definition(results: Results, name: str) -> tuple[str, str]:
    """(the study's YAML, what it takes for granted), or (empty, why there is none)."""
    table = results.experiments
    foreign = [factor for factor in results.factors if factor not in FIELDS]
    if foreign:
        return "", f"{listed(foreign)} {are(len(foreign))} no setting here"
    if not results.factors:
        return "", "the table names no settings that differ"
    unknown = [factor for factor in results.factors if not all(map(known, table[factor]))]
    if unknown:
        return "", f"{listed(unknown)} {are(len(unknown))} not known of every experiment"
    grid = {factor: tuple(levels(table[factor])) for factor in results.factors}
    cells, combinations = len(table[list(grid)].astype(str).drop_duplicates()), math.prod(map(len, grid.values()))
    if cells < combinations:
        return "", f"its {counted(cells, 'setting')} are not all {counted(combinations, 'combination')} of their values"
    fixed = shared(results)
    seeds = sorted({int(seed) for seed in table["seed"] if known(seed)})
    complete = len(seeds) > 1 and len(table) == cells * len(seeds)
    try:
        study = Study(name, fixed, grid, {"all": {}}, tuple(seeds) if complete else SEEDS)
    except UsageError as problem:
        return "", str(problem)
    rest = [name for name in DECISIVE if name not in fixed and name not in grid]
    return study_yaml(study), f"what the table does not say has this project's defaults: {listed(rest)}" if rest else ""
