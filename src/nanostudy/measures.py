"""Every measured quantity, once: what it is called, its unit, its decimals, and whether lower is better.

The store's columns, results.csv, listings, data frames, charts, page, Markdown, trackers and notebooks read this table. A new
quantity is one line here, and the place where it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """`decimals` is None for counts and for amounts that are shown with three digits."""

    name: str  # in code, store, data frames, the page's data and trackers
    title: str
    unit: str
    decimals: int | None = None
    lower_is_better: bool | None = None
    heading: str = ""  # of a narrow table's column; empty: the title
    column: str = ""  # of results.csv in a study's folder, where that is named otherwise

    @property
    def axis(self) -> str:
        """An axis's title: validation loss, nats per token."""
        return self.title if self.unit in ("", self.title) else f"{self.title}, {self.unit}"


NATS = "nats per token"
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("train_loss", "training loss", NATS, 4, True, "train"),
        Measure("val_loss", "validation loss", NATS, 4, True, "val"),
        Measure("gap", "loss gap", NATS, 4, True, "gap", "loss_gap"),
        Measure("best_val_loss", "lowest validation loss", NATS, 4, True, "best val"),
        Measure("best_step", "update of the lowest loss", "updates", None, None, "best at"),
        Measure("parameters", "parameters", "parameters"),
        Measure("updates", "updates", "updates"),
        Measure("tokens", "tokens", "tokens"),
        Measure("epochs", "epochs", "epochs", 2),
        Measure("flops", "arithmetic", "floating-point operations"),
        Measure("seconds", "time", "seconds", 1),
    )
}
