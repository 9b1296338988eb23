// A frozen weight in nested 4-bit blocks that the threads a product leaves idle widen for a product after it: values as dequantize.cu
// writes them, bit for bit.
//
// Units of UNIT elements in a row go round over workers, warps of the product: worker w of W takes units w, w + W, … to the last. What is
// beyond the last the host has widened by a launch of its own: it gives a product as much as it does beside its work.
//
// Up to PARTS weights of one format lie one below the other in `out`, rows of `cols` elements, `cols + gap` apart. Each has a multiple of
// UNIT elements and of the block size, together less than 2³²; `cols` is a multiple of 8 and at least 256, `gap` a multiple of 8; `out`
// lies on 16 bytes, codes on 4.
#pragma once

#include "common/blocks.cuh"
#include "common/vec.cuh"

constexpr u32 UNIT = 1024, PARTS = 3;
// Runs of 8 elements of a lane, 256 elements apart, so that a warp reads and writes whole lines.
constexpr u32 UNIT_RUNS = UNIT / 256;

struct WidenPart {
    const u8 *packed, *codes;
    const float *absmax, *map;
    float offset;
    // The first element, of all parts'.
    u32 first;
};

struct Widen {
    const float *levels;
    // Units; log2 of the block size.
    u32 units, cols, gap, shift;
    WidenPart parts[PARTS];
};

// What a warp reads of a unit: lane i the scale of block i.
struct WidenUnit {
    u32 codes[UNIT_RUNS], part;
    NestedScales::Loaded scale;
    float value;

    __device__ __forceinline__ void load(const Widen &job, u32 unit) {
        const u32 start = unit * UNIT, lane = threadIdx.x % 32;
        part = 0;
#pragma unroll
        for (u32 i = 1; i < PARTS; i++) part += start >= job.parts[i].first;
        const WidenPart &from = job.parts[part];
        const u32 at = start - from.first, block = at >> job.shift, blocks = max(UNIT >> job.shift, 1u);
        const u32 *packed = reinterpret_cast<const u32 *>(from.packed) + at / 8 + lane;
#pragma unroll
        for (u32 i = 0; i < UNIT_RUNS; i++) codes[i] = packed[i * 32];
        scale = {from.codes[block + lane % blocks], from.absmax[block >> 8]};
    }

    // The scale's value, when its code has come.
    __device__ __forceinline__ void look_up(const Widen &job) {
        const WidenPart &from = job.parts[part];
        value = NestedScales{nullptr, nullptr, from.map, from.offset}.value(scale);
    }

    // Elements `at` on, which are in that row and column, and those of the lane's other runs. `level`: lane i has level i % 16.
    template <typename T>
    __device__ __forceinline__ void store(T *out, const Widen &job, u32 at, u32 row, u32 col, float level) const {
#pragma unroll
        for (u32 i = 0; i < UNIT_RUNS; i++) {
            const float by = __shfl_sync(~0u, value, (i * 256 + threadIdx.x % 32 * 8) >> job.shift);
            float v[8];
            // Of the lane's number the shuffle takes the low 5 bits, of which the highest makes no difference.
#pragma unroll
            for (u32 j = 0; j < 8; j++) v[j] = __shfl_sync(~0u, level, codes[i] >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0))) * by;
            store_f32(out + (u64(at) + u64(row) * job.gap), v);
            at += 256, col += 256;
            if (col >= job.cols) col -= job.cols, row++;
        }
    }
};

// Units from `first` on, `step` apart; a whole warp. While one is written the next one's scales are looked up and the one after it is
// read.
template <typename T>
__device__ __forceinline__ void widen(T *out, const Widen &job, u32 first, u32 step) {
    const float level = job.levels[threadIdx.x % 32 % 16];
    const u32 rows_on = step * UNIT / job.cols, cols_on = step * UNIT - rows_on * job.cols;
    u32 at = first * UNIT + threadIdx.x % 32 * 8, row = at / job.cols, col = at - row * job.cols;
    WidenUnit next, after;
    if (first < job.units) next.load(job, first), next.look_up(job);
    if (first + step < job.units) after.load(job, first + step);
    for (u32 unit = first; unit < job.units; unit += step) {
        const WidenUnit now = next;
        next = after;
        if (unit + step < job.units) next.look_up(job);
        if (unit + 2 * step < job.units) after.load(job, unit + 2 * step);
        now.store(out, job, at, row, col, level);
        at += step * UNIT, row += rows_on, col += cols_on;
        if (col >= job.cols) col -= job.cols, row++;
    }
}
