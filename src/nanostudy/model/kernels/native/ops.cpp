// The operations of ops.py for CPUs, fused row by row: intermediate results stay in registers and the first-level cache.
//
// Activations are bf16 or fp32 (Real); all arithmetic is fp32. Names and letters are those of ops.py. The code uses the vector
// types of GCC and Clang, sixteen numbers at a time. One thread computes a whole row, and parameter gradients are summed per
// sequence, so the same build gives the same bits with any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

const int64_t WIDTH = 16;
typedef float V __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

struct bf16 {
    uint16_t bits;
};

// Copies the first `count` of sixteen elements. A copy of a constant size is one instruction, hence the two cases.
inline void copy(void *to, const void *from, int64_t count, size_t size) {
    if (__builtin_expect(count >= WIDTH, 1))
        std::memcpy(to, from, WIDTH * size);
    else
        std::memcpy(to, from, count * size);
}

// Elements from `count` on are zeros.
inline V load(const float *from, int64_t count) {
    V v = {};
    copy(&v, from, count, sizeof *from);
    return v;
}

// Intrinsics where it matters: GCC 12 converts vectors lane by lane, or in halves.
inline U words_of(Halves h) {
#ifdef __AVX512F__
    return (U)_mm512_cvtepu16_epi32((__m256i)h);
#else
    return __builtin_convertvector(h, U);
#endif
}

inline I words_of(Bytes b) {
#ifdef __AVX512F__
    return (I)_mm512_cvtepu8_epi32((__m128i)b);
#else
    return __builtin_convertvector(__builtin_convertvector(b, Halves), I);
#endif
}

inline V load(const bf16 *from, int64_t count) {
    Halves h = {};
    copy(&h, from, count, sizeof *from);
    return (V)(words_of(h) << 16);
}

inline void store(float *to, V v, int64_t count) {
    copy(to, &v, count, sizeof *to);
}

inline void store(bf16 *to, V v, int64_t count) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    U bits = (U)v, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    Halves h = __builtin_convertvector(v == v ? rounded : U{} + 0x7FC0, Halves);
#endif
    copy(to, &h, count, sizeof *to);
}

inline float number(const float *at) { return *at; }
inline float number(const bf16 *at) { return load(at, 1)[0]; }

inline V larger(V a, V b) { return a > b ? a : b; }

