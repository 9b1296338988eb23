//! `nibble train`.

use std::path::PathBuf;

use clap::{Args, ValueEnum, builder::PossibleValuesParser};
use nibble_data::Format;
use nibble_optim::{OptimizerName, ScheduleName, ScheduleOptions};

use super::{ModelArgs, PrecisionArgs, parse};

const EXAMPLES: &str = "\
Examples:
  nibble train --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl --output my-adapter
  nibble train --model model.gguf --data train.jsonl --eval-data eval.jsonl --eval-steps 50 \\
      --max-steps 500 --batch-size 4 --gradient-accumulation-steps 4 --output my-adapter
  nibble train --model ./model --adapter my-adapter --data more.jsonl --output my-adapter-2
  nibble train --model ./model --resume my-adapter --data rows.jsonl --output my-adapter --overwrite-output-dir

Data is JSONL or a JSON array. The columns tell the format: `messages`; `conversations`; `instruction`, `input`, `output`;
`prompt`, `completion`; `text`; or `input_ids` and `labels`. Answers are learned, prompts are only read.

The output folder is what PEFT writes: adapter_config.json, adapter_model.safetensors, the tokenizer and a model card; and
metrics.jsonl, a line a logged step. Ctrl-C saves what is learned so far, and so does an error.

--resume does the steps that are left, and goes on with the log. Settings that change no step may be others:
--gradient-checkpointing, --offload-weights, --memory-limit, pages (`paged_` before the optimizer's name) and the evaluation's.
On the CPU the result is that of one run, bit for bit; on a GPU each process times the algorithms of large products anew, and
another choice rounds otherwise.";

/// Train a LoRA adapter on a 4-bit model.
///
/// The model's linear layers are quantised to 4-bit NormalFloat as they are read, and frozen; adapters beside them are trained
/// on the answers of the data.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Start from this adapter; its own config decides about r, alpha, targets and the like
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,
    /// Go on with a run that Ctrl-C or an error ended: its output folder, with the same settings (see below)
    #[arg(long, value_name = "DIR", conflicts_with = "adapter", help_heading = "Model")]
    pub(crate) resume: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) data: TrainDataArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    pub(crate) precision: PrecisionArgs,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,

    /// Passes over the data [default: 3]
    #[arg(long, value_name = "X", value_parser = parse::above_zero, allow_negative_numbers = true, conflicts_with = "max_steps", help_heading = "Training")]
    pub(crate) num_train_epochs: Option<f64>,
    /// Optimizer steps, instead of epochs
    #[arg(long, value_name = "N", value_parser = parse::positive, help_heading = "Training")]
    pub(crate) max_steps: Option<usize>,
    /// Documents of a forward pass; with --packing: packs [default: 8, with --packing 1]
    #[arg(long, visible_alias = "batch-size", value_name = "N", value_parser = parse::positive, help_heading = "Training")]
    pub(crate) per_device_train_batch_size: Option<usize>,
    /// Forward passes of an optimizer step
    #[arg(long, value_name = "N", value_parser = parse::positive, default_value = "1", help_heading = "Training")]
    pub(crate) gradient_accumulation_steps: usize,
    /// The peak of the learning rate
    #[arg(long, visible_alias = "lr", value_name = "X", value_parser = parse::above_zero, allow_negative_numbers = true, default_value = "2e-4", help_heading = "Training")]
    pub(crate) learning_rate: f64,
    /// How the learning rate goes on from its peak: linear, cosine, constant, ...
    #[arg(long, value_name = "NAME", default_value = "linear", help_heading = "Training")]
    pub(crate) lr_scheduler_type: ScheduleName,
    /// Options of the schedule as JSON: num_cycles, power, lr_end, timescale, min_lr, min_lr_rate
    #[arg(long, value_name = "JSON", value_parser = parse::schedule_options, default_value = "{}", help_heading = "Training")]
    pub(crate) lr_scheduler_kwargs: ScheduleOptions,
    /// Steps in which the learning rate rises from 0 [default: 0]
    #[arg(long, value_name = "N", conflicts_with = "warmup_ratio", help_heading = "Training")]
    pub(crate) warmup_steps: Option<usize>,
    /// The same as a share of all steps [default: 0]
    #[arg(long, value_name = "X", value_parser = parse::fraction, allow_negative_numbers = true, help_heading = "Training")]
    pub(crate) warmup_ratio: Option<f64>,
    /// Decay of the trained weights
    #[arg(long, value_name = "X", value_parser = parse::not_negative, allow_negative_numbers = true, default_value = "0", help_heading = "Training")]
    pub(crate) weight_decay: f64,
    /// The norm that gradients are clipped to; 0 leaves them
    #[arg(long, value_name = "X", value_parser = parse::not_negative, allow_negative_numbers = true, default_value = "1", help_heading = "Training")]
    pub(crate) max_grad_norm: f64,
    /// The optimizer, as Hugging Face names it: adamw_torch, adamw_8bit, paged_adamw_8bit, lion_8bit, adafactor, sgd, ...
    #[arg(long, value_name = "NAME", default_value = "adamw_torch", help_heading = "Training")]
    pub(crate) optim: OptimizerName,
    /// Constants of the optimizer, such as "betas=0.9,0.95 eps=1e-6 decay=before"
    #[arg(long, value_name = "KEY=VALUE,...", default_value = "", hide_default_value = true, help_heading = "Training")]
    pub(crate) optim_args: String,
    /// Memory of the device that the states of a paged optimizer may take [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse::bytes, help_heading = "Training")]
    pub(crate) optim_device_memory: Option<usize>,
    /// On a GPU, keep the f32 values in the pages of a paged optimizer too; copies in the compute type stay
    #[arg(long, help_heading = "Training")]
    pub(crate) optim_page_masters: bool,
    /// On the CPU, a file for the states of a paged optimizer; it is gone after the run
    #[arg(long, value_name = "FILE", help_heading = "Training")]
    pub(crate) optim_page_file: Option<PathBuf>,
    /// What of the forward pass is computed again in the backward pass, to save memory; the bare flag means full, which costs
    /// about a third more time
    #[arg(long, value_enum, value_name = "KIND", num_args = 0..=1, default_value_t, default_missing_value = "full", help_heading = "Training")]
    pub(crate) gradient_checkpointing: GradientCheckpointing,
    /// Seed of first values, order and dropout
    #[arg(long, value_name = "N", default_value = "42", help_heading = "Training")]
    pub(crate) seed: u64,

    /// Steps between lines of the log
    #[arg(long, value_name = "N", value_parser = parse::positive, default_value = "1", help_heading = "Log and evaluation")]
    pub(crate) logging_steps: usize,
    /// Steps between evaluations; without it one at the end
    #[arg(long, value_name = "N", value_parser = parse::positive, requires = "eval_data", help_heading = "Log and evaluation")]
    pub(crate) eval_steps: Option<usize>,
    /// Documents of a forward pass in evaluation [default: as in training]
    #[arg(long, value_name = "N", value_parser = parse::positive, requires = "eval_data", help_heading = "Log and evaluation")]
    pub(crate) per_device_eval_batch_size: Option<usize>,
}

