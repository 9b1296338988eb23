//! The command line as it is typed: one file a command, flags in groups, every default in the help.

mod common;
mod doctor;
mod eval;
mod generate;
mod merge;
mod parse;
mod plan;
mod quickstart;
mod train;

pub(crate) use common::{ComputeDtype, DeviceName, ModelArgs, PrecisionArgs, Quant};
pub(crate) use doctor::DoctorArgs;
pub(crate) use eval::EvalArgs;
pub(crate) use generate::GenerateArgs;
pub(crate) use merge::{MergeArgs, MergeBase, MergeDtype};
pub(crate) use parse::bytes as parse_bytes;
pub(crate) use plan::PlanArgs;
pub(crate) use quickstart::QuickstartArgs;
pub(crate) use train::{GradientCheckpointing, OffloadWeights, TrainArgs};

use clap::{Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  nibble quickstart
      A small model, trained for a minute on this machine: see that it works.
  nibble train --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl --output my-adapter
      QLoRA: the model in 4 bits, adapters on all its linear layers.
  nibble plan --model HuggingFaceTB/SmolLM2-135M-Instruct --gpu 8GiB
      What that takes, and what fits: before anything is loaded.
  nibble generate --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my-adapter --prompt 'Hello!'
      Ask the result.
  nibble merge --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my-adapter --output my-model
      One model out of the two, for any other tool.

`nibble COMMAND --help` explains a command and all its flags.";

/// Fine-tune large language models in 4 bits.
///
/// The weights of the model stay frozen, in 4-bit NormalFloat; small LoRA adapters beside them are trained (QLoRA, Dettmers et
/// al. 2023). Models are read from Hugging Face folders, from the Hub and from GGUF files; adapters are written as PEFT writes
/// them.
#[derive(Debug, Parser)]
#[command(name = "nibble", version, after_help = EXAMPLES, max_term_width = 110, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Quickstart(QuickstartArgs),
    Train(Box<TrainArgs>),
    Generate(GenerateArgs),
    Eval(EvalArgs),
    Merge(MergeArgs),
    Plan(PlanArgs),
    Doctor(DoctorArgs),
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _, error::ErrorKind};

    use super::*;

    fn refused(line: &str) -> ErrorKind {
        Cli::try_parse_from(line.split(' ')).unwrap_err().kind()
    }

    fn train(line: &str) -> Box<TrainArgs> {
        let line = format!("nibble train --model m --data d --output o {line}");
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Some(Command::Train(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_says_what_it_does() {
        for command in Cli::command().get_subcommands() {
            for flag in command.get_arguments() {
                assert!(flag.get_help().is_some(), "{} {}", command.get_name(), flag.get_id());
            }
        }
    }

    #[test]
    fn aliases_are_the_same_flags() {
        let (short, long) = (train("--lr 0.1 --batch-size 3"), train("--learning-rate 0.1 --per-device-train-batch-size 3"));
        assert_eq!(short.learning_rate, long.learning_rate);
        assert_eq!((short.per_device_train_batch_size, long.per_device_train_batch_size), (Some(3), Some(3)));
    }

    #[test]
    fn a_bare_switch_means_its_usual_value() {
        assert_eq!(train("").gradient_checkpointing, GradientCheckpointing::Selective);
        assert_eq!(train("--gradient-checkpointing").gradient_checkpointing, GradientCheckpointing::Full);
        assert_eq!(train("--gradient-checkpointing none").gradient_checkpointing, GradientCheckpointing::None);
        assert_eq!(train("--double-quant").precision.double_quant, Some(true));
        assert_eq!(train("--double-quant false").precision.double_quant, Some(false));
    }

    #[test]
    fn values_that_no_run_can_have_are_refused() {
        let base = "nibble train --model m --data d --output o";
        for flags in [
            "--lora-r 0",
            "--lora-dropout 1",
            "--max-steps 0",
            "--batch-size 0",
            "--gradient-accumulation-steps 0",
            "--learning-rate -1",
            "--learning-rate nan",
            "--warmup-ratio 1.5",
            "--quant-block-size 63",
            "--num-train-epochs 0",
            "--max-length 1",
            "--optim sgdd",
            "--lr-scheduler-type sine",
        ] {
            assert_eq!(refused(&format!("{base} {flags}")), ErrorKind::ValueValidation, "{flags}");
        }
        for flags in ["--quant int4", "--device tpu", "--compute-dtype f64", "--data-format csv"] {
            assert_eq!(refused(&format!("{base} {flags}")), ErrorKind::InvalidValue, "{flags}");
        }
    }

    #[test]
    fn flags_that_would_be_ignored_are_refused() {
        let base = "nibble train --model m --data d --output o";
        assert_eq!(refused(&format!("{base} --max-steps 3 --num-train-epochs 1")), ErrorKind::ArgumentConflict);
        assert_eq!(refused(&format!("{base} --warmup-steps 3 --warmup-ratio 0.1")), ErrorKind::ArgumentConflict);
        assert_eq!(refused(&format!("{base} --eval-steps 3")), ErrorKind::MissingRequiredArgument);
        assert_eq!(refused("nibble generate --model m --prompt a --prompts b"), ErrorKind::ArgumentConflict);
        assert_eq!(refused("nibble generate --model m"), ErrorKind::MissingRequiredArgument);
        assert_eq!(refused("nibble generate --model m --prompt a --raw --system b"), ErrorKind::ArgumentConflict);
    }
}
