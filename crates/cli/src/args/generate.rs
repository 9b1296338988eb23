//! `nibble generate`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{ModelArgs, PrecisionArgs, common::AdapterArgs, parse};

const EXAMPLES: &str = "\
Examples:
  nibble generate --model ./model --prompt 'What is a nibble?'
  nibble generate --model ./model --adapter my-adapter --prompts questions.txt --json > answers.jsonl
  nibble generate --model ./model --raw --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95";

/// Answer prompts.
///
/// A prompt is put into the model's own chat template, and the answer ends at any of its end tokens.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("input").required(true).args(["prompt", "prompts"]))]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) adapter: AdapterArgs,
    /// The prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Input")]
    pub(crate) prompt: Option<String>,
    /// A file of prompts: a text a line, or JSONL with "prompt"
    #[arg(long, value_name = "FILE", help_heading = "Input")]
    pub(crate) prompts: Option<PathBuf>,
    /// Answer this many of a file's prompts at once [default: 8]
    #[arg(long, value_name = "N", value_parser = parse::positive, help_heading = "Input")]
    pub(crate) batch_size: Option<usize>,
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "raw", help_heading = "Input")]
    pub(crate) system: Option<String>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long, help_heading = "Input")]
    pub(crate) raw: bool,
    /// At most this many tokens
    #[arg(long, value_name = "N", value_parser = parse::positive, default_value = "256", help_heading = "Sampling")]
    pub(crate) max_new_tokens: usize,
    /// How freely tokens are drawn; 0 takes the likeliest always
    #[arg(long, value_name = "X", value_parser = parse::temperature, allow_negative_numbers = true, default_value = "0", help_heading = "Sampling")]
    pub(crate) temperature: f32,
    /// Draw from the likeliest tokens that reach this probability together
    #[arg(long, value_name = "X", value_parser = parse::top_p, allow_negative_numbers = true, help_heading = "Sampling")]
    pub(crate) top_p: Option<f32>,
    /// Draw from this many likeliest tokens
    #[arg(long, value_name = "N", value_parser = parse::positive, help_heading = "Sampling")]
    pub(crate) top_k: Option<usize>,
    /// Above 1: tokens that occurred become less likely
    #[arg(long, value_name = "X", value_parser = parse::penalty, allow_negative_numbers = true, default_value = "1", help_heading = "Sampling")]
    pub(crate) repetition_penalty: f32,
    /// Seed of the draws [default: 0]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) precision: PrecisionArgs,
    /// Write a JSON object a prompt: prompt_ids, token_ids, text
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}