inline float sum_of(V v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int64_t half = WIDTH / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

inline float largest_of(V v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    for (int64_t half = WIDTH / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) v[i] = std::max(v[i], v[i + half]);
    return v[0];
#endif
}

// e**x for x <= 0: 2**n times a polynomial for the rest, coefficients as in Cephes' expf (Moshier).
inline V exponential(V x) {
    x = x < -87.0f ? V{} - 87.0f : x;
    V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to the nearest integer
    V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (V)((__builtin_convertvector(n, I) + 127) << 23);
}

// 1 / x for x from 1 to 2**100, exact but for the last bit or two: a division takes as long as the rest of a GELU.
inline V inverse(V x) {
#ifdef __AVX512F__
    const V guess = (V)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// The keys of the dropout masks, arrays of Z. A null pointer stands for no dropout.
struct DropoutKeys {
    const uint32_t *low, *high;
    const int32_t *threshold;
    const float *scale;
};

const I LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The random bytes of some activations of one sequence. Applied to a vector, it multiplies by 0 where an activation is dropped
// and by the scale elsewhere. The same masks as keep_mask in randomness.py.
struct Mask {
    std::vector<uint32_t> words;
    const uint8_t *bytes = nullptr;
    I threshold = {};
    V kept = {};

    explicit Mask(int64_t most) : words(most / 4 + 4 * WIDTH) {}

    // `count` activations from number `first` on.
    void draw(const DropoutKeys *drop, int64_t z, int64_t first, int64_t count) {
        if (!drop) return;
        const int64_t skip = first & 3;
        const U high = U{} + drop->high[z], next = U{} + uint32_t(WIDTH) * 0x9E3779B9u;
        U word = ((U)LANE + uint32_t(first >> 2)) * 0x9E3779B9u + drop->low[z];
        uint32_t *to = words.data();
        for (int64_t i = 0; 4 * i < skip + count; i += WIDTH, word += next) {
            U x = word;
            x ^= x >> 16;
            x *= 0x7FEB352Du;
            x += high;
            x ^= x >> 15;
            x *= 0x846CA68Bu;
            x ^= x >> 16;
            std::memcpy(to + i, &x, sizeof x);
        }
        bytes = reinterpret_cast<const uint8_t *>(to) + skip;
        threshold = I{} + drop->threshold[z];
        kept = V{} + drop->scale[z];
    }

    V operator()(V v, int64_t i) const {
        if (!bytes) return v;
        Bytes b;
        std::memcpy(&b, bytes + i, sizeof b);
        return v * (words_of(b) >= threshold ? kept : V{});
    }
};

// Subtracts the mean from `row` and returns 1 / standard deviation: NaN where the variance overflows, which would give zeros.
inline float centre(float *row, V total, int64_t E, float epsilon) {
    const float mean = sum_of(total) / E;
    V squares = {};
    for (int64_t e = 0; e < E; e += WIDTH) {
        V v = load(row + e, E - e) - mean;
        store(row + e, v, E - e);
        v = load(row + e, E - e);  // zeros beyond the end
        squares += v * v;
    }
    const float variance = sum_of(squares) / E;
    return 1.0f / std::sqrt(variance + epsilon) + (variance - variance);
}

template <typename Real>
void residual_norm(const Real *x, const Real *y, const DropoutKeys *drop, const Real *gain, const Real *bias, Real *sum,
                   Real *norm, int64_t M, int64_t B, int64_t T, int64_t E, float epsilon, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Mask mask(E);
        std::vector<float> row(E);
        float *v = row.data();
#pragma omp for
        for (int64_t z = 0; z < M * B; z++) {
            const Real *g = gain + z / B * E, *b = bias ? bias + z / B * E : nullptr;
            for (int64_t t = 0; t < T; t++) {
                const int64_t at = (z * T + t) * E;
                mask.draw(drop, z, t * E, E);
                V total = {};
                for (int64_t e = 0; e < E; e += WIDTH) {
                    V a = mask(load(y + at + e, E - e), e);
                    if (x) a += load(x + at + e, E - e);
                    store(sum + at + e, a, E - e);
                    a = load(sum + at + e, E - e);  // as rounded
                    store(v + e, a, E - e);
                    total += a;
                }
                const float r = centre(v, total, E, epsilon);
                for (int64_t e = 0; e < E; e += WIDTH) {
                    V a = load(v + e, E - e) * r * load(g + e, E - e);
                    if (b) a += load(b + e, E - e);
                    store(norm + at + e, a, E - e);
                }
            }
        }
    }
}

template <typename Real>
void residual_norm_backward(const Real *d_sum, const Real *d_norm, const Real *sum, const DropoutKeys *drop, const Real *gain,
                            Real *d_x, Real *d_y, float *d_gain, float *d_bias, int64_t M, int64_t B, int64_t T,
                            int64_t E, float epsilon, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Mask mask(E);
        std::vector<float> row(E);
        float *v = row.data();
#pragma omp for
        for (int64_t z = 0; z < M * B; z++) {
            const Real *g = gain + z / B * E;
            float *to_gain = d_gain + z * E, *to_bias = d_bias + z * E;
            std::fill(to_gain, to_gain + E, 0.0f);
            std::fill(to_bias, to_bias + E, 0.0f);
            for (int64_t t = 0; t < T; t++) {
                const int64_t at = (z * T + t) * E;
                mask.draw(drop, z, t * E, E);
                V total = {}, level = {}, slope = {};
                for (int64_t e = 0; e < E; e += WIDTH) {
                    V a = load(sum + at + e, E - e);
                    store(v + e, a, E - e);
                    total += a;
                }
                const float r = centre(v, total, E, epsilon);
                for (int64_t e = 0; e < E; e += WIDTH) {
                    V normal = load(v + e, E - e) * r, d = load(d_norm + at + e, E - e);
                    store(to_gain + e, load(to_gain + e, E - e) + d * normal, E - e);
                    store(to_bias + e, load(to_bias + e, E - e) + d, E - e);
                    d *= load(g + e, E - e);
                    level += d;
                    slope += d * normal;
                }
                const float mean = sum_of(level) / E, tilt = sum_of(slope) / E;
                for (int64_t e = 0; e < E; e += WIDTH) {
                    V normal = load(v + e, E - e) * r, d = load(d_norm + at + e, E - e) * load(g + e, E - e);
                    V a = load(d_sum + at + e, E - e) + r * (d - mean - normal * tilt);
                    store(d_x + at + e, a, E - e);
                    store(d_y + at + e, mask(a, e), E - e);
                }
            }
        }
    }
}

// Reorders blocks of D elements from (Z, T, X, H) to (X, Z, H, T), or back.
template <bool back, typename Real>
void reorder(const Real *from, Real *to, int64_t Z, int64_t T, int64_t X, int64_t H, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t z = 0; z < Z; z++)
        for (int64_t x = 0; x < X; x++)
            for (int64_t h = 0; h < H; h++)
                for (int64_t t = 0; t < T; t++) {
                    const int64_t merged = (((z * T + t) * X + x) * H + h) * D;
                    const int64_t split = (((x * Z + z) * H + h) * T + t) * D;
                    const int64_t source = back ? split : merged, target = back ? merged : split;
                    for (int64_t d = 0; d < D; d += WIDTH) copy(to + target + d, from + source + d, D - d, sizeof(Real));
                }
}

