// The scale of a loss whose gradients are computed in f16, as it changes on the device.
//
// scaler[0] is the scale S, scaler[1] the number of steps with finite gradients since it last changed.
//
// loss_scale_divide: before the update. step[STEP_GRAD_SCALE] = 1 / S, step[STEP_LOSS_SCALE] = S.
//
// loss_scale_update: after it. A step whose gradients were not finite halves S, to `least` at the least; `interval` steps in a
// row with finite ones double it.
//
// Launch: one thread each. `step` is that of common/step.cuh.

#include "common/step.cuh"

extern "C" __global__ void __launch_bounds__(32) loss_scale_divide(float *step, const float *scaler) {
    if (threadIdx.x != 0) return;
    // Powers of two: exact.
    step[STEP_GRAD_SCALE] = 1.0f / scaler[0];
    step[STEP_LOSS_SCALE] = scaler[0];
}

extern "C" __global__ void __launch_bounds__(32) loss_scale_update(float *scaler, const float *step, float least, u32 interval) {
    if (threadIdx.x != 0) return;
    if (step[STEP_NOT_FINITE] != 0) {
        scaler[0] = fmaxf(0.5f * scaler[0], least);
        scaler[1] = 0;
    } else if (scaler[1] + 1 >= float(interval)) {
        scaler[0] *= 2;
        scaler[1] = 0;
    } else {
        scaler[1] += 1;
    }
}
