// Products of units of 4-bit codes with a few rows of x, as few_rows.cu describes them.
#pragma once

#include "common/early.cuh"
#include "common/few_rows.cuh"
#include "common/mma.cuh"

// What a lane loads of a unit: 16 bytes of two rows in both slices, and two scales.
template <bool EVEN>
struct Fetched {
    uint4 codes[2][2];
    Pair<EVEN> scales;
};

// Byte `i` of `word` as a pair of T; `place`: the lane's four bytes of an entry.
template <int I>
__device__ __forceinline__ u32 pair(const u8 *table, u32 word, u32 place) {
    u32 at;
    if constexpr (ENTRY_SHIFT == 8) asm("prmt.b32 %0, %1, %2, %3;" : "=r"(at) : "r"(word), "r"(place), "n"(0x5504 | I << 4));
    else at = (I == 0 ? word << 7 : word >> (I * 8 - 7)) & 0x7f80 | place;
    return *reinterpret_cast<const u32 *>(table + at);
}

// The table's levels and the parts' maps of scales on their way to shared memory.
template <u32 THREADS>
struct Tables {
    static constexpr u32 MAPS = (3 * 256 + THREADS - 1) / THREADS;

    float level, map[MAPS];

    template <typename T>
    __device__ __forceinline__ Tables(const Launch<T> &launch) : level(launch.code[threadIdx.x % 16]) {
#pragma unroll
        for (u32 j = 0; j < MAPS; j++) {
            const u32 i = j * THREADS + threadIdx.x;
            const float *from = i < 256 ? launch.parts[0].map : i < 512 ? launch.parts[1].map : launch.parts[2].map;
            map[j] = i < 3 * 256 && from ? from[i % 256] : 0.0f;
        }
    }
    template <typename T>
    __device__ __forceinline__ void store(u8 *table) const {
        for (u32 i = threadIdx.x / 8; i < 256; i += blockDim.x / 8) {
            const u32 word = pack2<T>(__shfl_sync(~0u, level, i / 16), __shfl_sync(~0u, level, i % 16));
            *reinterpret_cast<uint4 *>(table + (i << ENTRY_SHIFT) + threadIdx.x % 8 * 16) = make_uint4(word, word, word, word);
        }
    }
    template <typename T>
    __device__ __forceinline__ void store(u8 *table, float *maps) const {
        store<T>(table);
#pragma unroll
        for (u32 j = 0; j < MAPS; j++)
            if (j * THREADS + threadIdx.x < 3 * 256) maps[j * THREADS + threadIdx.x] = map[j];
    }
};

// How the scales of a tile are read.
template <typename T>
__device__ __forceinline__ Scales scales_of(const Launch<T> &launch, const float *maps, u32 tile) {
    const Found<T> found = launch.find(tile);
    return {maps + found.index * 256, found.part.offset};
}

// A lane's two scales of a unit, of row lane % 16 in slice lane / 16, to their place.
__device__ __forceinline__ void stage_scales(float *stage, float2 scales, u32 lane) {
    *reinterpret_cast<float2 *>(stage + lane / 16 * (2 * TILE) + lane % 8 * 4 + lane / 8 % 2 * 2) = scales;
}

// x in 16 bytes: [slice][row][word][lane % 4], zeros beyond k. Odd rows have neighbouring words exchanged, so that two rows lie in
// other banks. Asynchronous.
template <typename T>
__device__ __forceinline__ void hold_x(u32 to, const Launch<T> &launch, u32 units) {
    const u32 words = units * (UNIT / 8);
    for (u32 row = 0; row < launch.m; row++)
        for (u32 word = threadIdx.x; word < words; word += blockDim.x) {
            const u32 place = ((word / 16 * launch.m + row) * 4 + (word % 4 ^ row % 2)) * 4 + word / 4 % 4;
            const bool valid = word * 8 < launch.k;
            copy16(to + place * 16, launch.x + (valid ? row * launch.k + word * 8 : 0), valid);
        }
    copy_commit();
}

// The lane's part of B: 8 columns of its row of x (of the first or second four rows) at a time, if it holds one. Lanes without one
// have zeros in `b` from the start and keep them.
template <int GROUPS, bool HELD, typename T>
struct Columns {
    const T *x;  // the first row's, where x is not held
    u32 even, odd, step;  // where the even and the odd words of the first slice lie; from a slice to the next
    bool valid[GROUPS];
    uint4 b[2][GROUPS];

    __device__ __forceinline__ Columns(u32 held, const Launch<T> &launch, u32 lane) {
        const u32 row = lane / 8;
        if constexpr (!HELD) x = launch.x + row * launch.k + lane % 4 * 32;
        step = launch.m * (SLICE * 2);
        even = held + row * 256 + row % 2 * 64 + lane % 4 * 16, odd = even - row % 2 * 128;
#pragma unroll
        for (u32 j = 0; j < GROUPS; j++) {
            valid[j] = lane / 4 % 2 == lane % 4 / 2 && row + j * 4 < launch.m;
            b[0][j] = b[1][j] = make_uint4(0, 0, 0, 0);
        }
    }
    // Word WORD of slice S of `unit`.
    template <u32 WORD, u32 S>
    __device__ __forceinline__ void load(const Launch<T> &launch, u32 unit, u32 lane) {
#pragma unroll
        for (u32 j = 0; j < GROUPS; j++) {
            uint4 &to = b[S][j];
            if constexpr (HELD) {
                const u32 at = (WORD % 2 ? odd : even) + (unit * 2 + S) * step;
                asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                             : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                             : "r"(at + WORD * 64 + j * 1024), "r"(u32(valid[j])));
            } else {
                const u32 column = unit * UNIT + S * SLICE + WORD * 8;
                to = make_uint4(0, 0, 0, 0);
                if (valid[j] && column + lane % 4 * 32 < launch.k) to = *reinterpret_cast<const uint4 *>(x + j * 4 * launch.k + column);
            }
        }
    }
};

