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

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(device) => write!(f, "{device:?}"),
        }
    }
}
