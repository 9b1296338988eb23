//! Reading GGUF (ggml's container, versions 2 and 3): metadata, tensors under their Hugging Face names, and the model
//! config that the metadata amount to.
//!
//! Two things are stored otherwise than in a checkpoint: names, and for architecture `llama` the rows of query and key
//! projections, whose two halves of each head are interleaved. Both are undone on reading.

mod config;
mod header;
mod names;
mod reader;
mod value;
mod vocab;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use nibble_tensor::MappedFile;

pub(super) use config::Weights;
pub(super) use names::{ROPE_FREQS, stored_row};
pub use value::Value;
pub use vocab::GgufVocab;

use super::{StoredType, checkpoint::Entry};
use crate::config::ModelConfig;
use crate::error::{Error, GgufProblem, Result};

/// A GGUF file's metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    version: u32,
    metadata: BTreeMap<String, Value>,
}

impl Gguf {
    /// The container's version, 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Every key and its value.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// `general.architecture`, such as `llama`.
    #[must_use]
    pub fn architecture(&self) -> &str {
        self.metadata.get("general.architecture").and_then(Value::as_str).unwrap_or_default()
    }

    /// A value of the file's architecture: `block_count` is `llama.block_count`.
    fn of_arch(&self, key: &str) -> (String, Option<&Value>) {
        let key = format!("{}.{key}", self.architecture());
        let value = self.metadata.get(&key);
        (key, value)
    }
}

/// Opens a GGUF file: its metadata, and its tensors under Hugging Face names.
pub(super) fn open(path: &Path) -> Result<(Gguf, Arc<MappedFile>, BTreeMap<String, Entry>)> {
    let file = MappedFile::open(path)?;
    let (gguf, entries) =
        read(file.bytes(), file.bytes().len()).map_err(|problem| Error::Gguf { path: path.to_owned(), problem })?;
    Ok((gguf, file, entries))
}

/// The config of a file of `length` bytes that begins with `head`, and is called `name` in errors; nothing where that is not all of what
/// decides about it: the header, and the factors of rope where the file has some.
pub(super) fn config_of_head(head: &[u8], length: usize, name: &str) -> Result<Option<ModelConfig>> {
    let wrap = |problem| Error::Gguf { path: name.into(), problem };
    let (gguf, entries) = match read(head, length) {
        Err(GgufProblem::Cut { .. }) if head.len() < length => return Ok(None),
        found => found.map_err(wrap)?,
    };
    let factors = match entries.get(ROPE_FREQS).filter(|entry| entry.stored == StoredType::F32) {
        None => None,
        Some(entry) => {
            let Some(bytes) = head.get(entry.range.clone()) else { return Ok(None) };
            Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
    };
    let has = |name: &str| entries.contains_key(name);
    let shape = |name: &str| entries.get(name).map(|entry| entry.shape.clone());
    let dtype = entries.get("model.embed_tokens.weight").map_or(StoredType::BF16, |entry| entry.stored);
    let json = gguf.config_json(&Weights { factors, has: &has, shape: &shape, dtype }).map_err(wrap)?;
    ModelConfig::from_json(&json, name).map(Some)
}

fn read(bytes: &[u8], length: usize) -> std::result::Result<(Gguf, BTreeMap<String, Entry>), GgufProblem> {
    let (gguf, tensors) = header::read(bytes, length)?;
    if let Some(parts) = gguf.metadata.get("split.count").and_then(Value::as_u64).filter(|&n| n > 1) {
        return Err(GgufProblem::NotRun { key: "split.count".to_owned(), found: format!("a model in {parts} files") });
    }
    names::check_architecture(&gguf)?;
    let mut entries = BTreeMap::new();
    for (name, entry) in tensors {
        let (name, entry) = names::to_hugging_face(&gguf, name, entry)?;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(GgufProblem::Duplicate { name });
        }
    }
    Ok((gguf, entries))
}
