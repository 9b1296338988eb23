//! What changes from step to step, where a GPU's kernels read it: 16 floats in device memory.
//!
//! A captured step replays with the arguments it was captured with; learning rate, bias corrections and the clipping factor
//! change, so they are read from here. The layout is that of `kernels/src/common/step.cuh`.

use super::adamw::Hyper;
use crate::{Arena, DType, Result, Tensor};

/// Number of floats.
pub const LEN: usize = 16;
/// β₂ of this step, of [`super::adafactor`].
pub const BETA2: usize = 6;
/// Norm of all gradients, before clipping.
pub const NORM: usize = 8;
/// The factor that clips them.
pub const CLIP: usize = 9;
/// 1 when the norm is NaN or infinite: then nothing was updated.
pub const NOT_FINITE: usize = 10;
/// What the loss was multiplied by ([`super::loss_scale`]); 0 without a scale.
pub const LOSS_SCALE: usize = 11;

/// The values of one step of [`super::adamw`] (and, but for the corrections, of [`super::sgd`]) with gradients multiplied by
/// `grad_scale`; a gradient that is not finite leaves everything as it was.
#[must_use]
pub fn values(hyper: &Hyper, grad_scale: f32) -> [f32; LEN] {
    let correction = |beta: f64| 1.0 - beta.powi(hyper.step as i32);
    let mut values = [0.0; LEN];
    values[0] = grad_scale;
    values[1] = 1.0;
    values[2] = hyper.lr as f32;
    values[3] = (1.0 - hyper.lr * hyper.weight_decay) as f32;
    values[4] = (hyper.lr / correction(hyper.beta1)) as f32;
    values[5] = (1.0 / correction(hyper.beta2).sqrt()) as f32;
    values[CLIP] = 1.0;
    values
}

/// Memory for them.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn empty(arena: &Arena) -> Result<Tensor> {
    Tensor::zeros(arena, DType::F32, [LEN])
}
