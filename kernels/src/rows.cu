// Rows by index: y[i] = x[rows[i]] and y[rows[i]] = x[i], for the trained rows of the head.
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

extern "C" __global__ void __launch_bounds__(128)
    scatter_rows_f32(float *y, const float *x, const u32 *rows, const i32 *targets, u32 cols) {
    scatter(y, x, rows, targets, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    scatter_rows_f16(f16 *y, const f16 *x, const u32 *rows, const i32 *targets, u32 cols) {
    scatter(y, x, rows, targets, cols);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(128)
    scatter_rows_bf16(bf16 *y, const bf16 *x, const u32 *rows, const i32 *targets, u32 cols) {
    scatter(y, x, rows, targets, cols);
}
#endif
