"""What several test files share: a small text, one thread of fp32 on the CPU, and trainings of a few small experiments."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import Recordings

from nanostudy.atomic import cache_folder
from nanostudy.data.corpus import Corpus, load_corpus
from nanostudy.data.texts import locate_shakespeare
from nanostudy.device import compiler
from nanostudy.model import graphs, kernels
from nanostudy.model.ops import REFERENCE, Ops
from nanostudy.model.randomness import dropout_words, keep_mask
from nanostudy.settings import Experiment, Resources
from nanostudy.training import evaluation, run_folder
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.train import Job
from nanostudy.training.updates import Updates

if not torch.cuda.is_available():  # read when Triton is first imported, by whatever test
    os.environ["TRITON_INTERPRET"] = "1"

SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 8,
    "batch_size": 4,
    "max_iters": 20,
    "warmup_iters": 3,
    "log_interval": 1,
}
KERNELS = cache_folder() / "kernels"  # before a test moves the cache
WORDS = ("the", "sea", "is", "a", "song", "and", "no", "one", "hears", "it\n")

needs_shakespeare = pytest.mark.skipif(
    locate_shakespeare() is None, reason="tiny Shakespeare is neither in NANOSTUDY_CORPORA nor in the cache"
)


class Silent:
    """A study's listener that shows nothing."""

    def say(self, text: str, style: str = "") -> None: ...

    def show(self, snapshot: object) -> None: ...


def small(**settings) -> Experiment:
    """An experiment that trains in a blink; the corpus is the one that a test passes to `train`."""
    return Experiment(**{**SMALL, **settings})


def jobs_of(*experiments: Experiment) -> list[Job]:
    """One job each, named job0, job1, ..."""
    return [Job(f"job{i}", e, f"identity of job{i}") for i, e in enumerate(experiments)]


def cpu(precision: str = "fp32") -> Machine:
    return resolve(Resources(device="cpu", precision=precision, threads=1))


def cache_in(folder: Path) -> Path:
    """A cache of a test's own, with the kernels and the page's scripts that this machine has built already, which takes seconds."""
    cpu()
    (folder / "cache").mkdir(exist_ok=True)
    for scripts in KERNELS.parent.glob("vega-*.js"):
        shutil.copy(scripts, folder / "cache")
    if KERNELS.is_dir():
        shutil.copytree(KERNELS, folder / "cache" / "kernels", ignore=shutil.ignore_patterns("tmp*", "triton"))
    return folder / "cache"


def mask_of(keys_MB: torch.Tensor, rate_M: torch.Tensor, site: int, size: int) -> torch.Tensor:
    """False where dropped: bool (M, B, size), the first activations of every sequence at the site-th dropout."""
    words_Z = [word_SMB[site].flatten() for word_SMB in dropout_words(keys_MB, rate_M, site + 1)]
    return keep_mask(*words_Z, (size,), (1,)).view(*keys_MB.shape, size)


@pytest.fixture
def recordings(monkeypatch) -> Recordings:
    """In place of CUDA graphs."""
    stand_in = Recordings()
    monkeypatch.setattr(graphs, "record", stand_in.record)
    return stand_in


def write_text(path: Path, characters: int = 1500) -> Path:
    """Seeded random words: few characters, and something to learn in a few updates."""
    draw = np.random.default_rng(7)
    path.write_bytes(" ".join(draw.choice(WORDS, characters))[:characters].encode())
    return path


def record_again(run: Path, metadata: dict | None = None) -> None:
    """Writes run.json with the checksums of the files as they are now: a test's changes become the training's own."""
    content = metadata or json.loads((run / "run.json").read_text(encoding="utf-8"))
    content = {key: value for key, value in content.items() if key not in ("sha256", "checksums")}
    files = [run / name for name, file in run_folder.FILES.items() if file.has_checksum and (run / name).is_file()]
    run_folder.write_metadata(
        run, {**content, "checksums": {path.name: run_folder.checksum_of(path) for path in files}}
    )


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Drawing takes longer than a small training: here a training leaves a report.md that says so, and draws nothing."""

    def publish_run(folder: Path) -> None:
        (folder / "report.md").write_text("left out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanostudy.reporting.write.publish_run", publish_run)
        yield


@pytest.fixture
def no_report() -> Iterator[None]:
    with without_report():
        yield


@pytest.fixture(scope="module")
def small_evaluations() -> Iterator[None]:
    """Batches of about the size of a test's text: by default most of a batch would be padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluation.TOKENS, "cpu", 256)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors gain nothing from more; some tests ask for other numbers."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def native():
    """The kernels for a dtype, skipped where there is nothing to build them with."""

    def native(dtype: torch.dtype) -> Ops:
        if compiler() is None:
            pytest.skip("no C++ compiler is on the PATH")
        return kernels.cpu.native_ops(dtype)

    return native


@pytest.fixture(params=["plain", "native"])
def ops(request, native) -> Ops:
    """Both kinds of the ops between matrix products, in fp32."""
    return REFERENCE if request.param == "plain" else native(torch.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    return load_corpus(str(write_text(tmp_path_factory.mktemp("corpus") / "small.txt")))


@pytest.fixture
def machine() -> Machine:
    return cpu()


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The report of a hostile study, drawn once for all the tests that read it."""
    from hostile import hostile

    from nanostudy.analysis.analysis import Analysis
    from nanostudy.reporting.write import publish

    return publish(Analysis(hostile()), tmp_path_factory.mktemp("report") / "report")


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless. Skipped by name where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Reports without pictures, for tests of their words."""
    from nanostudy.reporting.charts.figure import Drawn

    monkeypatch.setattr("nanostudy.reporting.write.draw", lambda figures, tables: Drawn({}, "", {}))


@pytest.fixture
def on_batches(monkeypatch):
    """Takes a function that is called with (updates, experiments, steps, places, batch) of every micro-batch of a training."""
    now, records, step, batch = [], [], Updates.step, Updates.batch

    def watched_step(self, state, experiments, steps):
        now[:] = steps
        return step(self, state, experiments, steps)

    def watched_batch(self, experiments, sequences, inputs):
        made = batch(self, experiments, sequences, inputs)
        for record in records:
            record(self, experiments, list(now), sequences, made)
        return made

    monkeypatch.setattr(Updates, "step", watched_step)
    monkeypatch.setattr(Updates, "batch", watched_batch)
    return records.append


@pytest.fixture(scope="session")
def studied(tmp_path_factory) -> Path:
    """The folder of a finished study, with eight models of two shapes."""
    from serving import studied_in

    return studied_in(tmp_path_factory.mktemp("ui"))
