//! An optimizer's step on a GPU: what changes from step to step lies in device memory, so that the step can be captured.

use nibble_tensor::{
    Arena, Device, Tensor,
    ops::{global_norm, step},
};

use crate::Result;

/// What the kernels of a step read, and where they leave the gradient's norm.
#[derive(Debug)]
pub(crate) struct StepMemory {
    /// F32 `[16]`, see [`step`].
    values: Tensor,
}

impl StepMemory {
    /// On a GPU; nothing on the CPU.
    pub(crate) fn new(arena: &Arena) -> Result<Option<Self>> {
        if arena.device() == Device::Cpu {
            return Ok(None);
        }
        Ok(Some(Self { values: step::empty(arena)? }))
    }

    /// Writes the values of the step to come.
    pub(crate) fn begin(&mut self, values: &[f32; step::LEN]) -> Result<()> {
        Ok(self.values.write(values)?)
    }

    /// The norm of the gradients and the factor that clips it, left in the values.
    pub(crate) fn clip(&mut self, grads: &Tensor, max_norm: f64) -> Result<()> {
        Ok(global_norm::clip(grads, max_norm as f32, &mut self.values)?)
    }

    pub(crate) fn values(&self) -> &Tensor {
        &self.values
    }
}
