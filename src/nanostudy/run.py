"""A trained run, loaded: what it records, what it writes, and the last steps of its training."""

from __future__ import annotations

import html
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.interop import runs
from nanostudy.measures import MEASURES
from nanostudy.model.sample import generate
from nanostudy.settings import Experiment, Resources, SamplingParams
from nanostudy.settings_files import resume_command
from nanostudy.study.definition import definitions, folder_of, has_study
from nanostudy.study.names import label, varying
from nanostudy.study.store import FILE, Store
from nanostudy.text import duration
from nanostudy.training import run_folder
from nanostudy.training import stack as checkpoint
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.samples import Sample, write_samples
from nanostudy.training.weights import Weights, load_weights
from nanostudy.validation import settings_of, takes, usage_errors

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Run:
    """A trained model, loaded: its folder, experiment, tokenizer and weights."""

    folder: Path
    weights: Weights

    def __repr__(self) -> str:
        return f"<Run {self.folder}: {', '.join(f'{name} {value}' for name, value in self.summary.items())}>"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in self.summary.items()
        )
        return f"<p><b>{html.escape(str(self.folder))}</b></p><table>{cells}</table>"

    def on(self, device: torch.device) -> Run:
        return replace(self, weights=replace(self.weights, params=self.weights.params.to(device)))

    @property
    def summary(self) -> dict[str, str]:
        """A few figures, in words."""
        result = run_folder.read_result(self.folder) if self.folder.is_dir() else None
        if result is None:
            return {}
        best, step, updates = (MEASURES[name].text(result[name]) for name in ("best_val_loss", "best_step", "updates"))
        figures = {
            "status": str(result.status),
            **{measure.title: measure.text(result[measure.name]) for measure in MEASURES.values() if measure.brief},
            "updates": updates,
            "lowest": best and f"{best} at update {step}",
            "time": "" if result.seconds is None else duration(result.seconds),
        }
        return {name: value for name, value in figures.items() if value}

    @property
    def evaluations(self) -> pd.DataFrame:
        """The exact losses, one row per evaluation."""
        return self._table("evaluations.csv")

    @property
    def training(self) -> pd.DataFrame:
        """Loss of the batches, learning rate, gradient norm and tokens/s, one row every log_interval updates."""
        return self._table("training.csv")

    def _table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(run_folder.read_rows(self.folder / name), columns=list(run_folder.COLUMNS[name]))

    def curve(self) -> alt.ConcatChart:
        """Losses, learning rate and gradient norm against updates, as an Altair chart."""
        from nanostudy.reporting.notebook import training_chart

        return training_chart(self.folder)

    @property
    def short_name(self) -> str:
        """What varies in its study, or its folder's name."""
        studies = definitions(self.folder.parent)
        settings = self.experiment.as_dict()
        return label(settings, varying(studies)) if studies else self.folder.name

    @property
    def experiment(self) -> Experiment:
        return self.weights.experiment

    @property
    def metadata(self) -> dict[str, Any]:
        """run.json: corpus, machine, times, losses."""
        return run_folder.read_metadata(self.folder) or {}

    @takes(settings_of(SamplingParams).values())
    def sample(
        self, prompt: str | None = None, count: int = 1, tokens: int = 500, seed: int = 1, **sampling: Any
    ) -> list[str]:
        """`count` texts, each the prompt (a new line, where none is given) and `tokens` new tokens.

        `sampling` takes temperature, top_k, top_p and exact (see SamplingParams). The same arguments give the same texts.
        """
        pieces = list(self._ids(prompt, count, tokens, seed, SamplingParams(**sampling)))
        tokenizer = self.weights.tokenizer
        return [(prompt or "") + tokenizer.decode([int(step[s]) for step in pieces]) for s in range(count)]

    @takes(settings_of(SamplingParams).values())
    def stream(self, prompt: str | None = None, tokens: int = 500, seed: int = 1, **sampling: Any) -> Iterator[str]:
        """The first of `sample`'s texts without its prompt, piece by piece as it is written."""
        return self._pieces(self._ids(prompt, 1, tokens, seed, SamplingParams(**sampling)))

    def _pieces(self, ids: Iterator[Tensor]) -> Iterator[str]:
        held: list[int] = []
        for step_S in ids:
            held.append(int(step_S[0]))
            text = self.weights.tokenizer.decode(held)
            # a character of several bytes may lack its last ones, at most three
            if not text.endswith("\ufffd") or len(held) > 3:
                yield text
                held = []
        if held:
            yield self.weights.tokenizer.decode(held)

    def _ids(
        self, prompt: str | None, count: int, tokens: int, seed: int, sampling: SamplingParams
    ) -> Iterator[Tensor]:
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed={seed} must be from 0 to 2**63 - 1.")
        prompt_ids = self.weights.tokenizer.encode(prompt or self.weights.tokenizer.opening)
        steps = generate(self.weights.params, self.weights.config, prompt_ids, [seed], count, tokens, sampling)
        return (ids_MS[0] for ids_MS, _ in steps)


