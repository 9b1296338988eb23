//! Reading safetensors: one file, or shards listed in an index.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::Metadata;
use serde_json::Value;

use super::StoredType;
use super::checkpoint::Entry;
use crate::error::{Error, Result, SafetensorsProblem};
use nibble_tensor::MappedFile;

/// The format's limit on headers, in bytes.
const HEADER_LIMIT: u64 = 100_000_000;

type Opened = (Vec<Arc<MappedFile>>, BTreeMap<String, Entry>);

/// Opens one file.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let file = MappedFile::open(path)?;
    let entries = entries(file.bytes(), 0).map_err(|problem| Error::Safetensors { path: path.to_owned(), problem })?;
    Ok((vec![file], entries))
}

/// Opens the shards of `model.safetensors.index.json`. A tensor that is in a shard but not in the index is left out, as
/// in transformers.
pub(super) fn open_index(path: &Path) -> Result<Opened> {
    let refuse = |problem| Error::Safetensors { path: path.to_owned(), problem };
    let map = weight_map(path)?;
    for (shard, names) in &map {
        if !path.with_file_name(shard).is_file() {
            return Err(refuse(SafetensorsProblem::MissingShard {
                shard: shard.clone(),
                name: names[0].clone(),
                others: names.len() - 1,
            }));
        }
    }
    let (mut files, mut all) = (Vec::new(), BTreeMap::new());
    for (shard, names) in map {
        let file_path = path.with_file_name(&shard);
        let file = MappedFile::open(&file_path)?;
        let mut found = entries(file.bytes(), files.len()).map_err(|problem| Error::Safetensors { path: file_path, problem })?;
        files.push(file);
        for name in names {
            let Some(entry) = found.remove(&name) else {
                return Err(refuse(SafetensorsProblem::NotInShard { name, shard }));
            };
            all.insert(name, entry);
        }
    }
    Ok((files, all))
}

/// Shard file names, each with its tensors.
fn weight_map(path: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let refuse = || Error::Safetensors { path: path.to_owned(), problem: SafetensorsProblem::WeightMap };
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { op: "open", path: path.to_owned(), source })?;
    let index: Value = serde_json::from_str(&text).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    let map = index.get("weight_map").and_then(Value::as_object).ok_or_else(refuse)?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in map {
        // A shard is a plain file name: an index must not reach outside its folder.
        let shard = shard.as_str().filter(|shard| !shard.is_empty() && !shard.contains(['/', '\\']));
        let shard = shard.filter(|&shard| shard != "..").ok_or_else(refuse)?;
        shards.entry(shard.to_owned()).or_default().push(name.clone());
    }
    Ok(shards)
}

/// The tensors of one file's bytes, with their byte ranges checked against its length.
fn entries(bytes: &[u8], file: usize) -> std::result::Result<BTreeMap<String, Entry>, SafetensorsProblem> {
    let found = bytes.len() as u64;
    let Some(length) = bytes.first_chunk::<8>() else {
        return Err(SafetensorsProblem::TooShort { found });
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_LIMIT {
        return Err(SafetensorsProblem::HeaderTooLarge { limit: HEADER_LIMIT, found: length });
    }
    if length > found - 8 {
        return Err(SafetensorsProblem::HeaderCut { expected: length, found: found - 8 });
    }
    let data = 8 + length as usize;
    let header: Metadata = parse(&bytes[8..data])?;

    let mut entries = BTreeMap::new();
    let mut by_offset: Vec<_> = header.tensors().into_iter().collect();
    by_offset.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = data;
    for (name, info) in by_offset {
        let start = data + info.data_offsets.0;
        end = data + info.data_offsets.1;
        if end > bytes.len() {
            let expected = end as u64;
            return Err(SafetensorsProblem::TensorCut { name, expected, found });
        }
        let Some(stored) = StoredType::from_safetensors(info.dtype) else {
            return Err(SafetensorsProblem::Type { name, found: info.dtype.to_string() });
        };
        let shape = info.shape.clone();
        entries.insert(name, Entry { file, range: start..end, stored, shape, interleaved: None });
    }
    if end != bytes.len() {
        return Err(SafetensorsProblem::Trailing { expected: end as u64, found });
    }
    Ok(entries)
}

fn parse(header: &[u8]) -> std::result::Result<Metadata, SafetensorsProblem> {
    use safetensors::SafeTensorError::{InvalidHeader, InvalidHeaderDeserialization};
    let text = std::str::from_utf8(header).map_err(|source| SafetensorsProblem::Header(InvalidHeader(source)))?;
    serde_json::from_str(text).map_err(|source| SafetensorsProblem::Header(InvalidHeaderDeserialization(source)))
}
