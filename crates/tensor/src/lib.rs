//! Memory, shapes, devices, and each fused op of a decoder-only transformer as a `forward` / `backward` pair.
//!
//! A [`Tensor`] is contiguous memory with a [`Shape`] and a [`DType`], taken from an [`Arena`] of one [`Device`] and given
//! back to it when the last handle drops. The ops in [`ops`] are functions over tensors: each file holds the formula, the
//! CPU code, which is the specification: plain, parallel over rows, tested against f64. Each matches on the device once.
//!
//! What this crate must not know: tapes, names of parameters, models.
//!
//! ```
//! use nibble_tensor::{Arena, Device, Tensor, ops::rms_norm};
//! let arena = Arena::new(Device::Cpu);
//! let x = Tensor::from_slice(&arena, &[3.0f32, 4.0], [1, 2])?;
//! let weight = Tensor::from_slice(&arena, &[1.0f32, 1.0], [2])?;
//! let (y, _) = rms_norm::forward(&x, &weight, rms_norm::Config { eps: 0.0, offset: 0.0 })?;
//! assert!((y.as_slice::<f32>()?[0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6);
//! # Ok::<(), nibble_tensor::Error>(())
//! ```

#![deny(unsafe_code)]

mod ahead;
mod arena;
#[allow(unsafe_code)]
pub mod cuda;
mod device;
mod dtype;
mod error;
mod host_copy;
mod host_weight;
mod mapped;
pub mod ops;
mod owner;
mod rng;
mod shape;
mod tensor;
mod view_mut;
mod weight;

pub use ahead::LookAhead;
pub use arena::{Arena, ArenaStats, OwnerScope};
pub use device::Device;
pub use dtype::{DType, Element, Float};
pub use error::{Error, Result};
pub use host_copy::{HostCopy, HostPool};
pub use host_weight::HostWeight;
pub use mapped::MappedFile;
pub use owner::{Owner, OwnerStats};
pub use rng::Rng;
pub use shape::{Shape, size_class};
pub use tensor::Tensor;
pub use view_mut::TensorMut;
pub use weight::{Absmax, BlockWeight, Int8Weight, Weight};
