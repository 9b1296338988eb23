// Scales and codes of 4-bit blocks, as crates/nf4 lays them out.
#pragma once

#include "common/types.cuh"

// One float a block. `load` gets from memory what `value` makes a scale of, so that loads can run ahead of their use.
struct PlainScales {
    using Loaded = float;

    const float *absmax;

    __device__ __forceinline__ Loaded load(u64 block) const { return absmax[block]; }
    __device__ __forceinline__ float value(Loaded x) const { return x; }
    __device__ __forceinline__ float get(u64 block) const { return absmax[block]; }
};

// A doubly quantised scale. The product is rounded before the offset is added, as on the CPU: no fused multiply-add.
__device__ __forceinline__ float nested_scale(float level, float absmax, float offset) {
    return __fadd_rn(__fmul_rn(level, absmax), offset);
}

// Doubly quantised.
struct NestedScales {
    struct Loaded {
        u32 code;
        float absmax;
    };

    const u8 *codes;
    const float *absmax, *map;
    float offset;

    __device__ __forceinline__ Loaded load(u64 block) const { return {codes[block], absmax[block >> 8]}; }
    __device__ __forceinline__ float value(Loaded x) const { return nested_scale(map[x.code], x.absmax, offset); }
    __device__ __forceinline__ float get(u64 block) const { return value(load(block)); }
};

__device__ __forceinline__ u32 log2_of(u32 power) { return 31 - __clz(power); }
