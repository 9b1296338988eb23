//! CUDA sources of the kernels, a table of their signatures, and the images compiled from them.
//!
//! The build compiles each module (a `.cu` file) for each architecture with NVRTC and embeds the images ([`image`]). Where there
//! is none for a device, because the build had no NVRTC or the device is newer, [`cached`] compiles it on the machine with the
//! same options. Nothing here needs a device, a driver or a CUDA toolkit.

#![deny(unsafe_code)]

mod arch;
mod cache;
mod error;
mod hash;
mod nvrtc;
mod places;
mod table;

pub use arch::ComputeCapability;
pub use cache::cached;
pub use error::{Error, Result, Version};
pub use places::{find_library, find_nvrtc, site_folders, toolkit_folders, toolkits, wheel_folders};
pub use table::{Arg, ArgKind, Header, Kernel, Module, compile, has_images, image, kernel, kernels, module, modules};
