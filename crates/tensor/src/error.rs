//! The crate's error: facts a caller can match on.

use std::path::PathBuf;

use crate::{DType, Shape};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an op, an allocation or a file mapping failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operand's shape does not fit the op.
    #[error("{op}: `{operand}` has the wrong shape: expected {expected}, found {found}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The operand's name in the op's signature.
        operand: &'static str,
        /// The shape that fits.
        expected: Shape,
        /// The shape given.
        found: Shape,
    },
    /// An operand's dtype is not one the op takes.
    #[error("{op}: `{operand}` has the wrong dtype: expected {expected}, found {found}")]
    DType {
        /// The op.
        op: &'static str,
        /// The operand's name.
        operand: &'static str,
        /// What fits, in words.
        expected: &'static str,
        /// The dtype given.
        found: DType,
    },
    /// A size or argument outside what the op takes.
    #[error("{op}: `{argument}` must be {expected}, found {found}")]
    Argument {
        /// The op.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// What fits, in words.
        expected: &'static str,
        /// The value given.
        found: usize,
    },
    /// A token id or label at or beyond the vocabulary.
    #[error("{op}: id {id} at position {position} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The op.
        op: &'static str,
        /// Position in the stream.
        position: usize,
        /// The id found.
        id: i64,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// Memory written while another handle to it lives.
    #[error("{op}: the tensor is shared and cannot be written in place")]
    Shared {
        /// The op.
        op: &'static str,
    },
    /// The arena's limit is reached.
    #[error("out of memory on {device}: {requested} bytes asked, {live} of {limit} bytes in use")]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        requested: usize,
        /// Bytes in use.
        live: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The driver has no memory for what a call makes: a graph, a library's workspace.
    #[error("out of memory: {call} found none left")]
    DriverOutOfMemory {
        /// The call.
        call: &'static str,
    },
    /// The host has no more memory that a device could copy from and to by itself: such memory is locked, and neither swapped nor
    /// taken beyond the system's limit.
    #[error("out of host memory: {requested} bytes asked to be locked for copies to the GPU and back")]
    OutOfHostMemory {
        /// Bytes asked for.
        requested: usize,
    },
    /// A device that is not there, or too old.
    #[error("no GPU can be used: {reason}")]
    NoDevice {
        /// What is missing.
        reason: String,
    },
    /// A call into the driver or one of its libraries failed.
    #[error("cuda: {call} failed: {reason}")]
    Cuda {
        /// The call.
        call: &'static str,
        /// The library's words.
        reason: String,
    },
    /// A kernel cannot be launched.
    #[error("cuda: kernel `{kernel}` cannot run: {reason}")]
    Kernel {
        /// Its name.
        kernel: String,
        /// Why.
        reason: String,
    },
    /// Elements read or written in place that are on a device.
    #[error("{op}: the tensor is on {device}, not on the host")]
    NotOnHost {
        /// The op.
        op: &'static str,
        /// Where it is.
        device: String,
    },
    /// The 4-bit or 8-bit format refused its input.
    #[error(transparent)]
    Quantization(#[from] nibble_nf4::Error),
    /// A file could not be mapped.
    #[error("cannot read `{}`: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether there was no more memory, on the device or on the host.
    #[must_use]
    pub const fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfMemory { .. } | Self::DriverOutOfMemory { .. } | Self::OutOfHostMemory { .. })
    }
}
