// What few_rows.cu works on: its parts, their scales, and what is added beside their products.
#pragma once

#include "common/vec.cuh"

constexpr u32 TILE = 16;
constexpr u32 SLICE = 128;
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
    u32 m, k, shift, segments;

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

// How scales of a part are read.
struct Scales {
    const float *map;
    float offset;

    // The product is rounded before the offset is added, as on the CPU: no fused multiply-add.
    __device__ __forceinline__ float value(Scale x) const {
        return x.code == PLAIN ? x.absmax : __fadd_rn(__fmul_rn(map[x.code], x.absmax), offset);
    }
};

// Floats of a slice's scales in shared memory: 16 rows of two halves, and two more so that slices lie in other banks.
constexpr u32 STAGE = 2 * TILE + 2;

// Scales of all the block's slices, [tile][slice][row][half], by whole warps a row at a time.
template <u32 WARPS, typename T>
struct Stager {
    static constexpr u32 BATCH = 8;

    u32 row, half, rows, halves;
    Scale loaded[BATCH];

    __device__ __forceinline__ Stager(const Launch<T> &launch, u32 tiles)
        : row(threadIdx.x / 32), half(0), rows(tiles * TILE), halves(launch.k / 64) {}
    __device__ __forceinline__ bool done() const { return row >= rows; }
    __device__ __forceinline__ void next(u32 &row, u32 &half) const {
        half += 32;
        if (half >= halves) half = 0, row += WARPS;
    }
    __device__ __forceinline__ void load(const Launch<T> &launch, u32 first_tile, u32 lane) {
        u32 r = row, h = half;
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            if (r < rows) {
                const Found<T> found = launch.find(first_tile + r / TILE);
                const u32 in_part = min((first_tile - found.tile) * TILE + r, found.part.n - 1);
                const u32 element = in_part * launch.k + min(h + lane, halves - 1) * 64;
                loaded[i] = load_scale(found.part.absmax, found.part.absmax2, element >> launch.shift);
            }
            next(r, h);
        }
    }
    __device__ __forceinline__ void store(float *stage, const float *maps, const Launch<T> &launch, u32 first_tile, u32 lane,
                                          u32 slices) {
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            if (row < rows && half + lane < slices * 2) {
                const Found<T> found = launch.find(first_tile + row / TILE);
                const Scales scales = {maps + found.index * 256, found.part.offset};
                const u32 at = half + lane;
                stage[(row / TILE * slices + at / 2) * STAGE + row % TILE * 2 + at % 2] = scales.value(loaded[i]);
            }
            next(row, half);
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
