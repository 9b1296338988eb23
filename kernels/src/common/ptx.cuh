// PTX instructions that more than one kernel uses, each wrapped once: asynchronous copies to shared memory, matrix loads from it,
// the fast exponential, and barriers of part of a block.
//
// On sm_75 an asynchronous copy is a load and a store, and waiting for it is nothing: the barrier that follows does the rest.
#pragma once

#include "common/types.cuh"

__device__ __forceinline__ u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, zeros where not `valid` (`src` is then not read).
__device__ __forceinline__ void copy16(u32 dst, const void *src, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
#else
    u32 x[4] = {0, 0, 0, 0};
    if (valid) asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(src));
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
#endif
}

__device__ __forceinline__ void copy4(u32 dst, const void *src, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
#else
    u32 x = 0;
    if (valid) asm("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(src));
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst), "r"(x) : "memory");
#endif
}

__device__ __forceinline__ void store4(u32 dst, u32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst), "r"(word) : "memory");
}

__device__ __forceinline__ void store4_f32(u32 dst, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(dst), "f"(x) : "memory"); }

__device__ __forceinline__ void store16(u32 dst, const uint4 &x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ float load4_f32(u32 src) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(src));
    return x;
}

__device__ __forceinline__ uint4 load16(u32 src) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(src));
    return x;
}

__device__ __forceinline__ void store16_zero(u32 dst) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(dst), "r"(0) : "memory");
}

__device__ __forceinline__ void store16_f32(u32 dst, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// 2^x, about 2 ulp, 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh x to about 1e-6 absolute.
__device__ __forceinline__ float tanh_fast(float x) {
    float e = exp2_fast(2.885390082f * fabsf(x));
    return copysignf(1.0f - __fdividef(2.0f, e + 1.0f), x);
}

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads, a multiple of 32.
__device__ __forceinline__ void barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts this warp in without waiting for the others.
__device__ __forceinline__ void barrier_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A word that other blocks write: what they wrote before it is seen after it.
__device__ __forceinline__ u32 load_acquire(const u32 *p) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void store_release(u32 *p, u32 x) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

#if __CUDA_ARCH__ >= 900
// Whether this is the one lane of its warp that does what one lane does. The compiler knows that it is one.
__device__ __forceinline__ bool elect_one() {
    u32 chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen;
}

// The inverse of load_matrices.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// The inverse of load_matrices_transposed.
__device__ __forceinline__ void store_matrices_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
#endif
