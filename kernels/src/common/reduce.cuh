// Sums in a fixed order: the bits depend on the launch's geometry alone.
#pragma once

#include "common/types.cuh"

// The sum over the `width` lanes (a power of two) that hold this one, in each of them.
template <typename V>
__device__ __forceinline__ V lanes_sum(V x, u32 width = 32) {
    for (u32 step = width >> 1; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// The largest of 32 lanes' words, in each.
__device__ __forceinline__ u32 warp_max(u32 x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
    for (u32 step = 16; step > 0; step >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
#endif
}

// The sum over the threads of a block of whole warps in one dimension, in each of them. `slots` holds one value a warp, and
// must not be the one of the block's last sum: with two in turn, one barrier a sum is enough.
template <typename V>
__device__ __forceinline__ V block_sum(V x, V *slots) {
    x = lanes_sum(x);
    const u32 lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    return lanes_sum(lane < warps ? slots[lane] : V(0));
}

// sum[c] += Σ over r < count of rows[r, c]. Block (32, 16): 32 columns, a sixteenth of the rows for each y. Grid: cols / 32.
__device__ __forceinline__ void add_rows(float *sum, const float *rows, u32 count, u32 cols) {
    // Rows in flight a thread.
    constexpr u32 BATCH = 8;
    __shared__ float partial[16][32];
    const u32 c = blockIdx.x * 32 + threadIdx.x;
    float mine = 0;
    for (u32 first = threadIdx.y; first < count; first += 16 * BATCH) {
        float batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            const u32 r = first + 16 * i;
            batch[i] = r < count && c < cols ? rows[u64(r) * cols + c] : 0.0f;
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) mine += batch[i];
    }
    partial[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.y == 0 && c < cols) {
        float total = 0;
#pragma unroll
        for (u32 y = 0; y < 16; ++y) total += partial[y][threadIdx.x];
        sum[c] += total;
    }
}
