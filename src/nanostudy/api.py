"""The Python interface: what the commands do, as short calls."""

from __future__ import annotations

import contextlib
import html
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanostudy.atomic import sole_owner, write_atomically
from nanostudy.data.corpus import Corpus
from nanostudy.data.corpus import load_corpus as read_corpus
from nanostudy.device import memory_errors
from nanostudy.errors import Interrupted, NanostudyError, UsageError
from nanostudy.interop import runs
from nanostudy.interop.runs import Conversion
from nanostudy.model.gpt import GPTConfig
from nanostudy.model.gpt import count_parameters as count
from nanostudy.model.ranks import Ranks, joined
from nanostudy.model.sample import generate
from nanostudy.settings import Experiment, Resources, SamplingParams, check_value, names_of
from nanostudy.settings_files import experiment_and_resources, preset_names, read_settings
from nanostudy.signals import stop_requests
from nanostudy.text import duration
from nanostudy.tracking import check_installed, tracking
from nanostudy.training import run_folder
from nanostudy.training import stack as checkpoint
from nanostudy.training.events import Evaluated, Event, Stopped
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.recorder import Recorder
from nanostudy.training.train import Job
from nanostudy.training.train import train as train_stack
from nanostudy.training.weights import Weights, fitted, load_weights
from nanostudy.version import VERSION
from nanostudy.view import TrainingView

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
    def summary(self) -> dict[str, Any]:
        """In a few figures."""
        m = self.metadata
        final, best, seconds = m.get("final") or {}, m.get("best") or {}, m.get("seconds")
        known = {
            "status": m.get("status"),
            "parameters": f"{m['parameters']['total']:,}" if m else None,
            "updates": f"{m['updates']:,}" if m.get("updates") is not None else None,
            "training loss": f"{final['train_loss']:.4f}" if final.get("train_loss") is not None else None,
            "validation loss": f"{final['val_loss']:.4f}" if final.get("val_loss") is not None else None,
            "lowest": f"{best['val_loss']:.4f} at update {best['step']:,}"
            if best.get("val_loss") is not None
            else None,
            "time": duration(seconds) if seconds is not None else None,
        }
        return {name: value for name, value in known.items() if value is not None}

    @property
    def evaluations(self) -> pd.DataFrame:
        """The exact losses, a row an evaluation."""
        return self._table("evaluations.csv")

    @property
    def training(self) -> pd.DataFrame:
        """Loss of the batches, learning rate, gradient norm and tokens/s, a row every log_interval updates."""
        return self._table("training.csv")

    def _table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(run_folder.read_rows(self.folder / name), columns=list(run_folder.COLUMNS[name]))

    def curve(self) -> alt.ConcatChart:
        """Losses, learning rate and gradient norm against updates, as an Altair chart."""
        from nanostudy.reporting.notebook import training_chart

        return training_chart(self.folder)

    @property
    def experiment(self) -> Experiment:
        return self.weights.experiment

    @property
    def metadata(self) -> dict[str, Any]:
        """run.json: corpus, machine, times, losses."""
        return run_folder.read_metadata(self.folder) or {}

    def sample(
        self, prompt: str | None = None, count: int = 1, tokens: int = 500, seed: int = 1, **picking: Any
    ) -> list[str]:
        """`count` texts, each the prompt (a new line, where none is given) and `tokens` new tokens.

        `picking` takes temperature, top_k, top_p and exact (see SamplingParams). The same arguments give the same texts.
        """
        pieces = list(self._ids(prompt, count, tokens, seed, SamplingParams(**picking)))
        tokenizer = self.weights.tokenizer
        return [(prompt or "") + tokenizer.decode([int(step[s]) for step in pieces]) for s in range(count)]

    def stream(self, prompt: str | None = None, tokens: int = 500, seed: int = 1, **picking: Any) -> Iterator[str]:
        """The first of `sample`'s texts without its prompt, piece by piece as it is written."""
        ids = self._ids(prompt, 1, tokens, seed, SamplingParams(**picking))
        return self._pieces(ids)

    def _pieces(self, ids: Iterator[Tensor]) -> Iterator[str]:
        held: list[int] = []
        for step_S in ids:
            held.append(int(step_S[0]))
            text = self.weights.tokenizer.decode(held)
            # of bytes, a character may still lack its last ones, at most three
            if not text.endswith("\ufffd") or len(held) > 3:
                yield text
                held = []
        if held:
            yield self.weights.tokenizer.decode(held)

    def _ids(self, prompt: str | None, count: int, tokens: int, seed: int, picking: SamplingParams) -> Iterator[Tensor]:
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed={seed} must be from 0 to 2**63 - 1.")
        prompt_ids = self.weights.tokenizer.encode(prompt or self.weights.tokenizer.opening)
        steps = generate(self.weights.params, self.weights.shape, prompt_ids, [seed], count, tokens, picking)
        return (ids_MS[0] for ids_MS in steps)


