// The Euclidean norm √Σ x² of a flat buffer of gradients, and the factor that clips it. Both stay on the device.
//
// sum_squares_f32 writes one sum a block to partials [gridDim.x]. Eight squares at a time are summed in f32, the rest in f64: one
// f64 operation an element would take longer than reading it on consumer GPUs. Squares beyond f32's range are summed in f64. A
// NaN or an infinity stays one. Blocks of 256; grid: min(ceil(n / 8192), 8 blocks a multiprocessor), at least 1.
//
// grad_clip adds the partials in a fixed order, and writes to `step` (common/step.cuh), with s = step[STEP_GRAD_SCALE]:
//   STEP_NORM = |s| √Σ,  STEP_CLIP = min(1, max_norm / (norm + 1e-6)), 1 if max_norm is 0 (NaN stays NaN),
//   STEP_NOT_FINITE = 1 if the norm is NaN or infinite, else 0.
// One block of 256. Several calls of sum_squares_f32 with partials side by side give the norm of several buffers.
//
// Bytes: 4 an element. No dynamic shared memory.

#include "common/reduce.cuh"
#include "common/step.cuh"
#include "common/vec.cuh"

// Sums of squares below this may have lost squares that are not normal numbers.
constexpr float SMALL = 1e-28f;

template <int N>
__device__ __forceinline__ double squares(const float (&x)[N]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] * x[i];
    if (sum >= SMALL && sum < 3e38f) return double(sum);
    double wide = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) wide += double(x[i]) * double(x[i]);
    return wide;
}

extern "C" __global__ void __launch_bounds__(256) sum_squares_f32(double *partials, const float *x, u64 n) {
    __shared__ double slots[8];
    double sum = 0;
    const u64 stride = u64(gridDim.x) * blockDim.x, thread = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 packs = aligned16(x) ? n / 4 : 0;
    u64 i = thread;
    for (; i + stride < packs; i += 2 * stride) {
        const Pack<float> a = load16(x + 4 * i), b = load16(x + 4 * (i + stride));
        const float both[8] = {a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]};
        sum += squares(both);
    }
    if (i < packs) {
        const Pack<float> a = load16(x + 4 * i);
        sum += squares(a.v);
    }
    for (u64 k = 4 * packs + thread; k < n; k += stride) sum += double(x[k]) * double(x[k]);
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) grad_clip(float *step, const double *partials, u32 count, float max_norm) {
    __shared__ double slots[8];
    double sum = 0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    sum = block_sum(sum, slots);
    if (threadIdx.x != 0) return;
    const double norm = sqrt(sum) * fabs(double(step[STEP_GRAD_SCALE]));
    const double factor = double(max_norm) / (norm + 1e-6);
    step[STEP_NORM] = float(norm);
    // A comparison, not a minimum: that would turn NaN into 1.
    step[STEP_CLIP] = max_norm == 0 || factor > 1.0 ? 1.0f : float(factor);
    step[STEP_NOT_FINITE] = norm - norm == 0 ? 0.0f : 1.0f;
}
