// Lion (Chen et al. 2023) over a flat buffer of parameters, in one pass. With g = (grad_scale · clip) · grad:
//
//   p = p · keep − lr · sign(β₁ m + (1 − β₁) g),  m = β₂ m + (1 − β₂) g
//
// `step` holds lr, keep = 1 − lr · weight_decay, grad_scale and clip (common/step.cuh). keep does not apply to the parameters in the
// ranges of `no_decay`: start and end in pairs, sorted, disjoint. Where a gradient is not finite and step[STEP_SKIP] is 1, nothing
// changes.
//
// Threads: two packs of 4 values a thread, blockDim.x packs apart. Blocks of 256; grid: ceil(n / 2048) in x, at least 1; a
// smaller one takes them in turn. No shared memory. n may be any, and where a pointer is not aligned values go one by one.
//
// Bytes: 20 a parameter.

#include "common/lion.cuh"
#include "common/optimizer.cuh"

// Elements [begin, end), N at a time.
template <int N>
__device__ __forceinline__ void update_packs(float *p, float *m, const float *g, Ranges no_decay, const LionFactors &f, u64 begin,
                                             u64 end) {
    constexpr int PACKS = 2;
    const u64 stride = u64(gridDim.x) * blockDim.x * PACKS * N;
    for (u64 first = begin + (u64(blockIdx.x) * blockDim.x * PACKS + threadIdx.x) * N; first < end; first += stride) {
        float vp[PACKS][N], vm[PACKS][N], vg[PACKS][N];
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + i * blockDim.x * N;
            if (n < end) {
                load_f32(g + n, vg[i]);
                load_f32(m + n, vm[i]);
                load_f32(p + n, vp[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + i * blockDim.x * N;
            if (n >= end) break;
            u32 at = no_decay.find(n);
#pragma unroll
            for (int j = 0; j < N; ++j) lion(vp[i][j], vm[i][j], vg[i][j] * f.grad, f, !no_decay.hold(n + j, at));
            store_f32(m + n, vm[i]);
            store_f32(p + n, vp[i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 3)
    lion_f32(float *p, float *m, const float *g, const float *step, const u32 *no_decay, u32 no_decay_ranges, float beta1,
             float one_less_beta1, float beta2, float one_less_beta2, u64 n) {
    if (skipped(step)) return;
    const LionFactors f = {gradient_factor(step), beta1, one_less_beta1, beta2, one_less_beta2, step[STEP_LR], step[STEP_KEEP]};
    const Ranges ranges = {no_decay, f.keep == 1.0f ? 0 : no_decay_ranges};
    const u64 packed = aligned16(p) && aligned16(m) && aligned16(g) ? n & ~u64(3) : 0;
    update_packs<4>(p, m, g, ranges, f, 0, packed);
    update_packs<1>(p, m, g, ranges, f, packed, n);
}
