// Attention of whole sequences on a CPU with tiles, head by head and 32 queries at a time: what lies between the products
// never leaves the first caches. Included by ops.cpp.

#pragma once

#ifdef NANOSTUDY_TILES

namespace {

// One head of one sequence. Queries, keys and values lie side by side, T lines of 3 * E numbers.
struct Head {
    int64_t E, D, T, row;
    const bf16 *q, *k, *v;

    Head(const bf16 *qkv, int64_t z, int64_t h, int64_t H, int64_t T, int64_t D)
        : E(H * D), D(D), T(T), row(3 * E), q(qkv + z * T * row + h * D), k(q + E), v(k + E) {}
};

// Multiplies one panel by each of `count` others, `stride` numbers apart.
inline void multiply_all(const bf16 *left, const bf16 *right, int64_t count, int64_t stride, int64_t steps, float *sums,
                         int64_t row, bool more = false) {
    for (int64_t j = 0; j < count; j++) multiply(left, right + j * stride, steps, sums + j * PANEL, row, more);
}

// The address of numbers k to k + 15 of line i in a left factor's panel.
inline bf16 *place(bf16 *panel, int64_t i, int64_t k) { return panel + k / PANEL * 2 * TILE + i * PANEL + k % PANEL; }

// Fills line i with zeros from the last vector that was written to the end of the step.
inline void finish(bf16 *panel, int64_t i, int64_t seen) {
    const int64_t end = (seen + WIDTH - 1) / WIDTH * WIDTH;
    if (end % PANEL) std::memset(place(panel, i, end), 0, WIDTH * sizeof(bf16));
}

// Rounding may lift a number above 0 that should be at most 0. NaN stays NaN.
inline V at_most_zero(V x) { return x > 0.0f ? V{} : x; }

// `lse`, unless null, fp32 (Z, H, T): the log-sum-exp of each query's scores.
void attention(const bf16 *qkv, const DropoutKeys *drop, bf16 *y, float *lse, int64_t Z, int64_t H, int64_t T, int64_t D,
               float scale, int threads) {
    const int64_t wide = panels(T) * PANEL, deep = panels(D) * PANEL, E = H * D;
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        static thread_local Scratch<bf16> halves;
        static thread_local Scratch<float> wholes;
        Mask mask(wide);
        bf16 *keys = halves.of(2 * wide * deep + PANEL * (deep + wide)), *values = keys + wide * deep;
        bf16 *queries = values + wide * deep, *weights = queries + PANEL * deep;
        float *scores = wholes.of(PANEL * (wide + deep)), *sums = scores + PANEL * wide, tops[PANEL], totals[PANEL];
#pragma omp for
        for (int64_t zh = 0; zh < Z * H; zh++) {
            const int64_t z = zh / H, h = zh % H;
            const Head head(qkv, z, h, H, T, D);
            pack_all<RIGHT>(head.k, head.row, 1, T, D, keys);
            pack_all<RIGHT>(head.v, 1, head.row, D, T, values);
            for (int64_t first = 0; first < T; first += PANEL) {
                const int64_t lines = std::min(PANEL, T - first), blocks = first / PANEL + 1;
                pack<LEFT>(head.q + first * head.row, head.row, 1, lines, D, queries);
                multiply_all(queries, keys, blocks, PANEL * deep, panels(D), scores, wide);
                // several passes over the lines: a sum over a vector takes long, and meanwhile the next line can begin
                for (int64_t i = 0; i < lines; i++) {
                    const int64_t seen = first + i + 1;
                    V most = V{} - INFINITY;
                    for (int64_t k = 0; k < seen; k += WIDTH)
                        most = larger(most, LANE < int32_t(seen - k) ? load(scores + i * wide + k, WIDTH) : most);
                    tops[i] = largest_of(most) * scale;
                }
                for (int64_t i = 0; i < lines; i++) {
                    const int64_t seen = first + i + 1;
                    float *s = scores + i * wide;
                    V total = {};
                    for (int64_t k = 0; k < seen; k += WIDTH) {
                        const V a = exponential(at_most_zero(load(s + k, WIDTH) * scale - tops[i]));
                        store(s + k, LANE < int32_t(seen - k) ? a : V{}, WIDTH);
                        total += load(s + k, WIDTH);
                    }
                    totals[i] = sum_of(total);
                }
                for (int64_t i = 0; i < lines; i++) {
                    const int64_t seen = first + i + 1;
                    const float *s = scores + i * wide;
                    const float share = 1.0f / totals[i];
                    if (lse) lse[zh * T + seen - 1] = tops[i] + std::log(totals[i]);
                    mask.draw(drop, z, (h * T + seen - 1) * T, seen);
                    for (int64_t k = 0; k < seen; k += WIDTH)
                        store(place(weights, i, k), mask(load(s + k, WIDTH) * share, k), WIDTH);
                    finish(weights, i, seen);
                }
                multiply_all(weights, values, panels(D), PANEL * wide, blocks, sums, deep);
                put(sums, deep, y + (z * T + first) * E + h * D, E, lines, D);
            }
        }
    }
}

