"""Compiles every Triton kernel for GPUs that are not here, with the arguments of real launches, and prints what each takes.

python tests/model/compile_ahead.py [compute capability ...]     needs Triton, which brings NVIDIA's assembler
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.engine import State, window_losses
from nanostudy.model.gpt import working_copies
from nanostudy.model.kernels import gpu, triton_kernels
from nanostudy.model.ops import DropoutKeys
from nanostudy.model.optim import StepSettings
from nanostudy.settings import Experiment
from nanostudy.training import trial
from nanostudy.training.updates import Inputs, Updates

SHAPES = (
    *(
        (384, 6, 65, torch.bfloat16),
        (128, 8, 65, torch.bfloat16),
        (256, 2, 65, torch.bfloat16),
        (512, 2, 65, torch.bfloat16),
    ),
    *(
        (384, 6, 65, torch.float32),
        (256, 2, 65, torch.float32),
        (512, 2, 65, torch.float32),
        (768, 12, 50304, torch.float16),
    ),
)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Recorder:
    """Stands in for triton_kernels: remembers each launch instead of making it."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        return Grid(name, self.launches)


class Grid:
    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **how: self.launches.append((self.name, arguments, how))


def launches(E, H, V, dtype, M=4, B=2, T=128):
    """Those of every operation, with dropout and biases and without."""
    recorder = Recorder()
    ops, Z = gpu._Triton(recorder), M * B
    with FakeTensorMode():
        word = torch.zeros(Z, dtype=torch.int32)
        drop = DropoutKeys(word, word, word, torch.ones(Z))
        x, gain = torch.zeros(Z, T, E, dtype=dtype), torch.ones(M, E, dtype=dtype)
        qkv, logits = torch.zeros(Z, T, 3 * E, dtype=dtype), torch.zeros(Z, T, V, dtype=dtype)
        targets, losses = torch.zeros(Z, T, dtype=torch.int64), torch.zeros(Z, T)
        ids, tokens = targets.view(M, B, T), torch.zeros(1000, dtype=torch.uint8)
        ops.windows(tokens, ids[..., 0], T)
        ops.dropout_words(ids[..., 0], torch.zeros(M), 13)
        embeddings = x.view(M, B, T, E)[:, 0]
        ops.embed(ids, embeddings, embeddings)
        ops.one_hot(ids, V, dtype)
        ops.residual_norm(x, x, drop, gain, gain)
        *_, d_bias = ops.residual_norm_backward(x, x, x, drop, gain)
        y, lse = ops.attention(qkv, drop, H, True)
        ops.attention_backward(x, qkv, y, lse, drop)
        ops.residual_norm(None, x, None, gain, None)
        ops.residual_norm_backward(x, x, x, None, gain)
        ops.attention_backward(x, qkv, *ops.attention(qkv, None, H, True), None)
        ops.cross_entropy(logits, targets)
        ops.cross_entropy_backward(losses, logits, targets)
        ops.gelu_backward(x, ops.gelu(x, True)[1])
        ops.means(losses.view(M, B, T))
        pieces = d_bias.view(M, -1, E)
        ops.sums(x.view(M, -1, E), pieces, 64)  # of a bias
        ops.sums(pieces, gain[:, None], pieces.shape[1])  # of a buffer's vectors
        ops.sums(x.view(M, B, -1), x.view(M, B, -1)[:, :1], B)  # of positions
        rows, grads = torch.zeros(M, 5000), torch.zeros(M, 5000, dtype=dtype)
        settings = StepSettings(*torch.ones(7, M, 1))
        ops.update(State.fresh(rows), losses[:M, 0], grads, settings, 4000, dtype == torch.float16)
    return recorder.launches


class Launches(TorchDispatchMode):
    """Counts PyTorch's operations, views and allocations aside."""

    FREE = ("empty", "detach", "new_empty", "empty_like", "_unsafe_view", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        schema = operation._schema
        view = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
        name = schema.name.removeprefix("aten::")
        self.names[name] += not view and name not in self.FREE
        return operation(*args, **(kwargs or {}))


def machine_of(device):
    """(a machine in bf16 that remembers launches, what it remembers)"""
    recorder = Recorder()
    facts = {"device": torch.device(device), "dtype": torch.bfloat16, "compiled": False, "ops": gpu._Triton(recorder)}
    return SimpleNamespace(**facts), recorder.launches


def launches_of_an_update(experiments, evaluates=False):
    """(of these kernels, PyTorch's own), for a stack in bf16, on PyTorch's device without memory."""
    (machine, made), config, M = machine_of("meta"), GPTConfig.of(experiments[0], 65), len(experiments)
    updates = Updates(torch.empty(10_000, dtype=torch.uint8, device="meta"), config, machine)
    state = State.fresh(torch.empty(M, count_parameters(config).total, device="meta"))
    now = Inputs.of(updates.draw(experiments, [0] * M).rows[0], M)
    with Launches() as others:
        updates.update(state, experiments, now, lambda: False)
    assert {a.device.type for _, arguments, _ in made for a in arguments if isinstance(a, torch.Tensor)} == {"meta"}
    if evaluates:
        weights = working_copies(state.params, config, machine.dtype)
        window = torch.empty(3, config.block_size, dtype=torch.int64, device="meta")
        window_losses(weights, window, window, config, [e.n_head for e in experiments], machine.ops)
    return made, others.names


def launches_of_a_trial(experiment):
    """What trial.py launches for it."""
    machine, made = machine_of("cpu")
    smallest = replace(experiment, n_layer=1, block_size=trial.POSITIONS, batch_size=1)
    trial._try.__wrapped__(machine, trial.Shape(smallest, 65, torch.uint8))
    return made


def launches_of_the_published_grid():
    """Of updates and evaluations of every shape in stacks of one and of four, whose members may differ in their heads."""
    made = []
    for T, L, E, B in itertools.product((64, 128), (4, 6), (128, 256), (8, 16)):
        shape = {"block_size": T, "n_layer": L, "n_embd": E, "batch_size": B, "dropout": 0.1}
        for heads in ([4], [8], [4, 4, 8, 8]):
            made += launches_of_an_update([Experiment(**shape, n_head=H) for H in heads], evaluates=True)[0]
    return made


def compiled(name, arguments, how, capability):
    """(registers, bytes spilled, bytes of shared memory) of one launch's kernel."""
    function = getattr(triton_kernels, name)
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(function.params, arguments, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)
    architecture = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", "-o", "/dev/null", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", output), re.search(r"(\d+) bytes spill stores", output)
    return int(registers[1]), int(spilled[1]), kernel.metadata.shared


def main(capabilities):
    for capability in capabilities:
        for E, H, V, dtype in SHAPES:
            for name, arguments, how in launches(E, H, V, dtype):
                registers, spilled, shared = compiled(name, arguments, how, capability)
                row = {"capability": capability, "kernel": name, "E": E, "H": H, "V": V, "dtype": TYPES[dtype]}
                print(json.dumps(row | {"registers": registers, "spilled": spilled, "shared": shared}), flush=True)


if __name__ == "__main__":
    main([int(one) for one in sys.argv[1:]] or [80, 90])
