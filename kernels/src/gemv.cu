// y = x Wᵀ + bias for a few rows of x [m, k], m <= 8, against W [n, k] in 4-bit blocks (plain or nested scales), for what few_rows.cu
// does not take: f32, and odd sizes. y [m, n].
//
// W is decoded to f32 and rounded to T, as dequantize.cu does; products are summed in f32. A warp takes a row of W, and a lane 8
// elements of 256 at a time, or one of 32.
//
// Launch: block 512, grid min(ceil(n / 16), multiprocessors) in x (any other is right too), no dynamic shared memory.
//
// Bytes: W read once; x comes from the caches.

#include "common/blocks.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 WARPS = 16;
// Rows of x at most.
constexpr u32 MOST = 8;

template <typename T, typename S>
struct BlockMatrix {
    const u8 *packed;
    S scales;
    const float *levels;
    u32 shift;

    template <int N>
    __device__ __forceinline__ void get(u64 at, float (&w)[N]) const {
        const float scale = scales.get(at >> shift);
        if constexpr (N == 8) {
            const u32 codes = *reinterpret_cast<const u32 *>(packed + at / 2);
#pragma unroll
            for (int j = 0; j < 8; ++j) w[j] = rounded<T>(levels[codes >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15] * scale);
        } else {
            w[0] = rounded<T>(levels[packed[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15] * scale);
        }
    }
};

// A warp takes a row of W, N elements a lane at a time.
template <int N, typename T, typename W>
__device__ __forceinline__ void row_products(T *y, const T *x, const W &matrix, const T *bias, u32 m, u32 n, u32 k) {
    for (u64 row = u64(blockIdx.x) * WARPS + threadIdx.x / 32; row < n; row += u64(gridDim.x) * WARPS) {
        float sum[MOST] = {};
        for (u32 c = threadIdx.x % 32 * N; c < k; c += 32 * N) {
            float w[N];
            matrix.get(row * k + c, w);
#pragma unroll
            for (u32 i = 0; i < MOST; ++i) {
                if (i >= m) break;
                float v[N];
                load_f32(x + u64(i) * k + c, v);
#pragma unroll
                for (int j = 0; j < N; ++j) sum[i] += w[j] * v[j];
            }
        }
#pragma unroll
        for (u32 i = 0; i < MOST; ++i) {
            if (i >= m) break;
            sum[i] = lanes_sum(sum[i]);
            if (threadIdx.x % 32 == 0) y[u64(i) * n + row] = from_f32<T>(sum[i] + (bias ? to_f32(bias[row]) : 0.0f));
        }
    }
}

template <typename T, typename S>
__device__ __forceinline__ void gemv_blocks(T *y, const T *x, const u8 *packed, const S &scales, const float *code, const T *bias,
                                            u32 m, u32 n, u32 k, u32 block_size) {
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    const BlockMatrix<T, S> matrix = {packed, scales, levels, log2_of(block_size)};
    if (aligned16(x) && aligned16(packed) && k % 8 == 0) row_products<8>(y, x, matrix, bias, m, n, k);
    else row_products<1>(y, x, matrix, bias, m, n, k);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_plain_f32(float *y, const float *x, const u8 *packed, const float *absmax, const float *code, const float *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_nested_f32(float *y, const float *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const float *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_plain_f16(f16 *y, const f16 *x, const u8 *packed, const float *absmax, const float *code, const f16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_nested_f16(f16 *y, const f16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const f16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_plain_bf16(bf16 *y, const bf16 *x, const u8 *packed, const float *absmax, const float *code, const bf16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_nested_bf16(bf16 *y, const bf16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const bf16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

#endif
