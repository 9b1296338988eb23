//! Tolerances, strategies, gradient checks and f64 references on plain slices, for tests only.
//!
//! Depends on no other crate of the project, so that what is tested is never its own reference.

#![forbid(unsafe_code)]

mod compare;
mod device;
mod golden;
mod gradient;
pub mod reference;
mod strategy;

pub use compare::{UNIT_BF16, UNIT_F16, UNIT_F32, assert_within, relative_error, widen};
pub use device::gpu_library_folders;
pub use golden::golden_folder;
pub use gradient::{central_difference, weighted_sum};
pub use strategy::{cases, normals, size, sizes};
