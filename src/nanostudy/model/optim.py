"""AdamW, clipping and schedules, each member with settings of its own. Letters as in model.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanostudy.settings import Experiment

EPSILON = 1e-8  # torch.optim.AdamW's default, which nanoGPT keeps


def learning_rate(experiment: Experiment, step: int) -> float:
    """The rate of update number `step`, counted from 0: nanoGPT's warm-up and cosine, or constant.

    Where the decay would end before the warm-up does, the warm-up is followed by min_lr.
    """
    e = experiment
    if not e.decay_lr:
        return e.learning_rate
    end = e.max_iters if e.lr_decay_iters is None else e.lr_decay_iters
    lowest = e.learning_rate / 10 if e.min_lr is None else e.min_lr
    if step < e.warmup_iters:
        return e.learning_rate * (step + 1) / (e.warmup_iters + 1)
    if step > end or end <= e.warmup_iters:
        return lowest
    progress = (step - e.warmup_iters) / (end - e.warmup_iters)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (e.learning_rate - lowest)


@dataclass
class StepSettings:
    """The members' numbers for one update, fp32 (M, 1) each: a column beside the buffer's rows."""

    learning_rate: Tensor
    decay: Tensor  # learning_rate * weight_decay
    one_minus_beta1: Tensor  # 1 - beta1
    one_minus_beta2: Tensor
    log_beta1: Tensor
    log_beta2: Tensor
    grad_clip: Tensor  # infinite for no clipping

    @staticmethod
    def at(experiments: Sequence[Experiment], steps: Sequence[int], device: torch.device) -> StepSettings:
        """For update number `steps[m]`, counted from 0, of each member. Computed in double precision on the host."""
        rows = []
        for e, step in zip(experiments, steps, strict=True):
            lr = learning_rate(e, step)
            logs = (math.log(beta) if beta else -math.inf for beta in (e.beta1, e.beta2))
            rows.append((lr, lr * e.weight_decay, 1 - e.beta1, 1 - e.beta2, *logs, e.grad_clip or math.inf))
        return StepSettings(*torch.tensor(rows, dtype=torch.float32).to(device).T[:, :, None])


def adamw_kernel(
    params_MP: Tensor,
    grads_MP: Tensor,
    exp_avg_MP: Tensor,
    exp_avg_sq_MP: Tensor,
    decay_M1: Tensor,
    moved_M1: Tensor,
    clip_M1: Tensor,
    one_minus_beta1_M1: Tensor,
    one_minus_beta2_M1: Tensor,
    root_correction2_M1: Tensor,
    step_size_M1: Tensor,
) -> None:
    """The part of AdamW that visits every parameter, in place. Without `moved_M1` a gradient is not looked at: it may be anything."""
    grads_MP = torch.where(moved_M1, grads_MP * clip_M1, 0.0)
    params_MP.mul_(1 - decay_M1)
    exp_avg_MP.lerp_(grads_MP, one_minus_beta1_M1)
    exp_avg_sq_MP.mul_(1 - one_minus_beta2_M1).addcmul_(grads_MP * one_minus_beta2_M1, grads_MP)
    denominator_MP = exp_avg_sq_MP.sqrt().div_(root_correction2_M1).add_(EPSILON)
    params_MP.addcmul_(exp_avg_MP.div(denominator_MP), -step_size_M1)


def adamw(
    params_MP: Tensor,
    grads_MP: Tensor,
    exp_avg_MP: Tensor,
    exp_avg_sq_MP: Tensor,
    updates_M: Tensor,
    moved_M: Tensor,
    norm_M: Tensor,
    rates: StepSettings,
    decayed: int,
    kernel: Callable[..., None] = adamw_kernel,
) -> None:
    """One update, in place, of every member for which `moved_M` is true (Loshchilov & Hutter, 2019, algorithm 2), by its
    gradient scaled to a norm of at most its bound.

    `updates_M`, int64, counts each member's updates; `norm_M` are the gradients' norms. The first `decayed` columns are
    those that weight decay applies to.
    """
    moved_M1 = moved_M[:, None]
    updates_M.add_(moved_M)
    # nanoGPT's torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm
    clip_M1 = (rates.grad_clip / (norm_M[:, None] + 1e-6)).clamp_(max=1.0)
    learning_rate_M1, decay_M1, one_minus_beta1_M1, one_minus_beta2_M1 = (
        torch.where(moved_M1, rate, 0.0)
        for rate in (rates.learning_rate, rates.decay, rates.one_minus_beta1, rates.one_minus_beta2)
    )
    # 1 - beta**t, without the cancellation that it would suffer in fp32. A member that has not moved yet has corrections
    # of zero, and must not become 0 / 0.
    correction1_M1, correction2_M1 = (
        torch.where(moved_M1, -torch.expm1(updates_M[:, None] * log_beta), 1.0)
        for log_beta in (rates.log_beta1, rates.log_beta2)
    )
    numbers = (
        moved_M1,
        clip_M1,
        one_minus_beta1_M1,
        one_minus_beta2_M1,
        correction2_M1.sqrt(),
        learning_rate_M1 / correction1_M1,
    )
    rows = (params_MP, grads_MP, exp_avg_MP, exp_avg_sq_MP)
    kernel(*(row_MP[:, :decayed] for row_MP in rows), decay_M1, *numbers)
    if decayed < params_MP.shape[1]:
        kernel(*(row_MP[:, decayed:] for row_MP in rows), torch.zeros_like(decay_M1), *numbers)
