//! The crate's error: facts a caller can match on.

use nibble_tensor::{DType, Shape};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an optimizer or a schedule could not be made, stepped or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name that is no optimizer's.
    #[error("optim: `{name}` is not an optimizer known here; the nearest name is `{nearest}`")]
    UnknownOptimizer {
        /// The name given.
        name: String,
        /// The known name closest to it.
        nearest: &'static str,
    },
    /// A name that is no schedule's.
    #[error("lr_scheduler_type: `{name}` is not a schedule known here; the nearest name is `{nearest}`")]
    UnknownSchedule {
        /// The name given.
        name: String,
        /// The known name closest to it.
        nearest: &'static str,
    },
    /// An argument that the optimizer does not take.
    #[error("{optimizer}: takes no argument `{argument}`; it takes {}", quoted(known))]
    UnknownArgument {
        /// The optimizer.
        optimizer: &'static str,
        /// The argument given.
        argument: String,
        /// Those it takes.
        known: &'static [&'static str],
    },
    /// An argument whose value cannot be read.
    #[error("{of}: `{argument}` must be {expected}, found `{found}`")]
    Argument {
        /// The optimizer.
        of: &'static str,
        /// The argument.
        argument: String,
        /// What fits, in words.
        expected: &'static str,
        /// The value given.
        found: String,
    },
    /// The file that pages live in cannot hold them.
    #[error("optim_page_file: `{}` cannot hold pages of {bytes} bytes: {source}", path.display())]
    PageFile {
        /// The file.
        path: std::path::PathBuf,
        /// Bytes that were to be held, read or written.
        bytes: u64,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A page file with a GPU, whose pages live in memory.
    #[error("optim_page_file: on a GPU pages are in the host's memory, and take no file")]
    PageFileOnGpu,
    /// A budget for states on the CPU without a file for the others.
    #[error("optim_device_memory: on the CPU the pages that do not fit need a file, `optim_page_file`")]
    NoPageFile,
    /// Values in pages on the CPU.
    #[error("optim_page_masters: on the CPU the f32 values themselves are computed with")]
    MastersOnCpu,
    /// Less of the device than the pages need that visit it at once.
    #[error("optim_device_memory: expected room for two pages, at least {expected} bytes, found {found}")]
    DeviceMemory {
        /// Bytes of two pages.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A number outside what the option takes.
    #[error("{of}: `{option}` must be {expected}, found {found}")]
    Option {
        /// The optimizer, schedule or function.
        of: &'static str,
        /// The option.
        option: &'static str,
        /// What fits, in words.
        expected: &'static str,
        /// The number given.
        found: f64,
    },
    /// Options that the schedule does not read.
    #[error("{schedule}: takes no option {}", quoted(options))]
    UnusedOptions {
        /// The schedule.
        schedule: &'static str,
        /// The options.
        options: Vec<&'static str>,
    },
    /// `cosine_with_min_lr` without its floor, or with two.
    #[error("cosine_with_min_lr: expected one of `min_lr` and `min_lr_rate`, found {found}")]
    MinLr {
        /// How many of the two were given.
        found: usize,
    },
    /// A range without decay that is not within the parameters.
    #[error("no_decay: range {start}..{end} is not within the {len} parameters")]
    NoDecayRange {
        /// First element.
        start: usize,
        /// One past the last element.
        end: usize,
        /// Number of parameters.
        len: usize,
    },
    /// A saved state that is not this optimizer's; every mismatch is listed.
    #[error("{optimizer}: the saved state does not fit:{}", lines(mismatches))]
    State {
        /// The optimizer.
        optimizer: &'static str,
        /// What does not fit.
        mismatches: Vec<StateMismatch>,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] nibble_tensor::Error),
}

/// One tensor of a saved state that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateMismatch {
    /// The tensor's name.
    pub name: String,
    /// The type and shape that fit; nothing when the optimizer has no such tensor.
    pub expected: Option<(DType, Shape)>,
    /// What was found, in words; nothing when it is missing.
    pub found: Option<String>,
}

impl std::fmt::Display for StateMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, expected, found } = self;
        let expected = expected.map_or("nothing".to_owned(), |(dtype, shape)| format!("{dtype} {shape}"));
        write!(f, "{name}: expected {expected}, found {}", found.as_deref().unwrap_or("nothing"))
    }
}

fn lines(mismatches: &[StateMismatch]) -> String {
    mismatches.iter().fold(String::new(), |lines, mismatch| lines + "\n  " + &mismatch.to_string())
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
