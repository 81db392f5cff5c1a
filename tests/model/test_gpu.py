"""A GPU against the CPU, in a minute and a half. Without one each test is skipped by name there, and runs on a stand-in: kernels in
Triton's interpreter, graphs that are functions (recordings.py), small shapes.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jobs_of
from recordings import Recordings
from test_triton import ended

from nanostudy.device import memory_errors
from nanostudy.errors import OutOfMemory
from nanostudy.model import graphs, kernels, sample
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.engine import State, window_losses
from nanostudy.model.gpt import initial_parameters, working_copies
from nanostudy.model.kernels import gpu as module
from nanostudy.model.layers import Attention
from nanostudy.model.ops import REFERENCE, DropoutKeys, Ops
from nanostudy.model.optim import StepSettings
from nanostudy.model.randomness import dropout_keys, dropout_words, keep_mask
from nanostudy.settings import Experiment, Resources, SamplingParams
from nanostudy.training import evaluation, trial
from nanostudy.training import train as trainer
from nanostudy.training.events import Finished, Logged
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.updates import Updates

CPU = Resources(device="cpu", precision="fp32", threads=1, compile="no")
TOKENS = torch.arange(5000, dtype=torch.uint8) * 7 % 65
has_gpu = torch.cuda.is_available()


@dataclass(frozen=True)
class Place:
    """Where the tests run, and at which sizes."""

    device: torch.device
    sizes: dict[str, int]  # of an experiment
    dtypes: tuple[torch.dtype, ...]
    members: int

    def machine(self, precision: str = "fp32") -> Machine:
        if self.device.type == "cuda":
            return resolve(Resources(device="cuda", precision=precision, compile="yes"))
        return replace(resolve(replace(CPU, precision=precision)), compiled=True)

    @property
    def ops(self) -> Ops:
        return self.machine().ops

    def experiments(self, **settings: Any) -> list[Experiment]:
        rates = (0.0, 0.2, 0.1, 0.4)
        each = range(self.members)
        return [Experiment(**{**self.sizes, "seed": m + 1, "dropout": rates[m], **settings}) for m in each]


PLACES = {
    "gpu": Place(
        torch.device("cuda", 0),
        {"n_layer": 3, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 8},
        (torch.float32, torch.bfloat16, torch.float16),
        4,
    ),
    # the interpreter takes bf16 for integers in products
    "stand-in": Place(
        torch.device("cpu"),
        {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 9, "batch_size": 2},
        (torch.float32, torch.float16),
        2,
    ),
}


@pytest.fixture(
    params=[
        pytest.param("gpu", marks=pytest.mark.skipif(not has_gpu, reason="there is no CUDA GPU")),
        pytest.param(
            "stand-in",
            marks=pytest.mark.skipif(
                has_gpu or importlib.util.find_spec("triton") is None, reason="there is a GPU, or no Triton"
            ),
        ),
    ]
)
def place(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setattr(kernels, "native_ops", lambda dtype: module.operations())
        monkeypatch.setattr(graphs, "record", Recordings().record)
    return PLACES[request.param]


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def config_of(experiment: Experiment) -> GPTConfig:
    return GPTConfig.of(experiment, 65)


def normal(place, *size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(place.device, dtype)


def digest(state: State) -> str:
    tensors = (tensor.cpu().numpy().tobytes() for tensor in state.tensors().values())
    return hashlib.sha256(b"".join(tensors)).hexdigest()


# --- operations


def results(ops: Ops, place: Place, dtype: torch.dtype, real: torch.dtype) -> dict[str, torch.Tensor]:
    """Of every operation at inputs rounded to `dtype`, computed in `real`."""
    e = place.experiments()[0]
    M, B, T, E, H, V = place.members, e.batch_size, e.block_size, e.n_embd, e.n_head, 65
    rates = torch.tensor([0.0, 0.2, 0.1, 0.4][:M], device=place.device)
    keys = dropout_keys(range(M), [7] * M, range(B), B).to(place.device)
    *words, scale = ops.dropout_words(keys, rates, 2)
    drop = DropoutKeys(*(word[1] for word in words), scale)

    def rounded(*size: int, seed: int) -> torch.Tensor:
        return normal(place, *size, dtype=dtype, seed=seed).to(real)

    x, y, d_x, d_norm = (rounded(M * B, T, E, seed=seed) for seed in range(4))
    gain, bias = (rounded(M, E, seed=seed) for seed in (5, 6))
    total, norm = ops.residual_norm(x, y, drop, gain, bias)
    d_x_too, d_y, d_gain, d_bias = ops.residual_norm_backward(d_x, d_norm, x, drop, gain)
    qkv = rounded(M, B, T, 3 * E, seed=7).requires_grad_()
    attended = Attention.apply(qkv, drop, H, ops)
    (d_qkv,) = torch.autograd.grad(attended, qkv, rounded(M, B, T, E, seed=8))
    logits, ids = rounded(M * B, T, V, seed=9), (torch.arange(M * B * T) % V).view(M * B, T).to(place.device)
    losses = ops.cross_entropy(logits, ids)
    d_losses = torch.full_like(losses, 0.5)
    hidden, kept = ops.gelu(x, True)
    return {
        "embed": ops.embed(ids.view(M, B, T), rounded(M, V, E, seed=10), rounded(M, T, E, seed=11)),
        "one hot": ops.one_hot(ids.view(M, B, T), V, real),
        "sum": total,
        "norm": norm,
        "d x": d_x_too,
        "d y": d_y,
        "d gain": d_gain.view(M, -1, E).sum(1),
        "d bias": d_bias.view(M, -1, E).sum(1),
        "attention": attended.detach(),
        "d qkv": d_qkv,
        "losses": losses,
        "d logits": ops.cross_entropy_backward(d_losses, logits, ids),
        "gelu": hidden,
        "d gelu": ops.gelu_backward(d_x, kept),
        "means": ops.means(losses.view(M, B, T)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_every_kernel_equals_the_reference(place, dtype):
    """In the norm of each result: within fp32's rounding, or that of the half precision."""
    if dtype not in place.dtypes:
        pytest.skip("the interpreter has no products in bf16")
    mine, theirs = results(place.ops, place, dtype, dtype), results(REFERENCE, place, dtype, torch.float32)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, expected in theirs.items():
        difference = (mine[name].double() - expected.double()).norm() / expected.double().norm()
        assert difference < bound, f"{name}: {difference:.1e}"


