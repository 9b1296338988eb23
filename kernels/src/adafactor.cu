// Adafactor (Shazeer and Stern 2018) over a flat buffer of matrices, as transformers does it with relative_step and
// scale_parameter off. For a matrix of R rows and C columns (a vector is one row), with g = (grad_scale · clip) · grad:
//
//   row_i = β row_i + (1 − β) mean_j (g_ij² + eps),  col_j = β col_j + (1 − β) mean_i (g_ij² + eps)
//   u_ij = g_ij / √(row_i / mean row) / √col_j,  p = p · keep − lr / max(1, rms(u) / threshold) · u
//
// `step` holds lr, keep, grad_scale, clip and β = 1 − t^decay_rate (common/step.cuh). Where a gradient is not finite and
// step[STEP_SKIP] is 1, nothing changes. `matrices` holds 8 words each: first element in p and grad; R; C; where its rows and its
// columns begin in row and col; the number of the matrix's first group of 32 columns among all; 1 if it decays; 0.
//
// Four launches, each over all `count` matrices, of `rows` rows and `groups` groups of columns in all:
//   adafactor_rows    a warp a row: block 256, grid ceil(rows / 8)
//   adafactor_cols    32 columns a block, an eighth of the rows for each y: block (32, 8), grid `groups`
//   adafactor_rms     a block a matrix: block 512, grid `count`; leaves mean row and lr / max(1, rms / threshold) in factors [2 count]
//   adafactor_update  a warp a row: block 256, grid ceil(rows / 8)
// Sums have a fixed order: the bits do not change from run to run.
//
// Bytes: 24 a parameter in all.

#include "common/optimizer.cuh"
#include "common/reduce.cuh"

struct Matrix {
    u32 start, rows, cols, row_at, col_at, group_at, decayed, unused;
};

// The last of the matrices whose `at` is not beyond n.
template <u32 Matrix::*AT>
__device__ __forceinline__ u32 find(const Matrix *matrices, u32 count, u32 n) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (matrices[middle].*AT <= n)
            low = middle;
        else
            high = middle;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(256)
    adafactor_rows(float *row, const float *g, const float *step, const u32 *matrices, u32 count, u32 rows, float eps) {
    const u32 n = blockIdx.x * 8 + threadIdx.x / 32;
    if (n >= rows || skipped(step)) return;
    const Matrix *all = reinterpret_cast<const Matrix *>(matrices);
    const Matrix m = all[find<&Matrix::row_at>(all, count, n)];
    const float *from = g + m.start + u64(n - m.row_at) * m.cols, factor = gradient_factor(step), beta = step[STEP_BETA2];
    float sum = 0;
    for (u32 j = threadIdx.x % 32; j < m.cols; j += 32) {
        const float x = factor * from[j];
        sum += x * x + eps;
    }
    sum = lanes_sum(sum);
    if (threadIdx.x % 32 == 0) row[n] = beta * row[n] + (1.0f - beta) * (sum / float(m.cols));
}

extern "C" __global__ void __launch_bounds__(256)
    adafactor_cols(float *col, const float *g, const float *step, const u32 *matrices, u32 count, float eps) {
    __shared__ float partial[8][32];
    if (skipped(step)) return;
    const Matrix *all = reinterpret_cast<const Matrix *>(matrices);
    const Matrix m = all[find<&Matrix::group_at>(all, count, blockIdx.x)];
    const u32 j = (blockIdx.x - m.group_at) * 32 + threadIdx.x;
    const float factor = gradient_factor(step), beta = step[STEP_BETA2];
    float sum = 0;
    if (j < m.cols) {
#pragma unroll 8
        for (u32 i = threadIdx.y; i < m.rows; i += 8) {
            const float x = factor * g[m.start + u64(i) * m.cols + j];
            sum += x * x + eps;
        }
    }
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || j >= m.cols) return;
#pragma unroll
    for (u32 y = 1; y < 8; ++y) sum += partial[y][threadIdx.x];
    col[m.col_at + j] = beta * col[m.col_at + j] + (1.0f - beta) * (sum / float(m.rows));
}

extern "C" __global__ void __launch_bounds__(512)
    adafactor_rms(float *factors, const float *row, const float *col, const float *g, const float *step, const u32 *matrices,
                  float threshold) {
    __shared__ float slots[2][16];
    if (skipped(step)) return;
    const Matrix m = reinterpret_cast<const Matrix *>(matrices)[blockIdx.x];
    float sum = 0;
    for (u32 i = threadIdx.x; i < m.rows; i += blockDim.x) sum += row[m.row_at + i];
    const float mean = block_sum(sum, slots[0]) / float(m.rows), factor = gradient_factor(step);
    sum = 0;
    // A warp a row, or all threads along few rows.
    const u32 wide = m.cols >= 512 ? blockDim.x : 32, y = threadIdx.x / wide, ys = blockDim.x / wide;
    for (u32 i = y; i < m.rows; i += ys) {
        const float *from = g + m.start + u64(i) * m.cols, r = mean / row[m.row_at + i];
        float part = 0;
        for (u32 j = threadIdx.x % wide; j < m.cols; j += wide) {
            const float x = factor * from[j];
            part += x * x / col[m.col_at + j];
        }
        sum += r * part;
    }
    sum = block_sum(sum, slots[1]);
    if (threadIdx.x != 0) return;
    const float rms = sqrtf(sum / (float(m.rows) * float(m.cols)));
    factors[2 * blockIdx.x] = mean;
    factors[2 * blockIdx.x + 1] = step[STEP_LR] / fmaxf(1.0f, rms / threshold);
}

extern "C" __global__ void __launch_bounds__(256)
    adafactor_update(float *p, const float *row, const float *col, const float *factors, const float *g, const float *step,
                     const u32 *matrices, u32 count, u32 rows) {
    const u32 n = blockIdx.x * 8 + threadIdx.x / 32;
    if (n >= rows || skipped(step)) return;
    const Matrix *all = reinterpret_cast<const Matrix *>(matrices);
    const u32 at = find<&Matrix::row_at>(all, count, n);
    const Matrix m = all[at];
    const u64 first = m.start + u64(n - m.row_at) * m.cols;
    const float scale = factors[2 * at + 1] * gradient_factor(step) * rsqrtf(row[n] / factors[2 * at]);
    const float keep = m.decayed ? step[STEP_KEEP] : 1.0f;
    for (u32 j = threadIdx.x % 32; j < m.cols; j += 32)
        p[first + j] = p[first + j] * keep - scale * g[first + j] * rsqrtf(col[m.col_at + j]);
}
