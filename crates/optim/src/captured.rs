//! An optimizer's step on a GPU: what changes from step to step lies in device memory, so that the step can be captured.

use nibble_tensor::{
    Arena, Device, Tensor,
    ops::{adamw, global_norm, step},
};

use crate::{Result, ranges::Run};

/// What the kernels of a step read, and where they leave the gradient's norm.
#[derive(Debug)]
pub(crate) struct StepMemory {
    /// F32 `[16]`, see [`step`].
    values: Tensor,
    /// Starts and ends of what is not decayed.
    no_decay: Option<Tensor>,
}

impl StepMemory {
    /// On a GPU; nothing on the CPU.
    pub(crate) fn new(arena: &Arena, runs: &[Run]) -> Result<Option<Self>> {
        if arena.device() == Device::Cpu {
            return Ok(None);
        }
        let exempt = runs.iter().filter(|run| !run.decayed);
        let bounds: Vec<u32> = exempt.flat_map(|run| [run.range.start as u32, run.range.end as u32]).collect();
        let no_decay = if bounds.is_empty() { None } else { Some(Tensor::from_slice(arena, &bounds, [bounds.len()])?) };
        Ok(Some(Self { values: step::empty(arena)?, no_decay }))
    }

    /// Writes the values of the step to come.
    pub(crate) fn begin(&mut self, hyper: &adamw::Hyper, grad_scale: f32) -> Result<()> {
        Ok(self.values.write(&step::values(hyper, grad_scale))?)
    }

    /// The norm of the gradients and the factor that clips it, left in the values.
    pub(crate) fn clip(&mut self, grads: &Tensor, max_norm: f64) -> Result<()> {
        Ok(global_norm::clip(grads, max_norm as f32, &mut self.values)?)
    }

    pub(crate) fn values(&self) -> &Tensor {
        &self.values
    }

    pub(crate) fn no_decay(&self) -> Option<&Tensor> {
        self.no_decay.as_ref()
    }
}
