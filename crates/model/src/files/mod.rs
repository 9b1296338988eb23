//! Models' files: checkpoints read tensor by tensor out of memory maps, written in a stream, found on the Hub.

mod checkpoint;
mod decode;
pub mod gguf;
pub mod hub;
mod safetensors;
mod stored;
mod writer;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use gguf::{Gguf, GgufVocab};
pub use hub::{Fetched, Hub, HubOptions, ModelName, Progress};
pub use stored::StoredType;
pub use writer::{SafetensorsWriter, TensorPlan, WriteOptions};
