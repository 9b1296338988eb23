// Fixed-width integers, and bf16 and f16 as plain 16-bit storage: all arithmetic is in f32.
//
// The sources include nothing but each other, so that NVRTC alone compiles them. A value is rounded to nearest even when it is
// stored. Conversions to bf16 need sm_80; sm_75 compiles the kernels alone that write none (HAS_BF16).
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using i16 = short;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

#if __CUDA_ARCH__ >= 800
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

struct __align__(2) bf16 {
    u16 bits;
};

struct __align__(2) f16 {
    u16 bits;
};

__device__ __forceinline__ float to_f32(float x) { return x; }

__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

__device__ __forceinline__ float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename T>
__device__ __forceinline__ T from_f32(float x);

template <>
__device__ __forceinline__ float from_f32<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

#if HAS_BF16
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#endif

// 16 bytes of T in registers: one vector access a thread.
template <typename T>
struct __align__(16) Pack {
    static constexpr int N = 16 / sizeof(T);
    T v[N];
};

template <typename T>
__device__ __forceinline__ Pack<T> load16(const T *p) {
    return *reinterpret_cast<const Pack<T> *>(p);
}

template <typename T>
__device__ __forceinline__ void store16(T *p, const Pack<T> &x) {
    *reinterpret_cast<Pack<T> *>(p) = x;
}
