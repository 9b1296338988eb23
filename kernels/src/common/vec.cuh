// Sixteen bytes of values as f32 in registers, and back.
#pragma once

#include "common/types.cuh"

// Whether p may be read and written 16 bytes at a time.
__device__ __forceinline__ bool aligned16(const void *p) { return (reinterpret_cast<u64>(p) & 15) == 0; }

__device__ __forceinline__ void unpack(const Pack<float> &x, float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = x.v[i];
}

template <typename T>
__device__ __forceinline__ void unpack(const Pack<T> &x, float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = to_f32(x.v[i]);
}

__device__ __forceinline__ Pack<float> pack(const float (&x)[4], float) {
    Pack<float> y;
#pragma unroll
    for (int i = 0; i < 4; ++i) y.v[i] = x[i];
    return y;
}

// Two 16-bit values in one word, the first in the low half.
template <typename T>
__device__ __forceinline__ u32 pair_of(float lo, float hi) {
    return u32(from_f32<T>(lo).bits) | u32(from_f32<T>(hi).bits) << 16;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ u32 pair_of<bf16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

template <>
__device__ __forceinline__ u32 pair_of<f16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
#endif

template <typename T>
__device__ __forceinline__ Pack<T> pack(const float (&x)[8], T) {
    union {
        u32 words[4];
        Pack<T> y;
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pair_of<T>(x[2 * i], x[2 * i + 1]);
    return y;
}

// N values from p: one access where N values of T are 16 bytes, else one a value.
template <int N, typename T>
__device__ __forceinline__ void load_f32(const T *p, float (&y)[N]) {
    if constexpr (N * sizeof(T) == 16) {
        unpack(load16(p), y);
    } else if constexpr (N == 8 && sizeof(T) == 4) {
        const Pack<float> lo = load16(p), hi = load16(p + 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = lo.v[i], y[i + 4] = hi.v[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = to_f32(p[i]);
    }
}

template <int N, typename T>
__device__ __forceinline__ void store_f32(T *p, const float (&x)[N]) {
    if constexpr (N * sizeof(T) == 16) {
        store16(p, pack(x, T{}));
    } else if constexpr (N == 8 && sizeof(T) == 4) {
        store16(p, Pack<float>{x[0], x[1], x[2], x[3]});
        store16(p + 4, Pack<float>{x[4], x[5], x[6], x[7]});
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) p[i] = from_f32<T>(x[i]);
    }
}

// x rounded to T and back.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
    return to_f32(from_f32<T>(x));
}

// N values as they lie in memory, in registers until they are wanted as f32.
template <typename T, int N>
struct __align__(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Held {
    T v[N];

    __device__ __forceinline__ void load(const T *p) { *this = *reinterpret_cast<const Held *>(p); }

    __device__ __forceinline__ float operator[](int i) const { return to_f32(v[i]); }
};