def preset(name: str, **changes: Any) -> Experiment:
    """The experiment of a preset, a settings file or a run's folder, with these settings changed. Raises UsageError."""
    return experiment_and_resources({**read_settings(name), **changes})[0]


def load_corpus(name: str, tokenizer: str = "char") -> Corpus:
    """A text with its tokenizer and its two splits, by the name or path that `corpus=` takes. Raises UsageError, NanostudyError."""
    return read_corpus(name, tokenizer)


def count_parameters(experiment: Experiment) -> int:
    """Of its model, with the vocabulary of its corpus. Raises UsageError, NanostudyError."""
    corpus = read_corpus(experiment.corpus, experiment.tokenizer)
    return count(GPTConfig.of(experiment, corpus.tokenizer.vocab_size)).total


def load(run: str | Path, which: str = "best", device: str = "auto") -> Run:
    """A run's weights: "best" (lowest validation loss) or "last". Raises NanostudyError."""
    return _loaded(Path(run), which, resolve(Resources(device=device)))


def _loaded(folder: Path, which: str, machine: Machine) -> Run:
    metadata = run_folder.read_metadata(folder) if folder.is_dir() else None
    unfinished = metadata is not None and metadata["status"] == "unfinished"
    if unfinished and not (folder / f"{which}.safetensors").is_file():
        raise NanostudyError(f"The training of {folder} has not finished. Go on with: {_resume_command(folder)}")
    if folder.suffix == ".pt" and folder.is_file():
        raise UsageError(
            f"{folder} is a checkpoint of PyTorch's. Make a run of it: nanostudy convert {folder} --to RUN"
        )
    # one that was begun elsewhere can be asked at any time
    weights = runs.read_trained(folder, which).weights if unfinished else load_weights(folder, which)
    return Run(folder, weights).on(machine.device)


def train(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    resources: Resources | None = None,
    track: str | None = None,
    save_every: float = 60.0,
    listen: Callable[[Event], None] | None = None,
) -> Run:
    """Trains one experiment in the folder `out` (default: runs/ and its name) and returns the trained run.

    Goes on where an earlier call with the same experiment and folder stopped, and only loads a finished one. `listen`
    is called with every event; by default progress is shown. `track` is tensorboard, wandb or mlflow. Raises UsageError,
    NanostudyError (Interrupted, with everything saved, on Ctrl-C).

    Called by each of the ranks that torchrun started, it trains on all of them together and returns the same run. The first
    reads the folder, writes it and listens; what goes wrong one rank says, and the others raise ReportedElsewhere.
    """
    folder = Path(out) if out is not None else Path("runs") / experiment.name
    resources = resources or Resources()
    with joined() as ranks, contextlib.ExitStack() as stack:
        ranks.share(experiment.sequences_per_update)
        tracker = check_value("track", track)
        ranks.of_first(lambda: check_installed(tracker))
        machine = resolve(resources, ranks)
        initial, row = ranks.of_first(lambda: _first_weights(experiment, folder))
        corpus = _fitting_corpus(experiment, initial)
        ranks.agree(_decisive(experiment, corpus, machine))
        identity = experiment.identity(corpus.sha256, corpus.tokenizer.kind, initial.sha256 if initial else None)
        recorder = Recorder(folder, experiment, identity, corpus, machine)
        if ranks.first:
            stack.enter_context(sole_owner(folder))
        state = ranks.of_first(lambda: recorder.claim({**asdict(resources), **({"track": tracker} if tracker else {})}))
        if state in ("new", "unfinished"):
            events = train_stack(
                [Job(experiment.name, experiment, identity, row)],
                corpus,
                machine,
                folder / run_folder.CHECKPOINT,
                save_every=save_every,
                stop=stack.enter_context(stop_requests()),
                moments=True,
                ranks=ranks,
            )
            with memory_errors(), _hearing(recorder, listen, tracker, ranks) as hear:
                for event in events:
                    hear(event)
                    if isinstance(event, Stopped):
                        raise Interrupted(
                            f"Stopped after {event.step} updates. All of it is saved; go on with: {_resume_command(folder)}"
                        )
        run = ranks.of_first(lambda: complete(folder, machine).on(torch.device("cpu")))
        return run.on(machine.device)


def _first_weights(experiment: Experiment, folder: Path) -> tuple[Weights | None, Tensor | None]:
    """Those that init_from names, and as the row (P,) to start from, unless there is more to go on from."""
    if not experiment.init_from:
        return None, None
    initial = load_weights(Path(experiment.init_from))
    going_on = initial.goes_on is not None and _has_begun(folder)
    return initial, None if going_on else fitted(initial, experiment)


def _fitting_corpus(experiment: Experiment, initial: Weights | None) -> Corpus:
    """Raises UsageError where it is too short for the model, or without a character of the prompt."""
    corpus = read_corpus(experiment.corpus, initial.tokenizer if initial else experiment.tokenizer)
    corpus.check_window(experiment.block_size)
    try:
        corpus.tokenizer.encode(experiment.sample_prompt or "")
    except UsageError as problem:
        raise UsageError(f"sample_prompt: {problem}") from None
    return corpus


