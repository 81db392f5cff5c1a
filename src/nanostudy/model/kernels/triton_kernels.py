"""The GPU's kernels, in Triton: each of ops.py's operations between matrix products in one kernel, attention in three.

Sizes that decide how a kernel is compiled are `tl.constexpr`: widths, the vocabulary, whether there is dropout. Counts of
sequences and positions are not, so that one kernel serves every number of members. Blocks are fixed and no reduction crosses a
block: bits depend on the input alone, never on a race between configurations. Letters as in ops.py; R stands for rows, Z * T.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER_SPECIALIZED = ["rows", "T", "size", "count", "per_member", "columns", "parts"]


@triton.jit
def kept(number, low, high, threshold):
    """randomness.keep_mask for activations with these numbers. The masks make int32's arithmetic shifts logical ones."""
    x = (number >> 2) * -0x61C88647 + low
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x += high
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975
    x ^= (x >> 16) & 0xFFFF
    return ((x >> ((number & 3) * 8)) & 0xFF) >= threshold


# --- rows of width E


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def residual_norm(
    x, y, low, high, threshold, scale, gain, bias, total, norm, rows, T, per_member, epsilon: tl.constexpr,
    HAS_X: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_E = tl.arange(0, COLUMNS)
    inside = (row_R[:, None] < rows) & (column_E[None, :] < E)
    at = row_R[:, None].to(tl.int64) * E + column_E[None, :]
    sequence_R, there_R = row_R // T, row_R < rows
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        number = (row_R % T)[:, None] * E + column_E[None, :]
        words = [tl.load(word + sequence_R, mask=there_R, other=0)[:, None] for word in (low, high, threshold)]
        factor = tl.load(scale + sequence_R, mask=there_R, other=0.0)[:, None]
        value = tl.where(kept(number, words[0], words[1], words[2]), value * factor, 0.0)
    if HAS_X:
        value += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    normal = _normal(rounded.to(tl.float32), inside, epsilon, E)[0]
    member = (sequence_R // per_member)[:, None] * E + column_E[None, :]
    normal *= tl.load(gain + member, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normal += tl.load(bias + member, mask=inside, other=0.0).to(tl.float32)
    tl.store(norm + at, normal.to(norm.dtype.element_ty), mask=inside)


@triton.jit
def _normal(value, inside, epsilon: tl.constexpr, E: tl.constexpr):
    """(the normalised rows, 1 / their standard deviation). NaN where the variance overflows: a diverged member must not look healthy."""
    mean = tl.sum(tl.where(inside, value, 0.0), 1) / E
    centred = tl.where(inside, value - mean[:, None], 0.0)
    reciprocal = 1 / tl.sqrt(tl.sum(centred * centred, 1) / E + epsilon)
    return tl.where((reciprocal > 0)[:, None], centred * reciprocal[:, None], float("nan")), reciprocal


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def residual_norm_backward(
    d_total, d_norm, total, low, high, threshold, scale, gain, d_x, d_y, d_gain, d_bias, T, per_member,
    epsilon: tl.constexpr, DROP: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Gradients of the gain and the bias are summed over PART positions of one sequence."""
    z, part = tl.program_id(1), tl.program_id(0)
    column_E = tl.arange(0, COLUMNS)
    gain_E = tl.load(gain + z // per_member * E + column_E, mask=column_E < E, other=0.0).to(tl.float32)
    gain_sum_E = tl.zeros([COLUMNS], tl.float32)
    bias_sum_E = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, PART, ROWS):
        position_R = part * PART + first + tl.arange(0, ROWS)
        inside = (position_R[:, None] < T) & (column_E[None, :] < E)
        at = (z.to(tl.int64) * T + position_R[:, None]) * E + column_E[None, :]
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        normal, reciprocal = _normal(value, inside, epsilon, E)
        given = tl.load(d_norm + at, mask=inside, other=0.0).to(tl.float32)
        gain_sum_E += tl.sum(tl.where(inside, given * normal, 0.0), 0)
        bias_sum_E += tl.sum(given, 0)
        d_normal = given * gain_E[None, :]
        mean = tl.sum(d_normal, 1) / E
        along = tl.sum(tl.where(inside, d_normal * normal, 0.0), 1) / E
        through = (d_normal - mean[:, None] - normal * along[:, None]) * reciprocal[:, None]
        d_value = tl.load(d_total + at, mask=inside, other=0.0).to(tl.float32) + through
        tl.store(d_x + at, d_value.to(d_x.dtype.element_ty), mask=inside)
        if DROP:
            number = position_R[:, None] * E + column_E[None, :]
            keep = kept(number, tl.load(low + z), tl.load(high + z), tl.load(threshold + z))
            d_value = tl.where(keep, d_value * tl.load(scale + z), 0.0)
            tl.store(d_y + at, d_value.to(d_y.dtype.element_ty), mask=inside)
    to = (z.to(tl.int64) * tl.num_programs(0) + part) * E + column_E
    tl.store(d_gain + to, gain_sum_E, mask=column_E < E)
    tl.store(d_bias + to, bias_sum_E, mask=column_E < E)


# --- attention, straight from the queries, keys and values beside each other


@triton.jit
def _scores(q, k, m, n, T, scale):
    """Of BM queries and BN keys, fp32; -inf where a query does not see a key."""
    seen = (n[None, :] <= m[:, None]) & (n[None, :] < T)
    return tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def attention(
    qkv, y, lse, low, high, threshold, scale, T, score_scale, DROP: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of BM queries of one head, over blocks of BN keys (Dao et al., 2022). D is the head's width rounded up to a power of two."""
    z, h = tl.program_id(1) // H, tl.program_id(1) % H
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    base = qkv + z.to(tl.int64) * T * 3 * E + h * (E // H)
    inside = (m[:, None] < T) & (d[None, :] < E // H)
    q = tl.load(base + m[:, None] * 3 * E + d[None, :], mask=inside, other=0.0)
    if DROP:
        word_low, word_high, word_threshold = tl.load(low + z), tl.load(high + z), tl.load(threshold + z)
        factor = tl.load(scale + z)
    top = tl.full([BM], float("-inf"), tl.float32)
    sums = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, D], tl.float32)
    for first in range(0, tl.minimum((tl.program_id(0) + 1) * BM, T), BN):
        n = first + tl.arange(0, BN)
        there = (n[:, None] < T) & (d[None, :] < E // H)
        k = tl.load(base + E + n[:, None] * 3 * E + d[None, :], mask=there, other=0.0)
        v = tl.load(base + 2 * E + n[:, None] * 3 * E + d[None, :], mask=there, other=0.0)
        scores = _scores(q, k, m, n, T, score_scale)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        sums = sums * shrink + tl.sum(weights, 1)
        if DROP:
            keep = kept(h * T * T + m[:, None] * T + n[None, :], word_low, word_high, word_threshold)
            weights = tl.where(keep, weights * factor, 0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    to = y + z.to(tl.int64) * T * E + h * (E // H) + m[:, None] * E + d[None, :]
    tl.store(to, (out / sums[:, None]).to(y.dtype.element_ty), mask=inside)
    tl.store(lse + tl.program_id(1).to(tl.int64) * T + m, top + tl.log(sums), mask=m < T)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def attention_backward_kv(
    qkv, y, d_y, lse, d_qkv, low, high, threshold, scale, T, score_scale, DROP: tl.constexpr, E: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradients of BN keys and values, over the queries that see them."""
    z, h = tl.program_id(1) // H, tl.program_id(1) % H
    n, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, D)
    base = qkv + z.to(tl.int64) * T * 3 * E + h * (E // H)
    there = (n[:, None] < T) & (d[None, :] < E // H)
    k = tl.load(base + E + n[:, None] * 3 * E + d[None, :], mask=there, other=0.0)
    v = tl.load(base + 2 * E + n[:, None] * 3 * E + d[None, :], mask=there, other=0.0)
    if DROP:
        word_low, word_high, word_threshold = tl.load(low + z), tl.load(high + z), tl.load(threshold + z)
        factor = tl.load(scale + z)
    d_k = tl.zeros([BN, D], tl.float32)
    d_v = tl.zeros([BN, D], tl.float32)
    for first in range(tl.program_id(0) * BN // BM * BM, T, BM):
        m = first + tl.arange(0, BM)
        inside = (m[:, None] < T) & (d[None, :] < E // H)
        at = z.to(tl.int64) * T * E + h * (E // H) + m[:, None] * E + d[None, :]
        q = tl.load(base + m[:, None] * 3 * E + d[None, :], mask=inside, other=0.0)
        given = tl.load(d_y + at, mask=inside, other=0.0)
        delta = tl.sum(tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * given.to(tl.float32), 1)
        level = tl.load(lse + tl.program_id(1).to(tl.int64) * T + m, mask=m < T, other=float("inf"))
        weights = tl.exp(_scores(q, k, m, n, T, score_scale) - level[:, None])
        d_weights = tl.dot(given, tl.trans(v), input_precision="ieee")
        dropped = weights
        if DROP:
            keep = kept(h * T * T + m[:, None] * T + n[None, :], word_low, word_high, word_threshold)
            dropped = tl.where(keep, weights * factor, 0.0)
            d_weights = tl.where(keep, d_weights * factor, 0.0)
        d_v += tl.dot(tl.trans(dropped.to(given.dtype)), given, input_precision="ieee")
        d_scores = weights * (d_weights - delta[:, None]) * score_scale
        d_k += tl.dot(tl.trans(d_scores.to(q.dtype)), q, input_precision="ieee")
    to = d_qkv + z.to(tl.int64) * T * 3 * E + h * (E // H) + n[:, None] * 3 * E + d[None, :]
    tl.store(to + E, d_k.to(d_qkv.dtype.element_ty), mask=there)
    tl.store(to + 2 * E, d_v.to(d_qkv.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def attention_backward_q(
    qkv, y, d_y, lse, d_qkv, low, high, threshold, scale, T, score_scale, DROP: tl.constexpr, E: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of BM queries, over the keys that they see."""
    z, h = tl.program_id(1) // H, tl.program_id(1) % H
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    base = qkv + z.to(tl.int64) * T * 3 * E + h * (E // H)
    inside = (m[:, None] < T) & (d[None, :] < E // H)
    at = z.to(tl.int64) * T * E + h * (E // H) + m[:, None] * E + d[None, :]
    q = tl.load(base + m[:, None] * 3 * E + d[None, :], mask=inside, other=0.0)
    given = tl.load(d_y + at, mask=inside, other=0.0)
    delta = tl.sum(tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * given.to(tl.float32), 1)
    level = tl.load(lse + tl.program_id(1).to(tl.int64) * T + m, mask=m < T, other=float("inf"))
    if DROP:
        word_low, word_high, word_threshold = tl.load(low + z), tl.load(high + z), tl.load(threshold + z)
        factor = tl.load(scale + z)
    d_q = tl.zeros([BM, D], tl.float32)
    for first in range(0, tl.minimum((tl.program_id(0) + 1) * BM, T), BN):
        n = first + tl.arange(0, BN)
        there = (n[:, None] < T) & (d[None, :] < E // H)
        k = tl.load(base + E + n[:, None] * 3 * E + d[None, :], mask=there, other=0.0)
        v = tl.load(base + 2 * E + n[:, None] * 3 * E + d[None, :], mask=there, other=0.0)
        weights = tl.exp(_scores(q, k, m, n, T, score_scale) - level[:, None])
        d_weights = tl.dot(given, tl.trans(v), input_precision="ieee")
        if DROP:
            keep = kept(h * T * T + m[:, None] * T + n[None, :], word_low, word_high, word_threshold)
            d_weights = tl.where(keep, d_weights * factor, 0.0)
        d_scores = weights * (d_weights - delta[:, None]) * score_scale
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")
    to = d_qkv + z.to(tl.int64) * T * 3 * E + h * (E // H) + m[:, None] * 3 * E + d[None, :]
    tl.store(to, d_q.to(d_qkv.dtype.element_ty), mask=inside)


# --- losses


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def cross_entropy(logits, targets, losses, rows, V: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target_R = tl.load(targets + row_R, mask=row_R < rows, other=-1)
    level_R, hit_R = _logsumexp(logits, row_R, target_R, rows, V, COLUMNS, ROWS)
    tl.store(losses + row_R, tl.where(target_R >= 0, level_R - hit_R, 0.0), mask=row_R < rows)


@triton.jit
def _logsumexp(logits, row_R, target_R, rows, V: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """(the logarithm of the sum of exponentials, the logit of the target) of each row."""
    top_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    hit_R = tl.zeros([ROWS], tl.float32)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row_R[:, None] < rows) & (column[None, :] < V)
        at = row_R[:, None].to(tl.int64) * V + column[None, :]
        value = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        higher_R = tl.maximum(top_R, tl.max(tl.where(column[None, :] < V, value, float("-inf")), 1))
        # rows beyond the last have no finite logit, and -inf - -inf is NaN
        safe_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
        sum_R = sum_R * tl.exp(top_R - safe_R) + tl.sum(tl.exp(value - safe_R[:, None]), 1)
        hit_R += tl.sum(tl.where(column[None, :] == target_R[:, None], value, 0.0), 1)
        top_R = higher_R
    return top_R + tl.log(sum_R), hit_R


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def cross_entropy_backward(
    d_losses, logits, targets, d_logits, rows, V: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target_R = tl.load(targets + row_R, mask=row_R < rows, other=-1)
    given_R = tl.load(d_losses + row_R, mask=row_R < rows, other=0.0)
    level_R = _logsumexp(logits, row_R, target_R, rows, V, COLUMNS, ROWS)[0]
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row_R[:, None] < rows) & (column[None, :] < V)
        at = row_R[:, None].to(tl.int64) * V + column[None, :]
        value = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        hit = (column[None, :] == target_R[:, None]).to(tl.float32)
        d_value = (tl.exp(value - level_R[:, None]) - hit) * given_R[:, None]
        tl.store(d_logits + at, d_value.to(d_logits.dtype.element_ty), mask=inside)


# --- element by element, and sums of rows


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def gelu(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    share = 0.5 * (1 + tl.erf(value * 0.7071067811865476))
    tl.store(y + at, (value * share).to(y.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def gelu_backward(d_y, x, d_x, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    given = tl.load(d_y + at, mask=at < size, other=0.0).to(tl.float32)
    slope = 0.5 * (1 + tl.erf(value * 0.7071067811865476)) + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
    tl.store(d_x + at, (given * slope).to(d_x.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "stride"])
def squares(rows_MP, sums, columns, stride, BLOCK: tl.constexpr):
    """The sum of squares of each BLOCK columns of each row: (M, blocks)."""
    m, block = tl.program_id(1), tl.program_id(0)
    column = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows_MP + m.to(tl.int64) * stride + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(sums + m * tl.num_programs(0) + block, tl.sum(value * value, 0))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def roots(sums, norms, parts, BLOCK: tl.constexpr):
    """The root of each row's sum."""
    m = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        total += tl.load(sums + m * parts + part, mask=part < parts, other=0.0)
    tl.store(norms + m, tl.sqrt(tl.sum(total, 0)))


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "stride", "gradient_stride"])
def adamw(
    params, grads, exp_avg, exp_avg_sq, decay, active, clip, one_minus_beta1, one_minus_beta2, root_correction2,
    step_size, columns, stride, gradient_stride, epsilon: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < columns, m.to(tl.int64) * stride + column
    gradient = tl.load(grads + m.to(tl.int64) * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.where(tl.load(active + m), gradient * tl.load(clip + m), 0.0)
    share1, share2 = tl.load(one_minus_beta1 + m), tl.load(one_minus_beta2 + m)
    mean, square = tl.load(exp_avg + at, mask=inside, other=0.0), tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    near, far = mean + share1 * (gradient - mean), gradient - (gradient - mean) * (1 - share1)
    mean = tl.where(share1 < 0.5, near, far)  # as torch.lerp
    square = square * (1 - share2) + gradient * share2 * gradient
    value = tl.load(params + at, mask=inside, other=0.0) * (1 - tl.load(decay + m))
    value -= tl.load(step_size + m) * (mean / (tl.sqrt(square) / tl.load(root_correction2 + m) + epsilon))
    tl.store(params + at, value, mask=inside)
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