template <typename Real>
void split_heads(const Real *x, Real *y, int64_t Z, int64_t T, int64_t X, int64_t H, int64_t D, float, int threads) {
    reorder<false>(x, y, Z, T, X, H, D, threads);
}

template <typename Real>
void merge_heads(const Real *x, Real *y, int64_t Z, int64_t T, int64_t X, int64_t H, int64_t D, float, int threads) {
    reorder<true>(x, y, Z, T, X, H, D, threads);
}

// Writes e**(x * scale - largest) of the first `seen` of `stored` numbers into `row`, then zeros up to a whole vector.
// Returns (the largest, the sum).
template <typename Real>
inline std::pair<float, float> exponentials(const Real *from, float *row, int64_t seen, int64_t stored, float scale) {
    V most = V{} - INFINITY, total = {};
    for (int64_t i = 0; i < seen; i += WIDTH) {
        V a = load(from + i, stored - i) * scale;
        a = LANE < int32_t(seen - i) ? a : V{} - INFINITY;
        store(row + i, a, WIDTH);
        most = larger(most, a);
    }
    const float top = largest_of(most);
    for (int64_t i = 0; i < seen; i += WIDTH) {
        V a = exponential(load(row + i, WIDTH) - top);
        a = LANE < int32_t(seen - i) ? a : V{};
        store(row + i, a, WIDTH);
        total += a;
    }
    return {top, sum_of(total)};
}

template <typename Real>
void attend(const Real *scores, const DropoutKeys *drop, Real *weights, Real *dropped, int64_t Z, int64_t H, int64_t Q,
            int64_t K, int64_t T, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Mask mask(K);
        std::vector<float> row(K + WIDTH);
        float *v = row.data();
#pragma omp for
        for (int64_t zh = 0; zh < Z * H; zh++) {
            for (int64_t q = 0; q < Q; q++) {
                const int64_t at = (zh * Q + q) * K, seen = K - Q + q + 1;
                const float share = 1.0f / exponentials(scores + at, v, seen, K, scale).second;
                mask.draw(drop, zh / H, (zh % H * T + seen - 1) * T, seen);
                for (int64_t k = 0; k < seen; k += WIDTH) {
                    V a = load(v + k, WIDTH) * share;
                    store(weights + at + k, a, K - k);
                    if (drop) store(dropped + at + k, mask(a, k), K - k);
                }
                const int64_t end = std::min((seen + WIDTH - 1) / WIDTH * WIDTH, K);
                std::memset(weights + at + end, 0, (K - end) * sizeof(Real));
                if (drop) std::memset(dropped + at + end, 0, (K - end) * sizeof(Real));
            }
        }
    }
}

template <typename Real>
void attend_backward(const Real *d_dropped, const Real *weights, const DropoutKeys *drop, Real *d_scores, int64_t Z, int64_t H,
                     int64_t Q, int64_t K, int64_t T, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Mask mask(K);
        std::vector<float> row(K + WIDTH);
        float *v = row.data();
#pragma omp for
        for (int64_t zh = 0; zh < Z * H; zh++) {
            for (int64_t q = 0; q < Q; q++) {
                const int64_t at = (zh * Q + q) * K, seen = K - Q + q + 1;
                mask.draw(drop, zh / H, (zh % H * T + seen - 1) * T, seen);
                V dots = {};
                for (int64_t k = 0; k < seen; k += WIDTH) {  // weights of later keys are zero
                    V d = mask(load(d_dropped + at + k, K - k), k);
                    store(v + k, d, WIDTH);
                    dots += d * load(weights + at + k, K - k);
                }
                const float dot = sum_of(dots);
                for (int64_t k = 0; k < seen; k += WIDTH) {
                    V d = load(v + k, WIDTH) - dot;
                    store(d_scores + at + k, load(weights + at + k, K - k) * d * scale, K - k);
                }
                const int64_t end = std::min((seen + WIDTH - 1) / WIDTH * WIDTH, K);
                std::memset(d_scores + at + end, 0, (K - end) * sizeof(Real));
            }
        }
    }
}

template <typename Real>
void cross_entropy(const Real *logits, const int64_t *targets, float *losses, int64_t N, int64_t V_, float, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(V_ + WIDTH);
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            const auto [top, total] = exponentials(logits + n * V_, row.data(), V_, V_, 1.0f);
            losses[n] = targets[n] < 0 ? 0.0f : std::log(total) + top - number(logits + n * V_ + targets[n]);
        }
    }
}

