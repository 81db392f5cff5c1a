"""Results as data frames: the columns that are always there, what a factor is, what a cell is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from nanostudy.data.texts import cuts_of, find_text, locate_shakespeare, split_checksum
from nanostudy.measures import AT_THE_END, MEASURES
from nanostudy.settings import FIELDS, names_of
from nanostudy.text import counted, value_text

# settings that change no weight: they are no factors, and experiments that differ in nothing else are replicates
WITHOUT_EFFECT = (*names_of("record"), "eval_interval", "eval_tokens")
SETTINGS = tuple(name for name in FIELDS if name not in names_of("record"))
MACHINE = ("device", "device_name", "precision", "threads")
SURROUNDINGS = (*MACHINE, "members", "corpus_sha256")
# `source` is "nanostudy", or the table whose numbers other code may have made; `identity` is empty there
# `star` and `note` are a person's (study/notes.py)
OURS = "nanostudy"
ABOUT = ("id", "part", "status", "reason", "source", "study", "identity", "star", "note")
EVALUATIONS = ("name", "step", "tokens", "seconds", "train_loss", "val_loss")
TRAINING = ("name", "step", "loss", "learning_rate", "grad_norm", "tokens_per_second")
SAMPLES = ("name", "prompt", "text")
AT_CONTEXT = "val_loss_at_"  # and the context: the validation loss scored in windows of that length


def columns() -> tuple[str, ...]:
    """Those of the table of experiments. A table of other people's may add factors that are no settings here."""
    return (*ABOUT, *SETTINGS, *MEASURES, *SURROUNDINGS, "folder")


@dataclass(frozen=True)
class CorpusFacts:
    """A text that experiments read."""

    name: str
    sha256: str
    requested: str  # what finds it again: a name, or the path that it had
    tokenizer: str
    train_tokens: int
    entropy: float | None  # of the validation text, nats per token
    characters: tuple[int, ...] = ()  # of its parts: training, validation and, where there is one, test

    def parts(self) -> tuple[str, str] | None:
        """The training and the validation text, or None where they lie no longer here. Nothing is downloaded."""
        if self.requested in ("shakespeare", "auto") and self.name == "shakespeare" and locate_shakespeare() is None:
            return None
        try:
            text = find_text(self.name if self.name in ("shakespeare", "playhouse") else self.requested, self.tokenizer)
        except Exception:  # whatever the reason: a report can do without
            return None
        cuts = [0, *itertools.accumulate(self.characters)] if self.characters else cuts_of(text)
        if split_checksum(text, cuts) != self.sha256:
            return None
        return text.content[: cuts[1]], text.content[cuts[1] : cuts[2]]


def rows_frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """One of the other tables: texts as objects, numbers as float64, NaN where a row has none."""
    rows = list(rows)
    table = pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in columns})
    return table.astype({name: float for name in columns if name not in ("name", "prompt", "text")})


@dataclass(frozen=True)
class Results:
    """What is analysed. `experiments` has an index `name` and columns(): measures as float64, NaN where unknown; else None."""

    title: str
    experiments: pd.DataFrame
    evaluations: pd.DataFrame = field(default_factory=lambda: rows_frame((), EVALUATIONS))
    training: pd.DataFrame = field(default_factory=lambda: rows_frame((), TRAINING))
    samples: pd.DataFrame = field(default_factory=lambda: rows_frame((), SAMPLES))
    corpora: Mapping[str, CorpusFacts] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    others: tuple[Results, ...] = ()  # of other programs and people: compared with these, and no part of them

    @property
    def factors(self) -> tuple[str, ...]:
        """Settings with more than one known value, `seed` never among them, in the order in which Experiment declares them; and
        what else a table varied.
        """
        return factors_of(self.experiments)

    @property
    def finished(self) -> pd.DataFrame:
        """The experiments that have a result: finished, with a finite validation loss."""
        table = self.experiments
        return table[(table["status"] == "finished") & table["val_loss"].map(math.isfinite)]

    @property
    def contexts(self) -> tuple[int, ...]:
        """The contexts at which losses were scored, ascending."""
        names = map(str, self.experiments)
        return tuple(sorted(int(name.removeprefix(AT_CONTEXT)) for name in names if name.startswith(AT_CONTEXT)))

    def cells(self) -> pd.Series:
        """Of each experiment its settings without the seed, in words and factors alone: "n_embd=128, dropout=0.1"."""
        factors = self.factors
        labels = [
            ", ".join(f"{name}={value_text(value)}" for name, value in zip(factors, row, strict=True) if known(value))
            for row in self.experiments[list(factors)].itertuples(index=False, name=None)
        ]
        return pd.Series(labels, index=self.experiments.index, name="cell", dtype=object)


def factors_of(experiments: pd.DataFrame) -> tuple[str, ...]:
    candidates = [name for name in SETTINGS if name != "seed" and name not in WITHOUT_EFFECT]
    candidates += _others(map(str, experiments))
    return tuple(name for name in candidates if len(levels(experiments[name])) > 1)


def _others(names: Iterable[str]) -> list[str]:
    """The columns that hold what a table varied and this project has no setting for."""
    usual = {*columns(), *FIELDS, "name"}
    return [name for name in dict.fromkeys(names) if name not in usual and not name.startswith(AT_CONTEXT)]


def known(value: Any) -> bool:
    return value is not None and value is not pd.NA and value == value


def levels(column: pd.Series) -> list[Any]:
    """The known values, ascending; numbers before texts."""
    values = {value for value in column if known(value)}
    return sorted(values, key=lambda v: (isinstance(v, str), str(v) if isinstance(v, str) else v))


