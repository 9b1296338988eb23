// Stochastic gradient descent over a flat buffer of parameters, in one pass, as torch does it (without dampening).
//
//   g = (grad_scale · clip) · grad + weight_decay · p
//   p = p − lr · g without a momentum buffer; with one b = μ b + g, and p = p − lr · b, or p − lr · (g + μ b) (nesterov)
//
// `step` holds lr, grad_scale and clip (common/step.cuh). weight_decay is 0 for the parameters in the ranges of `no_decay`: start
// and end in pairs, sorted, disjoint. Where a gradient is not finite and step[STEP_SKIP] is 1, nothing changes. `momentum` (b)
// may be null; `copy` (or null) is a 16-bit copy of the new parameters: bf16, or f16 if copy_is_f16.
//
// Threads: two packs of 4 values a thread, blockDim.x packs apart. Blocks of 256; grid: ceil(n / 2048) in x, at least 1; a
// smaller one takes them in turn. No shared memory. n may be any, and where a pointer is not aligned values go one by one.
//
// Bytes: 12 a parameter, 20 with momentum; 2 more with the copy.

#include "common/optimizer.cuh"

struct Factors {
    float grad;
    float lr;
    float decay;
    float momentum;
    // The update is lr · (now · g + carried · b).
    float now;
    float carried;
};

// Elements [begin, end), N at a time.
template <int N>
__device__ __forceinline__ void update_packs(float *p, float *b, Copy copy, const float *g, Ranges no_decay, const Factors &f,
                                             u64 begin, u64 end) {
    constexpr int PACKS = 2;
    const u64 stride = u64(gridDim.x) * blockDim.x * PACKS * N;
    for (u64 first = begin + (u64(blockIdx.x) * blockDim.x * PACKS + threadIdx.x) * N; first < end; first += stride) {
        float vp[PACKS][N], vb[PACKS][N], vg[PACKS][N];
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + i * blockDim.x * N;
            if (n < end) {
                load_f32(g + n, vg[i]);
                load_f32(p + n, vp[i]);
                if (b != nullptr) load_f32(b + n, vb[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + i * blockDim.x * N;
            if (n >= end) break;
            u32 at = no_decay.find(n);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float decay = no_decay.hold(n + j, at) ? 0.0f : f.decay;
                const float gradient = vg[i][j] * f.grad + decay * vp[i][j];
                if (b == nullptr) {
                    vp[i][j] -= f.lr * gradient;
                } else {
                    vb[i][j] = f.momentum * vb[i][j] + gradient;
                    vp[i][j] -= f.lr * (f.now * gradient + f.carried * vb[i][j]);
                }
            }
            store_f32(p + n, vp[i]);
            if (b != nullptr) store_f32(b + n, vb[i]);
            copy.store(n, vp[i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 3)
    sgd_f32(float *p, float *momentum, u16 *copy, const float *g, const float *step, const u32 *no_decay, u32 no_decay_ranges,
            float mu, float weight_decay, u32 nesterov, u32 copy_is_f16, u64 n) {
    if (skipped(step)) return;
    const Factors f = {gradient_factor(step), step[STEP_LR], weight_decay, mu, nesterov ? 1.0f : 0.0f, nesterov ? mu : 1.0f};
    const Ranges ranges = {no_decay, weight_decay == 0 ? 0 : no_decay_ranges};
    const Copy to = {copy, copy_is_f16 != 0};
    const bool aligned = aligned16(p) && aligned16(momentum) && aligned16(g) && (reinterpret_cast<u64>(copy) & 7) == 0;
    const u64 packed = aligned ? n & ~u64(3) : 0;
    update_packs<4>(p, momentum, to, g, ranges, f, 0, packed);
    update_packs<1>(p, momentum, to, g, ranges, f, packed, n);
}