template <typename Real>
void cross_entropy_backward(const float *d_losses, const Real *logits, const int64_t *targets, Real *d_logits, int64_t N,
                            int64_t V_, float, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(V_ + WIDTH);
        float *p = row.data();
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            const float total = exponentials(logits + n * V_, p, V_, V_, 1.0f).second;
            if (targets[n] >= 0) p[targets[n]] -= total;
            const float share = d_losses[n] / total;
            for (int64_t v = 0; v < V_; v += WIDTH) store(d_logits + n * V_ + v, load(p + v, WIDTH) * share, V_ - v);
        }
    }
}

// GELU(x) = x * the share of a normal distribution below x (Hendrycks & Gimpel, 2016), and its derivative.
template <typename Real>
void gelu(const Real *x, Real *y, Real *slope, int64_t N, float, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n += WIDTH) {
        const V v = load(x + n, N - n), density = exponential(v * v * -0.5f) * 0.3989422804f;
        // Abramowitz & Stegun 26.2.17: within 7.5e-8
        const V size = v < V{} ? -v : v, t = inverse(size * 0.2316419f + 1.0f);
        V tail = t * 1.330274429f - 1.821255978f;
        tail = tail * t + 1.781477937f;
        tail = tail * t - 0.356563782f;
        tail = (tail * t + 0.319381530f) * t * density;
        const V share = v < V{} ? tail : 1.0f - tail;
        store(y + n, v * share, N - n);
        store(slope + n, share + v * density, N - n);
    }
}

// The sum of each row's squares, in blocks of 8192 columns whatever the number of threads.
template <typename Real>
void squares(const Real *rows, float *sums, int64_t M, int64_t columns, int64_t row, float, int threads) {
    const int64_t block = 8192, blocks = (columns + block - 1) / block;
    std::vector<float> part(blocks);
    for (int64_t m = 0; m < M; m++) {
#pragma omp parallel for num_threads(threads)
        for (int64_t b = 0; b < blocks; b++) {
            V total = {};
            const int64_t end = std::min(columns, (b + 1) * block);
            for (int64_t i = b * block; i < end; i += WIDTH) {
                const V v = load(rows + m * row + i, end - i);
                total += v * v;
            }
            part[b] = sum_of(total);
        }
        double all = 0;
        for (float each : part) all += each;
        sums[m] = all;
    }
}

// Rows of `columns` elements are `row` elements apart, those of the gradient `grad_row`. The settings are arrays of M.
template <typename Real>
void adamw_kernel(float *params, const Real *grads, float *exp_avg, float *exp_avg_sq, const float *decay, const bool *active,
          const float *clip, const float *one_minus_beta1, const float *one_minus_beta2, const float *root_correction2,
          const float *step_size, int64_t M, int64_t columns, int64_t row, int64_t grad_row, float epsilon,
          int threads) {
    for (int64_t m = 0; m < M; m++) {
        if (!active[m]) continue;
        float *p = params + m * row, *first = exp_avg + m * row, *second = exp_avg_sq + m * row;
        const Real *grad = grads + m * grad_row;
        const float keep = 1 - decay[m], step = step_size[m], root = root_correction2[m];
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < columns; i += WIDTH) {
            const int64_t count = columns - i;
            const V g = load(grad + i, count) * clip[m];
            V a = load(first + i, count), s = load(second + i, count), size;
            a = a * (1 - one_minus_beta1[m]) + g * one_minus_beta1[m];  // exact at 1, unlike a step towards g
            s = s * (1 - one_minus_beta2[m]) + g * g * one_minus_beta2[m];
            for (int64_t lane = 0; lane < WIDTH; lane++) size[lane] = std::sqrt(s[lane]);
            store(first + i, a, count);
            store(second + i, s, count);
            store(p + i, load(p + i, count) * keep - step * a / (size / root + epsilon), count);
        }
    }
}

}  // namespace

#include "tiles.h"
#include "attention.h"

// The operations by name, in fp32 and in bf16; null where this machine has none.
struct Op {
    const char *name;
    void *fp32, *bf16;
};

#define OP(name) {#name, (void *)name<float>, (void *)name<bf16>}
#ifdef NANOSTUDY_TILES
#define TILED_OP(name) {#name, nullptr, tiles_granted() ? (void *)name : nullptr}
#else
#define TILED_OP(name) {#name, nullptr, nullptr}
#endif

extern "C" {
Op ops[] = {
    OP(residual_norm), OP(residual_norm_backward), OP(split_heads), OP(merge_heads), OP(attend),
    OP(attend_backward), OP(cross_entropy), OP(cross_entropy_backward), OP(gelu), OP(squares), OP(adamw_kernel),
    TILED_OP(attention), TILED_OP(attention_backward), {nullptr, nullptr, nullptr},
};
}