void attention_backward(const bf16 *d_y, const bf16 *qkv, const float *lse, const DropoutKeys *drop, bf16 *d_qkv, int64_t Z,
                        int64_t H, int64_t T, int64_t D, float scale, int threads) {
    const int64_t wide = panels(T) * PANEL, deep = panels(D) * PANEL, E = H * D;
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        static thread_local Scratch<bf16> halves;
        static thread_local Scratch<float> wholes;
        Mask mask(wide);
        bf16 *keys = halves.of(3 * wide * deep + PANEL * (4 * deep + 2 * wide) + 2 * TILE), *values = keys + wide * deep;
        bf16 *keys_across = values + wide * deep, *queries = keys_across + wide * deep;
        bf16 *queries_across = queries + PANEL * deep, *d_out = queries_across + PANEL * deep;
        bf16 *d_out_across = d_out + PANEL * deep, *d_scores = d_out_across + PANEL * deep;
        bf16 *weights = d_scores + PANEL * wide, *turned = weights + PANEL * wide;
        float *scores = wholes.of(2 * PANEL * wide + PANEL * deep + 2 * wide * deep), *d_weights = scores + PANEL * wide;
        float *d_queries = d_weights + PANEL * wide, *d_keys = d_queries + PANEL * deep, *d_values = d_keys + wide * deep;
        float totals[PANEL];
#pragma omp for
        for (int64_t zh = 0; zh < Z * H; zh++) {
            const int64_t z = zh / H, h = zh % H;
            const Head head(qkv, z, h, H, T, D);
            bf16 *d_q = d_qkv + z * T * head.row + h * D, *d_k = d_q + E, *d_v = d_k + E;
            pack_all<RIGHT>(head.k, head.row, 1, T, D, keys);
            pack_all<RIGHT>(head.k, 1, head.row, D, T, keys_across);
            pack_all<RIGHT>(head.v, head.row, 1, T, D, values);
            for (int64_t first = 0; first < T; first += PANEL) {
                const int64_t lines = std::min(PANEL, T - first), blocks = first / PANEL + 1;
                const bf16 *q = head.q + first * head.row, *d = d_y + (z * T + first) * E + h * D;
                pack<LEFT>(q, head.row, 1, lines, D, queries);
                pack_all<RIGHT>(q, 1, head.row, D, lines, queries_across);
                pack<LEFT>(d, E, 1, lines, D, d_out);
                pack_all<RIGHT>(d, 1, E, D, lines, d_out_across);
                multiply_all(queries, keys, blocks, PANEL * deep, panels(D), scores, wide);
                multiply_all(d_out, values, blocks, PANEL * deep, panels(D), d_weights, wide);
                for (int64_t i = 0; i < lines; i++) {
                    const int64_t seen = first + i + 1;
                    float *w = scores + i * wide, *dw = d_weights + i * wide;
                    const float log_sum = lse[zh * T + seen - 1];
                    mask.draw(drop, z, (h * T + seen - 1) * T, seen);
                    V dots = {};
                    for (int64_t k = 0; k < seen; k += WIDTH) {
                        V a = exponential(at_most_zero(load(w + k, WIDTH) * scale - log_sum));
                        a = LANE < int32_t(seen - k) ? a : V{};
                        const V b = mask(load(dw + k, WIDTH), k);
                        store(w + k, a, WIDTH);
                        store(dw + k, b, WIDTH);
                        store(place(weights, i, k), mask(a, k), WIDTH);
                        dots += a * b;
                    }
                    finish(weights, i, seen);
                    totals[i] = sum_of(dots);
                }
                for (int64_t i = 0; i < lines; i++) {
                    const int64_t seen = first + i + 1;
                    for (int64_t k = 0; k < seen; k += WIDTH) {
                        const V a = load(scores + i * wide + k, WIDTH), d = load(d_weights + i * wide + k, WIDTH);
                        store(place(d_scores, i, k), a * (d - totals[i]) * scale, WIDTH);
                    }
                    finish(d_scores, i, seen);
                }
                multiply_all(d_scores, keys_across, panels(D), PANEL * wide, blocks, d_queries, deep);
                put(d_queries, deep, d_q + first * head.row, head.row, lines, D);
                for (int64_t j = 0; j < blocks; j++) {
                    const bool more = j + 1 < blocks;  // the first queries that see a key are those of its own block
                    pack<LEFT>(d_scores + j * 2 * TILE, 1, PANEL, PANEL, lines, turned);
                    multiply_all(turned, queries_across, panels(D), 2 * TILE, 1, d_keys + j * PANEL * deep, deep, more);
                    pack<LEFT>(weights + j * 2 * TILE, 1, PANEL, PANEL, lines, turned);
                    multiply_all(turned, d_out_across, panels(D), 2 * TILE, 1, d_values + j * PANEL * deep, deep, more);
                }
            }
            put(d_keys, deep, d_k, head.row, T, D);
            put(d_values, deep, d_v, head.row, T, D);
        }
    }
}

}  // namespace

#endif
