// y = x Wᵀ + bias for a few rows of x [m, k], m <= 8, against W [n, k]: 4-bit blocks (plain or nested scales) or dense.
//
// W is decoded to f32 and rounded to T, as dequantize.cu does; products are summed in f32. y [m, n].
//
// Threads: a warp takes a row of W and reads it once for all rows of x; a lane takes 8 elements of 256 at a time. Where k is no
// multiple of 8, or a pointer is not aligned, elements go one by one.
//
// Launch: block 256, grid ceil(n / 8) in x (a smaller one takes the rest in turn), no dynamic shared memory.
//
// Bytes: W read once; x comes from the caches.

#include "common/blocks.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 MOST = 8;

// Elements at .. at + N of a matrix of 4-bit blocks, as T's values.
template <typename T, typename S>
struct BlockMatrix {
    const u8 *packed;
    S scales;
    const float *table;
    u32 shift;

    template <int N>
    __device__ __forceinline__ void get(u64 at, float (&w)[N]) const {
        const float scale = scales.get(at >> shift);
        if constexpr (N == 8) {
            const u32 codes = *reinterpret_cast<const u32 *>(packed + at / 2);
#pragma unroll
            for (int j = 0; j < 8; ++j) w[j] = rounded<T>(table[codes >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15] * scale);
        } else {
            w[0] = rounded<T>(table[packed[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15] * scale);
        }
    }
    __device__ __forceinline__ bool aligned() const { return aligned16(packed); }
};

template <typename T>
struct DenseMatrix {
    const T *w;

    template <int N>
    __device__ __forceinline__ void get(u64 at, float (&v)[N]) const {
        load_f32(w + at, v);
    }
    __device__ __forceinline__ bool aligned() const { return aligned16(w); }
};

template <int N, typename T, typename W>
__device__ __forceinline__ void row_products(float (&sum)[MOST], const W &matrix, const T *x, u64 row, u32 m, u32 k) {
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
}

template <typename T, typename W>
__device__ __forceinline__ void gemv(T *y, const T *x, const W &matrix, const T *bias, u32 m, u32 n, u32 k) {
    const bool packs = k % 8 == 0 && aligned16(x) && matrix.aligned();
    for (u64 row = u64(blockIdx.x) * WARPS + threadIdx.x / 32; row < n; row += u64(gridDim.x) * WARPS) {
        float sum[MOST] = {};
        if (packs) row_products<8>(sum, matrix, x, row, m, k);
        else row_products<1>(sum, matrix, x, row, m, k);
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
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    gemv(y, x, BlockMatrix<T, S>{packed, scales, table, log2_of(block_size)}, bias, m, n, k);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_plain_f32(float *y, const float *x, const u8 *packed, const float *absmax, const float *code, const float *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_nested_f32(float *y, const float *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const float *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_dense_f32(float *y, const float *x, const float *w, const float *bias, u32 m, u32 n, u32 k) {
    gemv(y, x, DenseMatrix<float>{w}, bias, m, n, k);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_plain_f16(f16 *y, const f16 *x, const u8 *packed, const float *absmax, const float *code, const f16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_nested_f16(f16 *y, const f16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const f16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_dense_f16(f16 *y, const f16 *x, const f16 *w, const f16 *bias, u32 m, u32 n, u32 k) {
    gemv(y, x, DenseMatrix<f16>{w}, bias, m, n, k);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_plain_bf16(bf16 *y, const bf16 *x, const u8 *packed, const float *absmax, const float *code, const bf16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_nested_bf16(bf16 *y, const bf16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const bf16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    gemv_dense_bf16(bf16 *y, const bf16 *x, const bf16 *w, const bf16 *bias, u32 m, u32 n, u32 k) {
    gemv(y, x, DenseMatrix<bf16>{w}, bias, m, n, k);
}
#endif
