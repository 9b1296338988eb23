// Eight or sixteen bytes of values: as they lie in memory, in two or four registers, until they are wanted as f32.
#pragma once

#include "common/types.cuh"

// Whether p may be read and written 16 bytes at a time.
__device__ __forceinline__ bool aligned16(const void *p) { return (reinterpret_cast<u64>(p) & 15) == 0; }

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

// The halves of a word of two values as f32.
template <typename T>
__device__ __forceinline__ float low_of(u32 word) {
    return to_f32(T{u16(word)});
}

template <typename T>
__device__ __forceinline__ float high_of(u32 word) {
    return to_f32(T{u16(word >> 16)});
}

template <>
__device__ __forceinline__ float high_of<bf16>(u32 word) {
    return __uint_as_float(word & 0xffff0000);
}

// N values of T: 8 or 16 bytes, read and written in one access, or else one by one.
template <typename T, int N, bool WHOLE = N * sizeof(T) == 8 || N * sizeof(T) == 16>
struct Held {
    T value[N];

    __device__ __forceinline__ void load(const T *p) {
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] = p[i];
    }
    __device__ __forceinline__ void store(T *p) const {
#pragma unroll
        for (int i = 0; i < N; ++i) p[i] = value[i];
    }
    __device__ __forceinline__ void unpack(float (&y)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = to_f32(value[i]);
    }
    __device__ __forceinline__ void pack(const float (&x)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] = from_f32<T>(x[i]);
    }
};

template <typename T, int N>
struct __align__(N * sizeof(T)) Held<T, N, true> {
    static constexpr int WORDS = N * sizeof(T) / 4;
    u32 word[WORDS];

    __device__ __forceinline__ void load(const T *p) { *this = *reinterpret_cast<const Held *>(p); }

    __device__ __forceinline__ void store(T *p) const { *reinterpret_cast<Held *>(p) = *this; }

    __device__ __forceinline__ void unpack(float (&y)[N]) const {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (sizeof(T) == 4) {
                y[i] = __uint_as_float(word[i]);
            } else {
                y[2 * i] = low_of<T>(word[i]);
                y[2 * i + 1] = high_of<T>(word[i]);
            }
        }
    }

    __device__ __forceinline__ void pack(const float (&x)[N]) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (sizeof(T) == 4)
                word[i] = __float_as_uint(x[i]);
            else
                word[i] = pair_of<T>(x[2 * i], x[2 * i + 1]);
        }
    }
};

// N values at p as f32, and back. Eight f32 are two accesses of 16 bytes.
template <int N, typename T>
__device__ __forceinline__ void load_f32(const T *p, float (&y)[N]) {
    if constexpr (N == 8 && sizeof(T) == 4) {
        const Pack<float> lo = load16(p), hi = load16(p + 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = lo.v[i], y[i + 4] = hi.v[i];
    } else {
        Held<T, N> held;
        held.load(p);
        held.unpack(y);
    }
}

template <int N, typename T>
__device__ __forceinline__ void store_f32(T *p, const float (&x)[N]) {
    if constexpr (N == 8 && sizeof(T) == 4) {
        store16(p, Pack<float>{x[0], x[1], x[2], x[3]});
        store16(p + 4, Pack<float>{x[4], x[5], x[6], x[7]});
    } else {
        Held<T, N> held;
        held.pack(x);
        held.store(p);
    }
}

// x rounded to T and back.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
    return to_f32(from_f32<T>(x));
}
