"""Sampling: prefill, decode with a cache, pick tokens. Letters as in gpt.py; S is the number of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nanostudy.errors import NanostudyError
from nanostudy.model import graphs
from nanostudy.model.config import GPTConfig
from nanostudy.model.gpt import Cache, forward, named_views
from nanostudy.model.randomness import Purpose, generator
from nanostudy.settings import SamplingParams


def generate(
    params_MP: Tensor,
    config: GPTConfig,
    prompt_T: np.ndarray,
    seeds: Sequence[int],
    count: int,
    tokens: int,
    params: SamplingParams,
) -> Iterator[Tensor]:
    """Yields the next token ids, int64 (M, S), `tokens` times: S samples of every member after the same prompt.

    Sample s of a member depends only on the member's weights, its seed and s: not on the number of samples, nor on other
    members. Computed in the parameters' dtype. Raises NanostudyError where the logits are not finite.
    """
    return (ids_MS for ids_MS, _ in with_logits(params_MP, config, prompt_T, seeds, count, tokens, params))


@torch.inference_mode()
def with_logits(
    params_MP: Tensor,
    config: GPTConfig,
    prompt_T: np.ndarray,
    seeds: Sequence[int],
    count: int,
    tokens: int,
    params: SamplingParams,
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `generate`, each step with the logits (M, S, V), fp32, that its tokens were drawn from; read them before the next step."""
    M, device = len(params_MP), params_MP.device
    weights = named_views(params_MP, config)
    uniform_TMS = torch.from_numpy(_uniforms(seeds, count, tokens)).to(device)
    history_MST = torch.from_numpy(prompt_T).to(device).expand(M, count, -1)
    cache, unread_MST = Cache.empty(config, M, count, params_MP), history_MST[..., -config.block_size :]
    decode = _Decode(weights, config, cache, uniform_TMS[0], params) if replays(device) and tokens else None
    for t in range(tokens):
        if cache.length + unread_MST.shape[2] > config.block_size:
            # The window slides, every token changes its position, and nothing in the cache remains valid.
            keep = config.block_size if params.exact else max(1, config.block_size // 2)
            cache.length, unread_MST = 0, history_MST[..., -keep:]
        if decode and cache.length:
            ids_MS, logits_MSV = decode.next(unread_MST, uniform_TMS[t])
        else:
            logits_MSV = forward(weights, unread_MST, config, cache=cache)[:, :, -1].float()
            ids_MS = pick(logits_MSV, uniform_TMS[t], params)
        if t == 0 and not logits_MSV.isfinite().all():
            raise NanostudyError("This model gives no probabilities: its weights are not finite, or too large.")
        unread_MST = ids_MS[..., None]
        history_MST = torch.cat([history_MST, unread_MST], 2)[..., -config.block_size :]
        yield unread_MST[..., 0], logits_MSV


def replays(device: torch.device) -> bool:
    """Whether decoding is recorded: on a GPU, where each of its many small operations would be a launch."""
    return device.type == "cuda"


class _Decode:
    """The next token after one that was picked, on fixed memory: run once, then recorded and replayed."""

    def __init__(
        self, weights: Mapping[str, Tensor], config: GPTConfig, cache: Cache, uniform_MS: Tensor, params: SamplingParams
    ) -> None:
        self.weights, self.config, self.params, self.read = weights, config, params, cache
        self.token_MS1 = torch.zeros_like(uniform_MS, dtype=torch.int64)[..., None]
        self.uniform_MS, at = torch.zeros_like(uniform_MS), torch.zeros_like(self.token_MS1[0, 0])
        self.cache = Cache(cache.keys, cache.values, at=at)
        self.replay: Callable[[], tuple[Tensor, ...]] | None = None

    def next(self, token_MS1: Tensor, uniform_MS: Tensor) -> tuple[Tensor, Tensor]:
        """(ids (M, S), logits (M, S, V)); the next call overwrites the logits."""
        assert self.cache.at is not None
        for own, new in ((self.token_MS1, token_MS1), (self.uniform_MS, uniform_MS)):
            own.copy_(new)
        self.cache.at.fill_(self.read.length)
        self.read.length += 1
        if self.replay is None:
            results: tuple[Tensor, ...] = self.run()  # what a recording needs to have run before
            self.replay = graphs.record(self.run)
        else:
            results = self.replay()
        return results[0].clone(), results[1]

    def run(self) -> tuple[Tensor, Tensor]:
        logits_MSV = forward(self.weights, self.token_MS1, self.config, cache=self.cache)[:, :, -1].float()
        return pick(logits_MSV, self.uniform_MS, self.params), logits_MSV


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
