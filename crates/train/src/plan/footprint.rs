//! The memory of one step.

use nibble_data::{Batch, IGNORE_INDEX};
use nibble_lora::{AdapterConfig, Init};
use nibble_model::{LoadOptions, Transformer, config::ModelConfig};
use nibble_tensor::{
    Arena, Device, Owner, Rng,
    cuda::{CudaDevice, DeviceInfo},
};

use crate::{
    Result, TrainConfig,
    device_step::{DeviceSteps, Parts},
    trainer::optimizer,
};

/// A run, as far as its memory depends on it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How the base is held, and computed with. Every weight is trained of one that is not quantised if there is no adapter.
    pub load: LoadOptions,
    /// The adapter; none: every weight is trained.
    pub adapter: Option<AdapterConfig>,
    /// Documents of a micro-batch.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Optimizer, checkpointing and the rest.
    pub train: TrainConfig,
}

/// What a step takes, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// The most that tensors hold at once.
    pub peak: usize,
    /// What the arena takes from the device for it.
    pub device: usize,
    /// Who holds the peak.
    pub owners: Vec<(Owner, usize)>,
    /// Values that are trained.
    pub trained: usize,
}

/// The memory of a step of `setup` on a device like `gpu`, which holds nothing else.
///
/// # Errors
/// Out of memory, where the device has less; what is wrong with the adapter's config.
pub fn footprint(model: &ModelConfig, gpu: &DeviceInfo, setup: &Setup) -> Result<Footprint> {
    let arena = Arena::on(Device::Cuda(CudaDevice::dry(gpu)), usize::MAX)?;
    let trained = step(model, &arena, setup)?;
    let owners = arena.owners().into_iter().filter(|stats| stats.at_peak > 0);
    Ok(Footprint {
        peak: arena.stats().peak,
        device: arena.device_bytes().unwrap_or_default(),
        owners: owners.map(|stats| (stats.owner, stats.at_peak)).collect(),
        trained,
    })
}

/// Runs a step; gives the number of trained values.
fn step(model: &ModelConfig, arena: &Arena, setup: &Setup) -> Result<usize> {
    let mut model = Transformer::empty(model.clone(), arena, &setup.load)?;
    let mut params = match &setup.adapter {
        Some(adapter) => model.attach(adapter, Init::Zeros)?,
        None => model.train_all()?,
    };
    let mut grads = params.zero_grads()?;
    let mut optimizer = optimizer(&model, &params, &setup.train)?;
    let Some(mut steps) = DeviceSteps::new(arena, 1)? else { return Ok(params.numel()) };
    let parts = Parts { model: &model, params: &mut params, grads: &mut grads, optimizer: &mut optimizer, config: &setup.train };
    steps.enqueue(parts, &[batch(setup.batch, setup.length)], 1.0, setup.train.learning_rate, Rng::new(0).rooted())?;
    Ok(params.numel())
}

/// Documents of made-up tokens, all of them learned.
fn batch(documents: usize, length: usize) -> Batch {
    let label = |i: usize| if (i + 1).is_multiple_of(length) { IGNORE_INDEX } else { 0 };
    Batch {
        tokens: vec![0; documents * length],
        labels: (0..documents * length).map(label).collect(),
        cu_seqlens: (0..=documents).map(|n| (n * length) as u32).collect(),
        positions: (0..documents).flat_map(|_| 0..length as u32).collect(),
    }
}
