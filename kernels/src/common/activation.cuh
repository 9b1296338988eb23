// What the gate of a gated unit goes through, and its slope: the formulas of crates/tensor/src/ops/glu.rs.
#pragma once

#include "common/types.cuh"

enum Activation : u32 { SILU = 0, GELU_TANH = 1, GELU = 2 };

struct Act {
    float value;
    float slope;
};

// Within a few units in the last place; infinite beyond f32's range, as the division by it then gives 0.
__device__ __forceinline__ float exp_f32(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896f));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Φ(x), as the CPU computes it.
__device__ __forceinline__ float normal_cdf(float x) {
    const float z = fabsf(x) * 0.70710678118654752f;
    const float t = reciprocal(1.0f + 0.5f * z);
    float p = 1.4879116e-1f;
    p = p * t - 7.0184727e-1f;
    p = p * t + 1.2061695f;
    p = p * t - 7.6198419e-1f;
    p = p * t - 2.5994683e-2f;
    p = p * t - 2.751209e-2f;
    p = p * t + 4.4362343e-2f;
    p = p * t + 3.8460637e-1f;
    p = p * t + 9.988684e-1f;
    p = p * t - 1.2654595f;
    const float tail = 0.5f * (t * exp_f32(p - z * z));
    return x < 0 ? tail : 1.0f - tail;
}

template <u32 ACTIVATION>
__device__ __forceinline__ Act activate(float x) {
    if constexpr (ACTIVATION == SILU) {
        const float s = reciprocal(1.0f + exp_f32(-x));
        return {x * s, s + x * s * (1.0f - s)};
    } else if constexpr (ACTIVATION == GELU_TANH) {
        constexpr float TWICE_ROOT = 1.595769f;  // 2 √(2/π)
        const float square = x * x;
        const float s = reciprocal(1.0f + exp_f32(-TWICE_ROOT * x * (1.0f + 0.044715f * square)));
        return {x * s, s + x * s * (1.0f - s) * (TWICE_ROOT * (1.0f + 0.134145f * square))};
    } else {
        const float cdf = normal_cdf(x);
        return {x * cdf, cdf + x * (0.3989423f * exp_f32(-0.5f * x * x))};
    }
}
