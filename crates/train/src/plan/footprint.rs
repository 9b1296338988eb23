//! The memory of one step.

use nibble_data::{Batch, IGNORE_INDEX};
use nibble_lora::{AdapterConfig, Init};
use nibble_model::{LoadOptions, Transformer, config::ModelConfig};
use nibble_tensor::{
    Arena, Device, LookAhead, Owner, Rng,
    cuda::{CudaDevice, DeviceInfo},
};

use crate::{
    Result, TrainConfig,
    device_step::{DeviceSteps, Parts, of_a_class},
    trainer::{eval_loss, optimizer},
};

/// A run, as far as its memory depends on it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How the base is held, and computed with.
    pub load: LoadOptions,
    /// The adapter; none: every weight is trained, of a base that is not quantised.
    pub adapter: Option<AdapterConfig>,
    /// The documents of a micro-batch.
    pub documents: Vec<Document>,
    /// The documents of an evaluation's micro-batch; none where nothing is evaluated.
    pub evaluation: Vec<Document>,
    /// Optimizer, checkpointing and the rest.
    pub train: TrainConfig,
}

/// A document, by its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    /// All of it.
    pub tokens: usize,
    /// Those that are learned, at its end.
    pub learned: usize,
}

/// What a step takes, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// The most that tensors hold at once.
    pub peak: usize,
    /// What the arena takes from the device for it.
    pub device: usize,
    /// Who holds the peak.
    pub owners: Vec<(Owner, usize)>,
    /// Values that are trained.
    pub trained: usize,
    /// What a GPU leaves in host memory that is locked for it.
    pub host: HostBytes,
}

/// Host memory that is locked for a GPU, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostBytes {
    /// Weights of blocks.
    pub weights: usize,
    /// Activations between forward and backward.
    pub activations: usize,
    /// Pages of the optimizer.
    pub optimizer: usize,
}

impl HostBytes {
    /// All of it.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.weights + self.activations + self.optimizer
    }
}

impl Setup {
    /// The same with `batch` documents of `length` tokens, all of them learned.
    #[must_use]
    pub fn with_documents(&self, batch: usize, length: usize) -> Self {
        let document = Document { tokens: length, learned: length.saturating_sub(1) };
        let load = LoadOptions { max_positions: length, ..self.load };
        Self { documents: vec![document; batch], load, ..self.clone() }
    }

    /// The same with the weights of so many blocks on the host.
    #[must_use]
    pub fn with_blocks_on_host(&self, blocks_on_host: usize) -> Self {
        Self { load: LoadOptions { blocks_on_host, ..self.load }, ..self.clone() }
    }

    /// Tokens of a micro-batch.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.documents.iter().map(|document| document.tokens).sum()
    }

    /// Tokens of the longest document.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.documents.iter().map(|document| document.tokens).max().unwrap_or(0)
    }
}

/// What owners are shown as, in this order.
pub const COMPONENTS: [&str; 7] =
    ["base weights", "embeddings", "trained weights", "gradients", "optimizer", "activations", "scratch and the rest"];

impl Footprint {
    /// Bytes at the peak by [`COMPONENTS`].
    #[must_use]
    pub fn components(&self) -> [usize; COMPONENTS.len()] {
        let mut all = [0; COMPONENTS.len()];
        for (owner, bytes) in &self.owners {
            let component = match owner {
                Owner::BaseWeights => 0,
                Owner::Embeddings => 1,
                Owner::Trained => 2,
                Owner::Gradients => 3,
                Owner::Optimizer => 4,
                Owner::Activations(_) => 5,
                _ => 6,
            };
            all[component] += bytes;
        }
        all
    }

    /// Bytes that one kind of owner holds at the peak.
    #[must_use]
    pub fn of(&self, wanted: impl Fn(Owner) -> bool) -> usize {
        self.owners.iter().filter(|(owner, _)| wanted(*owner)).map(|(_, bytes)| bytes).sum()
    }
}

