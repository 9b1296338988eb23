//! Writing safetensors in a stream: headers first, from a plan of names, types and shapes; then bytes, tensor by tensor in
//! any order and in any pieces. Files are written beside their places and renamed at the end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use super::StoredType;
use crate::error::{Error, Result, WriteProblem};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// Its name.
    pub name: String,
    /// Its element type; not one of GGUF's quantised ones.
    pub dtype: StoredType,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// How a checkpoint is laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteOptions {
    /// The name before `.safetensors`: `model`, or `adapter_model`.
    pub stem: String,
    /// Bytes of tensors in a file, at most, but for a single tensor that is larger. More than one file makes shards
    /// `model-00001-of-00002.safetensors` with an index.
    pub max_shard_bytes: u64,
    /// The header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Default for WriteOptions {
    /// `model`, shards of 5 GB as transformers writes them, and the metadata `format: pt` that it looks for.
    fn default() -> Self {
        Self {
            stem: "model".to_owned(),
            max_shard_bytes: 5_000_000_000,
            metadata: BTreeMap::from([("format".to_owned(), "pt".to_owned())]),
        }
    }
}

/// A checkpoint being written. Nothing is seen at its place before [`finish`](Self::finish); dropping it unfinished leaves
/// nothing behind.
#[derive(Debug)]
pub struct SafetensorsWriter {
    folder: PathBuf,
    stem: String,
    shards: Vec<Shard>,
    places: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Shard {
    file: NamedTempFile,
    names: Vec<String>,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    offset: u64,
    length: u64,
    written: u64,
}

impl SafetensorsWriter {
    /// Lays out the files of a checkpoint in `folder`, which exists, and writes their headers.
    ///
    /// # Errors
    /// When a name is there twice, a type is not safetensors', the folder holds a checkpoint in the other layout, or the
    /// system refuses.
    pub fn create(folder: &Path, plan: &[TensorPlan], options: &WriteOptions) -> Result<Self> {
        let mut writer =
            Self { folder: folder.to_owned(), stem: options.stem.clone(), shards: Vec::new(), places: BTreeMap::new() };
        let groups = writer.shard(plan, options.max_shard_bytes)?;
        writer.refuse_shadowed(groups.len())?;
        for (index, group) in groups.iter().enumerate() {
            writer.begin(index, group, &options.metadata)?;
        }
        Ok(writer)
    }

