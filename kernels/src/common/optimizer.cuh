// What the optimizers share: the ranges without weight decay, and the 16-bit copy of the parameters.
#pragma once

#include "common/step.cuh"
#include "common/vec.cuh"

// Disjoint, sorted ranges: start and end in pairs.
struct Ranges {
    const u32 *bounds;
    u32 count;

    // The number of ranges that end at or before n.
    __device__ __forceinline__ u32 find(u64 n) const {
        u32 low = 0, high = count;
        while (low < high) {
            const u32 middle = (low + high) / 2;
            if (bounds[2 * middle + 1] <= n)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }

    // Whether n lies in a range; `at` is what `find` gave for an n not beyond this one, and moves along.
    __device__ __forceinline__ bool hold(u64 n, u32 &at) const {
        while (at < count && bounds[2 * at + 1] <= n) ++at;
        return at < count && bounds[2 * at] <= n;
    }
};

// A copy of the parameters in 16 bits, or none.
struct Copy {
    u16 *to;
    bool f16_bits;

    __device__ __forceinline__ u32 bits(float x) const {
        if (f16_bits) return from_f32<f16>(x).bits;
        // bf16 by integers: sm_75 has no conversion to it.
        const u32 bits = __float_as_uint(x);
        return (x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }

    template <int N>
    __device__ __forceinline__ void store(u64 n, const float (&x)[N]) const {
        if (to == nullptr) return;
        if constexpr (N == 4) {
            const u64 lo = bits(x[0]) | bits(x[1]) << 16, hi = bits(x[2]) | bits(x[3]) << 16;
            *reinterpret_cast<u64 *>(to + n) = lo | hi << 32;
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) to[n + i] = u16(bits(x[i]));
        }
    }
};

// Whether this step is to be left out: a gradient or a loss is not finite, or updates are halted (step_count.cu).
__device__ __forceinline__ bool skipped(const float *step) { return step[STEP_SKIP] != 0 && step[STEP_NOT_FINITE] != 0; }

__device__ __forceinline__ float gradient_factor(const float *step) { return step[STEP_GRAD_SCALE] * step[STEP_CLIP]; }
