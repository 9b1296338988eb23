// AdamW over a flat buffer of parameters, in one pass. With g = (grad_scale · clip) · grad:
//
//   m += (1 − β₁)(g − m),  v = β₂ v + (1 − β₂) g²
//   p = p · keep − size · m / (√v · inverse_root + eps)                 (torch's order), or
//   p = (p − size · m / (√v · inverse_root + eps)) · keep               (decay_after: bitsandbytes' order)
//
// `step` holds what changes from step to step (common/step.cuh): size = lr / (1 − β₁ᵗ), inverse_root = 1 / √(1 − β₂ᵗ) and keep =
// 1 − lr · weight_decay, which the host computes in f64, and clip, which grad_clip leaves there. keep does not apply to the
// parameters in the ranges of `no_decay`: start and end in pairs, sorted, disjoint. β₁ comes as 1 − β₁, and β₂ also as 1 − β₂,
// because the difference is exact in f64 only. Where a gradient is not finite and step[STEP_SKIP] is 1, nothing changes.
//
// `copy` (or null) is a 16-bit copy of the new parameters for the matmuls: bf16, or f16 if copy_is_f16.
//
// Threads: two packs of 4 values a thread, blockDim.x packs apart. Blocks of 256; grid: ceil(n / 2048) in x, at least 1; a
// smaller one takes them in turn. No shared memory. n may be any, and where a pointer is not aligned values go one by one.
//
// Bytes: 28 a parameter, 30 with the copy.

#include "common/optimizer.cuh"

struct Factors {
    float grad;
    float one_less_beta1;
    float beta2;
    float one_less_beta2;
    float size;
    float inverse_root;
    float eps;
    float before;
    float after;
};

__device__ __forceinline__ void update(float &p, float &m, float &v, float g, const Factors &f, bool decay) {
    g *= f.grad;
    m += f.one_less_beta1 * (g - m);
    v = f.beta2 * v + f.one_less_beta2 * (g * g);
    const float change = f.size * __fdividef(m, __fsqrt_rn(v) * f.inverse_root + f.eps);
    p = (p * (decay ? f.before : 1.0f) - change) * (decay ? f.after : 1.0f);
}

// Elements [begin, end), N at a time.
template <int N>
__device__ __forceinline__ void update_packs(float *p, float *m, float *v, Copy copy, const float *g, Ranges no_decay,
                                             const Factors &f, u64 begin, u64 end) {
    constexpr int PACKS = 2;
    const u64 stride = u64(gridDim.x) * blockDim.x * PACKS * N;
    for (u64 first = begin + (u64(blockIdx.x) * blockDim.x * PACKS + threadIdx.x) * N; first < end; first += stride) {
        float vp[PACKS][N], vm[PACKS][N], vv[PACKS][N], vg[PACKS][N];
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + i * blockDim.x * N;
            if (n < end) {
                load_f32(g + n, vg[i]);
                load_f32(m + n, vm[i]);
                load_f32(v + n, vv[i]);
                load_f32(p + n, vp[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + i * blockDim.x * N;
            if (n >= end) break;
            u32 at = no_decay.find(n);
#pragma unroll
            for (int j = 0; j < N; ++j) update(vp[i][j], vm[i][j], vv[i][j], vg[i][j], f, !no_decay.hold(n + j, at));
            store_f32(m + n, vm[i]);
            store_f32(v + n, vv[i]);
            store_f32(p + n, vp[i]);
            copy.store(n, vp[i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 3)
    adamw_f32(float *p, float *m, float *v, u16 *copy, const float *g, const float *step, const u32 *no_decay,
              u32 no_decay_ranges, float one_less_beta1, float beta2, float one_less_beta2, float eps, u32 decay_after,
              u32 copy_is_f16, u64 n) {
    if (skipped(step)) return;
    const float keep = step[STEP_KEEP];
    const Factors f = {gradient_factor(step),
                       one_less_beta1,
                       beta2,
                       one_less_beta2,
                       step[STEP_SIZE],
                       step[STEP_INVERSE_ROOT],
                       eps,
                       decay_after ? 1.0f : keep,
                       decay_after ? keep : 1.0f};
    const Ranges ranges = {no_decay, keep == 1.0f ? 0 : no_decay_ranges};
    const Copy to = {copy, copy_is_f16 != 0};
    const bool aligned = aligned16(p) && aligned16(m) && aligned16(v) && aligned16(g) && (reinterpret_cast<u64>(copy) & 7) == 0;
    const u64 packed = aligned ? n & ~u64(3) : 0;
    update_packs<4>(p, m, v, to, g, ranges, f, 0, packed);
    update_packs<1>(p, m, v, to, g, ranges, f, packed, n);
}
