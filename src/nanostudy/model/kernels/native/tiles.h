// Products of bf16 matrices with sums in fp32, by a CPU's tile unit (AMX) or its vector instructions for bf16. Compiled where
// NANOSTUDY_TILES is defined.
//
// A tile holds 16 lines of 32 numbers. Factors are packed into panels of 32 lines: two tiles for each step of 32 numbers
// along the sum. Zeros pad a matrix to whole panels.

#pragma once

#if defined(__AVX512BF16__) && defined(__linux__)
#define NANOSTUDY_TILES

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

const int64_t SIDE = 16, PANEL = 32;  // lines of a tile and of a panel; a step along the sum is one PANEL long
const int64_t TILE = SIDE * PANEL;    // numbers

inline int64_t panels(int64_t count) { return (count + PANEL - 1) / PANEL; }

#ifdef __AMX_BF16__

// Linux lets a process use this unit only on request.
inline bool tiles_granted() {
    const int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

// While an object of this type lives, all tiles of the thread have 16 lines of 64 bytes.
struct Tiles {
    struct alignas(64) Layout {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Tiles() {
        static constexpr Layout layout;
        _tile_loadconfig(&layout);
    }
    ~Tiles() { _tile_release(); }
};

#else

inline bool tiles_granted() { return true; }

struct Tiles {
    Tiles() {}  // not trivial, so that the compiler does not call an object of it unused
};

#endif

// Transposes 16 lines of 16 words.
inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xDD);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xDD);
    }
}

enum Factor { LEFT, RIGHT };

// Packs one panel of a factor, all of its `depth` along the sum. Number k of line i lies at i * line + k * deep; one of the
// two strides is 1. Lines from `lines` to 32 are zeros. In a right factor two neighbours along the sum lie side by side.
template <Factor factor>
void pack(const bf16 *from, int64_t line, int64_t deep, int64_t lines, int64_t depth, bf16 *to) {
    __m512i r[SIDE];
    for (int64_t k = 0; k < depth; k += PANEL)
        for (int64_t first = 0; first < PANEL; first += SIDE, to += TILE) {
            if (deep == 1) {
                const __mmask32 some = depth - k >= PANEL ? ~0u : (1u << (depth - k)) - 1;
                for (int64_t i = 0; i < SIDE; i++)
                    r[i] = _mm512_maskz_loadu_epi16(first + i < lines ? some : 0, from + (first + i) * line + k);
            } else {
                const int64_t count = std::clamp<int64_t>(lines - first, 0, SIDE);
                const __mmask16 some = (1u << count) - 1;
                for (int64_t i = 0; i < SIDE; i++) {
                    const int64_t at = k + 2 * i;
                    const bf16 *pair = from + at * deep + first;
                    const __m256i even = _mm256_maskz_loadu_epi16(at < depth ? some : 0, pair);
                    const __m256i odd = _mm256_maskz_loadu_epi16(at + 1 < depth ? some : 0, pair + deep);
                    r[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
                }
            }
            if ((factor == LEFT) != (deep == 1)) transpose(r);
            for (int64_t i = 0; i < SIDE; i++) _mm512_store_si512(to + i * PANEL, r[i]);
        }
}

// Packs all panels of a factor, each `steps` steps long, in the matrix's order in memory.
template <Factor factor>
void pack_all(const bf16 *from, int64_t line, int64_t deep, int64_t lines, int64_t depth, bf16 *to) {
    const int64_t steps = panels(depth);
    if (deep == 1)
        for (int64_t i = 0; i < lines; i += PANEL)
            pack<factor>(from + i * line, line, deep, std::min(PANEL, lines - i), depth, to + i * steps * PANEL);
    else
        for (int64_t k = 0; k < depth; k += PANEL)
            for (int64_t i = 0; i < lines; i += PANEL)
                pack<factor>(from + i * line + k * deep, line, deep, std::min(PANEL, lines - i), std::min(PANEL, depth - k),
                             to + i * steps * PANEL + k * PANEL);
}

// Computes 32 x 32 sums, lines `row` apart, over `steps` steps of two packed panels; adds them to `sums` if `more`.
#ifdef __AMX_BF16__

inline void multiply(const bf16 *left, const bf16 *right, int64_t steps, float *sums, int64_t row, bool more) {
    asm volatile("" ::: "memory");  // GCC 12 does not see that tiles are loaded from memory: finish all writes to it first
    float *below = sums + SIDE * row;
    const int64_t bytes = row * sizeof(float);
    if (more) {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + SIDE, bytes);
        _tile_loadd(2, below, bytes);
        _tile_loadd(3, below + SIDE, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++, left += 2 * TILE, right += 2 * TILE) {
        _tile_loadd(4, left, 64);
        _tile_loadd(5, right, 64);
        _tile_loadd(6, right + TILE, 64);
        _tile_loadd(7, left + TILE, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(2, 7, 5);
        _tile_dpbf16ps(3, 7, 6);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + SIDE, bytes);
    _tile_stored(2, below, bytes);
    _tile_stored(3, below + SIDE, bytes);
}

#else

inline void multiply(const bf16 *left, const bf16 *right, int64_t steps, float *sums, int64_t row, bool more) {
    const int64_t LINES = 8;  // whose 16 sums of vectors stay in registers
    for (int64_t first = 0; first < PANEL; first += LINES) {
        const bf16 *lines = left + first / SIDE * TILE + first % SIDE * PANEL;
        __m512 sum[LINES][2];
        for (int64_t i = 0; i < LINES; i++)
            for (int64_t j = 0; j < 2; j++)
                sum[i][j] = more ? _mm512_loadu_ps(sums + (first + i) * row + j * SIDE) : _mm512_setzero_ps();
        for (int64_t s = 0; s < 2 * steps * TILE; s += 2 * TILE)
            for (int64_t k = 0; k < PANEL; k += 2) {  // two neighbours along the sum at a time
                const __m512bh a = (__m512bh)_mm512_load_si512(right + s + k * SIDE);
                const __m512bh b = (__m512bh)_mm512_load_si512(right + s + TILE + k * SIDE);
                for (int64_t i = 0; i < LINES; i++) {
                    int32_t pair;
                    std::memcpy(&pair, lines + s + i * PANEL + k, sizeof pair);
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, a);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, b);
                }
            }
        for (int64_t i = 0; i < LINES; i++)
            for (int64_t j = 0; j < 2; j++) _mm512_storeu_ps(sums + (first + i) * row + j * SIDE, sum[i][j]);
    }
}

#endif

// Rounds `lines` x `count` sums to bf16.
inline void put(const float *from, int64_t from_row, bf16 *to, int64_t to_row, int64_t lines, int64_t count) {
    for (int64_t i = 0; i < lines; i++, from += from_row, to += to_row)
        for (int64_t j = 0; j < count; j += PANEL) {
            const __mmask32 some = count - j >= PANEL ? ~0u : (1u << (count - j)) - 1;
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + j + SIDE), _mm512_loadu_ps(from + j));
            _mm512_mask_storeu_epi16(to + j, some, (__m512i)both);
        }
}

// Aligned memory that tiles are loaded from. Each thread keeps its own.
template <typename Number>
struct Scratch {
    std::vector<Number> held;
    Number *at = nullptr;

    Number *of(int64_t count) {
        const size_t spare = 64 / sizeof(Number);
        if (held.size() < count + spare) {
            held.resize(count + spare);
            at = held.data() + (64 - reinterpret_cast<uintptr_t>(held.data()) % 64) % 64 / sizeof(Number);
        }
        return at;
    }
};

}  // namespace

#endif
