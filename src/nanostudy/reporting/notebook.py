"""An analysis as a notebook displays it: its answer, and sections of the report with figures as Altair charts."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.errors import UsageError
from nanostudy.reporting.charts.figure import Figure, vega_lite_version
from nanostudy.reporting.document import Experiments, Missing, Prose, Samples, Section, Shown
from nanostudy.reporting.html import Page, answer_as_html, block_as_html

MOST_ROWS = 10  # of the table of all experiments
MOST_SAMPLES = 4


class NotebookAnalysis(Analysis):
    """An Analysis that a notebook displays by its answer.

    section("ranking") is a section of the report, charts("ranking") are its figures.
    """

    def _repr_html_(self) -> str:
        return answer_as_html(self.page)

    @cached_property
    def page(self) -> Page:
        """What the report shows, before it is drawn."""
        from nanostudy.reporting.write import page_of  # which imports Altair

        return page_of(self)

    def section(self, name: str) -> Inline:
        """A section of the report: "ranking", "effects", "curves", ... Raises UsageError where there is none of this name."""
        sections = {section.id: section for section in self.page.sections}
        if name not in sections:
            raise UsageError(f"There is no section {name!r}: {', '.join(sections)}.")
        return Inline(sections[name], self.page)

    def charts(self, name: str) -> list[Any]:
        """A section's figures as Altair charts."""
        return self.section(name).charts


@dataclass(frozen=True, repr=False)
class Inline:
    """One section. A notebook displays it; `charts` are its figures, to be changed or saved."""

    section: Section
    page: Page

    @property
    def charts(self) -> list[Any]:
        return [as_chart(block.figure, self.page) for block in self.section.blocks if isinstance(block, Shown)]

    def __repr__(self) -> str:
        said = [
            block.text if isinstance(block, Prose) else block.reason
            for block in self.section.blocks
            if isinstance(block, Prose | Missing)
        ]
        return "\n".join([self.section.title, *said])

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        show: Any = display
        words = f"<h3>{html.escape(self.section.title)}</h3>"
        for block in self.section.blocks:
            if isinstance(block, Shown):
                if words:
                    show(HTML(words))
                words = ""
                show(as_chart(block.figure, self.page))
            elif isinstance(block, Samples):
                words += "".join(_sample(row, self.page) for row in self._samples(block))
            elif isinstance(block, Experiments):
                words += _experiments(block, self.page)
            else:
                words += block_as_html(block, self.page, self.section.title)
        if words:
            show(HTML(words))

    def _samples(self, block: Samples) -> list[dict[str, Any]]:
        first = list(block.first)[:MOST_SAMPLES]
        found = {row["i"]: row for row in reversed(self.page.data.samples) if row["i"] in first}
        return [found[i] for i in first if i in found]


def as_chart(figure: Figure, page: Page) -> Any:
    """The figure as print has it, with all its data."""
    import altair

    spec = figure.for_print(page.data.tables)
    schema = f"https://vega.github.io/schema/vega-lite/v{vega_lite_version().split('.')[0]}.json"
    return altair.ConcatChart.from_dict({"$schema": schema, **spec}, validate=False)


def _sample(row: dict[str, Any], page: Page) -> str:
    name = html.escape(str(page.data.experiments[row["i"]]["name"]))
    return f"<p><code>{name}</code></p><pre>{html.escape(str(row['text']))}</pre>"


def _experiments(block: Experiments, page: Page) -> str:
    """The best of them."""
    columns = {"name": "experiment", "val_loss": "validation", "train_loss": "training", "gap": "gap"}
    columns |= {**dict(zip(block.factors, block.factors, strict=True)), **dict(block.columns), "status": "status"}
    table = pd.DataFrame(page.data.experiments).sort_values("val_loss", na_position="last", kind="stable")
    shown: str = table.head(MOST_ROWS)[list(columns)].rename(columns=columns).to_html(index=False, na_rep="")
    return shown
