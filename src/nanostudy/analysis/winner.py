"""How good the best settings really are: their loss on seeds that did not choose them, and how fresh seeds confirm them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from nanostudy.analysis.frames import Results
from nanostudy.analysis.intervals import CONFIDENCE
from nanostudy.analysis.power import by_seed
from nanostudy.analysis.ranking import ranking, tied_settings
from nanostudy.text import value_text

CONFIRMATION = "confirmation"  # the study of the best settings, in the folder of the study that it confirms
TEST_LOSS = "test_loss"  # where the corpus has a third part


def unbiased(results: Results, read: str = "val_loss") -> float:
    """The mean loss of the settings that the other seeds choose, each read on the seed left out. NaN without two seeds.

    The lowest of several means is optimistic: it was chosen for its luck, too. So each seed's loss is read of the settings with the
    lowest mean validation loss over the other seeds. That is unbiased for settings chosen on one seed less (Stone, 1974,
    Cross-validatory choice and assessment of statistical predictions).
    """
    losses = by_seed(results)
    stable = ~losses.index.isin(losses.attrs["diverged"])
    losses = losses[stable] if stable.any() else losses  # as the ranking has them
    values = losses if read == "val_loss" else by_seed(results, read).reindex_like(losses)
    if (
        len(losses) > 1 and losses.notna().sum(axis=0).max() < 2
    ):  # no seed is shared: the first of each, the second, ...
        losses, values = _by_place(losses), _by_place(values)
    chosen_by, read_on = losses.to_numpy(dtype=float), values.to_numpy(dtype=float)
    left_out = []
    for seed in range(chosen_by.shape[1]):
        others = np.delete(chosen_by, seed, axis=1)
        usable = np.isfinite(chosen_by[:, seed] + read_on[:, seed]) & np.isfinite(others).any(axis=1)
        if usable.any():
            left_out.append(read_on[usable, seed][np.argmin(np.nanmean(others[usable], axis=1))])
    return float(np.mean(left_out)) if len(left_out) > 1 else math.nan


def _by_place(losses: pd.DataFrame) -> pd.DataFrame:
    rows = [pd.Series(row.dropna().to_numpy()) for _, row in losses.iterrows()]
    return pd.DataFrame(rows, index=losses.index)


# --- confirmation


@dataclass(frozen=True)
class Estimate:
    """A mean loss over seeds, in nats per token. The 95% interval holds whichever of the candidates won (Bonferroni)."""

    mean: float
    low: float
    high: float
    unbiased: float  # read on seeds that did not choose the winner


@dataclass(frozen=True)
class Confirmed:
    """What fresh seeds say of the settings that a study had tied for the best."""

    settings: str  # the winner's, in words: of those that vary in the study
    loss: Estimate  # validation loss
    on_test: Estimate | None  # loss on the test part, which chose nothing; None where the corpus has none
    n: int  # fresh seeds of the winner that finished
    candidates: int
    tied: int  # other candidates that are indistinguishable from it
    diverged: int  # of the winner's `runs`
    runs: int
    was_best: bool  # the winner had the lowest mean in the study, too


def candidates(results: Results, most: int) -> list[str]:
    """An experiment of each of the settings tied for the best, the lowest mean first, at most so many."""
    table = ranking(results)
    tied = table[table["tied"]].sort_values("mean", kind="stable")
    return list(tied["name"][~tied["name"].map(results.cells()).duplicated()])[:most]


def confirmed(confirmation: Results, study: Results) -> Confirmed | None:
    """From the results of the confirmation and of the study that it confirms. None until something has finished.

    The candidates are parts of that study, in the order that they had in the first. Those that diverged with a fresh seed win only
    where all did.
    """
    losses = by_seed(confirmation)
    losses = losses[losses.notna().any(axis=1)]
    if losses.empty:
        return None
    cells, table = confirmation.cells(), confirmation.experiments
    winner = str(losses.index[0])
    own = table[(cells == winner).to_numpy()]
    diverged, finished = (int(np.sum(own["status"] == status)) for status in ("diverged", "finished"))
    on_test = TEST_LOSS in table and bool(table[TEST_LOSS].notna().any())
    return Confirmed(
        settings=", ".join(f"{name} {value_text(own[name].iloc[0])}" for name in study.factors) or str(own.index[0]),
        loss=_estimate(confirmation, winner, "val_loss"),
        on_test=_estimate(confirmation, winner, TEST_LOSS) if on_test else None,
        n=finished,
        candidates=cells.nunique(),
        tied=len(tied_settings(confirmation) - {winner}),
        diverged=diverged,
        runs=diverged + finished,
        was_best=winner == cells.iloc[0],
    )


def _estimate(results: Results, winner: str, measure: str) -> Estimate:
    losses = by_seed(results, measure)
    own = losses[losses.index == winner].to_numpy(dtype=float).ravel()
    own = own[np.isfinite(own)]
    n, mean = len(own), float(own.mean())
    each = 1 - (1 - CONFIDENCE) / len(losses) / 2
    half = float(stats.t.ppf(each, n - 1)) * float(own.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean, mean - half, mean + half, unbiased(results, measure))


def confirmation_of(results: Results) -> Path | None:
    """The folder of the confirmation of the one study that was read."""
    paths = results.provenance.get("paths") or []
    folder = Path(paths[0]) / CONFIRMATION if len(paths) == 1 else None
    return folder if folder is not None and (folder / "study.yaml").is_file() else None
