"""Kernels that do not run: noticed before a training counts on them, with one note, and the same for all of a study."""

import json
import os

import pytest
import torch
from conftest import small

from nanostudy import api
from nanostudy.errors import OutOfMemory, UsageError
from nanostudy.model.config import GPTConfig
from nanostudy.model.kernels import WITHOUT
from nanostudy.model.ops import REFERENCE
from nanostudy.settings import Experiment, Resources, Where
from nanostudy.study import pool
from nanostudy.study.definition import Study
from nanostudy.study.tasks import Broken, Examined, Prepared
from nanostudy.training import machine as machines
from nanostudy.training import trial
from nanostudy.training.machine import resolve
from nanostudy.training.trial import Shape, problem, settled
from nanostudy.training.updates import Updates

CPU = Resources(device="cpu", precision="fp32", threads=1)
REASON = "they do not run on NVIDIA H200: ptxas fatal error: no such target"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """As it was, whatever a test leaves in it."""
    monkeypatch.setenv(WITHOUT, "")


@pytest.fixture
def on_gpu(monkeypatch):
    """A machine that has a GPU whose kernels fail with this error."""

    def on_gpu(error: Exception):
        def fail(machine, shape):
            raise error

        monkeypatch.setattr(trial, "_try", fail)
        facts = {"device": torch.device("cuda", 0), "device_name": "NVIDIA H200", "compiled": True}
        return machines.replace(resolve(CPU), **facts)

    return on_gpu


@pytest.fixture
def shape(corpus):
    return Shape.of(small(dropout=0.1), corpus)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_trial_is_two_updates_and_an_evaluation(corpus, recordings, monkeypatch, dropout):
    monkeypatch.setattr(
        trial.Updates, "step", lambda self, *more, step=trial.Updates.step: steps.append(step(self, *more))
    )
    steps = []
    trial._try(resolve(CPU), Shape.of(small(dropout=dropout, bias=True), corpus))
    assert len(steps) == 2


def test_one_note_and_the_reference_where_kernels_do_not_run(on_gpu, shape):
    machine = settled(
        CPU, on_gpu(RuntimeError("In the pass of LLVM\nptxas fatal error: no such target\n")), [shape, shape]
    )
    assert not machine.compiled
    assert machine.notes == (f"kernels are not compiled, so this is slower than it could be: {REASON}",)
    assert machine.conditions == resolve(CPU).conditions  # of the whole process, from now on
    assert os.environ[WITHOUT] == REASON  # and of those that it starts


def test_compile_yes_is_one_clear_error(on_gpu, shape):
    broken = on_gpu(RuntimeError("ptxas fatal error: no such target"))
    with pytest.raises(UsageError, match=f"compile=yes: {REASON}. With compile=auto it trains without, more slowly."):
        settled(machines.replace(CPU, compile="yes"), broken, [shape])


def test_a_lack_of_memory_is_no_fault_of_kernels(on_gpu, shape):
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        problem(on_gpu(RuntimeError("CUDA out of memory")), [shape])
    assert OutOfMemory  # what callers make of it: device.memory_errors


def test_a_cpu_is_not_tried(shape, monkeypatch):
    monkeypatch.setattr(trial, "_try", lambda machine, shape: 1 / 0)
    machine = resolve(CPU)
    assert settled(CPU, machine, [shape]) is machine


def test_a_training_says_it_in_its_run_folder(on_gpu, monkeypatch, tmp_path):
    broken = on_gpu(RuntimeError("ptxas fatal error: no such target"))
    monkeypatch.setattr(api, "resolve", lambda resources, ranks: broken)
    experiment = small(corpus="playhouse", max_iters=2, eval_interval=2, sample_tokens=0)
    api.train(experiment, tmp_path / "run", resources=CPU, listen=lambda event: None)
    metadata = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [note for note in metadata["notes"] if REASON in note]
    assert [session["compiled"] for session in metadata["sittings"]] == [False]


