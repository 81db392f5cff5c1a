"""One training step and one evaluation of a stack. Nothing here waits for the device, but ranks for each other. Letters as in
model.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanostudy.model.gpt import Dropout, GPTConfig, count_parameters, forward, named_views, working_copies
from nanostudy.model.layers import CrossEntropy
from nanostudy.model.ops import REFERENCE, Ops
from nanostudy.model.optim import StepSettings, adamw
from nanostudy.model.ranks import ALONE, Ranks

FIRST_LOSS_SCALE = 2.0**16  # torch.amp.GradScaler's defaults
LOSS_SCALE_GROWTH_INTERVAL = 2000
SMALLEST_LOSS_SCALE = 2.0**-4


@dataclass
class State:
    """What training changes: a row a member. Resuming needs this and the number of updates done."""

    params: Tensor  # fp32 (M, P)
    exp_avg: Tensor  # fp32 (M, P)
    exp_avg_sq: Tensor  # fp32 (M, P)
    updates: Tensor  # int64 (M,)
    diverged: Tensor  # bool (M,): its weights are those before the first update that was not finite, for good
    loss_scale: Tensor  # fp32 (M,), used in fp16 alone
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
        """A copy that holds only these members."""
        chosen = torch.tensor(index, dtype=torch.int64, device=self.params.device)
        return State(**{name: tensor.index_select(0, chosen) for name, tensor in self.tensors().items()})


@dataclass
class Batch:
    """A micro-batch: token ids and their successors, int64 (M, B, T), and the dropout of its sequences."""

    inputs: Tensor
    targets: Tensor
    dropout: Dropout | None


@dataclass
class Metrics:
    """Of one update, on the device, fp32 (M,) each."""

    loss: Tensor
    grad_norm: Tensor  # before clipping


def gradients(
    params_MP: Tensor,
    batches: Iterable[Batch],
    sequences: int,
    shape: GPTConfig,
    dtype: torch.dtype,
    loss_scale_M: Tensor | None,
    ops: Ops = REFERENCE,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor] | None:
    """Mean loss (M,) over the `sequences` of an update, and its gradient, fp32 (M, P).

    `batches` are this rank's of them, and ranks add theirs up. None where some are missing: a rank was asked to stop.
    What is differentiated is the sum of the members' mean losses: no member's gradient knows of another.
    """
    work = working_copies(params_MP, shape, dtype)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in work.items()}
    total_M, seen = torch.zeros(len(params_MP), device=params_MP.device), 0
    grads_MP: Tensor | None = None
    for batch in batches:
        parts = sequences / batch.inputs.shape[1]
        logits_MBTV = forward(leaves, batch.inputs, shape, batch.dropout, ops=ops)
        losses_M = CrossEntropy.apply(logits_MBTV, batch.targets, ops).mean((1, 2)) / parts
        scaled_M = losses_M if loss_scale_M is None else losses_M * loss_scale_M
        found = torch.autograd.grad(scaled_M.sum(), list(leaves.values()))
        if grads_MP is None:
            # one micro-batch needs no sum, and its gradient no more precision than it has, but room to be scaled back
            grads_MP = torch.empty_like(params_MP, dtype=dtype if parts == 1 and loss_scale_M is None else None)
            grads = named_views(grads_MP, shape)
        for into, grad in zip(grads.values(), found, strict=True):
            into.add_(grad) if seen else into.copy_(grad)
        total_M += losses_M.detach()
        seen += batch.inputs.shape[1]
    if loss_scale_M is not None and grads_MP is not None:
        grads_MP /= loss_scale_M[:, None]
    if ranks.count > 1:
        grads_MP = torch.zeros_like(params_MP) if grads_MP is None else grads_MP
        total_M, grads_MP, seen = _added(total_M, grads_MP, seen, ranks)
    return None if grads_MP is None or seen < sequences else (total_M, grads_MP)


def _added(loss_M: Tensor, grads_MP: Tensor, seen: int, ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    """Over ranks, in one reduction. Waits for the device."""
    seen_M = torch.full_like(loss_M, seen)
    sums_MS = torch.cat([grads_MP, loss_M[:, None], seen_M[:, None]], 1)
    ranks.add(sums_MS)
    return sums_MS[:, -2], sums_MS[:, :-2], int(sums_MS[0, -1])


def train_step(
    state: State,
    batches: Iterable[Batch],
    sequences: int,
    rates: StepSettings,
    shape: GPTConfig,
    dtype: torch.dtype,
    ops: Ops = REFERENCE,
    ranks: Ranks = ALONE,
) -> Metrics | None:
    """One update of every member by so many sequences, in place; nothing changes before the last, nor where `gradients` misses
    some: then there are no metrics. A member whose loss or gradient is not finite has diverged and stays as it was.

    In fp16 a gradient that is not finite is no divergence yet: the member stays as it was, halves its loss scale and goes on
    with the next batch, until no scale is left.
    """
    scaled = dtype == torch.float16
    loss_scale_M = state.loss_scale if scaled else None
    found = gradients(state.params, batches, sequences, shape, dtype, loss_scale_M, ops, ranks)
    if found is None:
        return None
    loss_M, grads_MP = found
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
    moved_M, decayed = finite_M & ~state.diverged, count_parameters(shape).decayed
    rows = (state.params, grads_MP, state.exp_avg, state.exp_avg_sq)
    adamw(*rows, state.updates, moved_M, norm_M, rates, decayed, ops.adamw_kernel)
    return Metrics(loss_M, norm_M)


@torch.no_grad()
def evaluate(
    params_MP: Tensor,
    windows: Iterable[tuple[Tensor, Tensor]],
    shape: GPTConfig,
    dtype: torch.dtype,
    ops: Ops = REFERENCE,
) -> Tensor:
    """Each member's loss in nats, summed over the windows, and the number of targets: float64 (M + 1,), on the host.
    Target -1 stands for no target.

    `windows` yields (inputs, targets), int64 (B, T), that all members read.
    """
    weights = working_copies(params_MP, shape, dtype)
    sums_M, counts = [], []
    for inputs_BT, targets_BT in windows:
        size = (len(params_MP), -1, -1)
        logits_MBTV = forward(weights, inputs_BT.expand(size), shape, ops=ops)
        losses_MBT = CrossEntropy.apply(logits_MBTV, targets_BT.expand(size), ops)
        sums_M.append(losses_MBT.sum((1, 2)))
        counts.append((targets_BT >= 0).sum())
    if not counts:
        return torch.zeros(len(params_MP) + 1, dtype=torch.float64)
    # added up on the host in double precision, which not every device has
    total_M = torch.stack(sums_M).cpu().double().sum(0)
    return torch.cat([total_M, torch.stack(counts).cpu().double().sum(0, keepdim=True)])
