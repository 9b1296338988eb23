//! `nibble doctor`.

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  nibble doctor
  nibble doctor --json | jq .cpu";

/// Show what this machine has, what is missing, and how to get it.
///
/// Processor and its instruction sets, memory, GPU libraries, caches, the Hugging Face Hub and Python. Nothing is changed and
/// nothing is downloaded; it ends with 0 whatever it finds. An access token is never shown.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// Write one JSON object
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}