def test_a_t4_trains_with_the_reference(monkeypatch):
    """Compute capability 7.5: no kernels, fp16, updates one by one; both said once."""
    facts = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device: (7, 5),
        "get_device_name": lambda device: "Tesla T4",
    }
    for name, answer in facts.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(machines, "cuda_problem", lambda device: None)
    monkeypatch.delenv(WITHOUT)
    machine = resolve(Resources(device="auto", threads=1))
    assert (machine.device, machine.precision, machine.compiled) == (torch.device("cuda", 0), "fp16", False)
    assert machine.ops is REFERENCE
    assert [note for note in machine.notes if "compute capability 8.0, and this GPU has 7.5" in note]
    assert [note for note in machine.notes if "fp16 with loss scaling" in note]
    assert len(machine.notes) == 2
    config = GPTConfig.of(small(), 11)
    assert not Updates(torch.zeros(9, dtype=torch.uint8), config, machine).replays
    with pytest.raises(UsageError, match=r"compile=yes: they need compute capability 8\.0"):
        resolve(Resources(device="auto", threads=1, compile="yes"))


# --- studies


def study(**settings):
    settings = {"corpus": "playhouse", "n_layer": 1, "n_embd": 8, "n_head": 1, "max_iters": 2, **settings}
    return Study("tried", settings | {"block_size": 8}, {"dropout": (0.0, 0.1)}, {"all": {}}, (1, 2), sample_tokens=4)


@pytest.fixture
def examined(monkeypatch):
    """A machine with a GPU whose kernels do not run, as a worker reports it; the workers themselves have none."""

    def answer(backend, shapes):
        asked.append(list(shapes))
        return machines.replace(resolve(CPU), compiled=True), 2**32, REASON

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pool, "_examined", answer)
    return asked


def test_all_workers_of_a_study_do_without_alike(examined, tmp_path, monkeypatch):
    """Noticed before the first experiment counts, for all shapes; in no process of the study are there kernels then."""
    said = []
    listener = type("Listener", (), {"say": lambda self, text, style="": said.append(text), "show": lambda *_: None})()
    resources = machines.replace(CPU, device="auto")
    results = api.run_study(study(), tmp_path / "study", workers=2, resources=resources, listener=listener)
    assert [shape.smallest.dropout > 0 for shape in examined[0]] == [False, True]
    assert [result.status for result in results] == ["finished"] * 4
    for result in results:
        metadata = json.loads((tmp_path / "study" / result.name / "run.json").read_text())
        assert [session["compiled"] for session in metadata["sittings"]] == [False]
        assert [note for note in metadata["notes"] if REASON in note]
    assert not [text for text in said if "other conditions" in text]


def test_a_study_with_compile_yes_is_refused(examined, tmp_path):
    resources = Resources(device="auto", precision="fp32", threads=1, compile="yes")
    with pytest.raises(UsageError, match="compile=yes: they do not run on NVIDIA H200"):
        api.run_study(study(), tmp_path / "study", workers=1, resources=resources)


def test_where_there_is_a_gpu_a_worker_says_what_the_machine_is(monkeypatch, corpus):
    """And the study's own process touches none: here there is a GPU as far as it sees, and the worker sees none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pool, "resolve", lambda resources: 1 / 0)
    made = pool.make_pool(Where(device="auto", precision="fp32", workers=1), 1, [Shape.of(Experiment(), corpus)])
    try:
        assert made.capacity.device == "cpu"
        assert made.capacity.memory > 0
    finally:
        made.backend.close()


class Answers:
    """A backend whose worker answers so."""

    def __init__(self, *reports):
        self.reports, self.closed = list(reports), False

    def start(self, worker, task):
        self.task = task

    def next(self, timeout):
        return 0, self.reports.pop(0)

    def close(self):
        self.closed = True


def test_a_worker_that_cannot_say_what_the_machine_is_ends_the_study():
    backend = Answers(Prepared(resolve(CPU)), Examined(None, None), Broken("error", "device=cuda:0: it does not work"))
    with pytest.raises(Exception, match="device=cuda:0: it does not work"):
        pool._examined(backend, [])
    assert backend.closed
