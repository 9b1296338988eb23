//! A tape of recorded backwards over move-only variables.
//!
//! A [`Var`] is an activation and, when something upstream trains, its place on the [`Tape`]. It is consumed by the one op
//! that uses it, so its gradient is written once: no topological sort, no zeroing, no accumulation of activation gradients.
//! Where a value feeds two places (in a transformer, only the residual stream) the op has two outputs.
//!
//! [`Tape::record`] takes an op's backward as an argument, so no op can be used without one; when neither the op nor its
//! inputs train, the closure and what it saved are dropped at once. [`Tape::checkpoint`] keeps only the inputs of a function
//! and runs it again in the backward pass.
//!
//! Trained values live in a [`ParamStore`]: one flat f32 buffer, with [`ParamGrads`] of the same layout beside it.
//! Gradients of parameters are added, so that micro-batches accumulate; gradients of activations are written.
//!
//! What this crate must not know: quantisation, adapters, optimizers, models.

#![forbid(unsafe_code)]

mod again;
mod offload;
pub mod ops;
mod params;
mod tape;

pub use nibble_tensor::{Error, Result};
pub use offload::{Kept, Offload};
pub use params::{Leaf, Param, ParamGrads, ParamStore, ParamStoreBuilder};
pub use tape::{Saved, Tape, Var, VarId};
