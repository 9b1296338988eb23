//! What changes from step to step, where a GPU's kernels read it: 16 floats in device memory.
//!
//! A captured step replays with the arguments it was captured with; learning rate, bias corrections and the clipping factor
//! change, so they are read from here. The layout is that of `kernels/src/common/step.cuh`. What depends on the step's number is
//! written on the device ([`super::step_count`]).

use super::adamw::Hyper;
use crate::{Arena, DType, Result, Tensor};

/// Number of floats.
pub const LEN: usize = 16;
/// lr / (1 − β₁ᵗ), of [`super::adamw`].
pub const SIZE: usize = 4;
/// 1 / √(1 − β₂ᵗ), of [`super::adamw`].
pub const INVERSE_ROOT: usize = 5;
/// β₂ of this step, of [`super::adafactor`].
pub const BETA2: usize = 6;
/// Norm of all gradients, before clipping.
pub const NORM: usize = 8;
/// The factor that clips them.
pub const CLIP: usize = 9;
/// 1 when the norm or a loss is NaN or infinite, or a step before was ([`super::step_count`]): then nothing was updated.
pub const NOT_FINITE: usize = 10;
/// What the loss was multiplied by ([`super::loss_scale`]); 0 without a scale.
pub const LOSS_SCALE: usize = 11;
/// The learning rate as f64, in two words.
pub(crate) const WIDE_LR: usize = 12;

/// The values of a step but for what depends on its number; gradients are multiplied by `grad_scale`. A gradient that is not finite
/// leaves everything as it was.
#[must_use]
pub fn start(lr: f64, weight_decay: f64, grad_scale: f32) -> [f32; LEN] {
    let mut values = [0.0; LEN];
    values[0] = grad_scale;
    values[1] = 1.0;
    values[2] = lr as f32;
    values[3] = (1.0 - lr * weight_decay) as f32;
    values[CLIP] = 1.0;
    let [low, high] = bytemuck::cast::<f64, [f32; 2]>(lr);
    (values[WIDE_LR], values[WIDE_LR + 1]) = (low, high);
    values
}

/// The values of one step of [`super::adamw`] whose number is known.
#[must_use]
pub fn values(hyper: &Hyper, grad_scale: f32) -> [f32; LEN] {
    let mut values = start(hyper.lr, hyper.weight_decay, grad_scale);
    values[SIZE] = (hyper.lr / correction(hyper.beta1, hyper.step)) as f32;
    values[INVERSE_ROOT] = (1.0 / correction(hyper.beta2, hyper.step).sqrt()) as f32;
    values
}

/// 1 − βᵗ.
pub(crate) fn correction(beta: f64, t: u32) -> f64 {
    1.0 - power(beta, t)
}

/// βᵗ by squaring; the kernel multiplies in the same order, so that both have the same bits.
fn power(mut beta: f64, mut t: u32) -> f64 {
    let mut result = 1.0;
    loop {
        if t & 1 == 1 {
            result *= beta;
        }
        t >>= 1;
        if t == 0 {
            return result;
        }
        beta *= beta;
    }
}

/// Memory for them.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn empty(arena: &Arena) -> Result<Tensor> {
    Tensor::zeros(arena, DType::F32, [LEN])
}
