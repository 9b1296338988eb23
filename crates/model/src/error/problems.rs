//! What can be wrong inside one file or one download, as facts; [`Error`](super::Error) says in which.

use std::path::PathBuf;

use crate::files::StoredType;

/// One problem of a model config.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// A required field is absent.
    #[error("`{field}`: expected {expected}, found nothing")]
    Missing {
        /// The field.
        field: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A field holds a value of the wrong kind or range.
    #[error("`{field}`: expected {expected}, found {found}")]
    Wrong {
        /// The field.
        field: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds, as JSON.
        found: String,
    },
    /// The model type is none of the described ones.
    #[error("`model_type`: expected one of {known}, found `{found}`")]
    Architecture {
        /// The described families, joined.
        known: String,
        /// The config's `model_type` (or `architectures`).
        found: String,
    },
    /// The language model is nested in a multimodal wrapper.
    #[error("`text_config`: expected a text model, found `{model_type}` with its text model nested inside")]
    Nested {
        /// The wrapper's `model_type`.
        model_type: String,
    },
    /// The weights are already quantised in a format that is not read.
    #[error("`quantization_config`: expected 16-bit or 32-bit weights, found `{method}`")]
    Quantized {
        /// `quant_method`, with the bits where they are told.
        method: String,
    },
    /// A described feature that the transformer does not run yet.
    #[error("`{family}` needs {feature}, which is not run yet")]
    NotRun {
        /// The `model_type`.
        family: &'static str,
        /// The feature.
        feature: &'static str,
    },
    /// Two fields contradict each other.
    #[error("`{field}`: expected {expected} (from `{other}`), found {found}")]
    Contradiction {
        /// The field.
        field: &'static str,
        /// What the other field calls for.
        expected: String,
        /// The other field.
        other: &'static str,
        /// What the field holds.
        found: String,
    },
}

/// One problem between a checkpoint and its config.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// A tensor that the config calls for is absent.
    #[error("{name}: expected {}, found nothing", shape(.expected))]
    Missing {
        /// The tensor.
        name: String,
        /// Its shape by the config.
        expected: Vec<usize>,
    },
    /// A tensor that the config does not know of.
    #[error("{name}: expected nothing, found {}", shape(.found))]
    Unexpected {
        /// The tensor.
        name: String,
        /// Its shape in the checkpoint.
        found: Vec<usize>,
    },
    /// A tensor of another shape.
    #[error("{name}: expected {}, found {}", shape(.expected), shape(.found))]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape by the config.
        expected: Vec<usize>,
        /// Its shape in the checkpoint.
        found: Vec<usize>,
    },
    /// A tensor whose elements are not floats.
    #[error("{name}: expected a float type, found {found}")]
    NotFloat {
        /// The tensor.
        name: String,
        /// Its stored type.
        found: StoredType,
    },
}

/// What is wrong with a safetensors file or index.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsProblem {
    /// The file is shorter than the 8 bytes of the header's length.
    #[error("expected at least 8 bytes, found {found}")]
    TooShort {
        /// Bytes in the file.
        found: u64,
    },
    /// The header is longer than the format allows.
    #[error("expected a header of at most {limit} bytes, found {found}")]
    HeaderTooLarge {
        /// The format's limit.
        limit: u64,
        /// The length that the file tells.
        found: u64,
    },
    /// The file ends inside its header.
    #[error("expected a header of {expected} bytes, found {found} (the file is cut)")]
    HeaderCut {
        /// The length that the file tells.
        expected: u64,
        /// Bytes after the length field.
        found: u64,
    },
    /// The header is not what the format says.
    #[error("header: {0}")]
    Header(#[source] safetensors::SafeTensorError),
    /// The file ends inside a tensor.
    #[error("tensor `{name}`: expected {expected} bytes of file, found {found} (the file is cut)")]
    TensorCut {
        /// The first tensor that is not whole.
        name: String,
        /// File length up to the tensor's end.
        expected: u64,
        /// File length.
        found: u64,
    },
    /// There are bytes after the last tensor.
    #[error("expected {expected} bytes, found {found}")]
    Trailing {
        /// Length by the header.
        expected: u64,
        /// File length.
        found: u64,
    },
    /// A tensor's element type is not known here.
    #[error("tensor `{name}`: type {found} is not read")]
    Type {
        /// The tensor.
        name: String,
        /// The type, as the header spells it.
        found: String,
    },
    /// The index has no usable `weight_map`.
    #[error("expected `weight_map` to map tensor names to file names beside the index")]
    WeightMap,
    /// A shard that the index names is not on disk.
    #[error("shard `{shard}` is missing; it holds `{name}` and {others} other tensors")]
    MissingShard {
        /// The shard's file name.
        shard: String,
        /// One tensor in it.
        name: String,
        /// How many more.
        others: usize,
    },
    /// A tensor is not in the shard that the index names.
    #[error("tensor `{name}`: expected in shard `{shard}`, found nothing")]
    NotInShard {
        /// The tensor.
        name: String,
        /// The shard's file name.
        shard: String,
    },
}