// The warp's number, known to the compiler to be the same in all lanes.
__device__ __forceinline__ u32 warp_of_block() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// One word of both slices of a unit: c[slice][group] of rows g and g + 8.
template <u32 WORD, int GROUPS, bool HELD, bool EVEN, typename T>
__device__ __forceinline__ void add_word(float (&c)[2][GROUPS][4], const Fetched<EVEN> &from, const u8 *table,
                                         Columns<GROUPS, HELD, T> &columns, const Launch<T> &launch, u32 unit, u32 lane, u32 place) {
    const auto word = [](const uint4 &x) { return WORD == 0 ? x.x : WORD == 1 ? x.y : WORD == 2 ? x.z : x.w; };
    columns.template load<WORD, 0>(launch, unit, lane);
    columns.template load<WORD, 1>(launch, unit, lane);
#pragma unroll
    for (u32 s = 0; s < 2; s++) {
        const u32 upper = word(from.codes[s][0]), lower = word(from.codes[s][1]);
        const u32 first[4] = {pair<0>(table, upper, place), pair<0>(table, lower, place), pair<1>(table, upper, place),
                              pair<1>(table, lower, place)};
        const u32 second[4] = {pair<2>(table, upper, place), pair<2>(table, lower, place), pair<3>(table, upper, place),
                               pair<3>(table, lower, place)};
#pragma unroll
        for (u32 j = 0; j < GROUPS; j++) {
            const uint4 &b = columns.b[s][j];
            mma<T>(c[s][j], first, b.x, b.y);
            mma<T>(c[s][j], second, b.z, b.w);
        }
    }
}

// Adds a unit's sums, for rows 0..4 of x and, with two groups, 4..8: acc[group] of rows g and g + 8. `stage`: the unit's scales.
template <int GROUPS, bool HELD, bool EVEN, typename T>
__device__ __forceinline__ void add_unit(float (&acc)[GROUPS][2], const Fetched<EVEN> &from, const float *stage, const u8 *table,
                                         Columns<GROUPS, HELD, T> &columns, const Launch<T> &launch, u32 unit, u32 lane, u32 place) {
    float c[2][GROUPS][4] = {};
    add_word<0>(c, from, table, columns, launch, unit, lane, place);
    add_word<1>(c, from, table, columns, launch, unit, lane, place);
    add_word<2>(c, from, table, columns, launch, unit, lane, place);
    add_word<3>(c, from, table, columns, launch, unit, lane, place);
#pragma unroll
    for (u32 s = 0; s < 2; s++) {
        const float4 scales = *reinterpret_cast<const float4 *>(stage + s * (2 * TILE) + lane / 4 * 4);
#pragma unroll
        for (u32 j = 0; j < GROUPS; j++) {
            acc[j][0] = fmaf(c[s][j][1], scales.y, fmaf(c[s][j][0], scales.x, acc[j][0]));
            acc[j][1] = fmaf(c[s][j][3], scales.w, fmaf(c[s][j][2], scales.z, acc[j][1]));
        }
    }
}

// Leaves a warp's sums of a tile, [row of W][row of x], and begins anew.
template <int GROUPS>
__device__ __forceinline__ void leave_sums(float *sums, float (&acc)[GROUPS][2], u32 m, u32 lane) {
#pragma unroll
    for (u32 j = 0; j < GROUPS; j++) {
        const u32 row = lane % 4 + j * 4;
        if (row < m) sums[lane / 4 * m + row] = acc[j][0], sums[(lane / 4 + 8) * m + row] = acc[j][1];
        acc[j][0] = acc[j][1] = 0;
    }
}

// Adds up the warps' sums of each tile, in the order of its first units, and what comes beside them. The units in turn are those of
// the block's line, or of each tile.
template <u32 WARPS, bool LINE, typename T>
__device__ __forceinline__ void finish(const float *sums, const Launch<T> &launch, u32 first_tile, u32 tiles) {
    const u32 units = (launch.k + UNIT - 1) / UNIT;
    for (u32 i = threadIdx.x; i < tiles * TILE * launch.m; i += blockDim.x) {
        const u32 x_row = i % launch.m, row_in_tile = i / launch.m % TILE, tile = i / (launch.m * TILE);
        const Found<T> found = launch.find(first_tile + tile);
        const u32 row = (first_tile + tile - found.tile) * TILE + row_in_tile;
        if (row >= found.part.n) continue;
        const float beside = beside_row(launch, found, row, x_row);
        const u32 first = LINE ? tile * units : 0, warps = min(units, WARPS);
        float sum = 0;
#pragma unroll 8
        for (u32 j = 0; j < warps; j++)
            sum += sums[((tile * WARPS + (first + j) % WARPS) * TILE + row_in_tile) * launch.m + x_row];
        const Part<T> &part = found.part;
        sum += beside;
        part.y[u64(x_row) * part.n + row] = from_f32<T>(sum);
    }
}

// A kernel's arguments as a Launch.
#define PART(I) \
    { \
        y##I, packed##I, absmax##I, absmax2_##I, map##I, bias##I, b##I, offset##I, scale##I, n##I, rank##I \
    }
#define LAUNCH \
    { \
        {PART(0), PART(1), PART(2)}, x, h, code, m, k, u32(31 - __clz(block_size)) \
    }
