//! Flags that several commands have.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use super::parse;

/// Which model.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A folder, a .gguf file, or a name on the Hugging Face Hub (`org/name`, `org/name@revision`, `org/name/file.gguf`)
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    pub(crate) model: String,
}

/// Which adapter, where one is optional.
#[derive(Debug, Args)]
pub(crate) struct AdapterArgs {
    /// The folder of a LoRA adapter to put on the model
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,
}

/// How the model is held, and where it runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Precision")]
pub(crate) struct PrecisionArgs {
    /// How the frozen linear layers are stored
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub(crate) quant: Quant,
    /// Quantise the scales of the 4-bit blocks too: 4.13 bits a weight instead of 4.5 [default: true]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) double_quant: Option<bool>,
    /// Weights that share a scale: a power of two from 32 to 4096 [default: 64]
    #[arg(long, value_name = "N", value_parser = parse::block_size)]
    pub(crate) quant_block_size: Option<usize>,
    /// The type of activations; auto is bf16 where the device multiplies it (a CPU with avx512_bf16, a GPU from Ampere on), f16 on
    /// GPUs before Ampere, else f32
    #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
    pub(crate) compute_dtype: ComputeDtype,
    /// Where to compute; auto is the best there is
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t)]
    pub(crate) device: DeviceName,
}

/// `--quant`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quant {
    /// 4-bit NormalFloat: the format of QLoRA
    #[default]
    Nf4,
    /// 4-bit floats
    Fp4,
    /// As the file has them
    None,
}

/// `--compute-dtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeDtype {
    /// bf16 where the device is fast in it
    #[default]
    Auto,
    /// Single precision
    F32,
    /// bfloat16
    Bf16,
    /// Half precision, with a loss scale that adapts itself: for GPUs without bf16
    F16,
}

/// `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceName {
    /// The best there is
    #[default]
    Auto,
    /// The processor
    Cpu,
    /// An NVIDIA GPU
    Cuda,
}