/// What is wrong with a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufProblem {
    /// The first four bytes are not `GGUF`.
    #[error("expected the magic `GGUF`, found {found:?}")]
    Magic {
        /// The bytes found.
        found: Vec<u8>,
    },
    /// A version that is not read.
    #[error("expected version 2 or 3, found {found}")]
    Version {
        /// The file's version.
        found: u32,
    },
    /// The file ends too early.
    #[error("{what}: expected {needed} bytes, found {available} (the file is cut)")]
    Cut {
        /// The part being read: a metadata key, a tensor, the header.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes left in the file.
        available: u64,
    },
    /// Text that is not UTF-8.
    #[error("{what}: expected UTF-8 text")]
    NotUtf8 {
        /// The metadata key or tensor.
        what: String,
    },
    /// A metadata value of unknown type.
    #[error("metadata `{key}`: expected a value type of 0 to 12, found {found}")]
    ValueType {
        /// The key.
        key: String,
        /// The type's code.
        found: u32,
    },
    /// Arrays nested deeper than any writer does.
    #[error("metadata `{key}`: expected arrays nested at most {limit} deep")]
    Nesting {
        /// The key.
        key: String,
        /// The limit.
        limit: usize,
    },
    /// A metadata value is absent or of the wrong kind.
    #[error("metadata `{key}`: expected {expected}, found {found}")]
    Metadata {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },
    /// A ggml type that is not read.
    #[error("tensor `{name}`: expected F32, F16, BF16, Q4_0, Q4_1 or Q8_0, found ggml type {found}{}", ggml_name(*.found))]
    TensorType {
        /// The tensor.
        name: String,
        /// The ggml type's code.
        found: u32,
    },
    /// A tensor's dimensions, offset or row length break the format.
    #[error("tensor `{name}`: expected {expected}, found {found}")]
    Tensor {
        /// The tensor.
        name: String,
        /// The rule.
        expected: &'static str,
        /// What the file holds.
        found: String,
    },
    /// Two tensors of one name.
    #[error("tensor `{name}` is there twice")]
    Duplicate {
        /// The tensor.
        name: String,
    },
    /// A model architecture that is not read from GGUF.
    #[error("`general.architecture`: expected {known}, found `{found}`")]
    Architecture {
        /// The ones read, joined.
        known: String,
        /// The file's.
        found: String,
    },
    /// A feature in the metadata that is not run.
    #[error("metadata `{key}`: {found} is not run")]
    NotRun {
        /// The key.
        key: String,
        /// Its value.
        found: String,
    },
}

/// What went wrong while writing a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteProblem {
    /// The tensor is not in the plan.
    #[error("not in the plan")]
    Unplanned,
    /// The plan names the tensor twice.
    #[error("in the plan twice")]
    Twice,
    /// More bytes than the plan says.
    #[error("expected {expected} bytes in all, found {found}")]
    TooMany {
        /// Bytes by the plan.
        expected: u64,
        /// Bytes written and about to be.
        found: u64,
    },
    /// The checkpoint was finished before the tensor was whole.
    #[error("expected {expected} bytes before the end, found {found}")]
    Unfinished {
        /// Bytes by the plan.
        expected: u64,
        /// Bytes written.
        found: u64,
    },
    /// A type that safetensors files do not hold.
    #[error("type {found} cannot be written")]
    Type {
        /// The type.
        found: StoredType,
    },
}

/// Why a model could not be fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HubProblem {
    /// The network is off, and the model is not whole in the cache.
    #[error("expected `{file}` in the cache `{cache}` (offline), found nothing")]
    Offline {
        /// The first file that is not there.
        file: String,
        /// The cache's folder.
        cache: PathBuf,
    },
    /// The server was not reached, or the connection broke.
    #[error("no answer from `{url}`: {reason}")]
    Network {
        /// What was asked for.
        url: String,
        /// The client's reason.
        reason: String,
    },
    /// The model asks its users to accept terms, or the token may not read it.
    #[error("status {status}: {}", access(.page, *.has_token))]
    Denied {
        /// 401 or 403.
        status: u16,
        /// The model's page.
        page: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// No such repository, revision or file.
    #[error("status 404: no such {what} at `{url}`")]
    NotFound {
        /// `repository`, `revision` or `file`.
        what: &'static str,
        /// What was asked for.
        url: String,
    },
    /// Any other status.
    #[error("status {status} from `{url}`")]
    Status {
        /// The status.
        status: u16,
        /// What was asked for.
        url: String,
    },
    /// An answer that is not what the Hub sends.
    #[error("expected {expected} from `{url}`, found {found}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What should have come.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// A download ended early.
    #[error("`{file}`: expected {expected} bytes, found {found}; fetching again resumes it")]
    Cut {
        /// The file.
        file: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// The repository has no weights that are read.
    #[error("expected `model.safetensors`, shards of it, or a named `.gguf` file, found {}", found_weights(.found))]
    NoWeights {
        /// The weight-like files that it has.
        found: Vec<String>,
    },
}

fn access(page: &str, has_token: bool) -> String {
    if has_token {
        format!("the token may not read it; accept the model's terms at {page}, or use a token of an account that did")
    } else {
        format!("expected an access token; if the model is gated, accept its terms at {page} first")
    }
}

fn found_weights(found: &[String]) -> String {
    if found.is_empty() { "none".to_owned() } else { format!("`{}`", found.join("`, `")) }
}

fn ggml_name(code: u32) -> &'static str {
    match code {
        6 => " (Q5_0)",
        7 => " (Q5_1)",
        10 => " (Q2_K)",
        11 => " (Q3_K)",
        12 => " (Q4_K)",
        13 => " (Q5_K)",
        14 => " (Q6_K)",
        20 => " (IQ4_NL)",
        23 => " (IQ4_XS)",
        39 => " (MXFP4)",
        _ => "",
    }
}

/// A shape as Python writes a tuple: `(8, 4096)`, `(8,)`.
fn shape(dims: &[usize]) -> String {
    match dims {
        [only] => format!("({only},)"),
        _ => format!("({})", dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}
