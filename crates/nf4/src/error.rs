//! The crate's one error type.

use std::fmt;

/// One fact that does not fit, named so that several can be reported together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// What was looked at: a field, or a tensor's full name.
    pub what: String,
    /// What it should have been.
    pub expected: String,
    /// What it was.
    pub found: String,
}

impl Mismatch {
    /// A mismatch of `what`, both sides as they print.
    pub fn new(what: impl fmt::Display, expected: impl fmt::Display, found: impl fmt::Display) -> Self {
        Self { what: what.to_string(), expected: expected.to_string(), found: found.to_string() }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: expected {}, found {}", self.what, self.expected, self.found)
    }
}

/// `; `-separated mismatches, for one-line messages.
struct List<'a>(&'a [Mismatch]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, m) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            m.fmt(f)?;
        }
        Ok(())
    }
}

/// Everything that can go wrong in this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A block size that the format does not have.
    #[error("{op}: expected a power of two from {min} to {max} as `block_size`, found {found}")]
    BlockSize {
        /// The operation that refused.
        op: &'static str,
        /// The smallest block size it takes.
        min: usize,
        /// The largest block size it takes.
        max: usize,
        /// The block size it was given.
        found: usize,
    },
    /// An infinity or NaN in what was to be quantised.
    #[error("{op}: expected finite values, found {value} at `{index}`")]
    NonFinite {
        /// The operation that refused.
        op: &'static str,
        /// Position of the first such element.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// Slices whose lengths, or shapes whose sizes, do not belong together.
    #[error("{op}: {}", List(.mismatches))]
    Sizes {
        /// The operation that refused.
        op: &'static str,
        /// Every size that does not fit.
        mismatches: Vec<Mismatch>,
    },
    /// A weight's stored state misses tensors or has unfitting ones.
    #[error("quantised state of `{name}`: {}", List(.mismatches))]
    State {
        /// The weight's name.
        name: String,
        /// Every tensor or field that is missing or does not fit.
        mismatches: Vec<Mismatch>,
    },
}

/// `Ok` when nothing was collected, else the sizes error.
pub(crate) fn check_sizes(op: &'static str, pairs: &[(&str, usize, usize)]) -> Result<(), Error> {
    let mismatches: Vec<_> = pairs
        .iter()
        .filter(|(_, expected, found)| expected != found)
        .map(|(what, expected, found)| Mismatch::new(what, expected, found))
        .collect();
    if mismatches.is_empty() { Ok(()) } else { Err(Error::Sizes { op, mismatches }) }
}
