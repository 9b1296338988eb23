//! A model's weights on disk, whatever the container: tensors by their Hugging Face names.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;

use super::decode::{Element, decode, decode_rows};
use super::{Gguf, StoredType, gguf, safetensors};
use crate::config::ModelConfig;
use crate::error::{Error, Result, TensorProblem};
use nibble_tensor::MappedFile;

/// An open checkpoint. Nothing is copied into memory but what is read from it.
///
/// Every tensor has its Hugging Face name, shape and row order, also in a GGUF file, where names and the rows of some
/// matrices are stored otherwise.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Arc<MappedFile>>,
    entries: BTreeMap<String, Entry>,
    gguf: Option<Gguf>,
}

/// What a checkpoint says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The shape as torch has it.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub stored: StoredType,
    /// The element type that it has when read: `stored`, or BF16 for GGUF's quantised types, which are rounded to it.
    pub dtype: StoredType,
    /// Bytes in the file.
    pub bytes: usize,
}

/// Where a tensor is.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Index into the checkpoint's files.
    pub(super) file: usize,
    /// Its bytes in that file.
    pub(super) range: Range<usize>,
    pub(super) stored: StoredType,
    pub(super) shape: Vec<usize>,
    /// Rows of a head, where the halves of each head's rows are stored interleaved (GGUF, arch `llama`).
    pub(super) interleaved: Option<usize>,
}

impl Entry {
    fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of a row: of everything but the first dim.
    fn row(&self) -> usize {
        self.shape.iter().skip(1).product()
    }
}

