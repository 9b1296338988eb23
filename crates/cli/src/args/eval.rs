//! `nibble eval`.

use std::path::PathBuf;

use clap::{Args, builder::PossibleValuesParser};
use nibble_data::Format;

use super::{ModelArgs, PrecisionArgs, common::AdapterArgs, parse};

const EXAMPLES: &str = "\
Examples:
  nibble eval --model ./model --data eval.jsonl
  nibble eval --model ./model --adapter my-adapter --data eval.jsonl --json";

/// Measure loss and perplexity on data.
///
/// The loss is the cross entropy in nats, its sum over all labelled tokens divided by their number, so it does not depend on
/// the batch size; perplexity is e to the loss.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) adapter: AdapterArgs,
    /// Rows to measure on: JSONL, or a JSON array
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub(crate) data: PathBuf,
    /// The format of the rows; without it found from the columns
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(Format::ALL.map(Format::name)), help_heading = "Data")]
    pub(crate) data_format: Option<String>,
    /// Cut longer examples to this many tokens [default: 1024, or what the model has if that is less]
    #[arg(long, value_name = "N", value_parser = parse::length, help_heading = "Data")]
    pub(crate) max_length: Option<usize>,
    /// Measure the prompts too, not only the answers
    #[arg(long, help_heading = "Data")]
    pub(crate) train_on_prompt: bool,
    /// Documents of a forward pass
    #[arg(
        long,
        visible_alias = "batch-size",
        value_name = "N",
        value_parser = parse::positive,
        default_value = "8",
        help_heading = "Data"
    )]
    pub(crate) per_device_eval_batch_size: usize,
    #[command(flatten)]
    pub(crate) precision: PrecisionArgs,
    /// Write one JSON object: loss, perplexity, tokens
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}
