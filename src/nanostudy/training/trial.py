"""Whether a GPU runs the kernels of a model: tried before its training counts on them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from nanostudy.data.corpus import Corpus
from nanostudy.device import is_lack_of_memory
from nanostudy.errors import error_line
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.engine import State, window_losses
from nanostudy.model.gpt import working_copies
from nanostudy.model.kernels import WITHOUT
from nanostudy.model.ranks import ALONE, Ranks
from nanostudy.settings import Experiment, Resources
from nanostudy.training.evaluation import text_on
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.updates import Updates

POSITIONS = 16  # kernels are compiled for no length in particular


class Shape(NamedTuple):
    """What decides how the kernels of a model are compiled, besides the precision."""

    smallest: Experiment  # that compiles the same
    vocabulary: int
    token: torch.dtype

    @staticmethod
    def of(experiment: Experiment, corpus: Corpus) -> Shape:
        e, token = experiment, text_on(torch.device("meta"), corpus.train.tokens[:1]).dtype
        alike = Experiment(n_head=e.n_head, n_embd=e.n_embd, bias=e.bias, tie_embeddings=e.tie_embeddings)
        dropout = 0.1 if e.dropout else 0.0
        smallest = replace(alike, n_layer=1, block_size=POSITIONS, batch_size=1, dropout=dropout)
        return Shape(smallest, corpus.tokenizer.vocab_size, token)


def settled(resources: Resources, machine: Machine, shapes: Iterable[Shape], ranks: Ranks = ALONE) -> Machine:
    """The machine, or without kernels and with a note if they do not run on its GPU. Raises UsageError under compile=yes."""
    reason = problem(machine, shapes)
    if reason is None:
        return machine
    os.environ[WITHOUT] = reason  # for this process and those that it starts
    return resolve(resources, ranks)


def problem(machine: Machine, shapes: Iterable[Shape]) -> str | None:
    """Why kernels do not run on this machine's GPU at one of these shapes; None where they do."""
    if not machine.compiled or machine.device.type != "cuda":
        return None
    for shape in dict.fromkeys(shapes):
        try:
            _try(machine, shape)
        except Exception as error:  # of the compiler, its assembler, the driver
            if is_lack_of_memory(error):
                raise
            return f"they do not run on {machine.device_name}: {error_line(error)}"
    return None


@cache
def _try(machine: Machine, shape: Shape) -> None:
    """Two updates and an evaluation of one layer: every kernel, and an update that is recorded and replayed."""
    config = GPTConfig.of(shape.smallest, shape.vocabulary)
    state = State.fresh(torch.zeros(1, count_parameters(config).total, device=machine.device))
    updates = Updates(torch.zeros(2 * POSITIONS, dtype=shape.token, device=machine.device), config, machine)
    for step in range(2):
        updates.step(state, [shape.smallest], [step])
    window = torch.zeros(1, POSITIONS, dtype=torch.int64, device=machine.device)
    losses = window_losses(working_copies(state.params, config, machine.dtype), window, window, config, ops=machine.ops)
    losses.tolist()  # waits for the device
