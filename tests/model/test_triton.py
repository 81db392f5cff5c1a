"""The GPU's kernels against the reference, in Triton's interpreter, which needs no GPU; and which kernels a study compiles."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanostudy.errors import KernelsUnavailable
from nanostudy.model import kernels
from nanostudy.model.config import GPTConfig
from nanostudy.model.engine import Batch, State, train_step, window_losses
from nanostudy.model.gpt import Dropout, initial_parameters, working_copies
from nanostudy.model.kernels import gpu
from nanostudy.model.layers import Attention
from nanostudy.model.ops import REFERENCE, DropoutKeys
from nanostudy.model.optim import StepSettings
from nanostudy.model.randomness import dropout_keys, dropout_words
from nanostudy.settings import Experiment

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# The interpreter takes bf16 for integers in products, so fp16 stands for both half precisions.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
SIZES = pytest.mark.parametrize(("M", "B", "T", "H", "D"), [(2, 2, 20, 3, 8), (1, 2, 70, 2, 16), (2, 1, 1, 1, 4)])
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, where the interpreter masks what it warns of


@pytest.fixture(scope="module")
def ops():
    """Interpreted (conftest.py)."""
    return gpu.operations()


def drop_of(rates, B, site=1):
    rate_M = torch.tensor(rates)
    keys_MB = dropout_keys(range(len(rates)), [7] * len(rates), range(B), B)
    words = [word[site].flatten() for word in dropout_words(keys_MB, rate_M, site + 1)]
    return DropoutKeys(*words, (1 / (1 - rate_M)).repeat_interleave(B))


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(mine, theirs):
    half = theirs.dtype == torch.float16
    torch.testing.assert_close(mine, theirs, rtol=5e-3 if half else 2e-6, atol=8e-3 if half else 2e-5)


# --- each operation


@needs_triton
@DTYPES
@SIZES
def test_residual_norm_equals_the_reference(ops, dtype, M, B, T, H, D):
    E, drop = H * D, drop_of((0.3, 0.6)[:M], B)
    x, y, d_sum, d_norm = (normal(M * B, T, E, dtype=dtype, seed=i) for i in range(4))
    gain, bias = normal(M, E, dtype=dtype, seed=5), normal(M, E, dtype=dtype, seed=6)
    for keys in (None, drop):
        for arguments in ((x, y, keys, gain, bias), (None, y, keys, gain, None)):
            results, expected = ops.residual_norm(*arguments), REFERENCE.residual_norm(*arguments)
            for mine, theirs in zip(results, expected, strict=True):
                close(mine, theirs)
            if keys and arguments[0] is None:
                assert torch.equal(results[0] == 0, expected[0] == 0)  # the masks, to the bit
        arguments = (d_sum, d_norm, REFERENCE.residual_norm(x, y, keys, gain, bias)[0], keys, gain)
        d_x, d_y, *sums = ops.residual_norm_backward(*arguments)
        expected = REFERENCE.residual_norm_backward(*arguments)
        close(d_x, expected[0])
        close(d_y, expected[1])
        assert torch.equal(d_y == 0, expected[1] == 0)
        for mine, theirs in zip(sums, expected[2:], strict=True):
            mine, theirs = mine.view(M, -1, E).sum(1), theirs.view(M, -1, E).sum(1)
            torch.testing.assert_close(mine, theirs, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=2e-2)


@needs_triton
def test_a_variance_that_overflows_is_not_a_number(ops):
    y = torch.full((1, 1, 4), 3e38)
    y[..., 0] = -3e38
    assert ops.residual_norm(None, y, None, torch.ones(1, 4), None)[1].isnan().all()


@needs_triton
@DTYPES
@SIZES
@pytest.mark.parametrize("dropout", [False, True])
def test_attention_equals_the_reference(ops, dtype, M, B, T, H, D, dropout):
    drop, results = drop_of((0.3, 0.6)[:M], B) if dropout else None, []
    for one in (ops, REFERENCE):
        qkv = normal(M, B, T, 3 * H * D, dtype=dtype).requires_grad_()
        y = Attention.apply(qkv, drop, H, one)
        (d_qkv,) = torch.autograd.grad(y, qkv, normal(M, B, T, H * D, dtype=dtype, seed=1))
        results.append((y.detach(), d_qkv))
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)


@needs_triton
@DTYPES
@pytest.mark.parametrize("V", [2, 65, 5000])
def test_cross_entropy_equals_the_reference(ops, dtype, V):
    logits, targets = 3 * normal(3, 5, V, dtype=dtype), torch.arange(15).view(3, 5) % V
    close(
        ops.cross_entropy_backward(d := torch.rand(3, 5), logits, targets),
        REFERENCE.cross_entropy_backward(d, logits, targets),
    )
    targets[1, 2] = -1
    close(ops.cross_entropy(logits, targets), REFERENCE.cross_entropy(logits, targets))


@needs_triton
@DTYPES
def test_gelu_equals_the_reference(ops, dtype):
    x, d_y = 2 * normal(2, 7, 300, dtype=dtype), normal(2, 7, 300, dtype=dtype, seed=1)
    y, kept = ops.gelu(x, True)
    close(y, REFERENCE.gelu(x, True)[0])
    close(ops.gelu_backward(d_y, kept), REFERENCE.gelu_backward(d_y, x))


@needs_triton
def test_norms_do_not_depend_on_the_number_of_rows(ops):
    rows = normal(5, 40_000)
    close(ops.norms(rows), REFERENCE.norms(rows))
    assert torch.equal(ops.norms(rows)[:2], ops.norms(rows[:2]))


@needs_triton
def test_adamw_writes_slices_in_place_and_ignores_members_that_diverged(ops):
    tensors = [normal(3, 5000, seed=i) for i in range(4)]
    tensors[3].abs_()
    tensors[1][1, 3] = torch.nan
    active = torch.tensor([[True], [False], [True]])
    numbers = [torch.full((3, 1), value) for value in (0.01, 0.5, 0.1, 0.01, 0.3, 0.001)]
    columns = (numbers[0], active, *numbers[1:])
    mine, theirs = ([t.clone() for t in tensors] for _ in range(2))
    ops.adamw_kernel(*(t[:, 7:4000] for t in mine), *columns)
    REFERENCE.adamw_kernel(*(t[:, 7:4000] for t in theirs), *columns)
    for i in (0, 2, 3):
        close(mine[i], theirs[i])
        assert torch.equal(mine[i][:, :7], tensors[i][:, :7])


# --- whole updates


@needs_triton
def test_updates_and_an_evaluation_equal_the_reference(ops):
    experiments = [
        Experiment(n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=2, dropout=d, bias=True) for d in (0.0, 0.3)
    ]
    config, results = GPTConfig.of(experiments[0], 11), []
    tokens = torch.arange(2 * 2 * 9).view(2, 2, 9) % 11
    for one in (ops, REFERENCE):
        state = State.fresh(initial_parameters(config, [1, 2]))
        for step in range(3):
            dropout = Dropout(dropout_keys([1, 2], [step] * 2, range(2), 2), torch.tensor([0.0, 0.3]), config)
            batch = Batch(tokens[..., :-1], tokens[..., 1:], dropout)
            settings = StepSettings.at(experiments, [step] * 2, CPU)
            metrics = train_step(state, [batch], 2, settings, config, torch.float32, one)
        weights = working_copies(state.params, config, torch.float32)
        losses = window_losses(weights, tokens[0, :, :-1], tokens[0, :, 1:], config, [2, 2], one)
        results.append((metrics.loss, metrics.grad_norm, losses))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# --- what is compiled


def keys(launches):
    """What Triton compiles a kernel for: its name, dtypes, and everything but counts, which its kernels do not specialise."""
    from nanostudy.model.kernels import triton_kernels

    return {
        (
            name,
            *(
                a.dtype if isinstance(a, torch.Tensor) else a if p in getattr(triton_kernels, name).constexprs else None
                for p, a in enumerate(arguments)
            ),
            *how.items(),
        )
        for name, arguments, how in launches
    }


@needs_triton
def test_counts_of_members_sequences_and_positions_compile_nothing():
    """In a process of its own, where kernels are not interpreted."""
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from compile_ahead import launches
from test_triton import keys
sizes = [(1, 1, 1), (4, 12, 64), (64, 3, 100)]
first, *others = [keys(launches(128, 4, 65, torch.bfloat16, *size)) for size in sizes]
assert all(other == first for other in others), [other ^ first for other in others]
print(len(first))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    assert int(output.stdout) == 12


@needs_triton
def test_an_update_launches_no_more_than_it_may():
    """Of the published model, 6 layers: views and allocations aside."""
    script = """
import sys; sys.path.insert(0, sys.argv[1])
from compile_ahead import launches_of_an_update
print(*launches_of_an_update(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    kernels, others = map(int, output.stdout.split())
    assert kernels <= 62
    assert others <= 250


@needs_triton
@pytest.mark.soak
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Half precision spills no register, and every kernel fits into the shared memory of an A100 (163 KiB) and an H100."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), "80", "90"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    rows = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(rows) == 2 * 8 * 12
    assert all(row["shared"] <= 163 * 1024 for row in rows)
    assert not [row for row in rows if row["spilled"] and row["dtype"] != "fp32"]


def test_older_gpus_and_machines_without_triton_go_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelsUnavailable, match=r"compute capability 8\.0, and this GPU has 7\.5"):
        gpu.triton_ops.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "nanostudy.model.kernels.triton_kernels", None)
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    with pytest.raises(KernelsUnavailable, match="Triton is missing"):
        gpu.triton_ops.__wrapped__(torch.device("cuda"))
