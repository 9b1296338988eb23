// Rows by index: y[i] = x[rows[i]] and y[rows[i]] = x[i], for the trained rows of the head; columns beside a matrix.
//
// place_columns writes scale x, x [n, cols], into columns first .. first + cols of y [n, total] with a pitch of ld, and zeros into its other
// columns: an adapter's matrix beside the base, among the columns of all adapters of that input. Threads: 256 a block, one for
// each element of y. Grid: ceil(n * total / 256) in x.
//
// scatter_rows leaves out rows whose target is negative (padding), and needs the other indices to differ. Gathering is the
// embedding's kernel. Threads: a block of 128 a row; 16 bytes a thread where the row's length and both pointers allow it.
// Grid: n rows in x. Bytes: x once, y once.

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
__device__ __forceinline__ void place(T *y, const T *x, float scale, u32 n, u32 cols, u32 first, u32 total, u32 ld) {
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= u64(n) * total) return;
    const u32 row = u32(i / total), column = u32(i % total);
    const bool inside = column >= first && column < first + cols;
    y[u64(row) * ld + column] = inside ? from_f32<T>(scale * to_f32(x[u64(row) * cols + column - first])) : from_f32<T>(0.0f);
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
