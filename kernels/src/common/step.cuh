// What changes from step to step, in device memory: 16 floats. A captured graph reads them anew at each replay.
#pragma once

#include "common/types.cuh"

enum Step : u32 {
    // Written by the host before each step.
    STEP_GRAD_SCALE = 0,  // what gradients are multiplied by: 1 / loss scale, 1 without one
    STEP_SKIP = 1,        // 1: an optimizer changes nothing when STEP_NOT_FINITE is 1; else 0
    STEP_LR = 2,          // learning rate
    STEP_KEEP = 3,        // 1 − lr · weight_decay (AdamW)
    // Written by step_count; by the host where it knows t.
    STEP_SIZE = 4,          // lr / (1 − β₁ᵗ) (AdamW)
    STEP_INVERSE_ROOT = 5,  // 1 / √(1 − β₂ᵗ) (AdamW)
    STEP_BETA2 = 6,         // β₂ of this step (Adafactor)
    // Written by grad_clip; by the host (0, 1, 0) where gradients are not clipped.
    STEP_NORM = 8,        // norm of all gradients, times grad_scale
    STEP_CLIP = 9,        // min(1, max_norm / (norm + 1e-6))
    STEP_NOT_FINITE = 10, // 1 when the norm is NaN or infinite, or step_count says so; else 0
    // Written by loss_scale_divide; by the host (0) without a loss scale.
    STEP_LOSS_SCALE = 11, // what the loss was multiplied by
    // Written by the host before each step.
    STEP_WIDE_LR = 12     // and 13: the learning rate as f64
};
