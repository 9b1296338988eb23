//! The ops of decoder-only transformers, each a file with formula, `forward`, `backward`, CPU code and tests.
//!
//! Letters: T tokens of the stream, C channels, H heads, K key/value heads, D head size, V vocabulary, R rank.
//! A stream holds packed documents without padding; [`Documents`] says where each begins.
//!
//! Gradients of parameters are added (`+=`) to what is there, so that micro-batches accumulate; gradients of activations
//! are written (`=`).

pub mod adafactor;
pub mod adamw;
pub mod adamw_8bit;
pub mod attention;
pub mod dequantize;
mod documents;
pub mod dynamic8;
pub mod embedding;
mod few;
pub mod global_norm;
pub mod glu;
pub mod linear;
pub mod lion;
pub mod lm_head_loss;
pub mod loss_scale;
pub(crate) mod matmul;
pub(crate) mod operand;
pub mod quantize;
pub mod residual;
pub mod rms_norm;
pub mod rope;
pub mod sample;
#[cfg(test)]
mod samples;
pub mod sgd;
pub mod simd;
mod softcap;
pub mod step;
pub mod step_count;
mod typed;

pub use documents::Documents;
