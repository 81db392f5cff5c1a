"""The GPU's kernels against the reference, in Triton's interpreter, which needs no GPU; and which kernels a study compiles."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from oracles import drop_of, normal

from nanostudy.errors import KernelsUnavailable
from nanostudy.model import kernels
from nanostudy.model.config import GPTConfig
from nanostudy.model.engine import (
    LOSS_SCALE_GROWTH_INTERVAL,
    Batch,
    State,
    end_of_update,
    gradients,
    train_step,
    window_losses,
)
from nanostudy.model.gpt import dropouts, initial_parameters, named_views, working_copies
from nanostudy.model.kernels import gpu
from nanostudy.model.layers import Attention
from nanostudy.model.ops import REFERENCE
from nanostudy.model.optim import StepSettings
from nanostudy.model.randomness import dropout_keys
from nanostudy.settings import Experiment

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# The interpreter takes bf16 for integers in products, so fp16 stands for both half precisions.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
SIZES = pytest.mark.parametrize(("M", "B", "T", "H", "D"), [(2, 2, 20, 3, 8), (1, 2, 70, 2, 16), (2, 1, 1, 1, 4)])
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, where the interpreter masks what it warns of


@pytest.fixture(scope="module")
def ops():
    """Interpreted (conftest.py)."""
    return gpu.operations()


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
def test_what_an_update_reads_equals_the_reference_to_the_bit(ops):
    tokens, starts = torch.arange(300, dtype=torch.uint8) % 251, torch.tensor([[0, 17, 200], [3, 5, 290]])
    for mine, theirs in zip(ops.windows(tokens, starts, 9), REFERENCE.windows(tokens, starts, 9), strict=True):
        assert torch.equal(mine, theirs)
    keys, rates = dropout_keys([1, 2], [5, 5], range(300), 300), torch.tensor([0.0, 0.37])
    for mine, theirs in zip(ops.dropout_words(keys, rates, 4), REFERENCE.dropout_words(keys, rates, 4), strict=True):
        assert torch.equal(mine, theirs)
    ids = torch.arange(2 * 3 * 7).view(2, 3, 7) % 11
    assert torch.equal(ops.one_hot(ids, 11, torch.float16), REFERENCE.one_hot(ids, 11, torch.float16))


@needs_triton
@DTYPES
def test_embeddings_equal_the_reference(ops, dtype):
    """Of members that are rows of a buffer, and of positions from the middle of a context."""
    buffer, ids = normal(2, 40 * 12 + 3, dtype=dtype), torch.arange(2 * 3 * 5).view(2, 3, 5) % 20
    token, position = buffer[:, : 20 * 12].view(2, 20, 12), buffer[:, 20 * 12 : 40 * 12].view(2, 20, 12)[:, 4:9]
    assert torch.equal(ops.embed(ids, token, position), REFERENCE.embed(ids, token, position))


@needs_triton
def test_sums_go_in_one_order_whatever_stands_beside_them(ops):
    x, pieces, whole = normal(3, 500, 200), torch.zeros(3, 6, 200), torch.zeros(3, 230)
    ops.sums(x, pieces, 90)
    torch.testing.assert_close(pieces, torch.stack([part.sum(1) for part in x.split(90, 1)], 1), rtol=1e-5, atol=1e-4)
    ops.sums(pieces, whole[:, None, 30:], 6)
    torch.testing.assert_close(whole[:, 30:], x.sum(1), rtol=1e-5, atol=1e-4)
    alone, of_one = torch.zeros(1, 6, 200), torch.zeros(1, 1, 200)
    ops.sums(x[1:2].clone(), alone, 90)
    ops.sums(alone, of_one, 6)
    assert torch.equal(of_one[0, 0], whole[1, 30:])
    losses = normal(3, 2, 5000)
    close(ops.means(losses), REFERENCE.means(losses))


class Ended(NamedTuple):
    """What the end of an update leaves."""

    state: State
    norms: torch.Tensor


def ended(ops, grads, losses, scaled, members=slice(None), updates=0):
    """Three members; the second keeps beta1 = beta2 = 0, the third does not clip."""
    numbers = ({"grad_clip": 0.5}, {"beta1": 0.0, "beta2": 0.0, "weight_decay": 0.3}, {"grad_clip": 0.0})
    experiments = [Experiment(learning_rate=0.01, **each) for each in numbers][members]
    state, size = State.fresh(normal(3, grads.shape[1], seed=8)), grads.shape[1]
    state.exp_avg, state.exp_avg_sq = 0.1 * normal(3, size, seed=9), normal(3, size).square()
    state = State(**{name: tensor.to(grads.device) for name, tensor in state.rows(range(3)[members]).tensors().items()})
    state.updates += updates
    state.good_steps += LOSS_SCALE_GROWTH_INTERVAL - 1
    settings = StepSettings(*StepSettings.rows(experiments, [200] * len(experiments)).to(grads.device))
    norms = (ops.update or partial(end_of_update, ops))(state, losses, grads, settings, size - 1000, scaled)
    return Ended(state, norms)


@needs_triton
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("updates", [0, 1, 30, 5000])
@pytest.mark.parametrize("broken", [None, "gradient", "loss"])
def test_the_end_of_an_update_equals_the_reference(ops, scaled, updates, broken):
    """Clipping, loss scales, divergence and AdamW; of gradients that are rows of a wider buffer."""
    grads, losses = normal(3, 5003, seed=3)[:, :5000], torch.tensor([1.0, 2.0, 3.0])
    if broken == "gradient":
        grads[1, 3] = torch.nan
    elif broken == "loss":
        losses[1] = torch.inf
    mine, theirs = (ended(one, grads, losses, scaled, updates=updates) for one in (ops, REFERENCE))
    torch.testing.assert_close(mine.norms, theirs.norms, equal_nan=True)
    for name, tensor in mine.state.tensors().items():
        torch.testing.assert_close(tensor, theirs.state.tensors()[name], rtol=1e-5, atol=2e-6, msg=name)
    assert theirs.state.updates.tolist() == [updates + 1, updates + (broken is None), updates + 1]
    alone = ended(ops, grads[2:], losses[2:], scaled, slice(2, 3), updates)
    assert torch.equal(alone.state.params[0], mine.state.params[2])  # whatever stands beside it


# --- whole updates


@needs_triton
@pytest.mark.parametrize(("bias", "tie_embeddings"), [(True, False), (False, True)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_and_an_evaluation_equal_the_reference(ops, bias, tie_embeddings, accumulation):
    """Gradients are written in place; 70 rows of a member are summed in two pieces."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 35, "batch_size": 2}
    shape |= {"bias": bias, "tie_embeddings": tie_embeddings}
    experiments = [Experiment(**shape, dropout=d, learning_rate=1e-2) for d in (0.0, 0.3)]
    config, results = GPTConfig.of(experiments[0], 11), []
    tokens = torch.arange(2 * 4 * 36).view(2, 4, 36) * 5 % 11
    for one in (ops, REFERENCE):
        state = State.fresh(initial_parameters(config, [1, 2]))
        for step in range(2):
            batches = []
            for places in (range(2), range(2, 4))[:accumulation]:
                keys, ids = dropout_keys([1, 2], [step] * 2, places, 4), tokens[:, places.start : places.stop]
                dropout = dropouts(keys, torch.tensor([0.0, 0.3]), config, one)
                batches.append(Batch(ids[..., :-1], ids[..., 1:], dropout))
            settings = StepSettings(*StepSettings.rows(experiments, [step] * 2))
            metrics = train_step(state, batches, 2 * accumulation, settings, config, torch.float32, one)
        weights = working_copies(state.params, config, torch.float32)
        losses = window_losses(weights, tokens[0, :, :-1], tokens[0, :, 1:], config, [2, 2], one)
        results.append((metrics.loss, metrics.grad_norm, losses))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(("bias", "tie_embeddings"), [(True, False), (False, True)])