/// The memory of a step of `setup` on a device like `gpu`, which holds nothing else.
///
/// # Errors
/// Out of memory, where the device has less; what is wrong with the adapter's config.
pub fn footprint(model: &ModelConfig, gpu: &DeviceInfo, setup: &Setup) -> Result<Footprint> {
    of_step(model, gpu, setup, of_a_class, true)
}

/// The same without what a step takes where there is memory for it, and lets go of where there is not.
///
/// # Errors
/// As [`footprint`].
pub(super) fn least_footprint(model: &ModelConfig, gpu: &DeviceInfo, setup: &Setup) -> Result<Footprint> {
    of_step(model, gpu, setup, of_a_class, false)
}

/// The same without the padding of a GPU's streams, which the processor's do not have.
pub(super) fn unpadded(model: &ModelConfig, gpu: &DeviceInfo, setup: &Setup) -> Result<Footprint> {
    of_step(model, gpu, setup, |batch| batch, true)
}

fn of_step(
    model: &ModelConfig,
    gpu: &DeviceInfo,
    setup: &Setup,
    shaped: fn(Batch) -> Batch,
    looks_ahead: bool,
) -> Result<Footprint> {
    let arena = Arena::on(Device::Cuda(CudaDevice::dry(gpu)), usize::MAX)?;
    if !looks_ahead {
        LookAhead::forbid(&arena);
    }
    let (trained, host) = step(model, &arena, setup, shaped)?;
    let owners = arena.owners().into_iter().filter(|stats| stats.at_peak > 0);
    Ok(Footprint {
        peak: arena.stats().peak,
        device: arena.device_bytes().unwrap_or_default(),
        owners: owners.map(|stats| (stats.owner, stats.at_peak)).collect(),
        trained,
        host,
    })
}

/// Runs a step, and an evaluation after it; gives the number of trained values, and what is on the host.
fn step(model: &ModelConfig, arena: &Arena, setup: &Setup, shaped: fn(Batch) -> Batch) -> Result<(usize, HostBytes)> {
    let mut model = Transformer::empty(model.clone(), arena, &setup.load)?;
    let mut params = match &setup.adapter {
        Some(adapter) => model.attach(adapter, Init::Zeros)?,
        None => model.train_all()?,
    };
    let mut optimizer = optimizer(&model, &mut params, &setup.train)?;
    let mut grads = params.zero_grads()?;
    let mut host = HostBytes { weights: model.host().bytes(), activations: 0, optimizer: optimizer.host_bytes() };
    let Some(mut steps) = DeviceSteps::new(arena, 1)? else { return Ok((params.numel(), host)) };
    let batches = [shaped(batch(&setup.documents))];
    // A second step finds the memory as the first left it, and may need more of it; the third finds the weights that the second has widened.
    for _ in 0..3 {
        let parts = Parts {
            model: &model,
            params: &mut params,
            grads: &mut grads,
            optimizer: &mut optimizer,
            loss_scale: None,
            config: &setup.train,
        };
        steps.enqueue(parts, &batches, 1.0, setup.train.learning_rate, Rng::new(0).rooted())?;
    }
    host.activations = model.host().bytes() - host.weights;
    if !setup.evaluation.is_empty() {
        eval_loss(&model, &params, &shaped(batch(&setup.evaluation)))?;
    }
    Ok((params.numel(), host))
}

/// Made-up tokens.
fn batch(documents: &[Document]) -> Batch {
    let mut batch = Batch { cu_seqlens: vec![0], ..Batch::default() };
    for &Document { tokens, learned } in documents {
        // The last position has nothing to learn.
        let first = (tokens - 1).saturating_sub(learned);
        batch.tokens.extend(std::iter::repeat_n(0, tokens));
        batch.labels.extend((0..tokens).map(|i| if i >= first && i + 1 < tokens { 0 } else { IGNORE_INDEX }));
        batch.positions.extend(0..tokens as u32);
        batch.cu_seqlens.push(batch.tokens.len() as u32);
    }
    batch
}