def test_masks_equal_the_cpus_to_the_bit(place):
    e, rates = place.experiments()[0], torch.tensor([0.3, 0.6])
    B, T, E = e.batch_size, e.block_size, e.n_embd
    keys = dropout_keys([1, 2], [3, 3], range(B), B)
    expected = [word.flatten(1) for word in dropout_words(keys, rates, 4)]
    *words, scale = place.ops.dropout_words(keys.to(place.device), rates.to(place.device), 4)
    for mine, theirs in zip(words, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    ones = torch.ones(2 * B, T, E, device=place.device)
    drop = DropoutKeys(*(word[2] for word in words), scale)
    total, _ = place.ops.residual_norm(None, ones, drop, ones[:2, 0], None)
    assert torch.equal(total.cpu() != 0, keep_mask(*(word[2] for word in expected), (T, E), (E, 1)))


def test_the_end_of_an_update_equals_the_reference(place):
    grads, losses = normal(place, 3, 5000, seed=3), torch.tensor([1.0, math.inf, 3.0], device=place.device)
    for scaled in (False, True):
        mine, theirs = (ended(ops, grads.to(d), losses.to(d), scaled, updates=3) for ops, d in both(place))
        for name, tensor in mine.state.tensors().items():
            torch.testing.assert_close(
                tensor.cpu(), theirs.state.tensors()[name], rtol=1e-4, atol=1e-5, msg=f"{name}, {scaled}"
            )


def both(place):
    return (place.ops, place.device), (REFERENCE, torch.device("cpu"))


# --- updates


def trained(machine: Machine, experiments: list[Experiment], updates: int, replays: bool | None = None):
    """(the losses of each update, the state)"""
    config = config_of(experiments[0])
    one = Updates(TOKENS.to(machine.device), config, machine)
    one.replays = machine.compiled if replays is None else replays
    params = initial_parameters(config, [e.seed for e in experiments]).to(machine.device)
    state, losses = State.fresh(params), []
    for step in range(updates):
        metrics = one.step(state, experiments, [step] * len(experiments))
        losses.append(metrics.loss.clone())
    return torch.stack(losses).cpu(), state


def test_updates_equal_the_cpus(place):
    experiments = place.experiments(bias=True, warmup_iters=0)
    count = 20 if place.device.type == "cuda" else 4
    mine, theirs = trained(place.machine(), experiments, count)[0], trained(resolve(CPU), experiments, count)[0]
    torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replays_make_the_bits_of_updates_one_by_one(place, accumulation):
    experiments = place.experiments(gradient_accumulation_steps=accumulation)
    precision = "bf16" if place.device.type == "cuda" else "fp32"
    for one in {precision, "fp32"}:
        machine = place.machine(one)
        eager, replayed = (trained(machine, experiments, 3, replays) for replays in (False, True))
        assert torch.equal(eager[0], replayed[0])
        assert digest(eager[1]) == digest(replayed[1])


def test_an_update_does_not_wait_for_the_device(place):
    machine, experiments = place.machine(), place.experiments()
    config = config_of(experiments[0])
    one = Updates(TOKENS.to(machine.device), config, machine)
    state = State.fresh(torch.zeros(place.members, count_parameters(config).total, device=machine.device))
    one.step(state, experiments, [0] * place.members)
    with no_waiting(place):
        for step in (1, 2):
            one.step(state, experiments, [step] * place.members)


@contextlib.contextmanager
def no_waiting(place):
    if place.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if place.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_resumed_trainings_make_the_same_bits(place, corpus, tmp_path, monkeypatch):
    """Killed between two updates, with a slot that is idle; each update has its width again."""

    class Replaying(Updates):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.replays = True

    monkeypatch.setattr(trainer, "Updates", Replaying)
    if place.device.type == "cpu":  # the interpreter would take minutes
        monkeypatch.setattr(evaluation, "window_losses", lambda *given: window_losses(*given[:-1], REFERENCE))
    ends = (6, 4, 6, 6)
    experiments = [
        replace(e, max_iters=end, eval_interval=3, log_interval=1, block_size=16)
        for e, end in zip(place.experiments(), ends, strict=False)
    ]
    experiments = experiments if len(experiments) > 2 else [*experiments, replace(experiments[0], seed=9)]
    begin = (jobs_of(*experiments), corpus, place.machine())
    whole = list(trainer.train(*begin, tmp_path / "whole", save_every=math.inf))
    for event in trainer.train(*begin, tmp_path / "killed", save_every=0):
        if isinstance(event, Logged) and event.step == 5:
            break
    resumed = list(trainer.train(*begin, tmp_path / "killed", save_every=math.inf))
    for first, second in zip(*(finished(events) for events in (whole, resumed)), strict=False):
        assert first[0] == second[0]
        assert torch.equal(first[1], second[1])


def finished(events):
    """(name, weights) of those that the second training finished, too"""
    of = sorted(
        (event.name, event.last_weights) for event in events if isinstance(event, Finished) and event.name != "job1"
    )
    assert len(of) >= 2
    return of


SCRIPT = """
import sys; sys.path[:0] = sys.argv[1:]
from test_gpu import *
print(digest(trained(PLACES["gpu"].machine("bf16"), PLACES["gpu"].experiments(), 3)[1]))
"""


def test_a_fresh_and_a_used_cache_make_the_same_bits(place, tmp_path):
    """In processes of their own; on the stand-in, which compiles nothing, twice in this one."""
    if place.device.type != "cuda":
        states = (trained(place.machine(), place.experiments(), 2)[1] for _ in range(2))
        assert len({digest(state) for state in states}) == 1
        return
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    folders = [str(Path(__file__).parents[i]) for i in range(2)]
    digests = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, *folders]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert output.returncode == 0, output.stderr
        digests.append(output.stdout.strip())
        assert list((tmp_path / "triton").rglob("*.cubin"))
    assert len(set(digests)) == 1