def test_each_gradient_equals_the_reference(ops, bias, tie_embeddings):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 35, "batch_size": 2}
    config = GPTConfig.of(Experiment(**shape, bias=bias, tie_embeddings=tie_embeddings), 11)
    params, tokens = initial_parameters(config, [1, 2]), torch.arange(2 * 2 * 36).view(2, 2, 36) * 5 % 11
    params += 0.1 * normal(*params.shape)
    batch, results = Batch(tokens[..., :-1], tokens[..., 1:], None), []
    for one in (ops, REFERENCE):
        results.append(named_views(gradients(params, [batch], 2, config, torch.float32, None, one)[1], config))
    for name, mine in results[0].items():
        expected = results[1][name]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=name)


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


def apart(script):
    """What a script prints in a process of its own, where kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    begin = "import sys; sys.path[:0] = sys.argv[1:]\nfrom compile_ahead import *\nfrom test_triton import keys\n"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", begin + script, *folders]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr
    return output.stdout


@needs_triton
def test_counts_of_members_sequences_and_positions_compile_nothing():
    script = """
sizes = [(1, 1, 1), (4, 12, 64), (64, 3, 100)]
first, *others = [keys(launches(128, 4, 65, torch.bfloat16, *size)) for size in sizes]
assert all(other == first for other in others), [other ^ first for other in others]
print(len(first))
"""
    assert int(apart(script)) == 25


@needs_triton
def test_the_published_grid_compiles_a_kernel_for_each_width_and_head():
    """Of 16 shapes, each with 4 heads, with 8, and with both in a stack. 13 kernels serve all, 6 one of two widths, 4 a width with
    one of two numbers of heads. A trial compiles all of them and no others.
    """
    script = """
