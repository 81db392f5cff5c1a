"""A stack against single models of plain torch modules; counts and initial weights against published and analytic values."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import small
from oracles import Masks, Plain, lively, plain_of

from nanostudy.model.config import GPTConfig, count_parameters, parameter_table
from nanostudy.model.engine import Batch, gradients
from nanostudy.model.gpt import dropouts, forward, initial_parameters, named_views
from nanostudy.model.ops import Ops
from nanostudy.model.randomness import dropout_keys

M, B, T = 3, 2, 7  # shorter than the block, so that positions are cut
VARIANTS = list(itertools.product((False, True), (False, True)))


def config_of(bias=True, tie_embeddings=False, n_layer=2, vocab_size=11, **settings) -> GPTConfig:
    experiment = small(n_layer=n_layer, bias=bias, tie_embeddings=tie_embeddings, **settings)
    return GPTConfig.of(experiment, vocab_size)


def tokens_of(config: GPTConfig, *size, seed=1) -> torch.Tensor:
    return torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(seed))


def assert_equals_plain_models(config: GPTConfig, ops: Ops, keys_and_rates=None):
    """Loss, logits and every parameter's gradient, with dropout from (keys (M, B), rates (M,)). Bound: 1e-5 of each tensor's largest element; seen: 9e-7."""
    params_MP, inputs, targets = lively(config, M), tokens_of(config, M, B, T), tokens_of(config, M, B, T, seed=2)
    dropout = None if keys_and_rates is None else dropouts(*keys_and_rates, config)
    logits = forward(named_views(params_MP, config), inputs, config, dropout, ops=ops)
    loss_M, grads_MP = gradients(params_MP, [Batch(inputs, targets, dropout)], B, config, torch.float32, None, ops)
    grads = named_views(grads_MP, config)
    for m in range(M):
        masks = None if keys_and_rates is None else Masks(keys_and_rates[0][m], keys_and_rates[1][m].item())
        plain = plain_of(params_MP[m], config)
        expected = plain(inputs[m], masks)
        loss = F.cross_entropy(expected.flatten(0, 1), targets[m].flatten())
        loss.backward()
        torch.testing.assert_close(logits[m], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(loss_M[m], loss, rtol=1e-5, atol=0)
        named = dict(plain.named_parameters())
        for p in parameter_table(config):
            want = named[p.nanogpt_key].grad
            assert want.abs().max() > 1e-4 or p.name.endswith("bias"), f"{p.name}: nothing was tested"
            torch.testing.assert_close(
                grads[p.name][m],
                want,
                rtol=1e-5,
                atol=1e-5 * want.abs().max().item(),
                msg=lambda text, name=p.name, m=m: f"member {m}, {name}: {text}",
            )


@pytest.mark.parametrize(("bias", "tie_embeddings"), VARIANTS)
def test_logits_and_gradients_equal_plain_modules(ops, bias, tie_embeddings):
    assert_equals_plain_models(config_of(bias, tie_embeddings), ops)


@pytest.mark.parametrize(("bias", "tie_embeddings"), VARIANTS)
def test_dropout_is_at_its_sites_with_its_scales(ops, bias, tie_embeddings):
    """Embedding, attention weights and both residual branches; each member with its own keys and rate, one with none."""
    keys = dropout_keys([5, 6, 7], [0, 10, 200], range(B), B)
    assert_equals_plain_models(config_of(bias, tie_embeddings), ops, (keys, torch.tensor([0.0, 0.2, 0.6])))


def test_a_rate_of_zero_changes_no_bit(ops):
    """A member without dropout has the same numbers beside a neighbour that has it."""
    config = config_of()
    params_MP, inputs = lively(config, M), tokens_of(config, M, B, T)
    keys = dropout_keys([5, 6, 7], [0, 0, 0], range(B), B)
    views = named_views(params_MP, config)
    with_neighbour = forward(views, inputs, config, dropouts(keys, torch.tensor([0.0, 0.5, 0.0]), config), ops=ops)
    without = forward(views, inputs, config, ops=ops)
    assert torch.equal(with_neighbour[[0, 2]], without[[0, 2]])
    assert not torch.equal(with_neighbour[1], without[1])


@pytest.mark.parametrize("rate", [None, 0.3])
def test_causality_by_gradients(ops, rate):
    """Logits at t read position s (its embedding enters nowhere else) if and only if s <= t, and no other member."""
    config = config_of()
    keys = dropout_keys([5, 6, 7], [0, 0, 0], range(B), B)
    dropout = None if rate is None else dropouts(keys, torch.full((M,), rate), config)
    views = {name: view.detach().requires_grad_() for name, view in named_views(lively(config, M), config).items()}
    logits = forward(views, tokens_of(config, M, B, T), config, dropout, ops=ops)
    weighted = logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    for m, t in itertools.product(range(M), range(T)):
        (grad,) = torch.autograd.grad(weighted[m, :, t].sum(), views["position_embedding"], retain_graph=True)
        reads = grad.abs().amax(-1) > 0
        expected = torch.zeros(M, config.block_size, dtype=torch.bool)
        expected[m, : t + 1] = True
        assert torch.equal(reads, expected)


def test_forward_refuses_what_does_not_fit_the_block():
    config = config_of()
    with pytest.raises(ValueError, match="block_size 8"):
        forward(named_views(lively(config, M), config), tokens_of(config, M, B, 9), config)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tie_embeddings", "tolerance"), [(False, 0.015), (True, 0.04)])
def test_initial_loss(bias, tie_embeddings, tolerance):
    """ln V + E std^2 / 2: the last LayerNorm gives vectors of squared length E, so logits are normal with variance E std^2,
    and ln E[exp(logit)] is half of that. n = 4 models of 512 targets each. Where the head is tied, the token just read is a
    little likelier than the others, which costs another 0.02. Deviations seen: 0.001 untied, 0.017 tied.
    """
    config = config_of(bias, tie_embeddings, n_embd=128, block_size=64, vocab_size=65)
    params_MP = initial_parameters(config, [1, 2, 3, 4])
    batch = Batch(tokens_of(config, 4, 8, 64), tokens_of(config, 4, 8, 64, seed=2), None)
    loss_M, _ = gradients(params_MP, [batch], 8, config, torch.float32, None)
    assert loss_M.mean().item() == pytest.approx(math.log(65) + 128 * 0.02**2 / 2, abs=tolerance)


# --- the table


@pytest.mark.parametrize(("bias", "tie_embeddings"), VARIANTS)
def test_counts_equal_those_of_plain_modules(bias, tie_embeddings):
    config = config_of(bias, tie_embeddings, n_layer=3)
    named, count = dict(Plain(config).named_parameters()), count_parameters(config)
    assert count.total == sum(p.numel() for p in named.values())
    assert count.decayed == sum(p.numel() for p in named.values() if p.dim() >= 2)
    assert count.without_positions == count.total - named["transformer.wpe.weight"].numel()
    table = parameter_table(config)
    assert [p.nanogpt_key for p in table if p.decayed] == [p.nanogpt_key for p in table][
        : sum(p.decayed for p in table)
    ]
    assert all(p.decayed == (named[p.nanogpt_key].dim() >= 2) for p in table)


def test_counts_equal_what_nanogpt_prints():
    """Its train_shakespeare_char prints: "number of parameters: 10.65M"; "num decayed parameter tensors: 26, with
    10,740,096 parameters"; "num non-decayed parameter tensors: 13, with 4,992 parameters".
    """
    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
    config = config_of(bias=False, tie_embeddings=True, vocab_size=65, **sizes)
    count, table = count_parameters(config), parameter_table(config)
    assert f"{count.without_positions / 1e6:.2f}M" == "10.65M"
    assert (sum(p.decayed for p in table), count.decayed) == (26, 10_740_096)
    assert (sum(not p.decayed for p in table), count.total - count.decayed) == (13, 4_992)


def test_views_are_of_the_buffer():
    config = config_of()
    buffer = lively(config, M)
    for p in parameter_table(config):
        named_views(buffer, config)[p.name].fill_(7)
    assert (buffer == 7).all()


# --- initialisation

INIT_STD = {  # GPT-2's, for two layers
    "token_embedding": 0.02,
    "position_embedding": 0.02,
    "head": 0.02,
    "qkv.weight": 0.02,
    "mlp_in.weight": 0.02,
    "attention_out.weight": 0.02 / 2,
    "mlp_out.weight": 0.02 / 2,
}


def test_initial_weights_row_by_row():
    """Normal with the published std: n = 4 members x the tensor's size, 4 x 128 at the least; mean, std and the share
    within one std each within 4.5 standard errors. Gains are 1, biases 0.
    """
    config = config_of(bias=True, tie_embeddings=False)
    seen = set()
    for name, view in named_views(initial_parameters(config, [1, 2, 3, 4]), config).items():
        if name.endswith(("gain", "bias")):
            assert (view == (1.0 if name.endswith("gain") else 0.0)).all(), name
            continue
        kind = name.split(".", 1)[-1] if name.startswith("layer") else name
        std, n = INIT_STD[kind], view.numel()
        seen.add(kind)
        assert n >= 512
        assert abs(view.double().mean()) < 4.5 * std / math.sqrt(n), name
        assert abs(view.double().square().mean().sqrt() - std) < 4.5 * std / math.sqrt(2 * n), name
        assert abs((view.abs() < std).double().mean() - 0.6827) < 4.5 * math.sqrt(0.6827 * 0.3173 / n), name
    assert seen == set(INIT_STD)


def test_initial_weights_depend_on_seed_and_shape_alone():
    config = config_of()
    alone, beside = initial_parameters(config, [2]), initial_parameters(config, [9, 2, 1, 2])
    assert torch.equal(alone[0], beside[1])
    assert torch.equal(alone[0], beside[3])
    matrices = [
        view.flatten(1)
        for name, view in named_views(beside, config).items()
        if "gain" not in name and "bias" not in name
    ]
    assert not any((view[0] == view[1]).any() for view in matrices)  # other seeds, other numbers
    first = [view[0, :100] for view in matrices]
    for one, other in itertools.combinations(first, 2):  # no tensor repeats another's numbers
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.5
