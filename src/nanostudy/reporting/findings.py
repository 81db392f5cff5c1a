"""What the sections of a document are made from: the analysis, the data that figures share, and of one result its run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanostudy.analysis import curves
from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.curves import Row
from nanostudy.analysis.frames import Results
from nanostudy.analysis.results import run_problems
from nanostudy.reporting.charts.marks import colourings
from nanostudy.reporting.data import Data, data_of, names_by_loss
from nanostudy.settings import Experiment, from_settings
from nanostudy.text import counted, digits, duration
from nanostudy.training.run_folder import read_metadata, read_rows

ENTROPY = "entropy_nats_per_character"  # of a split, in run.json


@dataclass(frozen=True)
class Training:
    """A run folder, read."""

    metadata: dict[str, Any]
    experiment: Experiment
    evaluations: Sequence[Row]  # with finite losses
    left_out: int  # evaluations without
    log: Sequence[Row]  # training.csv
    step: int  # updates so far, skipped ones included
    tokens: int
    seconds: float | None
    vocabulary: int
    characters_per_token: float  # of the validation split
    entropy: float | None  # of the validation text, nats per token

    @staticmethod
    def read(folder: Path) -> Training | None:
        m = read_metadata(folder)
        if m is None:
            return None
        corpus, experiment = m["corpus"], from_settings(m["settings"])
        rows = read_rows(folder / "evaluations.csv")
        log = [] if "training.csv" in run_problems(folder) else read_rows(folder / "training.csv")
        evaluations = curves.finite(rows, "train_loss", "val_loss")
        made = m.get("updates", 0) + m.get("skipped_updates", 0)
        step = max([made, *(int(table[-1]["step"]) for table in (rows, log) if table)])
        per_token, entropy = corpus["val"]["characters"] / corpus["val"]["tokens"], corpus["val"][ENTROPY]
        return Training(
            metadata=m,
            experiment=experiment,
            evaluations=evaluations,
            left_out=len(rows) - len(evaluations),
            log=log,
            step=step,
            tokens=m.get("tokens", step * experiment.tokens_per_update),
            seconds=m.get("seconds", rows[-1]["seconds"] if rows else None),
            vocabulary=len(corpus["tokenizer"]["characters"]) if corpus["tokenizer"]["kind"] == "char" else 256,
            characters_per_token=per_token,
            entropy=None if entropy is None else entropy * per_token,
        )

    @property
    def corpus(self) -> dict[str, Any]:
        return self.metadata["corpus"]

    def model(self) -> str:
        e, count = self.experiment, self.metadata["parameters"]["total"]
        shape = f"{counted(e.n_layer, 'layer')}, {counted(e.n_head, 'head')}, width {e.n_embd}, context {e.block_size}"
        return f"{count:,} parameters ({shape})"

    def length(self) -> str:
        skipped = self.metadata.get("skipped_updates", 0)
        notes = f" ({skipped:,} skipped)" if skipped else ""
        notes += "" if self.seconds is None else f" in {duration(self.seconds)}"
        epochs = digits(self.tokens / self.corpus["train"]["tokens"])
        return f"{counted(self.step, 'update')}{notes}: {self.tokens:,} tokens, {epochs} epochs"


@dataclass(frozen=True)
class Findings:
    analysis: Analysis
    data: Data
    training: Training | None  # where there is one result, and its run folder

    @property
    def results(self) -> Results:
        return self.analysis.results

    @property
    def colour(self) -> str:
        return self.data.colourings[0]

    @property
    def compares(self) -> bool:
        """Whether there are results to compare."""
        return len(self.results.finished) > 1

    @property
    def pair(self) -> tuple[str, str] | None:
        """The two experiments, the better first, where there are no others."""
        names = names_by_loss(self.results)
        return (names[0], names[1]) if len(names) == len(self.results.experiments) == 2 else None


def findings_of(analysis: Analysis) -> Findings:
    results = analysis.results
    strongest = list(analysis.effects.importance["factor"])
    folder = results.experiments["folder"].iloc[0] if len(results.experiments) == 1 else None
    training = Training.read(Path(folder)) if isinstance(folder, str) else None
    return Findings(analysis, data_of(results, colourings(results, strongest)), training)
