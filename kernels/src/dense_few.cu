// y = x Wᵀ for a few rows of x [m, k], m <= 8, and a dense W [n, k], 16-bit: the head and the adapters' A in generation.
// y [m, n] in U. Sums in f32.
//
// A group of warps takes a row of W, each warp a stretch of its columns 8 at a time a lane; `group` warps a row: 1 where rows are
// many, else up to 8, whose sums meet in shared memory. x comes from the first-level cache, W passes it by.
//
// Launch: block 256, grid any, best enough that every multiprocessor holds eight blocks or every row has its group. group: 1, 2, 4
// or 8. k a multiple of 8, x and W on 16 bytes.
//
// Bytes: W once.

#include "common/early.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 MOST = 8;

__device__ __forceinline__ uint4 load_once(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

template <typename T>
__device__ __forceinline__ void widen(float (&y)[8], const uint4 &v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) y[2 * i] = low_of<T>(words[i]), y[2 * i + 1] = high_of<T>(words[i]);
}

// Sums of one row of W over columns first, first + step, ... below k: M rows of x.
template <u32 M, typename T>
__device__ __forceinline__ void row_sums(float (&sum)[M], const T *row, const T *x, u32 m, u32 k, u32 first, u32 step) {
    // Loads of W in flight.
    constexpr u32 AHEAD = 4;
    for (u32 c = first; c < k; c += AHEAD * step) {
        uint4 w[AHEAD];
#pragma unroll
        for (u32 a = 0; a < AHEAD; ++a)
            w[a] = c + a * step < k ? load_once(row + c + a * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (u32 a = 0; a < AHEAD; ++a) {
            if (c + a * step >= k) break;
            float u[8];
            widen<T>(u, w[a]);
#pragma unroll
            for (u32 i = 0; i < M; ++i) {
                if (i >= m) break;
                float v[8];
                widen<T>(v, *reinterpret_cast<const uint4 *>(x + u64(i) * k + c + a * step));
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i] += u[j] * v[j];
            }
        }
    }
}

template <u32 M, typename U, typename T>
__device__ __forceinline__ void dense_few(U *y, const T *x, const T *w, u32 m, u32 n, u32 k, u32 group) {
    __shared__ float sums[8][MOST];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = 8 / group, part = warp % group;
    for (u32 first = blockIdx.x * rows; first < n; first += gridDim.x * rows) {
        const u32 row = first + warp / group;
        float sum[M] = {};
        if (row < n) row_sums(sum, w + u64(row) * k, x, m, k, (part * 32 + lane) * 8, group * 256);
#pragma unroll
        for (u32 i = 0; i < M; ++i)
            if (i < m) sum[i] = lanes_sum(sum[i]);
        if (group > 1) {
            if (lane == 0)
#pragma unroll
                for (u32 i = 0; i < M; ++i)
                    if (i < m) sums[warp][i] = sum[i];
            __syncthreads();
            if (part == 0 && lane == 0) {
                for (u32 other = 1; other < group; ++other)
#pragma unroll
                    for (u32 i = 0; i < M; ++i)
                        if (i < m) sum[i] += sums[warp + other][i];
            }
            __syncthreads();
        }
        if (part == 0 && lane == 0 && row < n)
#pragma unroll
            for (u32 i = 0; i < M; ++i)
                if (i < m) y[u64(i) * n + row] = from_f32<U>(sum[i]);
    }
}

template <typename U, typename T>
__device__ __forceinline__ void dense_few(U *y, const T *x, const T *w, u32 m, u32 n, u32 k, u32 group) {
    begin_early();
    if (m == 1) dense_few<1>(y, x, w, m, n, k, group);
    else dense_few<MOST>(y, x, w, m, n, k, group);
}

extern "C" __global__ void __launch_bounds__(256)
    dense_few_f16(f16 *y, const f16 *x, const f16 *w, u32 m, u32 n, u32 k, u32 group) {
    dense_few(y, x, w, m, n, k, group);
}

extern "C" __global__ void __launch_bounds__(256)
    dense_few_f32_f16(float *y, const f16 *x, const f16 *w, u32 m, u32 n, u32 k, u32 group) {
    dense_few(y, x, w, m, n, k, group);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256)
    dense_few_bf16(bf16 *y, const bf16 *x, const bf16 *w, u32 m, u32 n, u32 k, u32 group) {
    dense_few(y, x, w, m, n, k, group);
}

extern "C" __global__ void __launch_bounds__(256)
    dense_few_f32_bf16(float *y, const bf16 *x, const bf16 *w, u32 m, u32 n, u32 k, u32 group) {
    dense_few(y, x, w, m, n, k, group);
}
#endif
