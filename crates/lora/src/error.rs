//! The crate's error.

use std::path::PathBuf;

use nibble_tensor::Shape;

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One tensor of an adapter that does not fit the model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mismatch {
    /// The sizes differ.
    Shape {
        /// The tensor's name in the file.
        name: String,
        /// What the config and the model ask for.
        expected: Shape,
        /// What the file has.
        found: Vec<usize>,
    },
    /// The config asks for it and the file does not have it.
    Missing {
        /// The tensor's name in the file.
        name: String,
        /// Sizes it would have.
        expected: Shape,
    },
    /// The file has it and nothing asks for it.
    Unexpected {
        /// The tensor's name in the file.
        name: String,
    },
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shape { name, expected, found } => {
                write!(f, "{name}: expected {expected}, found (")?;
                for (i, size) in found.iter().enumerate() {
                    write!(f, "{}{size}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str(")")
            }
            Self::Missing { name, expected } => write!(f, "{name}: expected {expected}, found nothing"),
            Self::Unexpected { name } => write!(f, "{name}: found, but no module of the model has it"),
        }
    }
}

fn listed(mismatches: &[Mismatch]) -> String {
    mismatches.iter().fold(String::new(), |text, mismatch| text + "\n  " + &mismatch.to_string())
}

/// Why an adapter could not be made, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `target_modules` (with the other selections) names no linear of the model.
    #[error("target_modules {target_modules} matches no linear layer of the model: expected some of {}", available.join(", "))]
    NoTarget {
        /// As given.
        target_modules: String,
        /// Last parts of the names of the model's linears.
        available: Vec<String>,
    },
    /// A pattern is not a regular expression.
    #[error("`{field}` holds an invalid regular expression `{pattern}`: {source}")]
    Pattern {
        /// The config's field.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// The parser's reason.
        source: Box<fancy_regex::Error>,
    },
    /// A field has a value this crate does not act on.
    #[error("adapter config: `{field}` = {value} is not supported: expected {expected}")]
    Unsupported {
        /// The config's field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is supported.
        expected: &'static str,
    },
    /// The adapter's tensors do not fit the model.
    #[error("adapter `{}` does not fit the model:{}", path.display(), listed(mismatches))]
    Mismatches {
        /// The adapter's folder.
        path: PathBuf,
        /// All of them.
        mismatches: Vec<Mismatch>,
    },
    /// A file is missing or cannot be read or written.
    #[error("cannot access `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// `adapter_config.json` is not what it should be.
    #[error("`{}` is not an adapter config: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// `adapter_model.safetensors` is not what it should be.
    #[error("`{}` is not a valid safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        source: safetensors::SafeTensorError,
    },
    /// A tensor is stored in a type adapters are not stored in.
    #[error("`{}`: tensor `{name}` has dtype {found}: expected F32, BF16 or F16", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        found: String,
    },
    /// An op failed.
    #[error(transparent)]
    Tensor(#[from] nibble_tensor::Error),
}
