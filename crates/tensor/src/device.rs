//! Where memory lives and ops run.

use crate::cuda::CudaDevice;

/// A place to compute: a closed set, matched once in each op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The processor, all its cores.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(CudaDevice),
}

impl Device {
    /// Runs `f` where calls of ops cost least: for the processor, on a thread of the pool that they share their work with.
    /// From another thread each op is handed over and awaited, which takes as long as a small op.
    pub fn run<R: Send>(self, f: impl FnOnce() -> R + Send) -> R {
        if self == Self::Cpu { rayon::scope(|_| f()) } else { f() }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(device) => write!(f, "{device:?}"),
        }
    }
}
