//! `nibble merge`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{ModelArgs, Quant, parse};

const EXAMPLES: &str = "\
Examples:
  nibble merge --model ./model --adapter my-adapter --output merged
  nibble merge --model ./model --adapter my-adapter --output merged --base dequantized --dtype bf16
  nibble eval --model merged --quant none --data eval.jsonl
      What the merged model is worth: compare it with the adapter on the 4-bit model.";

/// Write one model out of a base model and an adapter.
///
/// W' = W + s B A for every layer with an adapter; modules that were trained whole replace those of the model. The result is
/// a folder of safetensors files that needs no adapter. It is never rounded to 4 bits, which would take most of a small
/// update with it.
///
/// QLoRA trains beside 4-bit weights, and those differ from the original ones. `--base original` adds the update to the
/// weights as they are in the file, which is usually better; `--base dequantized` adds it to the values that the 4-bit codes
/// stand for, which is exactly the model that was trained. The difference is measured and told.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct MergeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The folder of the LoRA adapter
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: PathBuf,
    /// The folder to write: new or empty
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub(crate) output: PathBuf,
    /// Replace what is in the output folder
    #[arg(long, help_heading = "Output")]
    pub(crate) overwrite_output_dir: bool,
    /// The weights that the update is added to
    #[arg(long, value_enum, value_name = "WEIGHTS", default_value_t, help_heading = "Merge")]
    pub(crate) base: MergeBase,
    /// The element type of the result
    #[arg(long, value_enum, value_name = "TYPE", default_value_t, help_heading = "Merge")]
    pub(crate) dtype: MergeDtype,
    /// The format of the linear layers that the adapter was trained beside
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t, help_heading = "Merge")]
    pub(crate) quant: Quant,
    /// Whether the scales of the 4-bit blocks were quantised too [default: true]
    #[arg(
        long,
        value_name = "BOOL",
        action = clap::ArgAction::Set,
        num_args = 0..=1,
        default_missing_value = "true",
        help_heading = "Merge"
    )]
    pub(crate) double_quant: Option<bool>,
    /// Weights that shared a scale: a power of two from 32 to 4096 [default: 64]
    #[arg(long, value_name = "N", value_parser = parse::block_size, help_heading = "Merge")]
    pub(crate) quant_block_size: Option<usize>,
}

/// `--base`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MergeBase {
    /// As they are in the file
    #[default]
    Original,
    /// Quantised as for training, and back
    Dequantized,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MergeDtype {
    /// Each tensor as it is in the file (bf16 where that is a block format of GGUF)
    #[default]
    Same,
    /// Single precision: nothing is rounded away
    F32,
    /// bfloat16
    Bf16,
    /// Half precision
    F16,
}
