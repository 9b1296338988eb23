// Rows by index: y[i] = x[rows[i]] and y[rows[i]] = x[i], for the trained rows of the head; columns beside a matrix.
//
// place_columns writes scale x, x [n, cols], into columns first .. first + cols of y [n, total] with a pitch of ld, and zeros into its other
// columns: an adapter's matrix beside the base, among the columns of all adapters of that input. Threads: 256 a block, 16 bytes of
// y a thread where total, ld and y allow it. Grid: ceil(n * total / 2048) in x; any is right. It may be launched early.
//
// scatter_rows leaves out rows whose target is negative (padding), and needs the other indices to differ. Gathering is the
// embedding's kernel. Threads: a block of 128 a row; 16 bytes a thread where the row's length and both pointers allow it.
// Grid: n rows in x. Bytes: x once, y once.

#include "common/early.cuh"
#include "common/types.cuh"

template <typename T>
__device__ __forceinline__ void scatter(T *y, const T *x, const u32 *rows, const i32 *targets, u32 cols) {
    if (targets[blockIdx.x] < 0) return;
    const T *from = x + u64(blockIdx.x) * cols;
    T *to = y + u64(rows[blockIdx.x]) * cols;
    constexpr u32 N = Pack<T>::N;
    if (cols % N == 0 && (u64(x) | u64(y)) % 16 == 0) {
        for (u32 i = threadIdx.x * N; i < cols; i += blockDim.x * N) store16(to + i, load16(from + i));
    } else {
        for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
    }
}

template <typename T>
__device__ __forceinline__ T placed(const T *x, float scale, u32 row, u32 column, u32 cols, u32 first) {
    const bool inside = column >= first && column < first + cols;
    return inside ? from_f32<T>(scale * to_f32(x[u64(row) * cols + column - first])) : from_f32<T>(0.0f);
}

template <typename T>
__device__ __forceinline__ void place(T *y, const T *x, float scale, u32 n, u32 cols, u32 first, u32 total, u32 ld) {
    begin_early();
    constexpr u32 N = Pack<T>::N;
    const bool packed = total % N == 0 && ld % N == 0 && u64(y) % 16 == 0;
    const u32 each = packed ? N : 1, per_row = total / each, i = blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 at = i; at < u64(n) * per_row; at += u64(gridDim.x) * blockDim.x) {
        const u32 row = u32(at / per_row), column = u32(at % per_row) * each;
        T *to = y + u64(row) * ld + column;
        Pack<T> pack;
#pragma unroll
        for (u32 j = 0; j < N; ++j)
            if (j < each) pack.v[j] = placed(x, scale, row, column + j, cols, first);
        if (packed) store16(to, pack);
        else *to = pack.v[0];
    }
}

extern "C" __global__ void __launch_bounds__(256)
    place_columns_f16(f16 *y, const f16 *x, float scale, u32 n, u32 cols, u32 first, u32 total, u32 ld) {
    place(y, x, scale, n, cols, first, total, ld);
}

extern "C" __global__ void __launch_bounds__(128)
    scatter_rows_f32(float *y, const float *x, const u32 *rows, const i32 *targets, u32 cols) {
    scatter(y, x, rows, targets, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    scatter_rows_f16(f16 *y, const f16 *x, const u32 *rows, const i32 *targets, u32 cols) {
    scatter(y, x, rows, targets, cols);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256)
    place_columns_bf16(bf16 *y, const bf16 *x, float scale, u32 n, u32 cols, u32 first, u32 total, u32 ld) {
    place(y, x, scale, n, cols, first, total, ld);
}

extern "C" __global__ void __launch_bounds__(128)
    scatter_rows_bf16(bf16 *y, const bf16 *x, const u32 *rows, const i32 *targets, u32 cols) {
    scatter(y, x, rows, targets, cols);
}
#endif