    /// Appends bytes (little-endian, row-major) to a tensor.
    ///
    /// # Errors
    /// When the tensor is not planned or grows beyond its plan, or the system refuses.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(place) = self.places.get_mut(name) else {
            return Err(refuse(&self.folder, name, WriteProblem::Unplanned));
        };
        let after = place.written + bytes.len() as u64;
        if after > place.length {
            let problem = WriteProblem::TooMany { expected: place.length, found: after };
            return Err(refuse(&self.folder, name, problem));
        }
        let file = &mut self.shards[place.shard].file;
        put(file.as_file_mut(), place.offset + place.written, bytes).map_err(|source| io("write", file.path(), source))?;
        place.written = after;
        Ok(())
    }

    /// Puts the files in their places, the index last, and gives back their paths.
    ///
    /// # Errors
    /// When a tensor is not whole, or the system refuses.
    pub fn finish(self) -> Result<Vec<PathBuf>> {
        for (name, place) in &self.places {
            if place.written != place.length {
                let problem = WriteProblem::Unfinished { expected: place.length, found: place.written };
                return Err(refuse(&self.folder, name, problem));
            }
        }
        let count = self.shards.len();
        let total: u64 = self.places.values().map(|place| place.length).sum();
        let (mut paths, mut map) = (Vec::new(), Map::new());
        for (i, shard) in self.shards.into_iter().enumerate() {
            let file_name = match count {
                1 => format!("{}.safetensors", self.stem),
                _ => format!("{}-{:05}-of-{count:05}.safetensors", self.stem, i + 1),
            };
            map.extend(shard.names.into_iter().map(|name| (name, Value::from(file_name.clone()))));
            paths.push(settle(shard.file, self.folder.join(file_name))?);
        }
        if count > 1 {
            map.sort_keys();
            let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
            let mut file = temporary(&self.folder)?;
            writeln!(file, "{index:#}").map_err(|source| io("write", file.path(), source))?;
            paths.push(settle(file, self.folder.join(format!("{}.safetensors.index.json", self.stem)))?);
        }
        Ok(paths)
    }

    /// Fills shards in the plan's order, as transformers does, and checks the plan. There is always one.
    fn shard<'a>(&self, plan: &'a [TensorPlan], limit: u64) -> Result<Vec<Vec<&'a TensorPlan>>> {
        let mut groups = vec![Vec::new()];
        let (mut size, mut seen) = (0, std::collections::BTreeSet::new());
        for tensor in plan {
            if !seen.insert(&tensor.name) {
                return Err(refuse(&self.folder, &tensor.name, WriteProblem::Twice));
            }
            if tensor.dtype.safetensors().is_none() {
                let problem = WriteProblem::Type { found: tensor.dtype };
                return Err(refuse(&self.folder, &tensor.name, problem));
            }
            let bytes = bytes(tensor);
            if size > 0 && size + bytes > limit {
                groups.push(Vec::new());
                size = 0;
            }
            size += bytes;
            groups.last_mut().expect("there is always one").push(tensor);
        }
        Ok(groups)
    }

    /// A reader takes one layout where it finds both, so the old one must not stay beside the new.
    fn refuse_shadowed(&self, shards: usize) -> Result<()> {
        let other = if shards > 1 { "model.safetensors" } else { "model.safetensors.index.json" };
        if self.stem == "model" && self.folder.join(other).exists() {
            return Err(Error::Shadowed { path: self.folder.clone(), file: other });
        }
        Ok(())
    }

    fn begin(&mut self, shard: usize, group: &[&TensorPlan], metadata: &BTreeMap<String, String>) -> Result<()> {
        // The widest elements first, so that every tensor is aligned to its own; stable, so names stay in the plan's order.
        let mut group = group.to_vec();
        group.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.block_bytes()));
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".to_owned(), json!(metadata));
        }
        let mut end = 0;
        for tensor in &group {
            let start = end;
            end += bytes(tensor);
            let info = json!({
                "dtype": tensor.dtype.to_string(),
                "shape": tensor.shape,
                "data_offsets": [start, end],
            });
            header.insert(tensor.name.clone(), info);
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let data = 8 + header.len() as u64;

        let mut file = temporary(&self.folder)?;
        let path = file.path().to_owned();
        let out = file.as_file_mut();
        put(out, 0, &(header.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(&header))
            .and_then(|()| out.set_len(data + end))
            .map_err(|source| io("write", &path, source))?;
        let mut offset = data;
        for tensor in &group {
            let place = Place { shard, offset, length: bytes(tensor), written: 0 };
            offset += place.length;
            self.places.insert(tensor.name.clone(), place);
        }
        self.shards.push(Shard { file, names: group.iter().map(|tensor| tensor.name.clone()).collect() });
        Ok(())
    }
}

/// The bytes of a planned tensor. Sizes beyond 64 bits saturate, and the system refuses the file.
fn bytes(tensor: &TensorPlan) -> u64 {
    let size = |n: usize| n as u64;
    tensor.shape.iter().map(|&dim| size(dim)).fold(size(tensor.dtype.block_bytes()), u64::saturating_mul)
}

fn put(file: &mut File, at: u64, bytes: &[u8]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(at))?;
    file.write_all(bytes)
}

fn temporary(folder: &Path) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".nibble-").suffix(".partial");
    // What is saved is for whoever may read the folder, as any other file; the umask applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder).map_err(|source| io("create a file in", folder, source))
}

fn settle(file: NamedTempFile, to: PathBuf) -> Result<PathBuf> {
    file.as_file().sync_all().map_err(|source| io("write", &to, source))?;
    file.persist(&to).map_err(|error| io("rename into", &to, error.error))?;
    Ok(to)
}

fn io(op: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::Io { op, path: path.to_owned(), source }
}

fn refuse(folder: &Path, name: &str, problem: WriteProblem) -> Error {
    Error::Write { path: folder.to_owned(), name: name.to_owned(), problem }
}
