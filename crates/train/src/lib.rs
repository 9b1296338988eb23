//! The training loop: micro-batches, clip, update, schedule, evaluate.
//!
//! ```text
//! for each optimizer step:
//!     take the micro-batches; n = labelled tokens of all of them
//!     for each: loss = Σ cross entropy / n, backward          gradients add up
//!     clip the gradient's norm; update with the schedule's learning rate
//! ```
//!
//! The loss of a step is the sum over its labelled tokens divided by their number, whatever the division into micro-batches:
//! 8 × 1 and 1 × 8 give the same loss and gradients.
//!
//! A run is a function of config, data and seed. Everything a front end shows passes through an [`Observer`].
//!
//! What this crate must not know: terminals, flags, environment variables.

#![forbid(unsafe_code)]

mod config;
mod device_step;
mod error;
mod metrics;
mod observer;
pub mod plan;
mod trainer;

pub use config::TrainConfig;
pub use error::{Error, Result, ResumeMismatch, ResumeProblem};
pub use metrics::MetricsFile;
pub use observer::{EvalStats, LogEntry, Observer, Plan, StepStats};
pub use trainer::{Outcome, Trainer, evaluate};