impl Checkpoint {
    /// Opens a checkpoint: a folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards, or
    /// with one `.gguf` file; or a file of one of these kinds. Headers are validated against the files' sizes.
    ///
    /// # Errors
    /// When there is no checkpoint, a shard or a tensor of the index is missing, or a file is cut or malformed.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Self::open_file(path);
        }
        for name in ["model.safetensors", "model.safetensors.index.json"] {
            if path.join(name).is_file() {
                return Self::open_file(&path.join(name));
            }
        }
        match &gguf_files(path)?[..] {
            [only] => Self::open_file(only),
            _ => Err(Error::NoCheckpoint { path: path.to_owned() }),
        }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let ends = |suffix: &str| name.to_ascii_lowercase().ends_with(suffix);
        if ends(".gguf") {
            let (gguf, file, entries) = gguf::open(path)?;
            return Ok(Self { path: path.to_owned(), files: vec![file], entries, gguf: Some(gguf) });
        }
        let (files, entries) = if ends(".json") { safetensors::open_index(path)? } else { safetensors::open(path)? };
        Ok(Self { path: path.to_owned(), files, entries, gguf: None })
    }

    /// The file that was opened: weights, index or GGUF.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF file's metadata, where it is one.
    #[must_use]
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// The model's config: `config.json` beside the weights, or what a GGUF file's metadata amounts to.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`]; for GGUF also when its metadata lack what a config needs.
    pub fn config(&self) -> Result<ModelConfig> {
        match &self.gguf {
            Some(gguf) => ModelConfig::from_json(&self.gguf_config(gguf)?, &self.path.display().to_string()),
            None => ModelConfig::read(&self.path.with_file_name("config.json")),
        }
    }

    fn gguf_config(&self, gguf: &Gguf) -> Result<String> {
        let factors = match self.entries.get(gguf::ROPE_FREQS) {
            Some(entry) => {
                let mut factors = vec![0.0; entry.rows() * entry.row()];
                self.read_f32(gguf::ROPE_FREQS, &mut factors)?;
                Some(factors)
            }
            None => None,
        };
        let has = |name: &str| self.entries.contains_key(name);
        let shape = |name: &str| self.entries.get(name).map(|entry| entry.shape.clone());
        gguf.config_json(&gguf::Weights { factors, has: &has, shape: &shape, dtype: self.widest() })
            .map_err(|problem| Error::Gguf { path: self.path.clone(), problem })
    }

    /// The element type of the matrices: the one of the embedding, as read.
    fn widest(&self) -> StoredType {
        self.info("model.embed_tokens.weight").map_or(StoredType::BF16, |info| info.dtype)
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// What is known of a tensor.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn info(&self, name: &str) -> Result<TensorInfo> {
        let entry = self.entry(name)?;
        let dtype = if entry.stored.is_quantized() { StoredType::BF16 } else { entry.stored };
        let bytes = entry.range.len();
        Ok(TensorInfo { shape: entry.shape.clone(), stored: entry.stored, dtype, bytes })
    }

    /// The tensor's bytes as they are stored, little-endian: in a GGUF file possibly quantised, and with the rows of
    /// `llama`'s query and key matrices interleaved.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let entry = self.entry(name)?;
        Ok(&self.files[entry.file].bytes()[entry.range.clone()])
    }

    /// Whether the stored bytes are the elements as they are read, in their order: floats of 16 or 32 bits, and no rows that
    /// a GGUF file has elsewhere.
    #[must_use]
    pub fn is_plain(&self, name: &str) -> bool {
        let plain = |entry: &Entry| {
            let floats = matches!(entry.stored, StoredType::BF16 | StoredType::F16 | StoredType::F32);
            floats && entry.interleaved.is_none() && cfg!(target_endian = "little")
        };
        self.entries.get(name).is_some_and(plain)
    }

    /// Copies bytes of a tensor from its byte `at` on, as they are stored: what [`bytes`](Self::bytes) shows, read by all cores.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::BufferLength`] beyond the tensor's end, [`Error::Io`].
    pub fn read_stored(&self, name: &str, at: usize, out: &mut [u8]) -> Result<()> {
        let entry = self.entry(name)?;
        let left = entry.range.len().saturating_sub(at);
        if out.len() > left {
            return Err(Error::BufferLength { name: name.to_owned(), expected: left, found: out.len() });
        }
        let io = |source| Error::Io { op: "read", path: self.path.clone(), source };
        self.files[entry.file].read_at((entry.range.start + at) as u64, out).map_err(io)
    }

    /// Reads a whole tensor as f32: 16-bit elements exactly, GGUF's quantised types rounded to bf16.
    ///
    /// # Errors
    /// When there is no such tensor, it holds no floats, or `out` has another length.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let rows = self.entry(name)?.rows();
        self.read_rows(name, 0..rows, out)
    }

    /// Reads a whole tensor as bf16; wider elements are rounded to nearest, ties to even.
    ///
    /// # Errors
    /// As [`read_f32`](Self::read_f32).
    pub fn read_bf16(&self, name: &str, out: &mut [bf16]) -> Result<()> {
        let rows = self.entry(name)?.rows();
        self.read_rows(name, 0..rows, out)
    }

    /// Reads rows (of the first dim) as f32, so that a large tensor can be worked through in pieces.
    ///
    /// # Errors
    /// As [`read_f32`](Self::read_f32), and when the rows are not the tensor's.
    pub fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.read_rows(name, rows, out)
    }

    fn read_rows<T: Element>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        let entry = self.entry(name)?;
        let (stored, row) = (entry.stored, entry.row());
        if !stored.is_float() {
            return Err(Error::NotFloat { name: name.to_owned(), found: stored });
        }
        // Only a 1-D tensor of blocks has rows shorter than a block.
        let step = if row.is_multiple_of(stored.block()) { 1 } else { stored.block() };
        let whole = rows.start.is_multiple_of(step) && rows.end.is_multiple_of(step);
        if rows.start > rows.end || rows.end > entry.rows() || !whole {
            return Err(Error::Rows { name: name.to_owned(), rows: entry.rows(), step, start: rows.start, end: rows.end });
        }
        let expected = rows.len() * row;
        if out.len() != expected {
            return Err(Error::BufferLength { name: name.to_owned(), expected, found: out.len() });
        }
        if expected == 0 {
            return Ok(());
        }
        let bytes = &self.files[entry.file].bytes()[entry.range.clone()];
        match entry.interleaved {
            None => {
                let at = |row_index: usize| row_index * row / stored.block() * stored.block_bytes();
                decode(stored, &bytes[at(rows.start)..at(rows.end)], out);
            }
            Some(head) => {
                decode_rows(stored, bytes, row, out, |i| gguf::stored_row(rows.start + i, head));
            }
        }
        Ok(())
    }

    /// Tells the system that the tensor's pages need not stay in memory. They are read again when asked for again.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn release(&self, name: &str) -> Result<()> {
        let entry = self.entry(name)?;
        self.files[entry.file].release(entry.range.clone());
        Ok(())
    }

    /// Checks the checkpoint against a config: every tensor there, none too many, every shape right, all floats.
    ///
    /// Tensors that transformers ignores are let pass: `lm_head.weight` of a tied model, `inv_freq` buffers of old
    /// files, and the rotary factors of a GGUF file, which its config accounts for.
    ///
    /// # Errors
    /// [`Error::Tensors`] with every mismatch.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let specs = config.tensors();
        let mut problems = Vec::new();
        for spec in &specs {
            let (name, expected) = (spec.name.clone(), spec.shape.clone());
            match self.entries.get(&spec.name) {
                None => problems.push(TensorProblem::Missing { name, expected }),
                Some(entry) if entry.shape != expected => {
                    let found = entry.shape.clone();
                    problems.push(TensorProblem::Shape { name, expected, found });
                }
                Some(entry) if !entry.stored.is_float() => {
                    problems.push(TensorProblem::NotFloat { name, found: entry.stored });
                }
                Some(_) => {}
            }
        }
        let known: std::collections::BTreeSet<_> = specs.iter().map(|spec| &spec.name[..]).collect();
        for (name, entry) in &self.entries {
            if !known.contains(&name[..]) && !ignored(name, config) {
                let (name, found) = (name.clone(), entry.shape.clone());
                problems.push(TensorProblem::Unexpected { name, found });
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: self.path.clone(), problems }) }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| Error::UnknownTensor { path: self.path.clone(), name: name.to_owned() })
    }
}

fn ignored(name: &str, config: &ModelConfig) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name == gguf::ROPE_FREQS || (config.tie_word_embeddings && name == "lm_head.weight")
}

fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { op: "list", path: folder.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            found.push(path);
        }
    }
    Ok(found)
}
