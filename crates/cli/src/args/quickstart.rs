//! `nibble quickstart`.

use std::path::PathBuf;

use clap::Args;

use super::parse;

/// Fine-tune a small model on this machine, in under two minutes.
///
/// Brings SmolLM2-135M-Instruct (or falls back to a small model inside the program), asks it three questions, trains an adapter
/// on dictionary rows from WordNet with the model in NF4, and asks again.
#[derive(Debug, Args)]
pub(crate) struct QuickstartArgs {
    /// Download nothing: take what is on this machine
    #[arg(long)]
    pub(crate) offline: bool,
    /// The folder to write the adapter to; new or empty
    #[arg(long, value_name = "DIR", default_value = "nibble-quickstart")]
    pub(crate) output: PathBuf,
    /// Replace the output folder if it is there
    #[arg(long)]
    pub(crate) overwrite_output_dir: bool,
    /// Another model: a folder, a .gguf file or a name on the Hub
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Optimizer steps [default: by the model's size, about a minute]
    #[arg(long, value_name = "N", value_parser = parse::positive)]
    pub(crate) max_steps: Option<usize>,
}
