//! A plan for one model on one GPU: methods, kinds of checkpointing, and what fits.

use nibble_lora::{AdapterConfig, TargetModules};
use nibble_model::{Checkpointing, LoadOptions, config::ModelConfig};

use super::{Footprint, Gpu, Setup, Streamed, can_stream, fewest_on_host, fit, tokens_per_second};
use crate::{Result, TrainConfig};

/// What is trained of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Adapters, on a base in 4 bits.
    QLora,
    /// Adapters, on a base as it is stored.
    Lora,
    /// Every weight.
    Full,
}

impl Method {
    /// All of them, the one that takes the least first.
    pub const ALL: [Self; 3] = [Self::QLora, Self::Lora, Self::Full];

    /// As papers write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::QLora => "QLoRA",
            Self::Lora => "LoRA",
            Self::Full => "full",
        }
    }
}

/// The kinds of checkpointing that are planned for, the fastest first.
pub const MODES: [(&str, Checkpointing); 4] = [
    ("none", Checkpointing::None),
    ("selective", Checkpointing::Selective),
    ("full", Checkpointing::Full),
    ("offload", Checkpointing::Offload),
];

/// What to plan for.
#[derive(Clone, Debug)]
pub struct Request {
    /// How a quantised base is held, and what is computed in.
    pub load: LoadOptions,
    /// The adapter.
    pub adapter: AdapterConfig,
    /// Documents of a micro-batch.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Optimizer and the rest.
    pub train: TrainConfig,
}

/// One kind of checkpointing, with all weights on the device or some on the host.
#[derive(Clone, Debug)]
pub struct Mode {
    /// As the command line spells it.
    pub name: &'static str,
    /// The same.
    pub checkpointing: Checkpointing,
    /// The weights on the host, where some are.
    pub streamed: Option<Streamed>,
    /// The step that was asked for.
    pub footprint: Footprint,
    /// The longest document that fits alone, in tokens.
    pub longest: Option<usize>,
    /// The largest micro-batch of documents of the length asked for.
    pub batch: Option<usize>,
    /// To expect of the step that was asked for.
    pub tokens_per_second: Option<f64>,
}

/// One method.
#[derive(Clone, Debug)]
pub struct MethodPlan {
    /// Which.
    pub method: Method,
    /// By kind of checkpointing, in the order of [`MODES`]; then, where that makes more fit, with weights on the host.
    pub modes: Vec<Mode>,
}

impl Request {
    /// Adapters of rank 16 on all linears, and documents of 1,024 tokens one by one.
    #[must_use]
    pub fn new(load: LoadOptions) -> Self {
        let target_modules = Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned()));
        let adapter = AdapterConfig { r: 16, lora_alpha: 32.0, target_modules, ..AdapterConfig::default() };
        Self { load, adapter, batch: 1, length: 1024, train: TrainConfig::default() }
    }

    /// A run of a method.
    #[must_use]
    pub fn setup(&self, method: Method, checkpointing: Checkpointing) -> Setup {
        let quant = if method == Method::QLora { self.load.quant } else { None };
        let setup = Setup {
            load: LoadOptions { quant, ..self.load },
            adapter: (method != Method::Full).then(|| self.adapter.clone()),
            documents: Vec::new(),
            evaluation: Vec::new(),
            train: TrainConfig { checkpointing, ..self.train.clone() },
        };
        setup.with_documents(self.batch, self.length)
    }
}

impl MethodPlan {
    /// The plan of a method on a GPU with `room` bytes for tensors.
    ///
    /// # Errors
    /// What is wrong with the adapter's config.
    pub fn new(model: &ModelConfig, gpu: &Gpu, room: usize, request: &Request, method: Method) -> Result<Self> {
        let mode = |(name, checkpointing), blocks| {
            Mode::new(model, gpu, room, request, (name, &request.setup(method, checkpointing).with_blocks_on_host(blocks)))
        };
        let mut modes = MODES.iter().map(|&kind| mode(kind, 0)).collect::<Result<Vec<_>>>()?;
        let last = MODES[MODES.len() - 1];
        for blocks in streams(model, gpu, room, &request.setup(method, last.1), &modes)? {
            modes.push(mode(last, blocks)?);
        }
        Ok(Self { method, modes })
    }

    /// The fastest kind of checkpointing in which the step that was asked for fits.
    #[must_use]
    pub fn fastest(&self, room: usize) -> Option<&Mode> {
        self.modes.iter().find(|mode| mode.footprint.device <= room)
    }
}

impl Mode {
    /// Of a run that `setup` is the step of.
    fn new(
        model: &ModelConfig,
        gpu: &Gpu,
        room: usize,
        request: &Request,
        (name, setup): (&'static str, &Setup),
    ) -> Result<Self> {
        Ok(Self {
            name,
            checkpointing: setup.train.checkpointing,
            streamed: Streamed::of(model, gpu, setup),
            footprint: fit::needed(model, gpu, setup)?,
            longest: fit::longest(model, gpu, setup, room)?,
            batch: fit::largest_batch(model, gpu, setup, request.length, room)?,
            tokens_per_second: tokens_per_second(model, gpu, setup),
        })
    }

    /// The kind of checkpointing, and how many blocks have their weights on the host: `offload + 18/80`.
    #[must_use]
    pub fn label(&self) -> String {
        match self.streamed {
            None => self.name.to_owned(),
            Some(Streamed { blocks, of, .. }) => format!("{} + {blocks}/{of}", self.name),
        }
    }
}

/// How many blocks have their weights on the host in the modes beyond `modes`, which keep all on the device: the fewest with which the step
/// of `setup` fits where it does not otherwise, and all of them where that makes it fit or the model's positions do not fit otherwise.
fn streams(model: &ModelConfig, gpu: &Gpu, room: usize, setup: &Setup, modes: &[Mode]) -> Result<Vec<usize>> {
    let fits = modes.iter().any(|mode| mode.footprint.device <= room);
    let enough = modes.iter().any(|mode| mode.longest.is_some_and(|longest| longest >= model.max_position_embeddings));
    if !can_stream(setup) || fits && enough {
        return Ok(Vec::new());
    }
    let all = model.num_hidden_layers;
    let with = |blocks| Ok(fit::needed(model, gpu, &setup.with_blocks_on_host(blocks))?.device <= room);
    let fewest = if fits { None } else { fewest_on_host(all, with)? };
    let mut found = Vec::from_iter(fewest);
    found.extend((fewest != Some(all)).then_some(all));
    Ok(found)
}
