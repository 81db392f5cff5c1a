"""An analysis as a notebook displays it: its answer, and sections of the report with figures as Altair charts."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.results import read_run_folder
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.reporting.charts.figure import Figure, vega_lite_version
from nanostudy.reporting.data import Data
from nanostudy.reporting.document import Document, Experiments, Prose, Samples, Section
from nanostudy.reporting.html import block_as_html
from nanostudy.reporting.markdown import brief_table

MOST_ROWS = 10  # of the table of all experiments
MOST_SAMPLES = 4


class NotebookAnalysis(Analysis):
    """An Analysis that a notebook displays by its answer.

    section("ranking") is a section of the report, charts("ranking") are its figures.
    """

    def _repr_html_(self) -> str:
        document = self.document
        notes = "".join(f"<p><em>{html.escape(note)}</em></p>" for note in document.notes)
        first = document.sections[0] if document.sections else None
        blocks = "".join(block_as_html(block, document.data, "") for block in first.blocks) if first else ""
        return f"<h3>{html.escape(document.title)}</h3><p>{html.escape(document.lede)}</p>{notes}{blocks}"

    @cached_property
    def document(self) -> Document:
        """The report, before it is drawn."""
        from nanostudy.reporting.sections import document  # which imports Altair

        return document(self)

    def section(self, name: str) -> NotebookSection:
        """A section of the report: "ranking", "effects", "curves", ... Raises UsageError where there is none of this name."""
        from nanostudy.reporting.sections import SECTIONS

        if name not in SECTIONS:
            raise UsageError(f"There is no section {name!r}: {', '.join(SECTIONS)}.")
        made = {section.id: section for section in self.document.sections}
        nothing = Section(name, name.capitalize(), [Prose("These results have nothing to say here.")])
        return NotebookSection(made.get(name, nothing), self.document.data)

    def charts(self, name: str) -> list[Any]:
        """A section's figures as Altair charts; none where the report leaves it out."""
        return self.section(name).charts


def training_chart(folder: Path) -> Any:
    """A run's curve as an Altair chart. Raises NanostudyError, also where there is nothing to draw."""
    charts = NotebookAnalysis(read_run_folder(folder)).charts("curves")
    if not charts:
        raise NanostudyError(f"No loss was recorded in {folder} that could be drawn.")
    return charts[0]


@dataclass(frozen=True, repr=False)
class NotebookSection:
    """One section. A notebook displays it; `charts` are its figures, to be changed or saved."""

    section: Section
    data: Data

    @property
    def charts(self) -> list[Any]:
        return [as_chart(block, self.data) for block in self.section.blocks if isinstance(block, Figure)]

    def __repr__(self) -> str:
        texts = [block.text for block in self.section.blocks if hasattr(block, "text")]
        return "\n".join([self.section.title, *texts])

    def _ipython_display_(self) -> None:
        """HTML, and charts between."""
        from IPython.display import HTML, display

        show: Any = display
        words = f"<h3>{html.escape(self.section.title)}</h3>"
        for block in self.section.blocks:
            match block:
                case Figure():
                    if words:
                        show(HTML(words))
                    words = ""
                    show(as_chart(block, self.data))
                case Samples():
                    words += _samples(block, self.data)
                case Experiments():
                    words += _experiments(block, self.data)
                case _:
                    words += block_as_html(block, self.data, self.section.title)
        if words:
            show(HTML(words))


def as_chart(figure: Figure, data: Data) -> Any:
    """The figure as print has it, with all its data."""
    import altair

    class OfflineChart(altair.ConcatChart):
        """Altair's own display loads scripts from the network; this picture lies in the notebook."""

        def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, str]:
            import vl_convert

            return {"image/svg+xml": vl_convert.vegalite_to_svg(self.to_dict()), "text/plain": "an Altair chart"}

    schema = f"https://vega.github.io/schema/vega-lite/v{vega_lite_version().split('.')[0]}.json"
    return OfflineChart.from_dict({"$schema": schema, **figure.for_print(data.tables)}, validate=False)


def _samples(block: Samples, data: Data) -> str:
    """The first text of each."""
    texts = {sample["i"]: sample["text"] for sample in reversed(data.samples)}
    return "".join(
        f"<p><code>{html.escape(str(data.experiments[i]['name']))}</code></p><pre>{html.escape(str(texts[i]))}</pre>"
        for i in list(block.first)[:MOST_SAMPLES]
        if i in texts
    )


def _experiments(block: Experiments, data: Data) -> str:
    """The best of them."""
    header, cells = brief_table(block.columns, data.ranked[:MOST_ROWS])
    return str(pd.DataFrame(cells, columns=header).to_html(index=False))
