//! Optimizers over one flat buffer of parameters, gradient clipping, and learning-rate schedules.
//!
//! All trainable parameters lie in one f32 tensor and their gradients in another, so that each of these is one call over one
//! slice. Names and behaviour are those of the reference stack (torch, bitsandbytes, Hugging Face's Trainer).
//!
//! What this crate must not know: tapes, layers, files.
//!
//! ```
//! use nibble_optim::{AdamWConfig, Layout, Optimizer, OptimizerConfig, clip_grad_norm};
//! use nibble_tensor::{Arena, Device, Tensor};
//! let arena = Arena::new(Device::Cpu);
//! let mut params = Tensor::from_slice(&arena, &[1.0f32, -1.0], [2])?;
//! let grads = Tensor::from_slice(&arena, &[3.0f32, 4.0], [2])?;
//! let mut optimizer = Optimizer::new(&arena, &Layout::one(2), OptimizerConfig::AdamW(AdamWConfig::default()))?;
//! let clip = clip_grad_norm(&grads, 1.0)?;
//! assert_eq!(clip.norm, 5.0);
//! optimizer.step(&mut params, &grads, 0.1, clip.scale)?;
//! assert!((params.as_slice::<f32>()?[0] - 0.9).abs() < 1e-6);
//! # Ok::<(), nibble_optim::Error>(())
//! ```

#![forbid(unsafe_code)]

mod adafactor;
mod adamw;
mod args;
mod captured;
mod clip;
mod config;
mod error;
mod layout;
mod lion;
mod name;
mod names;
mod optimizer;
mod page_file;
mod paged;
mod plan;
mod ranges;
mod schedule;
mod sgd;

pub use adafactor::AdafactorConfig;
pub use adamw::AdamWConfig;
pub use clip::{ClipInfo, clip_grad_norm};
pub use config::OptimizerConfig;
pub use error::{Error, Result, StateMismatch};
pub use layout::Layout;
pub use lion::LionConfig;
pub use name::OptimizerName;
pub use nibble_tensor::ops::adamw::DecayOrder;
pub use optimizer::Optimizer;
pub use paged::Paging;
pub use schedule::{LrSchedule, ScheduleName, ScheduleOptions};
pub use sgd::SgdConfig;