def without_unset(experiments: pd.DataFrame) -> pd.DataFrame:
    """The same, with the values that "none" stands for: where the decay of the learning rate ends, and at what rate."""
    end, least = experiments["lr_decay_iters"], experiments["min_lr"]
    tenth = pd.to_numeric(experiments["learning_rate"]).map(lambda rate: float(f"{rate / 10:.12g}"))
    return experiments.assign(
        lr_decay_iters=end.mask(end == "none", experiments["max_iters"]),
        min_lr=least.mask((least == "none") & tenth.notna(), tenth.astype(object)),
    )


def experiments_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of experiments from a mapping each, `name` among its keys: with every column, in its type.

    `gap` and `epochs` need not be given where they follow from the rest. What diverged has no losses at its end.
    """
    contexts = {key for record in records for key in record if key.startswith(AT_CONTEXT)}
    scored = sorted(contexts, key=lambda key: int(key.removeprefix(AT_CONTEXT)))
    others = _others(key for record in records for key in record)
    values = {name: [record.get(name) for record in records] for name in (*columns(), *scored, *others)}
    table = pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in values.items()})
    for name in (*MEASURES, *scored):
        table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
    table.loc[(table["status"] == "diverged").to_numpy(), list(AT_THE_END)] = math.nan
    table["gap"] = table["gap"].fillna(table["val_loss"] - table["train_loss"])
    table["source"] = table["source"].map(lambda value: value or "table")
    table.index = pd.Index([record["name"] for record in records], name="name", dtype=object)
    return table


def joined(pieces: Sequence[Results]) -> Results:
    """One Results of several: an experiment that is there twice once, names that mean two things told apart."""
    if len(pieces) == 1:
        return pieces[0]
    notes = [note for piece in pieces for note in piece.notes]
    superfluous = _superfluous(pieces)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in ("experiments", "evaluations", "training", "samples")}
    taken: set[str] = set()
    for piece, again in zip(pieces, superfluous, strict=True):
        if again:
            notes.append(
                f"{counted(len(again), 'experiment')} of {piece.title} came twice, such as {again[0]}: counted once."
            )
        kept = piece.experiments.drop(index=again)
        named = {name: _unlike(str(name), piece.title, taken) for name in kept.index}
        tables["experiments"].append(kept.rename(index=named))
        for which in ("evaluations", "training", "samples"):
            rows = getattr(piece, which)
            rows = rows[rows["name"].isin(list(named))]
            tables[which].append(rows.assign(name=rows["name"].map(named)))
    whole = {name: _stacked(parts) for name, parts in tables.items()}
    whole["experiments"].index.name = "name"
    corpora = {sha: facts for piece in pieces for sha, facts in piece.corpora.items()}
    provenance = {
        key: [piece.provenance[key] for piece in pieces if key in piece.provenance]
        for key in dict.fromkeys(key for piece in pieces for key in piece.provenance)
    }
    title = " + ".join(dict.fromkeys(piece.title for piece in pieces))
    others = tuple(other for piece in pieces for other in piece.others)
    return Results(title, **whole, corpora=corpora, provenance=_flat(provenance), notes=tuple(notes), others=others)


def _superfluous(pieces: Sequence[Results]) -> list[list[str]]:
    """Of each piece the experiments that are there already: copies of a result, and those without one where there is one.

    The same experiment trained on two machines is two results, which a comparison of machines needs.
    """
    found: dict[str, list[tuple[int, str, str, tuple[float, float]]]] = {}
    for place, piece in enumerate(pieces):
        table = piece.experiments
        columns = zip(table.index, *(table[c] for c in ("identity", "status", "val_loss", "seconds")), strict=True)
        for name, identity, status, loss, seconds in columns:
            if known(identity):
                found.setdefault(identity, []).append((place, str(name), status, (loss, seconds)))
    superfluous: list[list[str]] = [[] for _ in pieces]
    for same in found.values():
        done = [one for one in same if one[2] in ("finished", "diverged")]
        distinct = [one for i, one in enumerate(done) if not any(_alike(one[3], other[3]) for other in done[:i])]
        for place, name, *_ in (one for one in same if one not in (distinct or same[:1])):
            superfluous[place].append(name)
    return superfluous


def _alike(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether loss and seconds are the same but for the rounding of a run folder's seconds."""
    return np.allclose(a, b, rtol=0, atol=[1e-9, 0.02], equal_nan=True)


def _unlike(name: str, title: str, taken: set[str]) -> str:
    names = itertools.chain([name, f"{name} ({title})"], (f"{name} ({title}, {n})" for n in itertools.count(2)))
    chosen = next(one for one in names if one not in taken)
    taken.add(chosen)
    return chosen


def _stacked(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    whole = [part for part in parts if len(part)] or list(parts[:1])
    return pd.concat(whole, ignore_index="name" in parts[0].columns)


def _flat(provenance: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Lists one after another without repetition; mappings united; texts as paragraphs."""
    flat: dict[str, Any] = {}
    for key, values in provenance.items():
        if all(isinstance(value, Mapping) for value in values):
            flat[key] = {name: one for value in values for name, one in value.items()}
        elif all(isinstance(value, list) for value in values):
            every = list(itertools.chain.from_iterable(values))
            flat[key] = [one for i, one in enumerate(every) if one not in every[:i]]
        else:
            flat[key] = "\n".join(dict.fromkeys(str(value) for value in values))
    return flat
