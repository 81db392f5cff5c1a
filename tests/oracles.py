"""A GPT of plain torch modules, as nanoGPT writes it, with dropout masks made by hand: what a stack is compared with. And what
operations are tried on.
"""

import math

import torch
import torch.nn.functional as F
from conftest import mask_of
from torch import nn

from nanostudy.model.config import GPTConfig, count_parameters, parameter_table
from nanostudy.model.gpt import named_views
from nanostudy.model.ops import DropoutKeys
from nanostudy.model.randomness import dropout_keys, dropout_words


def normal(*size, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drop_of(rates, batch: int, site: int = 1) -> DropoutKeys:
    """Of so many sequences of each of the members with these rates."""
    keys_MB, rate_M = dropout_keys([*range(len(rates))], [7] * len(rates), range(batch), batch), torch.tensor(rates)
    words = [word_SMB[site].flatten() for word_SMB in dropout_words(keys_MB, rate_M, site + 1)]
    return DropoutKeys(*words, (1 / (1 - rate_M)).repeat_interleave(batch))


class Masks:
    """Multipliers of one member's dropouts, made by hand from `mask_of`: zero, or 1 / (1 - rate)."""

    def __init__(self, keys_B, rate):
        self.keys_B, self.rate = keys_B, rate

    def at(self, site, *size):
        kept = mask_of(self.keys_B[None], torch.tensor([self.rate]), site, math.prod(size))[0]
        return kept.float().view(-1, *size) / (1 - self.rate)


class Attention(nn.Module):
    def __init__(self, s: GPTConfig):
        super().__init__()
        self.heads = s.n_head
        self.c_attn = nn.Linear(s.n_embd, 3 * s.n_embd, bias=s.bias)
        self.c_proj = nn.Linear(s.n_embd, s.n_embd, bias=s.bias)

    def forward(self, x, masks=None, site=0):
        b, t, e = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(e, dim=2))
        if masks is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(t, t).tril().bool(), -torch.inf)
            y = scores.softmax(-1) * masks.at(site, self.heads, t, t) @ v
        return self.c_proj(y.transpose(1, 2).reshape(b, t, e))


class Block(nn.Module):
    def __init__(self, s: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(s.n_embd, bias=s.bias)
        self.attn = Attention(s)
        self.ln_2 = nn.LayerNorm(s.n_embd, bias=s.bias)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(s.n_embd, 4 * s.n_embd, bias=s.bias),
                "gelu": nn.GELU(),
                "c_proj": nn.Linear(4 * s.n_embd, s.n_embd, bias=s.bias),
            }
        )

    def forward(self, x, masks=None, site=0):
        drop = (lambda y, at: y) if masks is None else (lambda y, at: y * masks.at(at, *y.shape[1:]))
        x = x + drop(self.attn(self.ln_1(x), masks, site), site + 1)
        mlp = self.mlp
        return x + drop(mlp.c_proj(mlp.gelu(mlp.c_fc(self.ln_2(x)))), site + 2)


class Plain(nn.Module):
    """GPT-2 as nanoGPT writes it, under nanoGPT's names."""

    def __init__(self, s: GPTConfig):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(s.vocab_size, s.n_embd),
                "wpe": nn.Embedding(s.block_size, s.n_embd),
                "h": nn.ModuleList([Block(s) for _ in range(s.n_layer)]),
                "ln_f": nn.LayerNorm(s.n_embd, bias=s.bias),
            }
        )
        self.lm_head = nn.Linear(s.n_embd, s.vocab_size, bias=False)
        if s.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens, masks=None):
        t = self.transformer
        x = t.wte(tokens) + t.wpe(torch.arange(tokens.shape[1]))
        x = x if masks is None else x * masks.at(0, *x.shape[1:])
        for layer, block in enumerate(t.h):
            x = block(x, masks, 1 + 3 * layer)
        return self.lm_head(t.ln_f(x))


def plain_of(row_P, config: GPTConfig) -> Plain:
    """The plain model with one member's weights, under the names of the table's last column."""
    plain = Plain(config)
    views, named = named_views(row_P[None], config), dict(plain.named_parameters())
    table = parameter_table(config)
    assert {p.nanogpt_key for p in table} == set(named)
    with torch.no_grad():
        for p in table:
            assert named[p.nanogpt_key].shape == p.size
            named[p.nanogpt_key].copy_(views[p.name][0])
    return plain


def lively(config: GPTConfig, members: int, seed: int = 0) -> torch.Tensor:
    """Weights far from the initial ones: no gain is 1, no bias is 0, attention is uneven."""
    draw = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(members, count_parameters(config).total, generator=draw)
