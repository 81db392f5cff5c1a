"""Every measured quantity, once: what it is called, its unit, its decimals, and whether lower is better.

The store's columns, run.json, results.csv, listings, data frames, page, Markdown, trackers and notebooks read this table. A
new quantity is one line here, and one where it is computed: in `final_measures` of training/train.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """`decimals` is None for counts, and for amounts that are shown with three digits."""

    name: str  # in code, store, run.json, data frames, the page's data and trackers
    title: str
    unit: str
    decimals: int | None = None
    lower_is_better: bool | None = None
    heading: str = ""  # of a narrow table's column; empty: the title
    column: str = ""  # of results.csv in a study's folder; empty: the name
    derived: bool = False  # follows from other measures and the text that was read, so that it is not stored
    brief: bool = True  # short tables have it, too: the terminal's, Markdown's, a notebook's

    @property
    def axis(self) -> str:
        """An axis's title: validation loss, nats per token."""
        return self.title if self.unit in ("", self.title) else f"{self.title}, {self.unit}"

    def text(self, value: float | None) -> str:
        """As a table shows it; empty where it is not known."""
        if value is None or value != value:
            return ""
        return f"{value:,.0f}" if self.decimals is None else f"{value:.{self.decimals}f}"


NATS = "nats per token"
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("train_loss", "training loss", NATS, 4, True, "train"),
        Measure("val_loss", "validation loss", NATS, 4, True, "val"),
        Measure("test_loss", "test loss", NATS, 4, True, "test", brief=False),
        Measure("gap", "loss gap", NATS, 4, True, "gap", "loss_gap", derived=True),
        Measure("best_step", "update of the lowest loss", "updates", heading="best at", brief=False),
        Measure("best_val_loss", "lowest validation loss", NATS, 4, True, "best val", brief=False),
        Measure("parameters", "parameters", "parameters"),
        Measure("updates", "updates", "updates", brief=False),
        Measure("tokens", "tokens", "tokens", brief=False),
        Measure("epochs", "epochs", "epochs", 2, derived=True, brief=False),
        Measure("flops", "arithmetic", "FLOP", heading="arithmetic, FLOP", derived=True, brief=False),
        Measure("seconds", "time", "seconds", 1, heading="time, s", brief=False),
    )
}
AT_THE_END = ("train_loss", "val_loss", "gap")  # what the last evaluation measures, so what a diverged training lacks
OF_EVALUATIONS = ("train_loss", "val_loss", "best_step", "best_val_loss")


def stored() -> list[str]:
    """The measures that have a column in the store."""
    return [measure.name for measure in MEASURES.values() if not measure.derived]


def final() -> list[str]:
    """Those that are known once an experiment has ended."""
    return [name for name in stored() if name not in (*OF_EVALUATIONS, "parameters")]
