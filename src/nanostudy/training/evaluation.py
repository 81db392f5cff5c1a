"""Evaluations: exact losses over a text's fixed windows, many at once. A GPU records one batch as a graph and replays it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import count, takewhile

import numpy as np
import torch
from torch import Tensor

from nanostudy.data.corpus import Corpus, window_starts
from nanostudy.device import memory_errors
from nanostudy.model import graphs
from nanostudy.model.config import GPTConfig
from nanostudy.model.engine import window_losses
from nanostudy.model.gpt import working_copies
from nanostudy.model.ranks import ALONE, Ranks
from nanostudy.training.machine import Machine
from nanostudy.training.window_losses import Windows

# What one batch may hold, by the kind of device: tokens of a stack, and logits, of which each token has one per token of the
# vocabulary. A GPU needs many to be busy. Both bound memory and do not change the result.
TOKENS = {"cpu": 2**14, "mps": 2**14, "cuda": 2**17}
LOGITS = {"cpu": 2**23, "mps": 2**23, "cuda": 2**26}
LEAST_REPLAYED = 3  # batches; fewer are not worth a recording, which computes one twice
MOST_RECORDED = 4  # graphs that are kept: of both splits, for a whole stack and for a part of it
SMALLEST_CONTEXT = 32
ADVICE = (
    "Memory ran out in an evaluation, in which batch_size plays no part. Lower n_embd, n_layer or block_size, or the number "
    "of different tokens ({vocabulary:,}): tokenizer=byte has 256. The last checkpoint is whole."
)


def evaluation_tokens(vocabulary: int, device: str) -> int:
    """Tokens of a stack in one batch, as long as a window is no longer."""
    return min(TOKENS[device], LOGITS[device] // vocabulary)


def contexts_within(block_size: int) -> list[int]:
    """The fixed context lengths at which experiments are compared: 32, 64, 128, ... up to block_size."""
    return list(takewhile(lambda context: context <= block_size, (SMALLEST_CONTEXT << i for i in count())))


def text_on(device: torch.device, tokens: np.ndarray) -> Tensor:
    text = torch.from_numpy(tokens)
    wide = device.type != "cpu" and text.dtype == torch.uint16  # which PyTorch does not index on a GPU
    return (text.int() if wide else text).to(device)


def windows_at(text: Tensor, starts_B: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 (B, T). Targets beyond the end of the text are -1."""
    places_BT = starts_B[:, None] + torch.arange(context + 1, device=text.device)
    window_BT = text[places_BT.clamp(max=len(text) - 1)].long()
    return window_BT[:, :-1], torch.where(places_BT[:, 1:] < len(text), window_BT[:, 1:], -1)


class Evaluations:
    """The evaluations of experiments of one shape on one text. The text is on the device, and each is read once, at its end."""

    def __init__(
        self,
        corpus: Corpus,
        config: GPTConfig,
        machine: Machine,
        ranks: Ranks = ALONE,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.corpus, self.config, self.machine, self.ranks, self.stop = corpus, config, machine, ranks, stop
        self.texts = {name: text_on(machine.device, split.tokens) for name, split in corpus.splits.items()}
        self.replays = machine.device.type == "cuda" and machine.compiled
        # by split, context and heads: the weights that a recording reads, and what replays it for other windows
        self.recorded: dict[Hashable, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}

    def windows(
        self,
        params_MP: Tensor,
        heads: Sequence[int],
        split: str,
        context: int,
        *,
        tokens: int | None = None,
        batches: int | None = None,
    ) -> list[Windows] | None:
        """Each member's losses over all windows, over a fixed subset of about so many tokens, or over the first batches.

        Ranks share the windows and get the same numbers. None after a request to stop at any rank. Raises OutOfMemory.
        """
        M, text = len(params_MP), self.texts[split]
        at_once = max(1, evaluation_tokens(self.config.vocab_size, self.machine.device.type) // (context * M))
        starts = window_starts(self.corpus, split, context, tokens)[: batches and batches * at_once]
        filled = np.append(starts, np.full(-len(starts) % at_once, len(text)))  # one size for all batches
        starts_CB = torch.from_numpy(filled).view(-1, at_once).to(self.machine.device)
        C = len(starts_CB)
        # Room for all losses at first: small tensors that each batch left behind would lie in the middle of what it freed, and
        # the next batch would find no room there (docs/log.md). The last number counts ranks that were asked to stop.
        sums = params_MP.new_zeros(M * C * at_once + 1)
        sums_MCB = sums[:-1].view(M, C, at_once)
        with memory_errors(ADVICE.format(vocabulary=self.config.vocab_size)):
            batch = self.batch(params_MP, heads, split, context, starts_CB)
            for c in range(self.ranks.rank, C, self.ranks.count):
                if self.stop():
                    sums[-1] = 1
                    break
                sums_MCB[:, c] = batch(starts_CB[c])
        self.ranks.add(sums)
        read = sums.cpu()
        if read[-1]:
            return None
        targets = np.minimum(context, len(text) - 1 - starts)
        sums_MW = read[:-1].view(M, -1)[:, : len(starts)].numpy()
        return [Windows.of(sums_W, targets, context) for sums_W in sums_MW]

    def batch(
        self, params_MP: Tensor, heads: Sequence[int], split: str, context: int, starts_CB: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """What computes a batch from where its windows start: each window's loss in nats, fp32 (M, B)."""

        def losses(weights: Mapping[str, Tensor], starts_B: Tensor) -> Tensor:
            inputs_BT, targets_BT = windows_at(self.texts[split], starts_B, context)
            return window_losses(weights, inputs_BT, targets_BT, self.config, heads, self.machine.ops)

        if self.replays and len(starts_CB) >= LEAST_REPLAYED * self.ranks.count:
            key = (split, context, tuple(heads))
            if key not in self.recorded:
                if len(self.recorded) == MOST_RECORDED:
                    del self.recorded[next(iter(self.recorded))]  # the oldest
                held_MP = params_MP.to(self.machine.dtype, copy=True)
                one = partial(losses, working_copies(held_MP, self.config, held_MP.dtype))
                one(starts_CB[0])  # compiles kernels, which a recording must not
                self.recorded[key] = held_MP, graphs.record(one, starts_CB[0])
            held_MP, replay = self.recorded[key]
            held_MP.copy_(params_MP)
            return replay
        return partial(losses, working_copies(params_MP, self.config, self.machine.dtype))