def _decisive(experiment: Experiment, corpus: Corpus, machine: Machine) -> dict[str, object]:
    """What all ranks must have alike: what decides the result, and its bits."""
    names = (*names_of("shape"), *names_of("number"))
    settings = {name: getattr(experiment, name) for name in names}
    return {"nanostudy": VERSION, **machine.conditions, "the corpus's SHA-256": corpus.sha256, **settings}


@contextlib.contextmanager
def _hearing(
    recorder: Recorder, listen: Callable[[Event], None] | None, track: str | None, ranks: Ranks
) -> Iterator[Callable[[Event], None]]:
    """Who hears of a training, at the first of its ranks: the run folder, who listens or looks on, and a tracker."""
    if not ranks.first:
        yield lambda event: None
        return
    r = recorder
    view = (
        TrainingView(r.experiment, r.corpus, r.machine, r.folder) if listen is None else contextlib.nullcontext(listen)
    )
    with view as shown, tracking(track, getattr(shown, "say", None) or _warn) as tracked:

        def hear(event: Event) -> None:
            r.record(event)
            shown(event)
            if tracked:
                tracked.hear(event, r.folder, r.experiment.as_dict(), r.identity)

        yield hear


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _has_begun(folder: Path) -> bool:
    """Whether there is something to go on from, or nothing left to do."""
    status = (run_folder.read_metadata(folder) or {}).get("status", "new")
    return checkpoint.exists(folder / run_folder.CHECKPOINT) or status in ("finished", "diverged")


def _resume_command(folder: Path) -> str:
    named = str(folder)
    named = os.path.join(".", named) if named in preset_names() else named
    return f"nanostudy train {shlex.quote(named)}"


def complete(folder: Path, machine: Machine) -> Run:
    """The last steps of a finished training, each only if it is still to be done: sample, report, tidying up."""
    from nanostudy.reporting.write import publish_run

    run = _loaded(folder, "best", machine)
    e = run.experiment
    if not (folder / "sample.txt").exists():
        sample = run.sample(e.sample_prompt, tokens=e.sample_tokens, seed=e.seed)[0]
        write_atomically(folder / "sample.txt", sample + "\n")
    if not (folder / "report.md").exists():
        publish_run(folder)
    checkpoint.remove(folder / run_folder.CHECKPOINT)
    return run


def convert(
    source: str | Path,
    to: str | Path,
    *,
    out: str | Path | None = None,
    which: str | None = None,
    meta: str | Path | None = None,
    characters: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Conversion:
    """A run to "nanogpt" or "huggingface" (in the folder `out`, by default one inside the run), or nanoGPT's ckpt.pt to a run.

    `which` weights leave: "best" or "last" (default: last for nanoGPT, which goes on from them, else best). For a ckpt.pt, `meta`
    is the meta.pkl or `characters` the corpus with its characters, where neither is found; `settings` change what it was
    trained with, such as max_iters. Raises UsageError, NanostudyError.
    """
    source = Path(source)
    if str(to) in ("nanogpt", "huggingface"):
        if source.suffix == ".pt":
            raise UsageError(f"Make a run of {source} first, with --to RUN; that is converted --to {to}.")
        if meta or characters or settings:
            raise UsageError(f"meta, characters and settings belong to a checkpoint of nanoGPT's, not to --to {to}.")
        return runs.export_run(source, str(to), Path(out) if out else None, which, overwrite)
    if source.is_dir() or source.suffix == ".safetensors":
        raise UsageError(f"A run is converted --to nanogpt or --to huggingface, not {str(to)!r}.")
    if out or which or overwrite:
        raise UsageError(
            "out, which and overwrite belong to --to nanogpt and --to huggingface; here --to names the new run."
        )
    return _arrive(source, Path(to), Path(meta) if meta else None, characters, settings)


class _Evaluated(Exception):
    """Told by the trainer: enough."""


def _arrive(
    source: Path, target: Path, meta: Path | None, characters: str | None, settings: dict[str, Any]
) -> Conversion:
    imported = runs.read_nanogpt(source, target, meta, characters, settings)
    e, step = imported.experiment, imported.checkpoint.iter_num
    runs.write_run(imported, target, resolve(imported.resources))
    notes = list(imported.notes)
    if imported.corpus is None:
        notes.append("NOTE: the text is not at hand (name it with corpus=), so there is no report, and no going on")
        return Conversion(target, tuple(notes))

    def listen(event: Event) -> None:
        if isinstance(event, Evaluated):
            notes.append(f"update {step:,}: train {event.train_loss:.4f}, val {event.val_loss:.4f} nats per token")
            if step < e.max_iters:
                raise _Evaluated

    with contextlib.suppress(_Evaluated):
        train(e, target, resources=imported.resources, listen=listen)
    if step < e.max_iters:
        notes.append(f"unfinished: {step:,} of {e.max_iters:,} updates; go on with {_resume_command(target)}")
    return Conversion(target, tuple(notes))