grid = keys(launches_of_the_published_grid())
tried = set().union(*(keys(launches_of_a_trial(Experiment(n_head=H, n_embd=E, dropout=0.1))) for H in (4, 8) for E in (128, 256)))
print(len(grid), len(grid - tried), len(tried - grid))
"""
    count, untried, useless = map(int, apart(script).split())
    assert (untried, useless) == (0, 0)
    assert count == 13 + 2 * 6 + 4 * 4


@needs_triton
def test_an_update_launches_no_more_than_it_may():
    """Views and allocations aside: the published run, and the grid's smallest cell, four of them in a stack."""
    script = """
run = Experiment(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2, bias=True, tie_embeddings=False)
cell = Experiment(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=8, dropout=0.1)
for experiments in ([run], [cell] * 4):
    kernels, others = launches_of_an_update(experiments)
    print(json.dumps([len(kernels), {name: count for name, count in others.items() if count}]))
"""
    run, cell = map(json.loads, apart(script).splitlines())
    products = {"bmm": 52, "addmm": 24}  # of biases, too
    assert run == [92, {**products, "_to_copy": 1, "new_full": 1, "zeros": 1}]
    assert cell == [50, {"bmm": 51, "baddbmm_": 1, "_to_copy": 1, "new_full": 1, "zeros": 1}]


@needs_triton
@pytest.mark.soak
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Half precision spills no register but one, with heads of 256 on an H100, and every kernel fits into the shared memory of an A100 (163 KiB) and an H100."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), "80", "90"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    rows = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(rows) == 2 * 8 * 25
    assert all(row["shared"] <= 163 * 1024 for row in rows)
    assert not [row for row in rows if row["spilled"] > 4 and row["dtype"] != "fp32"]


def test_older_gpus_and_machines_without_triton_go_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelsUnavailable, match=r"compute capability 8\.0, and this GPU has 7\.5"):
        gpu.triton_ops.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "nanostudy.model.kernels.triton_kernels", None)
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    with pytest.raises(KernelsUnavailable, match="Triton is missing"):
        gpu.triton_ops.__wrapped__(torch.device("cuda"))
