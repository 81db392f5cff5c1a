"""What came of an experiment: the one record that store, run folders, tables, data frames and trackers read and write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from nanostudy.measures import AT_THE_END, MEASURES, final
from nanostudy.settings import Experiment, from_settings


class Status(StrEnum):
    """How far an experiment is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def has_result(self) -> bool:
        """Whether it was trained as far as it goes; its result never changes."""
        return self in (Status.FINISHED, Status.DIVERGED)

    @property
    def is_undone(self) -> bool:
        """Whether a session of its study trains it."""
        return self in (Status.WAITING, Status.RUNNING)


@dataclass(frozen=True)
class Result:
    """An experiment and what came of it. Measures are attributes, too: `result.val_loss` is None until it is known, and where it
    is not finite.
    """

    name: str
    identity: str
    settings: str  # JSON: a study may have a million of them
    status: Status
    measures: Mapping[str, float | None]
    id: int = 1  # in its study
    part: str | None = None
    reason: str | None = None  # of a failure or divergence
    step: int = 0  # batches done
    skipped: int | None = None  # of these, the ones that were no updates: their gradient overflowed in fp16
    stack: int | None = None  # the last that it trained in
    members: int | None = None  # of that stack when it started, this one included
    machine: Mapping[str, Any] = field(default_factory=dict)
    context_losses: Mapping[int, float | None] = field(default_factory=dict)  # validation losses at fixed contexts
    sampled: bool = False
    finished_at: str | None = None

    def __post_init__(self) -> None:
        """A diverged training has no losses at its end; those of its last evaluation belong to an earlier update."""
        if self.status is Status.DIVERGED:
            measures = {**self.measures, **{name: None for name in AT_THE_END if name in self.measures}}
            object.__setattr__(self, "measures", measures)

    def __getattr__(self, name: str) -> Any:
        if name in MEASURES and "measures" in self.__dict__:
            return self.measures.get(name)
        raise AttributeError(f"a result has no {name!r}")

    def __getitem__(self, measure: str) -> float | None:
        """A measure by its name: the gap, too."""
        value: float | None = getattr(self, measure)
        return value

    @cached_property
    def experiment(self) -> Experiment:
        return from_settings(json.loads(self.settings))

    @property
    def gap(self) -> float | None:
        if self.val_loss is None or self.train_loss is None:
            return None
        return float(self.val_loss - self.train_loss)

    @staticmethod
    def from_run(name: str, metadata: Mapping[str, Any], evaluations: Sequence[Mapping[str, float]]) -> Result:
        """From run.json and evaluations.csv, of a training that goes on, too."""
        last = evaluations[-1] if evaluations else {}
        best = metadata.get("best") or min(evaluations, key=lambda row: row["val_loss"], default={})
        session = (metadata.get("sittings") or [metadata["machine"]])[-1]
        skipped = metadata.get("skipped_updates")
        measures = {
            **{name: metadata.get(name, last.get(name)) for name in final()},
            "parameters": metadata["parameters"]["total"],
            "train_loss": last.get("train_loss"),
            "val_loss": last.get("val_loss"),
            "best_step": best.get("step"),
            "best_val_loss": best.get("val_loss"),
        }
        status = metadata["status"]
        return Result(
            name,
            metadata["identity"],
            json.dumps(metadata["settings"]),
            Status.RUNNING if status == "unfinished" else Status(status),
            {name: finite(value) for name, value in measures.items()},
            reason=metadata.get("diverged"),
            step=int(last.get("step", 0)) if skipped is None else metadata["updates"] + skipped,
            skipped=skipped,
            members=session.get("members", 1),
            machine={key: value for key, value in session.items() if key not in ("after_update", "members")},
            context_losses={int(context): loss for context, loss in (metadata.get("context_losses") or {}).items()},
        )

    def to_run(self) -> dict[str, Any]:
        """For run.json, without what its evaluations say."""
        return {
            "status": self.status,
            "diverged": self.reason,
            "skipped_updates": self.skipped,
            **{name: finite(self.measures[name]) for name in final() if name in self.measures},
            "seconds": round(self.seconds, 2),
            "context_losses": dict(self.context_losses),
        }

    def to_record(self, settings: Sequence[str], tested: bool) -> dict[str, Any]:
        """A row of results.csv and of listings, with these of its settings, and the test loss where any was `tested`.

        Losses are in nats per token, after `step` updates.
        """
        values = json.loads(self.settings)
        left_out = ("updates", "epochs", "flops", *(() if tested else ("test_loss",)))
        listed = [measure for measure in MEASURES.values() if measure.name not in left_out]
        early = (
            () if self.status is Status.FINISHED else AT_THE_END
        )  # updates may have been made since the last evaluation
        return {
            "id": self.id,
            "name": self.name,
            "part": self.part,
            "status": self.status,
            **{name: values.get(name) for name in settings},
            "step": self.step,
            **{m.column or m.name: None if m.name in early else self[m.name] for m in listed},
            "reason": self.reason,
        }


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, as JSON and SQL have it."""
    return value if value is not None and math.isfinite(value) else None
