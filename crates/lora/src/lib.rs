//! A linear layer with a frozen base in any format and an optional adapter beside it; PEFT's files.
//!
//! * [`Linear`]: y = x W₀ᵀ + b + s · dropout(x) Aᵀ Bᵀ (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>), W₀ in NF4, FP4, 8-bit or
//!   a floating-point type ([`Weight`]).
//! * [`AdapterConfig`]: PEFT's `adapter_config.json`, read and written.
//! * [`attach`]: puts adapters beside the linears that a config targets, and their values into one flat buffer.
//! * [`AdapterFile`] and [`save_adapter`]: PEFT's `adapter_model.safetensors`, both ways.
//! * [`merge`]: W₀ + s B A.
//!
//! What this crate must not know: attention, blocks, optimizers.

#![forbid(unsafe_code)]

mod attach;
mod config;
mod error;
mod files;
mod linear;
mod merge;
mod target;

pub use attach::{Init, attach};
pub use config::{AdapterConfig, Bias, InitLoraWeights, OneOrMany, PeftType, TargetModules};
pub use error::{Error, Mismatch, Result};
pub use files::{AdapterFile, PREFIX, is_adapter, save_adapter};
pub use linear::{Adapter, Base, Linear, Lora, forward_behind_norm, forward_fused, forward_gated, forward_gated_behind_norm};
pub use merge::merge;
pub use nibble_tensor::Weight;
