//! Decoder-only transformers described by their Hugging Face config; loading and saving.
//!
//! A model is data: [`config::ModelConfig`] says in plain fields what a `config.json` says in its several
//! spellings, and [`config::Features`] what its family does differently from the common Llama-like block. What
//! cannot be said there, or is not run yet, is refused by name with every other problem of the same file.
//!
//! [`files::Checkpoint`] reads weights from one safetensors file, from shards with an index, or from GGUF, tensor
//! by tensor out of a memory map; [`files::SafetensorsWriter`] streams them out again; [`files::Hub`] finds them in the
//! local cache of the Hugging Face Hub or downloads them into it.
//!
//! [`Transformer::load`] quantises a checkpoint tensor by tensor; [`Transformer::attach`] puts adapters on it;
//! [`Transformer::loss`] records a training pass on a tape; [`Session`] generates with cached keys and values.
//!
//! What this crate must not know: optimizers, datasets, processes.

#![forbid(unsafe_code)]

mod block;
mod checkpointing;
pub mod config;
pub mod error;
pub mod files;
mod generate;
mod load;
mod prefetch;
mod transformer;

pub use checkpointing::{Checkpointing, Mix};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Session, generate_batch};
pub use load::LoadOptions;
pub use transformer::{LossOptions, Stream, Transformer};
