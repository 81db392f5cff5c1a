"""What the models write: measured against their text, and side by side."""

from __future__ import annotations

from typing import Any

from nanostudy.analysis.frames import known
from nanostudy.analysis.sample_quality import SHARES
from nanostudy.reporting.charts.experiments import QUALITIES, quality_figure
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.data import names_by_loss
from nanostudy.reporting.document import Blocks, Bullets, Grid, Prose, Samples
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import interval, share_text
from nanostudy.settings import SamplingParams

MOST_ROWS = 10


def writing(f: Findings) -> Blocks:
    quality, results = f.analysis.quality, f.results
    if quality.empty:
        return []
    figure = quality_figure(results, quality)
    lines = [
        "Of each share, the 95% interval and its n: Wilson's; of few, the numbers themselves.",
        *quality.attrs["notes"],
    ]
    if f.compares:
        lines += [_against_loss(row) for row in each(f.analysis.quality_against_loss) if row.Index in QUALITIES]
    best = [name for name in names_by_loss(results) if name in quality.index][:MOST_ROWS]
    rows = [{"experiment": name, **_measured(quality.loc[name])} for name in best]
    caption = "What the samples of the best are like" if len(best) > 1 else "What its samples are like"
    return [figure, Bullets(lines), Grid(caption, rows, folded=figure is not None)]


def _measured(row: Any) -> dict[str, str]:
    texts = {QUALITIES[share][0]: share_text(row, share) if known(row[share]) else "not known" for share in SHARES}
    longest = row["longest_copied"]
    return {**texts, "longest copied, characters": f"{longest:,.0f}" if known(longest) else "not known"}


def _against_loss(row: Any) -> str:
    """One row of the correlations of quality with loss."""
    about = f"{QUALITIES[row.Index][0].capitalize()} against validation loss"
    if not known(row.rho):
        return f"{about}: too few experiments, or too much alike, to say."
    if not known(row.low) or row.low <= 0 <= row.high:
        relation = "indistinguishable from no relation (95%)"
    else:
        relation = f"the {'lower' if row.rho < 0 else 'higher'} the loss, the more"
    return f"{about}: {relation}; rank correlation {interval(row.rho, row.low, row.high, 2)}, n = {int(row.n)}."


def samples(f: Findings) -> Blocks:
    sampled = list(dict.fromkeys(sample["i"] for sample in f.data.samples))
    if not sampled:
        return []
    if f.training:
        usual, seed = SamplingParams(), f.training.experiment.seed
        how = f"temperature {usual.temperature}, top-k {usual.top_k}, seed {seed}"
        text = f"What the weights with the lowest validation loss write (sample.txt; {how})."
        return [Prose(text), Samples(sampled)]
    text = (
        "The best, the middle and the worst of those with samples, until you choose others here or in the table above."
    )
    first = [sampled[0], sampled[len(sampled) // 2], sampled[-1]] if len(sampled) > 2 else sampled
    return [Prose(text), Samples(first)]
