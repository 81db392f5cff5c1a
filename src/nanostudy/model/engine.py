"""One training step of a stack, and its losses over windows. Letters as in gpt.py.

Nothing here waits for the device, except where ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanostudy.model.config import GPTConfig, count_parameters, parameter_table
from nanostudy.model.gpt import forward, named_views, working_copies
from nanostudy.model.ops import REFERENCE, DropoutKeys, Ops
from nanostudy.model.optim import StepSettings, adamw
from nanostudy.model.ranks import ALONE, Ranks

FIRST_LOSS_SCALE = 2.0**16  # torch.amp.GradScaler's defaults
LOSS_SCALE_GROWTH_INTERVAL = 2000
SMALLEST_LOSS_SCALE = 2.0**-4
LEAST_PIECE = 64


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
    dropout: Sequence[DropoutKeys] | None
    heads: Sequence[int] | None = None


class Metrics(NamedTuple):
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
    total_M: Tensor | None = None
    grads_MP: Tensor | None = None
    seen = 0
    for batch in batches:
        parts = sequences / batch.inputs.shape[1]
        # A sum over micro-batches and the division by the loss scale need fp32; a single gradient keeps its dtype.
        alone = parts == 1 and loss_scale_M is None
        losses_M, own_MP = _backward(work, params_MP, batch, parts, config, dtype, loss_scale_M, ops)
        losses_M = losses_M if parts == 1 else losses_M / parts
        total_M = losses_M if total_M is None else total_M + losses_M
        if grads_MP is None:
            grads_MP = own_MP if alone else own_MP.float()
        else:
            grads_MP += own_MP
        seen += batch.inputs.shape[1]
    if loss_scale_M is not None and grads_MP is not None:
        grads_MP /= loss_scale_M[:, None]
    if ranks.count > 1:
        if total_M is None or grads_MP is None:
            total_M, grads_MP = torch.zeros(len(params_MP), device=params_MP.device), torch.zeros_like(params_MP)
        # one reduction for all three; it waits for the device
        sums_MS = torch.cat([grads_MP, total_M[:, None], torch.full_like(total_M, seen)[:, None]], 1)
        ranks.add(sums_MS)
        grads_MP, total_M, seen = sums_MS[:, :-2], sums_MS[:, -2], int(sums_MS[0, -1])
    return None if total_M is None or grads_MP is None or seen < sequences else (total_M, grads_MP)


def _backward(
    work: Mapping[str, Tensor],
    params_MP: Tensor,
    batch: Batch,
    parts: float,
    config: GPTConfig,
    dtype: torch.dtype,
    loss_scale_M: Tensor | None,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """Mean losses (M,) of a micro-batch, one of so many parts of an update, and the gradients of its part, (M, P) in `dtype`."""
    M, B, T = batch.inputs.shape
    grads_MP = torch.empty_like(params_MP, dtype=dtype)
    into, sums_MKC = _room(grads_MP, config, B * T) if ops.sums else (None, None)
    # With `into` the backward pass returns no gradients; it has to reach the first layer all the same.
    names = list(work) if into is None else ["token_embedding"]
    leaves = {**work, **{name: work[name].detach().requires_grad_() for name in names}}
    logits_ZTV = forward(leaves, batch.inputs, config, batch.dropout, heads=batch.heads, ops=ops, into=into).flatten(
        0, 1
    )
    targets_ZT = batch.targets.flatten(0, 1)
    losses_M = ops.means(ops.cross_entropy(logits_ZTV.detach(), targets_ZT).view(M, B, T))
    if loss_scale_M is None:
        share = np.float32(1) / np.float32(parts) / np.float32(B * T)
        d_losses_ZT = params_MP.new_full((M * B, T), float(share))
    else:
        d_losses_ZT = (loss_scale_M / parts / (B * T))[:, None, None].expand(M, B, T).reshape(M * B, T)
    d_logits_ZTV = ops.cross_entropy_backward(d_losses_ZT, logits_ZTV.detach(), targets_ZT)
    result = torch.autograd.grad(logits_ZTV, [leaves[name] for name in names], d_logits_ZTV, allow_unused=True)
    if sums_MKC is None:
        for own, grad in zip(named_views(grads_MP, config).values(), result, strict=True):
            own.copy_(grad)
    elif ops.sums:
        ops.sums(sums_MKC, grads_MP[:, None, -sums_MKC.shape[2] :], sums_MKC.shape[1])
    return losses_M, grads_MP


def _room(grads_MP: Tensor, config: GPTConfig, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Where a device writes gradients: of matrices into the buffer (M, P), of vectors, for each piece of a member's rows, into
    fp32 (M, K, C), whose sums over K belong into the buffer's last C columns.
    """
    pieces = -(-rows // sum_piece(rows))
    vectors = [p for p in parameter_table(config) if not p.decayed]
    sums_MKC = grads_MP.new_empty(len(grads_MP), pieces, sum(p.numel for p in vectors), dtype=torch.float32)
    columns = sums_MKC.split([p.numel for p in vectors], 2)
    return named_views(grads_MP, config) | {p.name: c for p, c in zip(vectors, columns, strict=True)}, sums_MKC


def sum_piece(rows: int) -> int:
    """Rows of a member over which one program of a device sums the gradient of a vector: as many as leave 256 pieces or fewer."""
    return LEAST_PIECE * -(-rows // (256 * LEAST_PIECE))


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
    end = ops.update or partial(end_of_update, ops)
    return Metrics(loss_M, end(state, loss_M, grads_MP, settings, count_parameters(config).decayed, scaled))


def end_of_update(
    ops: Ops,
    state: State,
    loss_M: Tensor,
    grads_MP: Tensor,
    settings: StepSettings,
    decayed: int,
    scaled: bool,
) -> Tensor:
    """From the losses and gradients of an update to the state after it, in place. The gradients' norms, fp32 (M,)."""
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
    active_M = finite_M & ~state.diverged
    rows = (state.params, grads_MP, state.exp_avg, state.exp_avg_sq)
    adamw(*rows, state.updates, active_M, norm_M, settings, decayed, ops.adamw_kernel)
    return norm_M


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
    inputs_MBT, targets_MBT = (
        ids_BT.expand(len(weights["token_embedding"]), -1, -1) for ids_BT in (inputs_BT, targets_BT)
    )
    logits_MBTV = forward(weights, inputs_MBT, config, heads=heads, ops=ops)
    losses_ZT = ops.cross_entropy(logits_MBTV.flatten(0, 1), targets_MBT.flatten(0, 1))
    return losses_ZT.view(targets_MBT.shape).sum(2)
