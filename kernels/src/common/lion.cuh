// One element of Lion, whatever its state is held in.
#pragma once

#include "common/types.cuh"

struct LionFactors {
    float grad, beta1, one_less_beta1, beta2, one_less_beta2, lr, keep;
};

// g: the gradient, scaled.
__device__ __forceinline__ void lion(float &p, float &m, float g, const LionFactors &f, bool decay) {
    const float toward = __fmaf_rn(m, f.beta1, f.one_less_beta1 * g);
    const float sign = toward > 0 ? f.lr : (toward < 0 ? -f.lr : 0.0f);
    p = p * (decay ? f.keep : 1.0f) - sign;
    m = __fmaf_rn(m, f.beta2, f.one_less_beta2 * g);
}
