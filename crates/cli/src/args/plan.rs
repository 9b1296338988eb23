//! `nibble plan`.

use std::path::PathBuf;

use clap::Args;
use nibble_optim::OptimizerName;

use super::{Quant, parse};

const EXAMPLES: &str = "\
Examples:
  nibble plan
      Which models fit which GPUs, and how.
  nibble plan --model meta-llama/Meta-Llama-3-8B --gpu 'RTX 4090'
      What training takes, what fits, how fast it will be, and the command.
  nibble plan --model ./model --gpu 12GiB --max-length 4096 --batch-size 2 --html plan.html

Nothing of the model is read but its config (of a GGUF file: the header), and no GPU is needed: a training step runs on shapes
alone, with the allocations of the real one.";

/// Show what training a model takes, before anything is loaded.
///
/// Memory of QLoRA, LoRA and full fine-tuning by component; the longest context and the largest batch that fit each kind of
/// checkpointing; tokens a second to expect (an estimate); and the command for it. Without a model: which models fit which GPUs.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PlanArgs {
    /// A folder, a .gguf file, or a name on the Hugging Face Hub; without it, the table of models and GPUs
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    pub(crate) model: Option<String>,
    /// The GPU: a name (`RTX 4090`, `h100`), or its memory (`24GiB`) [default: this machine's, else 24GiB]
    #[arg(long, value_name = "GPU", requires = "model", help_heading = "Model")]
    pub(crate) gpu: Option<String>,
    /// Hold the run to this much memory: 8GiB, 500MB [default: what the GPU has]
    #[arg(long, value_name = "SIZE", value_parser = parse::bytes, requires = "model", help_heading = "Model")]
    pub(crate) memory_limit: Option<usize>,

    /// Documents of a forward pass
    #[arg(long, visible_alias = "per-device-train-batch-size", value_name = "N", value_parser = parse::positive, default_value = "1", help_heading = "Training")]
    pub(crate) batch_size: usize,
    /// Tokens of a document [default: 1024, or what the model has if that is less]
    #[arg(long, value_name = "N", value_parser = parse::length, help_heading = "Training")]
    pub(crate) max_length: Option<usize>,
    /// Rank of the adapters
    #[arg(long, value_name = "N", value_parser = parse::positive, default_value = "16", help_heading = "Training")]
    pub(crate) lora_r: usize,
    /// Layers that get an adapter: all-linear, names with commas between, or a regular expression
    #[arg(long, value_name = "MODULES", default_value = "all-linear", help_heading = "Training")]
    pub(crate) target_modules: String,
    /// The optimizer, as Hugging Face names it
    #[arg(long, value_name = "NAME", default_value = "adamw_torch", help_heading = "Training")]
    pub(crate) optim: OptimizerName,
    /// How QLoRA holds the frozen linear layers
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t, help_heading = "Training")]
    pub(crate) quant: Quant,

    /// Write one JSON object
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
    /// Write a page with the picture, complete in one file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) html: Option<PathBuf>,
}
