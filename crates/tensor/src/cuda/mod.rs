//! NVIDIA GPUs: the driver, memory, kernels, matrix products and graphs.
//!
//! The only module that names `cudarc` and calls the driver; hence its `unsafe`: each call hands the driver handles that this
//! module made and keeps for the life of the process. Device memory is not Rust memory: a kernel that writes where it should
//! not can spoil tensors, never the host's memory, so that launching one is a safe function once its arguments fit its
//! signature. Nothing is linked: the driver, cuBLASLt and NVRTC are opened at run time, and without them everything here is
//! an error that says what is missing.
//!
//! All kernels of a device go to one stream in the order of the calls, so memory can be handed out again as soon as its tensor
//! drops. Copies of [`Pinned`] memory may run beside them on a second stream, which waits for what the first has been given so far;
//! the first waits for such a copy before anything that depends on it ([`Pinned::join`]).
//!
//! A device that only counts ([`CudaDevice::dry`]) has no driver: what it can count returns before the driver is called, and
//! binding its context, which all else begins with, is an error.

mod charges;
mod context;
mod copy;
mod driver;
mod dry;
mod graph;
mod heap;
mod launch;
pub mod libraries;
mod matmul;
mod memory;
mod order;
mod pages;
mod pinned;
mod product;
mod profile;
mod rates;
mod timer;
mod widen;

pub use context::{CudaDevice, DeviceInfo, OpenOptions};
pub use graph::Graph;
pub(crate) use heap::Span;
pub(crate) use launch::{Arg, Grid, TensorMap, suffix};
pub(crate) use matmul::{Gemm, Matrix};
pub(crate) use memory::DeviceHeap;
pub use nibble_kernels::ComputeCapability;
pub use pages::Pager;
pub use pinned::Pinned;
pub(crate) use product::{GatedUnit, is_aligned};
pub use profile::KernelTime;
pub use timer::KernelTimer;
pub(crate) use widen::{Widen, WidenBeside};
