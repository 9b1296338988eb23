//! A plan for one model on one GPU: methods, kinds of checkpointing, and what fits.

use nibble_lora::{AdapterConfig, TargetModules};
use nibble_model::{Checkpointing, LoadOptions, config::ModelConfig};

use super::{Footprint, Gpu, Setup, fit, tokens_per_second};
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

/// One kind of checkpointing.
#[derive(Clone, Debug)]
pub struct Mode {
    /// As the command line spells it.
    pub name: &'static str,
    /// The same.
    pub checkpointing: Checkpointing,
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
    /// By kind of checkpointing, in the order of [`MODES`].
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
        let modes = MODES.iter().map(|&(name, checkpointing)| {
            let setup = request.setup(method, checkpointing);
            Ok(Mode {
                name,
                checkpointing,
                footprint: fit::needed(model, gpu, &setup)?,
                longest: fit::longest(model, gpu, &setup, room)?,
                batch: fit::largest_batch(model, gpu, &setup, request.length, room)?,
                tokens_per_second: tokens_per_second(model, gpu, &setup),
            })
        });
        Ok(Self { method, modes: modes.collect::<Result<_>>()? })
    }

    /// The fastest kind of checkpointing in which the step that was asked for fits.
    #[must_use]
    pub fn fastest(&self, room: usize) -> Option<&Mode> {
        self.modes.iter().find(|mode| mode.footprint.device <= room)
    }
}
