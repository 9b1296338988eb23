// Scales and codes of 4-bit blocks, as crates/nf4 lays them out.
#pragma once

#include "common/types.cuh"

// One float a block.
struct PlainScales {
    const float *absmax;

    __device__ __forceinline__ float get(u64 block) const { return absmax[block]; }
};

// Doubly quantised. The product is rounded before the offset is added, as on the CPU: no fused multiply-add.
struct NestedScales {
    const u8 *codes;
    const float *absmax, *map;
    float offset;

    __device__ __forceinline__ float get(u64 block) const {
        return __fadd_rn(__fmul_rn(map[codes[block]], absmax[block >> 8]), offset);
    }
};

__device__ __forceinline__ u32 log2_of(u32 power) { return 31 - __clz(power); }
