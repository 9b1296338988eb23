//! The header: magic, version, metadata, tensor infos; each tensor's place checked against the file's size.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::reader::Reader;
use super::{Gguf, Value};
use crate::error::GgufProblem;
use crate::files::StoredType;
use crate::files::checkpoint::Entry;

type Result<T> = std::result::Result<T, GgufProblem>;

/// Reads the header of a file of `length` bytes that begins with `bytes`: metadata, and tensors in file order under their GGUF names, shapes
/// outermost dim first.
pub(super) fn read(bytes: &[u8], length: usize) -> Result<(Gguf, Vec<(String, Entry)>)> {
    let reader = &mut Reader::new(bytes);
    let magic: [u8; 4] = reader.array("magic")?;
    if &magic != b"GGUF" {
        return Err(GgufProblem::Magic { found: magic.to_vec() });
    }
    let version = reader.u32("version")?;
    if !(2..=3).contains(&version) {
        return Err(GgufProblem::Version { found: version });
    }
    // An info has at least a name's length, a dim count, a type and an offset; a key-value pair at least a length, a type
    // and a byte.
    let tensors = reader.count(24, "tensor count")?;
    let pairs = reader.count(13, "metadata count")?;
    let metadata = metadata(reader, pairs)?;
    let alignment = alignment(&metadata)?;
    let infos: Vec<Info> = (0..tensors).map(|_| info(reader)).collect::<Result<_>>()?;
    // A cut before the data would be told by the first tensor.
    let data = reader.position().next_multiple_of(alignment);
    let mut seen = BTreeSet::new();
    let mut entries = Vec::with_capacity(infos.len());
    for info in infos {
        let range = range(&info, data, alignment, length)?;
        if !seen.insert(info.name.clone()) {
            return Err(GgufProblem::Duplicate { name: info.name });
        }
        let entry = Entry { file: 0, range, stored: info.stored, shape: info.shape, interleaved: None };
        entries.push((info.name, entry));
    }
    Ok((Gguf { version, metadata }, entries))
}

fn metadata(reader: &mut Reader<'_>, pairs: usize) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for i in 0..pairs {
        let key = reader.string(&format!("metadata key {i} of {pairs}"))?;
        let what = format!("metadata `{key}`");
        let code = reader.u32(&what)?;
        let value = reader.value(code, &key).map_err(|problem| match problem {
            GgufProblem::Cut { needed, available, .. } => GgufProblem::Cut { what, needed, available },
            other => other,
        })?;
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// `general.alignment`: a power of two up to a mebibyte, 32 where the file is silent.
fn alignment(metadata: &BTreeMap<String, Value>) -> Result<usize> {
    let key = "general.alignment";
    let Some(value) = metadata.get(key) else { return Ok(32) };
    match value.as_u64() {
        Some(n) if n.is_power_of_two() && n <= 1 << 20 => Ok(n as usize),
        _ => {
            let expected = "a power of two up to 1048576";
            Err(GgufProblem::Metadata { key: key.to_owned(), expected, found: value.brief() })
        }
    }
}

struct Info {
    name: String,
    shape: Vec<usize>,
    stored: StoredType,
    offset: u64,
}

fn info(reader: &mut Reader<'_>) -> Result<Info> {
    let name = reader.string("tensor name")?;
    let what = format!("header of tensor `{name}`");
    let rank = reader.u32(&what)?;
    if rank > 4 {
        return Err(GgufProblem::Tensor { name, expected: "at most 4 dims", found: rank.to_string() });
    }
    let mut shape: Vec<usize> = (0..rank).map(|_| reader.u64(&what).map(|dim| dim as usize)).collect::<Result<_>>()?;
    // ggml counts dims from the innermost.
    shape.reverse();
    let code = reader.u32(&what)?;
    let stored = match code {
        0 => StoredType::F32,
        1 => StoredType::F16,
        2 => StoredType::Q4_0,
        3 => StoredType::Q4_1,
        8 => StoredType::Q8_0,
        30 => StoredType::BF16,
        found => return Err(GgufProblem::TensorType { name, found }),
    };
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(stored.block()) {
        return Err(GgufProblem::Tensor { name, expected: "rows of whole blocks of 32", found: row.to_string() });
    }
    let offset = reader.u64(&what)?;
    Ok(Info { name, shape, stored, offset })
}

fn range(info: &Info, data: usize, alignment: usize, length: usize) -> Result<Range<usize>> {
    let refuse = |expected, found| GgufProblem::Tensor { name: info.name.clone(), expected, found };
    if !info.offset.is_multiple_of(alignment as u64) {
        return Err(refuse("an aligned offset", info.offset.to_string()));
    }
    let elements = info.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let Some(bytes) = elements.and_then(|elements| info.stored.bytes(elements)) else {
        return Err(refuse("a size below 2^64 bytes", format!("dims {:?}", info.shape)));
    };
    let available = (length as u64).saturating_sub(data as u64).saturating_sub(info.offset);
    if bytes as u64 > available {
        let what = format!("tensor `{}`", info.name);
        return Err(GgufProblem::Cut { what, needed: bytes as u64, available });
    }
    let start = data + info.offset as usize;
    Ok(start..start + bytes)
}