@usage_errors
def load(run: str | Path, which: str = "best", device: str = "auto") -> Run:
    """A run's weights: "best" (lowest validation loss) or "last". Of a study, its best run; STUDY/NUMBER is another of its runs.

    Raises UsageError, NanostudyError.
    """
    return load_on(run_folder_of(str(run)), which, resolve(Resources(device=device)))


def run_folder_of(word: str) -> Path:
    """The run folder or weights file that this names."""
    path = Path(word)
    if (path / "run.json").is_file() or path.is_file():
        return path
    if has_study(study := folder_of(word)):
        with Store.read(study / FILE) as store:
            best = store.best(1)
        if not best:
            raise NanostudyError(
                f"No experiment of {study} has finished. `nanostudy study status {study}` says how far it is."
            )
        return study / best[0].name
    if not path.exists() and has_study(study := folder_of(str(path.parent))):
        with Store.read(study / FILE) as store:
            return study / store.row(path.name).name
    return path


def load_on(folder: Path, which: str, machine: Machine) -> Run:
    """As `load`, on the device of a machine that is resolved already. Raises NanostudyError."""
    metadata = run_folder.read_metadata(folder) if folder.is_dir() else None
    unfinished = metadata is not None and metadata["status"] == "unfinished"
    if unfinished and not (folder / f"{which}.safetensors").is_file():
        raise NanostudyError(f"The training of {folder} has not finished. Go on with: {resume_command(folder)}")
    if folder.suffix == ".pt" and folder.is_file():
        raise UsageError(
            f"{folder} is a checkpoint of PyTorch's. Make a run of it: nanostudy convert {shlex.quote(str(folder))} --to RUN"
        )
    # a training begun elsewhere has weights from its first day on
    weights = runs.read_trained(folder, which).weights if unfinished else load_weights(folder, which)
    return Run(folder, weights).on(machine.device)


def has_begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from, or nothing left to do."""
    status = (run_folder.read_metadata(folder) or {}).get("status", "new")
    return checkpoint.exists(folder / run_folder.CHECKPOINT) or status in ("finished", "diverged")


def complete(folder: Path, machine: Machine, doing: Callable[[str], None] = lambda phase: None) -> Run:
    """The last steps of a finished training, each only if it is still to be done: sample, report, deleting the checkpoint.

    `doing` is called as each begins.
    """
    from nanostudy.reporting.write import publish_run

    run = load_on(folder, "best", machine)
    e = run.experiment
    if not (folder / "sample.txt").exists():
        doing("sampling")
        how = SamplingParams()
        text = run.sample(e.sample_prompt, tokens=e.sample_tokens, seed=e.seed)[0]
        sample = Sample(e.sample_prompt, text, e.sample_tokens, e.seed, how.temperature, how.top_k, how.top_p)
        write_samples(folder, [sample], headings=False)
    if not (folder / "report.md").exists():
        doing("writing the report")
        publish_run(folder)
    checkpoint.remove(folder / run_folder.CHECKPOINT)
    return run
