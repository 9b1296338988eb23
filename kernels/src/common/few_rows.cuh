// What few_rows.cu works on: its parts, their scales, and what is added beside their products.
#pragma once

#include "common/blocks.cuh"
#include "common/vec.cuh"

constexpr u32 TILE = 16;
constexpr u32 SLICE = 128;
constexpr u32 UNIT = 2 * SLICE;
#if __CUDA_ARCH__ >= 800
// An entry and as much room again, so that the byte itself is the second byte of the address.
constexpr u32 ENTRY_SHIFT = 8;
#else
constexpr u32 ENTRY_SHIFT = 7;
#endif
constexpr u32 TABLE = 256 << ENTRY_SHIFT;

template <typename T>
struct Part {
    T *y;
    const u8 *packed;
    const void *absmax;     // codes, or floats
    const float *absmax2, *map;  // null: `absmax` are floats
    const T *bias, *b;
    float offset, scale;
    u32 n, rank;

    __device__ __forceinline__ u32 tiles() const { return (n + TILE - 1) / TILE; }
    __device__ __forceinline__ bool nested() const { return absmax2 || n == 0; }
};

// A part, its number, and which of the launch's tiles and of h's columns is its first.
template <typename T>
struct Found {
    Part<T> part;
    u32 index, tile, column;
};

template <typename T>
struct Launch {
    Part<T> parts[3];
    const T *x, *h;
    const float *code;
    u32 m, k, shift;

    // Whether a lane's scales are two neighbouring codes wherever it looks.
    __device__ __forceinline__ bool even() const {
        return shift == 6 && k % UNIT == 0 && parts[0].nested() && parts[1].nested() && parts[2].nested();
    }
    __device__ __forceinline__ u32 tiles() const { return parts[0].tiles() + parts[1].tiles() + parts[2].tiles(); }
    __device__ __forceinline__ u32 ranks() const { return parts[0].rank + parts[1].rank + parts[2].rank; }
    __device__ __forceinline__ Found<T> find(u32 tile) const {
        const u32 second = parts[0].tiles(), third = second + parts[1].tiles();
        if (tile < second) return {parts[0], 0, 0, 0};
        if (tile < third) return {parts[1], 1, second, parts[0].rank};
        return {parts[2], 2, third, parts[0].rank + parts[1].rank};
    }
};

// A scale as it lies in memory; code PLAIN: it is `absmax` itself.
struct Scale {
    u32 code;
    float absmax;
};
constexpr u32 PLAIN = 256;

__device__ __forceinline__ Scale load_scale(const void *absmax, const float *absmax2, u32 block) {
    if (absmax2) return {reinterpret_cast<const u8 *>(absmax)[block], absmax2[block >> 8]};
    return {PLAIN, reinterpret_cast<const float *>(absmax)[block]};
}

// The scales of the two halves of a slice, as they lie in memory. EVEN: two neighbouring codes and the scale of both.
template <bool EVEN>
struct Pair {
    Scale of[2];
};

template <>
struct Pair<true> {
    u32 codes;
    float absmax;
};

// How scales of a part are read.
struct Scales {
    const float *map;
    float offset;

    __device__ __forceinline__ float value(Scale x) const {
        return x.code == PLAIN ? x.absmax : nested_scale(map[x.code], x.absmax, offset);
    }
    __device__ __forceinline__ float2 values(const Pair<false> &x) const { return {value(x.of[0]), value(x.of[1])}; }
    __device__ __forceinline__ float2 values(const Pair<true> &x) const {
        return {nested_scale(map[x.codes & 255], x.absmax, offset), nested_scale(map[x.codes >> 8], x.absmax, offset)};
    }
};

// Floats of a unit's scales in shared memory: [slice][row % 8][row / 8][half].
constexpr u32 STAGE = 4 * TILE;

// Where a lane's scales of a unit come from.
template <bool EVEN>
struct ScaleReader {
    const void *absmax;
    const float *absmax2;
    u32 at;  // the element, or its block

    template <typename T>
    __device__ __forceinline__ void seek(const Part<T> &part, u32 element) {
        absmax = part.absmax, absmax2 = part.absmax2;
        at = EVEN ? element / 64 : element;
    }
    __device__ __forceinline__ void move(u32 elements) { at += EVEN ? elements / 64 : elements; }
    __device__ __forceinline__ void fetch(Pair<true> &to) const {
        asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(to.codes) : "l"(reinterpret_cast<const u8 *>(absmax) + at));
        asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(to.absmax) : "l"(absmax2 + (at >> 8)));
    }
    // `column`: of the element; those beyond k have the row's first scale.
    __device__ __forceinline__ void fetch(Pair<false> &to, u32 column, u32 k, u32 shift) const {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 c = column + i * 64;
            to.of[i] = load_scale(absmax, absmax2, (c < k ? at + i * 64 : at - column) >> shift);
        }
    }
};

// What comes beside a row's product: s h Bᵀ + bias.
template <typename T>
__device__ __forceinline__ float beside_row(const Launch<T> &launch, const Found<T> &found, u32 row, u32 x_row) {
    const Part<T> &part = found.part;
    float sum = part.bias ? to_f32(part.bias[row]) : 0.0f, product = 0;
    if (!part.b) return sum;
    const T *b = part.b + u64(row) * part.rank, *h = launch.h + x_row * launch.ranks() + found.column;
    if (part.rank % 8 == 0 && aligned16(b) && aligned16(h)) {
#pragma unroll 2
        for (u32 j = 0; j < part.rank; j += 8) {
            float u[8], v[8];
            load_f32(b + j, u);
            load_f32(h + j, v);
#pragma unroll
            for (u32 e = 0; e < 8; e++) product += u[e] * v[e];
        }
    } else {
#pragma unroll 4
        for (u32 j = 0; j < part.rank; j++) product += to_f32(b[j]) * to_f32(h[j]);
    }
    return sum + part.scale * product;
}

// Brings the B of the block's rows nearer.
template <typename T>
__device__ __forceinline__ void prefetch_beside(const Launch<T> &launch, u32 first_tile, u32 tiles) {
    if (!launch.ranks()) return;
    for (u32 i = threadIdx.x; i < tiles * TILE; i += blockDim.x) {
        const Found<T> found = launch.find(first_tile + i / TILE);
        const u32 row = (first_tile - found.tile) * TILE + i;
        if (found.part.b && row < found.part.n)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(found.part.b + u64(row) * found.part.rank));
    }
}
