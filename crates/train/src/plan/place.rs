//! Where a run is planned for: a GPU, or the processor.

use nibble_model::{config::ModelConfig, files::StoredType};
use nibble_tensor::{DType, Owner};

use super::{Footprint, Gpu, HostBytes, Setup, fit, footprint, footprint::unpadded};
use crate::Result;

/// Device memory that a paged optimizer can always do with: more than the pages that visit at once.
pub const FEW_PAGES: usize = 64 << 20;

/// Where.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// The processor.
    Cpu,
    /// A GPU.
    Gpu(Gpu),
}

impl Place {
    /// What a step takes, however much there is.
    ///
    /// # Errors
    /// What is wrong with the adapter's config.
    pub fn needed(&self, model: &ModelConfig, setup: &Setup) -> Result<Footprint> {
        match self {
            Self::Cpu => on_cpu(model, setup),
            Self::Gpu(gpu) => fit::needed(model, gpu, setup),
        }
    }

    /// Whether a step fits into `room` bytes: on the processor with an eighth to spare, since its blocks are rounded up to eight sizes an
    /// octave. Automatic checkpointing takes what there is.
    ///
    /// # Errors
    /// As [`Place::needed`].
    pub fn fits(&self, model: &ModelConfig, setup: &Setup, room: usize) -> Result<bool> {
        match self {
            Self::Cpu => Ok(on_cpu(model, setup)?.peak <= room - room / 9),
            Self::Gpu(gpu) => match footprint(model, &gpu.device(room), setup) {
                Ok(_) => Ok(true),
                Err(error) if error.is_out_of_memory() => Ok(false),
                Err(error) => Err(error),
            },
        }
    }
}

/// On the processor no op can run without memory. But it keeps what a GPU keeps (measured: within 2 % in bf16, where neither
/// widens the head), in its own type, without working copies of what is trained; logits are f32 there.
fn on_cpu(model: &ModelConfig, setup: &Setup) -> Result<Footprint> {
    let size = setup.load.compute_dtype.size();
    let mut alike = setup.clone();
    alike.load.compute_dtype = DType::Bf16;
    // Pages may be in a file, which is no memory: nothing is opened for a plan.
    alike.train.optim_paging = nibble_optim::Paging { device_memory: Some(FEW_PAGES), ..nibble_optim::Paging::default() };
    // A GPU converts matrices that are not quantised to the type of its activations; here they stay as stored.
    let mut stored = model.clone();
    let widened = if stored.dtype.replace(StoredType::BF16) == Some(StoredType::F32) { 2 } else { 1 };
    let mut found = unpadded(&stored, &fit::boundless(&Gpu::of_memory(0)), &alike)?;
    for (owner, bytes) in &mut found.owners {
        match owner {
            Owner::Trained => *bytes = 4 * found.trained,
            Owner::Activations("lm_head_loss") => {}
            Owner::Activations(_) => *bytes = *bytes / DType::Bf16.size() * size,
            Owner::Embeddings => *bytes *= widened,
            Owner::BaseWeights if setup.load.quant.is_none() => *bytes *= widened,
            Owner::Scratch => *bytes = 0,
            _ => {}
        }
    }
    found.peak = found.owners.iter().map(|(_, bytes)| bytes).sum();
    found.device = found.peak;
    // The host is the device.
    found.host = HostBytes::default();
    Ok(found)
}
