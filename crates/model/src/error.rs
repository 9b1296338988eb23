//! The one error type of the crate. Variants carry facts; lists hold every problem of a file, not the first one.

use std::fmt::Display;
use std::path::PathBuf;

use crate::files::StoredType;

mod problems;

pub use problems::{ConfigProblem, GgufProblem, HubProblem, SafetensorsProblem, TensorProblem, WriteProblem};

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with a model's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a read or a write.
    #[error("{op} `{path}`: {source}")]
    Io {
        /// What was being done: `open`, `read`, `write`, `rename`, …
        op: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file could not be mapped into memory, or an op failed.
    #[error(transparent)]
    Tensor(#[from] nibble_tensor::Error),
    /// An adapter does not fit the model.
    #[error(transparent)]
    Adapter(#[from] nibble_lora::Error),
    /// A weight cannot be quantised.
    #[error("quantize `{name}`: {source}")]
    Quantize {
        /// The tensor.
        name: String,
        /// The reason.
        source: nibble_nf4::Error,
    },
    /// More tokens than positions.
    #[error("generate: {tokens} tokens do not fit: expected at most {positions}")]
    TooLong {
        /// Tokens asked for.
        tokens: usize,
        /// Positions there are.
        positions: usize,
    },
    /// Generation needs a token to begin with.
    #[error("generate: expected a prompt of at least one token, found none")]
    EmptyPrompt,
    /// A module of `modules_to_save` that cannot be trained whole.
    #[error("modules_to_save: expected `lm_head` or `embed_tokens`, found `{module}`")]
    ModuleToSave {
        /// As given.
        module: String,
    },
    /// A JSON file does not parse.
    #[error("parse `{path}`: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A model config is malformed, or says something that is not run.
    #[error("read the config of `{model}`:{}", lines(.problems))]
    Config {
        /// The file, or the name given by the caller.
        model: String,
        /// Every problem found.
        problems: Vec<ConfigProblem>,
    },
    /// A checkpoint's tensors are not the ones its config calls for.
    #[error("checkpoint `{path}` does not fit its config:{}", lines(.problems))]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// Every problem found, in the model's order.
        problems: Vec<TensorProblem>,
    },
    /// A safetensors file or its index is malformed.
    #[error("open `{path}`: {problem}")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: SafetensorsProblem,
    },
    /// A GGUF file is malformed, or holds what is not read.
    #[error("open `{path}`: {problem}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: GgufProblem,
    },
    /// A folder holds no checkpoint.
    #[error("open `{path}`: expected `model.safetensors`, `model.safetensors.index.json` or a `.gguf` file, found none")]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
    },
    /// A tensor that the checkpoint does not have was asked for.
    #[error("read tensor `{name}`: not in `{path}`")]
    UnknownTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A buffer does not hold as many elements as the rows read.
    #[error("read tensor `{name}`: expected a buffer of {expected} elements, found {found}")]
    BufferLength {
        /// The tensor.
        name: String,
        /// Elements in the rows.
        expected: usize,
        /// Elements in the buffer.
        found: usize,
    },
    /// Rows outside a tensor, or, in a 1-D tensor of blocks, rows that cut a block.
    #[error("read tensor `{name}`: expected rows within 0..{rows} in steps of {step}, found {start}..{end}")]
    Rows {
        /// The tensor.
        name: String,
        /// Rows of the tensor.
        rows: usize,
        /// Rows that only come together.
        step: usize,
        /// First row asked for.
        start: usize,
        /// One past the last row asked for.
        end: usize,
    },
    /// A tensor whose elements are not floats was to be read as floats.
    #[error("read tensor `{name}`: expected a float type, found {found}")]
    NotFloat {
        /// The tensor.
        name: String,
        /// Its stored type.
        found: StoredType,
    },
    /// Writing a checkpoint went against its own plan.
    #[error("write tensor `{name}` into `{path}`: {problem}")]
    Write {
        /// The folder being written.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What went wrong.
        problem: WriteProblem,
    },
    /// A folder to be written to already holds a checkpoint in the other layout, which would shadow the new one.
    #[error("write a checkpoint into `{path}`: expected no `{file}` there, found one")]
    Shadowed {
        /// The folder.
        path: PathBuf,
        /// The file in the way.
        file: &'static str,
    },
    /// A model's name on the Hub is malformed.
    #[error("parse model name `{found}`: expected `org/name`, `org/name@revision` or `org/name/file.gguf`")]
    HubName {
        /// What was given.
        found: String,
    },
    /// The Hub, or the local cache of it, did not give a model.
    #[error("fetch `{model}`: {problem}")]
    Hub {
        /// `org/name@revision`.
        model: String,
        /// What went wrong.
        problem: HubProblem,
    },
}

/// One indented line a problem.
fn lines(problems: &[impl Display]) -> String {
    problems.iter().fold(String::new(), |text, problem| text + "\n  " + &problem.to_string())
}