/// What is learned from.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub(crate) struct TrainDataArgs {
    /// Rows to train on: JSONL, or a JSON array
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// Rows to evaluate on
    #[arg(long, value_name = "FILE")]
    pub(crate) eval_data: Option<PathBuf>,
    /// The format of the rows; without it found from the columns
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(Format::ALL.map(Format::name)))]
    pub(crate) data_format: Option<String>,
    /// Cut longer examples to this many tokens [default: 1024, or what the model has if that is less]
    #[arg(long, value_name = "N", value_parser = parse::length)]
    pub(crate) max_length: Option<usize>,
    /// Learn the prompts too, not only the answers
    #[arg(long)]
    pub(crate) train_on_prompt: bool,
    /// Hold tensors to this much memory: 8GiB, 500MB; a GPU's driver and libraries take about 0.6 GB beside [default: what is there]
    #[arg(long, value_name = "SIZE", value_parser = parse::bytes)]
    pub(crate) memory_limit: Option<usize>,
    /// Blocks whose 4-bit weights wait in host memory and come to the GPU when they run: a number, none, or as many as the memory asks
    /// for
    #[arg(long, value_name = "N", value_parser = parse::offload_weights, default_value = "auto")]
    pub(crate) offload_weights: OffloadWeights,
    /// Fill each forward pass with as many documents as fit into --max-length tokens; they do not see each other
    #[arg(long)]
    pub(crate) packing: bool,
    /// Keep the order of the file
    #[arg(long)]
    pub(crate) no_shuffle: bool,
}

/// Where the result goes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// The folder to write; new or empty
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Replace the output folder if it is there
    #[arg(long)]
    pub(crate) overwrite_output_dir: bool,
}

/// What the adapter is.
#[derive(Debug, Args)]
#[command(next_help_heading = "Adapter")]
pub(crate) struct LoraArgs {
    /// Rank of the adapters [default: 16]
    #[arg(long, value_name = "N", value_parser = parse::positive)]
    pub(crate) lora_r: Option<usize>,
    /// Scale of the adapters: alpha / r [default: 32]
    #[arg(long, value_name = "X", value_parser = parse::above_zero, allow_negative_numbers = true)]
    pub(crate) lora_alpha: Option<f64>,
    /// Dropout on the adapters' inputs [default: 0]
    #[arg(long, value_name = "X", value_parser = parse::dropout, allow_negative_numbers = true)]
    pub(crate) lora_dropout: Option<f64>,
    /// Scale by alpha / sqrt(r), which suits high ranks
    #[arg(long)]
    pub(crate) use_rslora: bool,
    /// Layers that get an adapter: all-linear, names with commas between (q_proj,v_proj), or a regular expression for
    /// whole paths [default: all-linear]
    #[arg(long, value_name = "MODULES")]
    pub(crate) target_modules: Option<String>,
    /// Layers of those that get none: names, or a regular expression
    #[arg(long, value_name = "MODULES")]
    pub(crate) exclude_modules: Option<String>,
    /// Modules trained whole and saved with the adapter: lm_head, embed_tokens
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) modules_to_save: Vec<String>,
    /// Only these blocks get adapters: 0,1,2
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    pub(crate) layers_to_transform: Vec<usize>,
}

/// `--offload-weights`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OffloadWeights {
    /// As many blocks as must, on a GPU.
    Auto,
    /// So many.
    Blocks(usize),
}

/// `--gradient-checkpointing`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum GradientCheckpointing {
    /// Keep everything
    None,
    /// Keep the results of matrix products and attention; the cheap rest is computed again
    #[default]
    Selective,
    /// Keep the inputs of each block
    Full,
    /// Keep the inputs of each block in host memory
    Offload,
    /// The fastest mix that fits the GPU's free memory (or `--memory-limit`)
    Auto,
}
