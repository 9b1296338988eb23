// Optimizer states in 8 bits, in blocks of 256 elements: a value is level[code] · absmax of its block (crates/nf4, dynamic.rs).
//
// The nearest code is found with one look into a table. Its key is the sign and the leading bits of a magnitude y, which leave at
// most one threshold between two codes in an entry: the entry holds the lower code above SHIFT bits, and in these the largest
// number minus the threshold's own low bits, so that adding the low bits of y carries into the code just where y is above it.
// Negative values have entries of their own, of 255 − code.
#pragma once

#include "common/optimizer.cuh"
#include "common/reduce.cuh"

constexpr u32 BLOCK = 256;
// Bits of y that are no part of the key. Levels of the signed map lie twice as far apart.
constexpr u32 SIGNED_SHIFT = 17, UNSIGNED_SHIFT = 16;

__device__ constexpr u32 keys(u32 shift) { return (23u << (23 - shift)) + 1; }

// The words of a map's tables: 256 levels, then the entries.
constexpr u32 SIGNED_WORDS = 256 + 2 * keys(SIGNED_SHIFT), UNSIGNED_WORDS = 256 + keys(UNSIGNED_SHIFT);

// A block: where its elements begin in the flat buffers, how many there are, and whether they decay.
struct Block {
    u32 start;
    u32 len;
    bool decayed;

    __device__ __forceinline__ explicit Block(uint2 entry) : start(entry.x), len(entry.y & 0xffff), decayed(entry.y >> 31) {}
};

// 0xff in the two lowest bytes where a and b are negative.
__device__ __forceinline__ u32 signs(float a, float b) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, 0xfb;" : "=r"(y) : "f"(a), "f"(b));
    return y;
}

template <bool SIGNED>
struct Map {
    static constexpr u32 SHIFT = SIGNED ? SIGNED_SHIFT : UNSIGNED_SHIFT;
    static constexpr i32 FIRST = i32((127 - 23) << (23 - SHIFT));
    const u32 *table;

    __device__ __forceinline__ float level(u32 codes, u32 j) const { return __uint_as_float(table[codes >> j * 8 & 255]); }

    // The nearest codes of 4 values, the first in the lowest byte. A code of a negative value is that of a negative level.
    __device__ __forceinline__ u32 codes(const float *y) const {
        u32 code[4];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            // What is no number becomes the largest magnitude: keys stay within the table.
            const u32 bits = __float_as_uint(fmaxf(fminf(fabsf(y[j]), 1.0f), 1.1920929e-7f));
            i32 key = i32(bits >> SHIFT);
            if (SIGNED && __float_as_int(y[j]) < 0) key += keys(SHIFT);
            code[j] = table[key + (256 - FIRST)] + (bits & ((1u << SHIFT) - 1));
        }
        // Byte 2 of a sum holds the code, after a shift by SHIFT - 16.
        if (SIGNED) {
#pragma unroll
            for (u32 j = 0; j < 4; ++j) code[j] >>= SHIFT - 16;
        }
        const u32 packed = __byte_perm(__byte_perm(code[0], code[1], 0x0062), __byte_perm(code[2], code[3], 0x0062), 0x5410);
        if (!SIGNED) return packed;
        return packed ^ __byte_perm(signs(y[0], y[1]), signs(y[2], y[3]), 0x5410);
    }
};

// The largest magnitude of 8 values.
__device__ __forceinline__ float largest(const float (&x)[8]) {
    float top = 0;
#pragma unroll
    for (u32 j = 0; j < 8; ++j) top = fmaxf(top, fabsf(x[j]));
    return top;
}

// 1 / absmax, correctly rounded for what is not tiny; 0 for 0, so that a block of zeros has the codes of 0.
__device__ __forceinline__ float reciprocal(float absmax) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(absmax));
    const float better = __fmaf_rn(r, -__fmaf_rn(absmax, r, -1.0f), r);
    return absmax > 0 ? (absmax > 1e-37f ? better : r) : 0.0f;
}

// Quotient and root, within 2 units in the last place; numbers below 1e-38 count as 0.
__device__ __forceinline__ float fast_div(float a, float b) {
    float y;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

__device__ __forceinline__ float fast_sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < __uint_as_float(0x7f800000); }

// A lane's 8 elements of a block: 4 at `lane_at`, and 4 half a block further.
__device__ __forceinline__ u32 lane_at() { return threadIdx.x % 32 * 4; }

// The lane's elements of x, the block's first element. WHOLE: all there, 16 bytes at a time; else 0 beyond `len`.
template <bool WHOLE>
__device__ __forceinline__ void load_block(const float *x, u32 len, float (&y)[8]) {
    if constexpr (WHOLE) {
        const Pack<float> lo = load16(x + lane_at()), hi = load16(x + lane_at() + BLOCK / 2);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) y[j] = lo.v[j], y[j + 4] = hi.v[j];
    } else {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            const u32 at = lane_at() + j / 4 * (BLOCK / 2) + j % 4;
            y[j] = at < len ? x[at] : 0.0f;
        }
    }
}

template <bool WHOLE>
__device__ __forceinline__ void store_block(float *x, u32 len, const float (&y)[8]) {
    if constexpr (WHOLE) {
        store16(x + lane_at(), Pack<float>{y[0], y[1], y[2], y[3]});
        store16(x + lane_at() + BLOCK / 2, Pack<float>{y[4], y[5], y[6], y[7]});
    } else {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            const u32 at = lane_at() + j / 4 * (BLOCK / 2) + j % 4;
            if (at < len) x[at] = y[j];
        }
    }
}

// A state's codes and scales, and the f32 of small parameters.
struct State {
    u8 *codes;
    float *absmax;
    float *exact;

    __device__ __forceinline__ u32 *words(u32 block) const { return reinterpret_cast<u32 *>(codes + u64(block) * BLOCK + lane_at()); }

    // The lane's values of a block, decoded.
    template <bool SIGNED>
    __device__ __forceinline__ void load(const Map<SIGNED> &map, const u32 (&words)[2], float absmax, float (&x)[8]) const {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) x[j] = map.level(words[j / 4], j % 4) * absmax;
    }

    // Encodes the block, whose lanes all call this.
    template <bool SIGNED>
    __device__ __forceinline__ void store(const Map<SIGNED> &map, u32 block, float (&x)[8]) const {
        const float top = __uint_as_float(warp_max(__float_as_uint(largest(x))));
        const float scale = reciprocal(top);
        if (threadIdx.x % 32 == 0) absmax[block] = top;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) x[j] *= scale;
        u32 *to = words(block);
        to[0] = map.codes(x);
        to[BLOCK / 8] = map.codes(x + 4);
    }
};
