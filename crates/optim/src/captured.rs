//! An optimizer's step on a GPU: what changes from step to step lies in device memory, so that the step can be captured.

use nibble_tensor::{
    Arena, Device, Tensor,
    ops::{
        global_norm, step,
        step_count::{Corrections, StepCount},
    },
};

use crate::Result;

/// What the kernels of a step read, and where they leave the gradient's norm.
#[derive(Debug)]
pub(crate) struct StepMemory {
    /// F32 `[16]`, see [`step`].
    values: Tensor,
    pub(crate) count: StepCount,
    corrections: Corrections,
}

impl StepMemory {
    /// On a GPU; nothing on the CPU.
    pub(crate) fn new(arena: &Arena, corrections: Corrections) -> Result<Option<Self>> {
        if arena.device() == Device::Cpu {
            return Ok(None);
        }
        Ok(Some(Self { values: step::empty(arena)?, count: StepCount::new(arena)?, corrections }))
    }

    /// Writes the values of the step to come.
    pub(crate) fn begin(&mut self, lr: f64, weight_decay: f64, grad_scale: f32) -> Result<()> {
        Ok(self.values.write(&step::start(lr, weight_decay, grad_scale))?)
    }

    /// The norm of the gradients and the factor that clips it, left in the values.
    pub(crate) fn clip(&mut self, grads: &Tensor, max_norm: f64) -> Result<()> {
        Ok(global_norm::clip(grads, max_norm as f32, &mut self.values)?)
    }

    /// The step's number and what depends on it, left in the values; or that it is left out.
    pub(crate) fn advance(&mut self, losses: Option<&Tensor>) -> Result<()> {
        Ok(self.count.advance(&mut self.values, losses, &self.corrections)?)
    }

    pub(crate) fn values(&self) -> &Tensor {
        &self.values
    }
}
