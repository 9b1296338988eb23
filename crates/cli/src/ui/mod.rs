//! Results onto standard output, everything else onto standard error.

mod format;
mod progress;

use std::{
    fmt::Display,
    io::{self, Write as _},
};

pub(crate) use format::{bytes, count, duration, percent};
pub(crate) use progress::{Bar, Download};

use crate::error::{CliError, Result};

/// A line of what is going on. A closed standard error is no reason to end a run.
pub(crate) fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A line of `name  value`, aligned with its neighbours.
pub(crate) fn fact(name: &str, value: impl Display) {
    say(format_args!("{name:<10} {value}"));
}

/// Something to know that stops nothing.
pub(crate) fn warn(line: impl Display) {
    say(format_args!("warning: {line}"));
}

/// Writes a result at once.
///
/// # Errors
/// [`CliError::Stdout`].
pub(crate) fn write(text: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(CliError::Stdout)
}

/// Writes a line of a result.
///
/// # Errors
/// [`CliError::Stdout`].
pub(crate) fn line(text: impl Display) -> Result<()> {
    write(format_args!("{text}\n"))
}
