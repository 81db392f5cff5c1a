"""The GPU's kernels, in Triton: each of ops.py's operations between matrix products in one kernel, attention in three.

Sizes that decide how a kernel is compiled are `tl.constexpr`: widths, the vocabulary, whether there is dropout. Counts of
sequences and positions are not, so that one kernel serves every number of members. Blocks are fixed and sums go in one order:
bits depend on the input alone, never on a race between configurations or programs. Letters as in ops.py; R stands for rows, Z * T.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER_SPECIALIZED = [
    *("rows", "T", "size", "count", "per_member", "columns", "pieces", "piece", "sites", "decayed"),
    *("member_stride", "row_stride", "stride", "gradient_stride", "position_stride"),
]


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


@triton.jit
def _dropped(value, number, low, high, threshold, factor):
    return tl.where(kept(number, low, high, threshold), value * factor, 0.0)


# --- what an update reads, and the embeddings


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def windows(tokens, starts, inputs, targets, size, T, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(starts + at // T, mask=at < size, other=0) + at % T
    tl.store(inputs + at, tl.load(tokens + place, mask=at < size, other=0).to(tl.int64), mask=at < size)
    tl.store(targets + at, tl.load(tokens + place + 1, mask=at < size, other=0).to(tl.int64), mask=at < size)


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def dropout_words(keys, rates, low, high, threshold, scale, count, per_member, BLOCK: tl.constexpr):
    """randomness.dropout_words, of one dropout in each row of programs; and the scales."""
    site = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _mix64(tl.load(keys + at, mask=at < count, other=0) + site * -0x61C8864680B583EB)
    rate = tl.load(rates + at // per_member, mask=at < count, other=0.0)
    coin = ((_mix64(key) >> 40) & 0xFFFFFF).to(tl.float32) / 16777216.0
    to = site * count + at
    tl.store(low + to, key.to(tl.int32), mask=at < count)
    tl.store(high + to, (key >> 32).to(tl.int32), mask=at < count)
    tl.store(threshold + to, tl.floor(rate * 256.0 + coin).to(tl.int32), mask=at < count)
    if tl.program_id(1) == 0:
        tl.store(scale + at, tl.div_rn(1.0, 1 - rate), mask=at < count)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def embed(
    ids, token, position, y, rows, T, per_member, member_stride, position_stride, E: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_E = tl.arange(0, COLUMNS)
    inside = (row_R[:, None] < rows) & (column_E[None, :] < E)
    member_R = (row_R // T // per_member).to(tl.int64)
    token_R = member_R * member_stride + tl.load(ids + row_R, mask=row_R < rows, other=0) * E
    position_R = member_R * position_stride + row_R % T * E
    value = tl.load(token + token_R[:, None] + column_E[None, :], mask=inside, other=0.0).to(tl.float32)
    value += tl.load(position + position_R[:, None] + column_E[None, :], mask=inside, other=0.0).to(tl.float32)
    at = row_R[:, None].to(tl.int64) * E + column_E[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def one_hot(ids, y, size, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    hit = tl.load(ids + at // columns, mask=at < size, other=-1) == at % columns
    tl.store(y + at, hit.to(y.dtype.element_ty), mask=at < size)


# --- rows of width E


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def residual_norm(
    x, y, low, high, threshold, scale, gain, bias, total, norm, rows, T, per_member, member_stride,
    epsilon: tl.constexpr, HAS_X: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, E: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_E = tl.arange(0, COLUMNS)
    inside = (row_R[:, None] < rows) & (column_E[None, :] < E)
    at = row_R[:, None].to(tl.int64) * E + column_E[None, :]
    sequence_R, there_R = row_R // T, row_R < rows
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        number = (row_R % T)[:, None] * E + column_E[None, :]
        value = _dropped_rows(value, number, low, high, threshold, scale, sequence_R, there_R)
    if HAS_X:
        value += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    normal = _normal(rounded.to(tl.float32), inside, epsilon, E)[0]
    member = (sequence_R // per_member).to(tl.int64)[:, None] * member_stride + column_E[None, :]
    normal *= tl.load(gain + member, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normal += tl.load(bias + member, mask=inside, other=0.0).to(tl.float32)
    tl.store(norm + at, normal.to(norm.dtype.element_ty), mask=inside)


@triton.jit
def _dropped_rows(value, number, low, high, threshold, scale, sequence_R, there_R):
    low_R1 = tl.load(low + sequence_R, mask=there_R, other=0)[:, None]
    high_R1 = tl.load(high + sequence_R, mask=there_R, other=0)[:, None]
    threshold_R1 = tl.load(threshold + sequence_R, mask=there_R, other=0)[:, None]
    return _dropped(value, number, low_R1, high_R1, threshold_R1, tl.load(scale + sequence_R, mask=there_R)[:, None])


@triton.jit
def _normal(value, inside, epsilon: tl.constexpr, E: tl.constexpr):
    """(the normalised rows, 1 / their standard deviation). NaN where the variance overflows: a diverged member must not look healthy."""
    mean = tl.sum(tl.where(inside, value, 0.0), 1) / E
    centred = tl.where(inside, value - mean[:, None], 0.0)
    reciprocal = 1 / tl.sqrt(tl.sum(centred * centred, 1) / E + epsilon)
    return tl.where((reciprocal > 0)[:, None], centred * reciprocal[:, None], float("nan")), reciprocal


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def residual_norm_backward(
    d_total, d_norm, total, low, high, threshold, scale, gain, d_x, d_y, d_gain, d_bias, rows, T, per_member, piece,
    member_stride, stride, row_stride, epsilon: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr,
    E: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of `piece` of a member's rows, over which gradients of the gain and the bias are summed."""
    m, k = tl.program_id(1).to(tl.int64), tl.program_id(0)
    column_E = tl.arange(0, COLUMNS)
    gain_E = tl.load(gain + m * member_stride + column_E, mask=column_E < E, other=0.0).to(tl.float32)
    gain_sum_E = tl.zeros([COLUMNS], tl.float32)
    bias_sum_E = tl.zeros([COLUMNS], tl.float32)
    for first in range(k * piece, tl.minimum((k + 1) * piece, rows), ROWS):
        row_R = first + tl.arange(0, ROWS)
        inside = (row_R[:, None] < rows) & (column_E[None, :] < E)
        at = (m * rows + row_R)[:, None] * E + column_E[None, :]
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
            sequence_R, number = m * per_member + row_R // T, (row_R % T)[:, None] * E + column_E[None, :]
            d_value = _dropped_rows(d_value, number, low, high, threshold, scale, sequence_R, row_R < rows)
            tl.store(d_y + at, d_value.to(d_y.dtype.element_ty), mask=inside)
    to = m * stride + k * row_stride + column_E
    tl.store(d_gain + to, gain_sum_E, mask=column_E < E)
    if HAS_BIAS:
        tl.store(d_bias + to, bias_sum_E, mask=column_E < E)