# --- evaluations, samples, what cannot be


def test_an_evaluation_equals_the_cpus(place):
    experiment = place.experiments()[0]
    config, losses = config_of(experiment), []
    params = initial_parameters(config, [1, 2])
    ids = TOKENS[: 4 * (config.block_size + 1)].long().view(4, -1)
    for ops, device in both(place):
        weights = working_copies(params.to(device), config, torch.float32)
        window = ids.to(device)
        losses.append(window_losses(weights, window[:, :-1], window[:, 1:], config, ops=ops).cpu())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_a_recorded_decode_writes_the_tokens_of_one_that_is_not(place, monkeypatch, exact):
    config = config_of(place.experiments()[0])
    params = 3 * initial_parameters(config, [1, 2]).to(place.device)
    monkeypatch.setattr(sample, "replays", lambda device: True)
    arguments = (params, config, np.array([1, 2, 3]), [1, 2], 2, config.block_size + 20)
    written = []
    for record in (graphs.record, lambda function, *inputs: function):
        monkeypatch.setattr(graphs, "record", record)
        steps = sample.generate(*arguments, SamplingParams(temperature=0.8, top_k=20, exact=exact))
        written.append(torch.stack([ids_MS for ids_MS, _ in steps], 2).cpu())
    assert torch.equal(*written)


def test_a_trial_succeeds_or_says_why_not(place, corpus, monkeypatch):
    shape = trial.Shape.of(place.experiments()[-1], corpus)
    trial._try(place.machine(), shape)
    machine = replace(place.machine(), device=torch.device("cuda", 0))

    def fail(machine, shape):
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    monkeypatch.setattr(trial, "_try", fail)
    assert trial.problem(machine, [shape]).endswith("device kernel image is invalid")


def test_a_lack_of_memory_is_noticed(place):
    with pytest.raises(OutOfMemory), memory_errors():
        torch.empty(2**46, device=place.device)


def test_a_batch_on_the_device_is_the_cpus(place):
    """Of tokens of one byte and of two."""
    starts = torch.tensor([[0, 300], [17, 2000]])
    for tokens in (TOKENS, TOKENS.to(torch.uint16)):
        mine = place.ops.windows(tokens.to(place.device), starts.to(place.device), 64)
        for own, expected in zip(mine, REFERENCE.windows(tokens, starts, 64), strict=True):
            assert torch.equal(own.cpu(), expected)


def test_adamws_settings_reach_the_device(place):
    experiments = place.experiments()
    one = Updates(TOKENS.to(place.device), config_of(experiments[0]), place.machine())
    settings = one.draw(experiments, [5] * place.members).rows[0]
    assert settings.device.type == place.device.type
    expected = StepSettings.rows(experiments, [5] * place.members)
    assert torch.equal(
        settings.cpu()[-4 * place.members :].view(torch.float32)[: 7 * place.members], expected.flatten()
    )
