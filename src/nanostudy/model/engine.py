"""One training step of a stack, and its losses over windows. Letters as in gpt.py.

Nothing here waits for the device, except where ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.gpt import Dropout, forward, named_views, working_copies
from nanostudy.model.layers import CrossEntropy
from nanostudy.model.ops import REFERENCE, Ops
from nanostudy.model.optim import StepSettings, adamw
from nanostudy.model.ranks import ALONE, Ranks

FIRST_LOSS_SCALE = 2.0**16  # torch.amp.GradScaler's defaults
LOSS_SCALE_GROWTH_INTERVAL = 2000
SMALLEST_LOSS_SCALE = 2.0**-4


@dataclass
class State:
    """All that training changes, one row per member. A resume needs this and the number of updates so far."""

    params: Tensor  # fp32 (M, P)
    exp_avg: Tensor  # fp32 (M, P)
    exp_avg_sq: Tensor  # fp32 (M, P)
    updates: Tensor  # int64 (M,)
    diverged: Tensor  # bool (M,): weights stay as they were before the first update that was not finite
    loss_scale: Tensor  # fp32 (M,), used only in fp16
    good_steps: Tensor  # int64 (M,): updates since the scale last changed

    @staticmethod
    def fresh(params_MP: Tensor) -> State:
        members, device = len(params_MP), params_MP.device
        return State(
            params_MP,
            torch.zeros_like(params_MP),
            torch.zeros_like(params_MP),
            torch.zeros(members, dtype=torch.int64, device=device),
            torch.zeros(members, dtype=torch.bool, device=device),
            torch.full((members,), FIRST_LOSS_SCALE, device=device),
            torch.zeros(members, dtype=torch.int64, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self, index: Sequence[int]) -> State:
        """A copy of these members only."""
        chosen = torch.tensor(index, dtype=torch.int64, device=self.params.device)
        return State(**{name: tensor.index_select(0, chosen) for name, tensor in self.tensors().items()})


@dataclass
class Batch:
    """A micro-batch: token ids and the ids that follow them, int64 (M, B, T), the dropout of its sequences, and each member's
    number of heads, where it is not the configuration's."""

    inputs: Tensor
    targets: Tensor
    dropout: Dropout | None
    heads: Sequence[int] | None = None


@dataclass
class Metrics:
    """Metrics of one update, on the device, fp32 (M,) each."""

    loss: Tensor
    grad_norm: Tensor  # before clipping


def gradients(
    params_MP: Tensor,
    batches: Iterable[Batch],
    sequences: int,
    config: GPTConfig,
    dtype: torch.dtype,
    loss_scale_M: Tensor | None,
    ops: Ops = REFERENCE,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor] | None:
    """Mean loss (M,) over the `sequences` of an update, and its gradient, fp32 (M, P).

    `batches` are this rank's share, and the ranks add up their sums. None if sequences are missing: a rank was asked to stop.
    The backward pass starts from the sum of the members' mean losses, so no member's gradient depends on another.
    """
    work = working_copies(params_MP, config, dtype)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in work.items()}
    total_M, seen = torch.zeros(len(params_MP), device=params_MP.device), 0
    grads_MP: Tensor | None = None
    for batch in batches:
        parts = sequences / batch.inputs.shape[1]
        logits_MBTV = forward(leaves, batch.inputs, config, batch.dropout, heads=batch.heads, ops=ops)
        losses_M = CrossEntropy.apply(logits_MBTV, batch.targets, ops).mean((1, 2)) / parts
        scaled_M = losses_M if loss_scale_M is None else losses_M * loss_scale_M
        batch_grads = torch.autograd.grad(scaled_M.sum(), list(leaves.values()))
        if grads_MP is None:
            # A sum over micro-batches and the division by the loss scale need fp32; a single gradient keeps its dtype.
            grads_MP = torch.empty_like(params_MP, dtype=dtype if parts == 1 and loss_scale_M is None else None)
            grads = named_views(grads_MP, config)
        for into, grad in zip(grads.values(), batch_grads, strict=True):
            into.add_(grad) if seen else into.copy_(grad)
        total_M += losses_M.detach()
        seen += batch.inputs.shape[1]
    if loss_scale_M is not None and grads_MP is not None:
        grads_MP /= loss_scale_M[:, None]
    if ranks.count > 1:
        grads_MP = torch.zeros_like(params_MP) if grads_MP is None else grads_MP
        total_M, grads_MP, seen = _sum_over_ranks(total_M, grads_MP, seen, ranks)
    return None if grads_MP is None or seen < sequences else (total_M, grads_MP)


def _sum_over_ranks(loss_M: Tensor, grads_MP: Tensor, seen: int, ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    """One reduction for all three. Waits for the device."""
    seen_M = torch.full_like(loss_M, seen)
    sums_MS = torch.cat([grads_MP, loss_M[:, None], seen_M[:, None]], 1)
    ranks.add(sums_MS)
    return sums_MS[:, -2], sums_MS[:, :-2], int(sums_MS[0, -1])


def train_step(
    state: State,
    batches: Iterable[Batch],
    sequences: int,
    settings: StepSettings,
    config: GPTConfig,
    dtype: torch.dtype,
    ops: Ops = REFERENCE,
    ranks: Ranks = ALONE,
) -> Metrics | None:
    """One update of every member, in place, by so many sequences. A member whose loss or gradient is not finite has diverged and
    stays as it was. If `gradients` returns None, nothing changes and there are no metrics.

    In fp16 a gradient that is not finite does not mean divergence: the member stays as it was, halves its loss scale and
    continues with the next batch, until the scale is too small.
    """
    scaled = dtype == torch.float16
    loss_scale_M = state.loss_scale if scaled else None
    result = gradients(state.params, batches, sequences, config, dtype, loss_scale_M, ops, ranks)
    if result is None:
        return None
    loss_M, grads_MP = result
    norm_M = ops.norms(grads_MP)
    finite_M = norm_M.isfinite()
    lost_M = ~loss_M.isfinite()
    if scaled:
        state.good_steps.add_(1).mul_(finite_M)
        grown_M = state.good_steps >= LOSS_SCALE_GROWTH_INTERVAL
        state.loss_scale.mul_(torch.where(finite_M, 1.0 + grown_M.float(), 0.5))
        state.good_steps.masked_fill_(grown_M, 0)
        lost_M |= state.loss_scale < SMALLEST_LOSS_SCALE
    else:
        lost_M |= ~finite_M
    state.diverged |= lost_M
    active_M, decayed = finite_M & ~state.diverged, count_parameters(config).decayed
    rows = (state.params, grads_MP, state.exp_avg, state.exp_avg_sq)
    adamw(*rows, state.updates, active_M, norm_M, settings, decayed, ops.adamw_kernel)
    return Metrics(loss_M, norm_M)


@torch.no_grad()
def window_losses(
    weights: Mapping[str, Tensor],
    inputs_BT: Tensor,
    targets_BT: Tensor,
    config: GPTConfig,
    heads: Sequence[int] | None = None,
    ops: Ops = REFERENCE,
) -> Tensor:
    """Each member's loss in nats, summed over each window, fp32 (M, B): of windows, int64 (B, T), that all members read.

    Target -1 stands for no target. `weights` are working copies; `heads` as in `forward`.
    """
    size = (len(weights["token_embedding"]), -1, -1)
    logits_MBTV = forward(weights, inputs_BT.expand(size), config, heads=heads, ops=ops)
    return CrossEntropy.apply(logits_MBTV, targets_BT.expand(size), ops).sum(2)
