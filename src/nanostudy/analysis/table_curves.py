"""Tables of evaluations, a row each, as tables of experiments with a curve each; and charts, whose lines are trainings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nanostudy.analysis.table_cells import DECIMAL, LOSSES
from nanostudy.analysis.table_columns import SPELLINGS, Reading, Stated, read_columns
from nanostudy.analysis.table_files import Column, Table, stem_of
from nanostudy.settings import names_of
from nanostudy.text import counted
from nanostudy.validation import letters

STEPS = ("step", "iter", "iteration", "iternum", "globalstep", "trainingiteration", "epoch", "update", "updates")
FEWEST_OF_A_CURVE = 5  # evaluations, where a table names no trainings and begins later than at update 1

Point = dict[str, str]  # an evaluation: its step, and its losses, empty where it has none


class Note(NamedTuple):
    about: str  # a table, or a row of it; empty where the sentence says that
    text: str


def as_curves(table: Table, stated: Stated, notes: list[Note]) -> Table:
    """A table of evaluations, a row each, as experiments with a curve each. Adds notes."""
    step = next((column for key in STEPS for column in table.columns if letters(column.heading) == key), None)
    reading = read_columns(table, stated) if step is not None else Reading()
    measured = {name: reading.roles[name] for name in LOSSES if name in reading.roles}
    if step is None or not measured:
        return table
    trainings = _trainings(table, step, reading)
    if trainings is None:
        if "name" in reading.roles and len(set(reading.roles["name"].cells)) < len(table.rows):
            notes.append(
                Note(
                    table.label,
                    f"each row is an experiment, for rows of one name have the same {step.heading}, or none.",
                )
            )
        return table
    curves = [(own, points) for own in trainings if (points := _points(step, measured, own))]
    same = [
        column
        for column in table.columns
        if column not in (step, *measured.values())
        and all(len({column.cells[i] for i in own}) == 1 for own, _ in curves)
    ]
    unnamed = {} if "name" in reading.roles else {"name": stem_of(table.at[0][0])}
    rows = [
        {
            **unnamed,
            **{column.heading: column.cells[own[0]] for column in same},
            step.heading: _end(points)["step"],
            **{column.heading: _end(points)[name] for name, column in measured.items()},
        }
        for own, points in curves
    ]
    if not rows:
        return table
    notes += _about_curves(table, curves, len(trainings))
    return Table(
        table.label,
        table.checksums,
        list(rows[0]),
        [table.at[own[-1]] for own, _ in curves],
        [list(row.values()) for row in rows],
        {place: points for place, (_, points) in enumerate(curves)},
    )


def _trainings(table: Table, step: Column, reading: Reading) -> list[list[int]] | None:
    """The rows of each training in order of its steps; None where the rows are experiments of their own.

    A training is all rows of one name, seed, settings and factors. A learning rate that changes from row to row is a schedule.
    """
    steps = [float(cell) if DECIMAL.fullmatch(cell) else math.nan for cell in step.cells]
    names = [reading.roles[key] for key in ("name", "id", "seed") if key in reading.roles]
    settings = {name: column for name, column in reading.settings.items() if name not in names_of("record")}
    factors = [column for column in reading.factors.values() if letters(column.heading) not in STEPS]
    scheduled = [column for name, column in settings.items() if name != "learning_rate"]
    for others in ([*settings.values(), *factors], scheduled):
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in sorted(range(len(steps)), key=steps.__getitem__):
            groups.setdefault(tuple(column.cells[i] for column in (*names, *others)), []).append(i)
        own = sorted(groups.values(), key=min)
        apart = all(len({steps[i] for i in group}) == len(group) for group in own) and not any(map(math.isnan, steps))
        begun = all(steps[group[0]] <= 1 or len(group) >= FEWEST_OF_A_CURVE for group in own)
        if apart and any(len(group) > 1 for group in own) and (names or begun or not (settings or factors)):
            return own
    return None


def _about_curves(table: Table, curves: Sequence[tuple[Sequence[int], Sequence[Point]]], trainings: int) -> list[Note]:
    ends = [float(_end(points)["step"]) for _, points in curves]
    texts = [f"{len(table.rows):,} evaluations of {counted(trainings, 'training')}, read as curves."]
    if trainings > len(curves):
        texts.append(f"{counted(trainings - len(curves), 'training')} without any loss left out.")
    if early := sum(end < max(ends) for end in ends):
        texts.append(f"{counted(early, 'training')} of {len(ends):,} with fewer updates than {max(ends):,.0f}.")
    return [Note(table.label, text) for text in texts]


def _end(points: Sequence[Point]) -> Point:
    """The last evaluation with a validation loss, where there is one: logs may have the training loss alone in between."""
    return next((point for point in reversed(points) if point.get("val_loss")), points[-1])


def of_chart(table: Table) -> Table:
    """The lines of a chart that Weights & Biases exports ("Step", "NAME - val/loss", ...), an experiment with a curve each."""
    charted: dict[str, dict[str, Column]] = {}
    for column in table.columns[1:]:
        name, _, measure = column.heading.rpartition(" - ")
        role = next((role for role in LOSSES if letters(measure) in SPELLINGS[role]), None)
        if name and role:
            charted.setdefault(name, {})[role] = column
    if not charted or letters(table.header[0]) not in STEPS:
        return table
    every = range(len(table.rows))
    header = ["name", "step", *(role for role in LOSSES if any(role in own for own in charted.values()))]
    curves = [(name, points) for name, own in charted.items() if (points := _points(table.columns[0], own, every))]
    rows = [[name, *(_end(points).get(key, "") for key in header[1:])] for name, points in curves]
    by_row = {place: points for place, (_, points) in enumerate(curves)}
    return Table(table.label, table.checksums, header, [table.at[-1]] * len(rows), rows, by_row) if rows else table


def _points(step: Column, losses: Mapping[str, Column], places: Iterable[int]) -> list[Point]:
    """Those of these rows that have a loss."""
    rows = [{"step": step.cells[i], **{name: column.cells[i] for name, column in losses.items()}} for i in places]
    return [row for row in rows if any(row[name] for name in losses)]
