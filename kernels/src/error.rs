//! The crate's error: facts a caller can match on.

use std::path::PathBuf;

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a module could not be compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No module has this name.
    #[error("no CUDA module is named `{module}`")]
    UnknownModule {
        /// The name asked for.
        module: String,
    },
    /// The module is for Hopper alone.
    #[error("CUDA module `{module}` is for sm_90a alone, not for {arch}")]
    HopperOnly {
        /// The module.
        module: String,
        /// The architecture asked for.
        arch: String,
    },
    /// The library cannot be opened or is no NVRTC.
    #[error("open NVRTC `{path}`: {reason}")]
    Open {
        /// The library.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },
    /// The compiler is older or newer than the device.
    #[error("NVRTC {version} (`{path}`) does not compile for {arch}")]
    Architecture {
        /// The library.
        path: PathBuf,
        /// Its version.
        version: Version,
        /// The architecture asked for.
        arch: String,
    },
    /// The compiler refused the source.
    #[error("compile `{module}` for {arch}: {reason}\n{log}")]
    Compile {
        /// The module.
        module: String,
        /// The architecture.
        arch: String,
        /// NVRTC's name of the error.
        reason: String,
        /// The compiler's log.
        log: String,
    },
}

/// NVRTC's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Before the dot.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
