//! What an update of a part of the flat buffer needs to know of it beforehand.

use nibble_tensor::{
    Arena, DType, Device, Result as TensorResult, Tensor, TensorMut,
    ops::{adafactor::Matrices, dynamic8::Blocks},
};

use crate::{
    OptimizerConfig, Result,
    layout::Layout,
    ranges::{Run, runs},
};

/// A part of the flat buffer, prepared for the updates of one optimizer.
#[derive(Debug)]
pub(crate) struct Plan {
    numel: usize,
    pub(crate) runs: Vec<Run>,
    /// Starts and ends of what is not decayed, on a GPU.
    pub(crate) no_decay: Option<Tensor>,
    /// Of an optimizer with 8-bit states.
    pub(crate) blocks: Option<Blocks>,
    /// Of an optimizer with factored states.
    pub(crate) matrices: Option<Matrices>,
}

impl Plan {
    pub(crate) fn new(arena: &Arena, layout: &Layout, config: &OptimizerConfig) -> Result<Self> {
        let decay = config.weight_decay() != 0.0;
        // Without decay all parameters are treated alike: one run.
        let runs = runs(layout.numel(), &if decay { layout.no_decay() } else { Vec::new() })?;
        let exempt = runs.iter().filter(|run| !run.decayed);
        let bounds: Vec<u32> = exempt.flat_map(|run| [run.range.start as u32, run.range.end as u32]).collect();
        let on_gpu = arena.device() != Device::Cpu;
        let no_decay =
            if on_gpu && !bounds.is_empty() { Some(Tensor::from_slice(arena, &bounds, [bounds.len()])?) } else { None };
        let blocks = if config.is_coded() { Some(Blocks::new(arena, layout.blocks(decay))?) } else { None };
        let matrices = if config.is_factored() { Some(Matrices::new(arena, layout.matrices(decay))?) } else { None };
        Ok(Self { numel: layout.numel(), runs, no_decay, blocks, matrices })
    }

    pub(crate) fn numel(&self) -> usize {
        self.numel
    }

    /// The runs' parts of flat buffers, in step.
    pub(crate) fn cut<'a>(&self, buffer: TensorMut<'a>) -> TensorResult<Vec<TensorMut<'a>>> {
        let mut rest = buffer;
        let mut parts = Vec::with_capacity(self.runs.len());
        for run in &self.runs {
            let (part, tail) = rest.split(run.range.len())?;
            parts.push(part);
            rest = tail;
        }
        Ok(parts)
    }
}

/// A state tensor of an optimizer: its name in files, its type and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) dtype: DType,
    pub(crate) len: usize,
}

impl Spec {
    pub(crate) const fn new(name: &'static str, dtype: DType, len: usize) -> Self {
        Self { name, dtype, len }
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }
}

/// What changes from step to step: on the CPU as numbers, on a GPU in device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Now<'a> {
    /// See [`crate::Optimizer::step`].
    Host { lr: f64, step: u32, grad_scale: f32 },
    /// See [`nibble_tensor::ops::step`].
    Device(&'a Tensor),
}