# --- attention, straight from the queries, keys and values beside each other


@triton.jit
def _load(base, row, column, T, stride: tl.constexpr, width: tl.constexpr):
    inside = (row[:, None] < T) & (column[None, :] < width)
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, row, column, T, value, stride: tl.constexpr, width: tl.constexpr):
    inside = (row[:, None] < T) & (column[None, :] < width)
    tl.store(base + row[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, k, m, n, T, scale):
    """Of BM queries and BN keys, fp32; -inf where a query does not see a key."""
    seen = (n[None, :] <= m[:, None]) & (n[None, :] < T)
    return tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def _words(low, high, threshold, scale, z, DROP: tl.constexpr):
    if DROP:
        return tl.load(low + z), tl.load(high + z), tl.load(threshold + z), tl.load(scale + z)
    return 0, 0, 0, 1.0


@triton.jit
def _weights(weights, m, n, h, T, words):
    """With dropout, of queries m and keys n of a head."""
    number = h * T * T + m[:, None] * T + n[None, :]
    return _dropped(weights, number, words[0], words[1], words[2], words[3])


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def attention(
    qkv, y, lse, low, high, threshold, scale, T, score_scale, DROP: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of BM queries of one head, over blocks of BN keys (Dao et al., 2022). D is the head's width rounded up to a power of two."""
    z, h = tl.program_id(0) // H, tl.program_id(0) % H
    m, d = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, D)
    base = qkv + z.to(tl.int64) * T * 3 * E + h * (E // H)
    q = _load(base, m, d, T, 3 * E, E // H)
    words = _words(low, high, threshold, scale, z, DROP)
    top = tl.full([BM], float("-inf"), tl.float32)
    sums = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, D], tl.float32)
    for first in range(0, tl.minimum((tl.program_id(1) + 1) * BM, T), BN):
        n = first + tl.arange(0, BN)
        k, v = _load(base + E, n, d, T, 3 * E, E // H), _load(base + 2 * E, n, d, T, 3 * E, E // H)
        scores = _scores(q, k, m, n, T, score_scale)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        sums = sums * shrink + tl.sum(weights, 1)
        if DROP:
            weights = _weights(weights, m, n, h, T, words)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    _store(y + z.to(tl.int64) * T * E + h * (E // H), m, d, T, out / sums[:, None], E, E // H)
    tl.store(lse + tl.program_id(0).to(tl.int64) * T + m, top + tl.log(sums), mask=m < T)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def attention_backward(
    qkv, y, d_y, lse, d_qkv, low, high, threshold, scale, T, score_scale, DROP: tl.constexpr, E: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, OF_KEYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of BN keys and values, over blocks of BM queries; or of BN queries."""
    z, h, block, d = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1), tl.arange(0, D)
    base = qkv + z.to(tl.int64) * T * 3 * E + h * (E // H)
    to = d_qkv + z.to(tl.int64) * T * 3 * E + h * (E // H)
    here = z.to(tl.int64) * T * E + h * (E // H)
    words = _words(low, high, threshold, scale, z, DROP)
    levels = lse + tl.program_id(0).to(tl.int64) * T
    if OF_KEYS:
        n = block * BN + tl.arange(0, BN)
        k, v = _load(base + E, n, d, T, 3 * E, E // H), _load(base + 2 * E, n, d, T, 3 * E, E // H)
        d_k = tl.zeros([BN, D], tl.float32)
        d_v = tl.zeros([BN, D], tl.float32)
        for first in range(block * BN // BM * BM, T, BM):
            m = first + tl.arange(0, BM)
            q, given = _load(base, m, d, T, 3 * E, E // H), _load(d_y + here, m, d, T, E, E // H)
            delta = tl.sum(_load(y + here, m, d, T, E, E // H).to(tl.float32) * given.to(tl.float32), 1)
            level = tl.load(levels + m, mask=m < T, other=float("inf"))
            weights = tl.exp(_scores(q, k, m, n, T, score_scale) - level[:, None])
            d_weights = tl.dot(given, tl.trans(v), input_precision="ieee")
            dropped = weights
            if DROP:
                dropped = _weights(weights, m, n, h, T, words)
                d_weights = _weights(d_weights, m, n, h, T, words)
            d_v += tl.dot(tl.trans(dropped.to(given.dtype)), given, input_precision="ieee")
            d_scores = weights * (d_weights - delta[:, None]) * score_scale
            d_k += tl.dot(tl.trans(d_scores.to(q.dtype)), q, input_precision="ieee")
        _store(to + E, n, d, T, d_k, 3 * E, E // H)
        _store(to + 2 * E, n, d, T, d_v, 3 * E, E // H)
    else:
        m = block * BN + tl.arange(0, BN)
        q, given = _load(base, m, d, T, 3 * E, E // H), _load(d_y + here, m, d, T, E, E // H)
        delta = tl.sum(_load(y + here, m, d, T, E, E // H).to(tl.float32) * given.to(tl.float32), 1)
        level = tl.load(levels + m, mask=m < T, other=float("inf"))
        d_q = tl.zeros([BN, D], tl.float32)
        for first in range(0, tl.minimum((block + 1) * BN, T), BN):
            n = first + tl.arange(0, BN)
            k, v = _load(base + E, n, d, T, 3 * E, E // H), _load(base + 2 * E, n, d, T, 3 * E, E // H)
            weights = tl.exp(_scores(q, k, m, n, T, score_scale) - level[:, None])
            d_weights = tl.dot(given, tl.trans(v), input_precision="ieee")
            if DROP:
                d_weights = _weights(d_weights, m, n, h, T, words)
            d_scores = weights * (d_weights - delta[:, None]) * score_scale
            d_q += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")
        _store(to, m, d, T, d_q, 3 * E, E // H)


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


# --- element by element


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


# --- sums in a fixed order, and the end of an update


@triton.jit(do_not_specialize=[*NEVER_SPECIALIZED, "x_stride", "x_row_stride"])
def sums(
    x, y, rows, piece, columns, x_stride, x_row_stride, stride, row_stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """y[m, k] = the sum of `piece` rows of x[m], from row k * piece on."""
    m, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(k * piece, tl.minimum((k + 1) * piece, rows), ROWS):
        row_R = first + tl.arange(0, ROWS)
        inside = (row_R[:, None] < tl.minimum((k + 1) * piece, rows)) & (column[None, :] < columns)
        at = m * x_stride + row_R[:, None].to(tl.int64) * x_row_stride + column[None, :]
        total += tl.sum(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), 0)
    to = y + m * stride + k.to(tl.int64) * row_stride + column
    tl.store(to, total.to(y.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def means(x, y, count, BLOCK: tl.constexpr):
    m = tl.program_id(0)
    tl.store(y + m, _sum(x + m.to(tl.int64) * count, count, BLOCK) / count)


@triton.jit
def _sum(x, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def squares(rows_MP, sums, columns, stride, BLOCK: tl.constexpr):
    """The sum of squares of each BLOCK columns of each row: (M, blocks)."""
    m, block = tl.program_id(1), tl.program_id(0)
    column = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows_MP + m.to(tl.int64) * stride + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(sums + m * tl.num_programs(0) + block, tl.sum(value * value, 0))


@triton.jit
def _one_minus_exp(x):
    """For x from -inf to 0, without fp32's cancellation near 0, where it is the series."""
    near = 1.0 + x / 9
    for i in tl.static_range(8, 1, -1):
        near = 1.0 + x / i * near
    return tl.where(x > -0.5, -x * near, 1 - tl.exp(x))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def step_sizes(
    squared, losses, loss_scale, good_steps, updates, diverged, learning_rate, decay, one_minus_beta1, one_minus_beta2,
    log_beta1, log_beta2, grad_clip, norms, numbers, pieces, SCALED: tl.constexpr, GROWTH: tl.constexpr,
    SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one member: its gradient's norm, whether it is updated (engine.train_step), and the numbers of its AdamW (optim.adamw)."""
    m = tl.program_id(0)
    norm, loss = tl.sqrt(_sum(squared + m * pieces, pieces, BLOCK)), tl.load(losses + m)
    finite, lost = norm < float("inf"), (tl.abs(loss) < float("inf")) == 0
    if SCALED:
        good = tl.where(finite, tl.load(good_steps + m) + 1, 0)
        grown = good >= GROWTH
        scale = tl.load(loss_scale + m) * tl.where(finite, tl.where(grown, 2.0, 1.0), 0.5)
        tl.store(loss_scale + m, scale)
        tl.store(good_steps + m, tl.where(grown, 0, good))
        lost = lost | (scale < SMALLEST)
    else:
        lost = lost | (finite == 0)
    lost = lost | (tl.load(diverged + m) != 0)
    active = finite & (lost == 0)
    count = tl.load(updates + m) + active.to(tl.int64)
    tl.store(diverged + m, lost)
    tl.store(updates + m, count)
    tl.store(norms + m, norm)
    step = count.to(tl.float32)
    correction1 = _one_minus_exp(step * tl.load(log_beta1 + m))
    correction2 = _one_minus_exp(step * tl.load(log_beta2 + m))
    to, M = numbers + m, tl.num_programs(0)
    tl.store(to, tl.where(active, tl.load(decay + m), 0.0))
    tl.store(to + M, tl.where(active, tl.minimum(tl.load(grad_clip + m) / (norm + 1e-6), 1.0), 0.0))
    tl.store(to + 2 * M, tl.where(active, tl.load(one_minus_beta1 + m), 0.0))
    tl.store(to + 3 * M, tl.where(active, tl.load(one_minus_beta2 + m), 0.0))
    tl.store(to + 4 * M, tl.where(active, tl.sqrt(correction2), 1.0))
    tl.store(to + 5 * M, tl.where(active, tl.load(learning_rate + m) / tl.where(active, correction1, 1.0), 0.0))
    tl.store(to + 6 * M, active.to(tl.float32))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def adamw(
    params, grads, exp_avg, exp_avg_sq, numbers, columns, decayed, stride, gradient_stride, epsilon: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    m, M = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < columns, m.to(tl.int64) * stride + column
    gradient = tl.load(grads + m.to(tl.int64) * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.where(tl.load(numbers + 6 * M + m) > 0, gradient * tl.load(numbers + M + m), 0.0)
    share1, share2 = tl.load(numbers + 2 * M + m), tl.load(numbers + 3 * M + m)
    mean, square = tl.load(exp_avg + at, mask=inside, other=0.0), tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    near, far = mean + share1 * (gradient - mean), gradient - (gradient - mean) * (1 - share1)
    mean = tl.where(share1 < 0.5, near, far)  # as torch.lerp
    square = square * (1 - share2) + gradient * share2 * gradient
    decay = tl.where(column < decayed, tl.load(numbers + m), 0.0)
    value = tl.load(params + at, mask=inside, other=0.0) * (1 - decay)
    value -= tl.load(numbers + 5 * M + m) * (mean / (tl.sqrt(square) / tl.load(numbers + 4 * M + m) + epsilon))
    tl.store(params + at, value, mask=inside)
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
