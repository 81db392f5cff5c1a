"""AdamW, gradient clipping and learning-rate schedules, with separate settings for each member. Letters as in gpt.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanostudy.settings import Experiment

EPSILON = 1e-8  # the default of torch.optim.AdamW, as in nanoGPT


def learning_rate(experiment: Experiment, step: int) -> float:
    """The learning rate of update number `step`, counted from 0: nanoGPT's warm-up and cosine decay, or constant.

    If the decay ends before the warm-up does, min_lr follows the warm-up.
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
    """The members' settings for one update, fp32 (M, 1) each, to broadcast over the buffer's rows."""

    learning_rate: Tensor
    decay: Tensor  # learning_rate * weight_decay
    one_minus_beta1: Tensor  # 1 - beta1
    one_minus_beta2: Tensor
    log_beta1: Tensor
    log_beta2: Tensor
    grad_clip: Tensor  # infinite for no clipping

    @staticmethod
    def rows(experiments: Sequence[Experiment], steps: Sequence[int]) -> Tensor:
        """The fields in order, fp32 (7, M, 1), for update number `steps[m]` of member m, counted from 0. Computed in double
        precision on the host."""
        rows = []
        for e, step in zip(experiments, steps, strict=True):
            lr = learning_rate(e, step)
            logs = (math.log(beta) if beta else -math.inf for beta in (e.beta1, e.beta2))
            rows.append((lr, lr * e.weight_decay, 1 - e.beta1, 1 - e.beta2, *logs, e.grad_clip or math.inf))
        return torch.tensor(rows, dtype=torch.float32).T[:, :, None]


def adamw_kernel(
    params_MP: Tensor,
    grads_MP: Tensor,
    exp_avg_MP: Tensor,
    exp_avg_sq_MP: Tensor,
    decay_M1: Tensor,
    active_M1: Tensor,
    clip_M1: Tensor,
    one_minus_beta1_M1: Tensor,
    one_minus_beta2_M1: Tensor,
    root_correction2_M1: Tensor,
    step_size_M1: Tensor,
) -> None:
    """AdamW's loop over all parameters, in place. Gradients of members outside `active_M1` are ignored, so they may be NaN."""
    grads_MP = torch.where(active_M1, grads_MP * clip_M1, 0.0)
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
    active_M: Tensor,
    norm_M: Tensor,
    settings: StepSettings,
    decayed: int,
    kernel: Callable[..., None],
) -> None:
    """One AdamW update, in place, of every member in `active_M` (Loshchilov & Hutter, 2019, algorithm 2), after clipping.

    `updates_M`, int64, counts each member's updates; `norm_M` are the norms of the gradients. Weight decay applies to the first
    `decayed` columns.
    """
    active_M1 = active_M[:, None]
    updates_M.add_(active_M)
    # nanoGPT's torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm
    clip_M1 = (settings.grad_clip / (norm_M[:, None] + 1e-6)).clamp_(max=1.0)
    learning_rate_M1, decay_M1, one_minus_beta1_M1, one_minus_beta2_M1 = (
        torch.where(active_M1, setting, 0.0)
        for setting in (settings.learning_rate, settings.decay, settings.one_minus_beta1, settings.one_minus_beta2)
    )
    # 1 - beta**t without fp32's cancellation. It is zero for a member without updates, and 0 / 0 must not happen.
    correction1_M1, correction2_M1 = (
        torch.where(active_M1, -torch.expm1(updates_M[:, None] * log_beta), 1.0)
        for log_beta in (settings.log_beta1, settings.log_beta2)
    )
    columns = (
        active_M1,
        clip_M1,
        one_minus_beta1_M1,
        one_minus_beta2_M1,
        correction2_M1.sqrt(),
        learning_rate_M1 / correction1_M1,
    )
    rows = (params_MP, grads_MP, exp_avg_MP, exp_avg_sq_MP)
    kernel(*(row_MP[:, :decayed] for row_MP in rows), decay_M1, *columns)
    if decayed < params_MP.shape[1]:
        kernel(*(row_MP[:, decayed:] for row_MP in rows), torch.zeros_like(decay_M1), *columns)
