//! What the commands do: one file or folder a command.

pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod merge;
pub(crate) mod plan;
pub(crate) mod quickstart;
pub(crate) mod train;
