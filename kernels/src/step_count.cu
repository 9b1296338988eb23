// The number t of the step that follows, and what depends on it: after grad_clip, before the update. `step` is that of
// common/step.cuh.
//
// A step is not finite if step[STEP_NOT_FINITE] says so or one of `losses` [loss_count] (may be null) is NaN or infinite. Where the
// loss scale cannot be at fault (step[STEP_LOSS_SCALE] is `least` or less, 0 without one) it sets *halted, which the host alone
// clears. A step that is not finite or comes while *halted is set leaves *steps, and leaves 1 in step[STEP_NOT_FINITE]: the update
// changes nothing. Any other has the number t = *steps + 1, and with it, in f64 as the host computes them,
//   STEP_SIZE = lr / (1 − β₁ᵗ),  STEP_INVERSE_ROOT = 1 / √(1 − β₂ᵗ),  STEP_BETA2 = 1 − t^exponent.
// beta1, beta2 and exponent are the bits of f64 numbers.
//
// Launch: one thread works. No shared memory.

#include "common/step.cuh"

// βᵗ, by the products of ops::step::power in their order.
__device__ __forceinline__ double power(double beta, u32 t) {
    double result = 1.0;
    for (;;) {
        if (t & 1) result = __dmul_rn(result, beta);
        t >>= 1;
        if (t == 0) return result;
        beta = __dmul_rn(beta, beta);
    }
}

__device__ __forceinline__ double from_bits(u64 bits) { return __longlong_as_double(i64(bits)); }

extern "C" __global__ void __launch_bounds__(32)
    step_count(float *step, u32 *steps, u32 *halted, const float *losses, u32 loss_count, u64 beta1, u64 beta2, u64 exponent,
               float least) {
    if (threadIdx.x != 0) return;
    bool finite = step[STEP_NOT_FINITE] == 0;
    for (u32 i = 0; i < loss_count; ++i) finite = finite && losses[i] - losses[i] == 0;
    if (!finite && step[STEP_LOSS_SCALE] <= least) *halted = 1;
    if (!finite || *halted != 0) {
        step[STEP_NOT_FINITE] = 1;
        return;
    }
    const u32 t = *steps + 1;
    *steps = t;
    const double lr = *reinterpret_cast<const double *>(step + STEP_WIDE_LR);
    step[STEP_SIZE] = float(lr / __dadd_rn(1.0, -power(from_bits(beta1), t)));
    step[STEP_INVERSE_ROOT] = float(1.0 / sqrt(__dadd_rn(1.0, -power(from_bits(beta2), t))));
    step[STEP_BETA2] = float(1.0 - pow(double(t), from_bits(exponent)));
}
