"""Sampling: prefill, decode with a cache, pick tokens. Letters as in gpt.py; S is the number of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nanostudy.errors import NanostudyError
from nanostudy.model import graphs
from nanostudy.model.config import GPTConfig
from nanostudy.model.gpt import Cache, forward, named_views
from nanostudy.model.randomness import Purpose, generator
from nanostudy.settings import SamplingParams


@torch.inference_mode()
def generate(
    params_MP: Tensor,
    config: GPTConfig,
    prompt_T: np.ndarray,
    seeds: Sequence[int],
    count: int,
    tokens: int,
    params: SamplingParams,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, `tokens` times, the next token ids, int64 (M, S): S samples of every member after the same prompt; and the logits
    that they were drawn from, fp32 (M, S, V), which the next step may overwrite.

    Sample s of a member depends only on the member's weights, its seed and s: not on the number of samples, nor on other
    members. Computed in the parameters' dtype. Raises NanostudyError where the logits are not finite.
    """
    M, device = len(params_MP), params_MP.device
    weights = named_views(params_MP, config)
    uniform_TMS = torch.from_numpy(_uniforms(seeds, count, tokens)).to(device)
    history_MST = torch.from_numpy(prompt_T).to(device).expand(M, count, -1)
    cache, unread_MST = Cache.empty(config, M, count, params_MP), history_MST[..., -config.block_size :]

    def draw(unread_MST: Tensor, uniform_MS: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        place = cache if at is None else Cache(cache.keys, cache.values, at=at)
        logits_MSV = forward(weights, unread_MST, config, cache=place)[:, :, -1].float()
        return pick(logits_MSV, uniform_MS, params), logits_MSV

    replay: Callable[..., tuple[Tensor, Tensor]] | None = None
    for t in range(tokens):
        if cache.length + unread_MST.shape[2] > config.block_size:
            # The window slides, every token changes its position, and nothing in the cache remains valid.
            keep = config.block_size if params.exact else max(1, config.block_size // 2)
            cache.length, unread_MST = 0, history_MST[..., -keep:]
        if replays(device) and cache.length:
            given = unread_MST, uniform_TMS[t], torch.full((1,), cache.length, device=device)
            ids_MS, logits_MSV = (replay or draw)(*given)
            ids_MS = ids_MS.clone()
            replay = replay or graphs.record(draw, *given)
            cache.length += 1
        else:
            ids_MS, logits_MSV = draw(unread_MST, uniform_TMS[t])
        if t == 0 and not logits_MSV.isfinite().all():
            raise NanostudyError("This model gives no probabilities: its weights are not finite, or too large.")
        unread_MST = ids_MS[..., None]
        history_MST = torch.cat([history_MST, unread_MST], 2)[..., -config.block_size :]
        yield ids_MS, logits_MSV


def replays(device: torch.device) -> bool:
    """Whether decoding is recorded: on a GPU, where each of its many small operations would be a launch."""
    return device.type == "cuda"


def pick(logits_MSV: Tensor, uniform_MS: Tensor, params: SamplingParams) -> Tensor:
    """Token ids (M, S): the inverse of the cumulative distribution at a uniform number in [0, 1)."""
    if params.temperature == 0:
        return logits_MSV.argmax(-1)
    sorted_MSV, ids_MSV = ((logits_MSV - logits_MSV.amax(-1, keepdim=True)) / params.temperature).sort(
        dim=-1, descending=True, stable=True
    )
    probability_MSV = sorted_MSV.softmax(-1)
    if params.top_k is not None:
        probability_MSV[..., params.top_k :] = 0
    if params.top_p is not None:
        before_MSV = probability_MSV.cumsum(-1) - probability_MSV
        probability_MSV[before_MSV >= params.top_p * probability_MSV.sum(-1, keepdim=True)] = 0
    cumulative_MSV = probability_MSV.cumsum(-1)
    target_MS1 = uniform_MS[..., None] * cumulative_MSV[..., -1:]
    place_MS1 = torch.searchsorted(cumulative_MSV, target_MS1, right=True)
    # rounding may lift the target to the total, where only excluded tokens follow
    place_MS1 = torch.minimum(place_MS1, ((probability_MSV > 0).sum(-1, keepdim=True) - 1).clamp_(min=0))
    return ids_MSV.gather(-1, place_MS1)[..., 0]


def _uniforms(seeds: Sequence[int], count: int, tokens: int) -> np.ndarray:
    """(tokens, M, S), fp32."""
    rows = [
        [generator(seed, Purpose.SAMPLING, s).random(tokens, dtype=np.float32) for s in range(count)] for seed in seeds
    ]
    return np.array(rows).transpose(2, 0, 1)
