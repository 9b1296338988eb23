//! The tensors under which bitsandbytes stores a 4-bit weight in a checkpoint, and back.
//!
//! | name | dtype, shape |
//! |---|---|
//! | `W` | U8 `[ceil(n/2), 1]` |
//! | `W.absmax` | F32 `[blocks]`; U8 `[blocks]` with double quantisation |
//! | `W.quant_map` | F32 `[16]` |
//! | `W.nested_absmax` | F32 `[ceil(blocks/256)]`, with double quantisation |
//! | `W.nested_quant_map` | F32 `[256]`, with double quantisation |
//! | `W.quant_state.bitsandbytes__nf4` (or `__fp4`) | U8: JSON as Python's `json.dumps` writes it |
//!
//! This is what `QuantState.as_dict(packed=True)` of bitsandbytes 0.50 gives and `QuantState.from_dict` takes.

use std::fmt::Write as _;

use crate::blocks::{Absmax, NESTED_BLOCK, QuantizedBlocks};
use crate::element::ElementType;
use crate::error::{Error, Mismatch, check_sizes};
use crate::format::Format;

/// How far a stored 4-bit level may lie from ours: other releases computed the tables at run time. Decoding uses ours, as the reference's kernels do.
const MAP_TOLERANCE: f32 = 1e-6;

/// The dtype of a stored tensor, in the words of safetensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateDtype {
    /// Bytes.
    U8,
    /// 32-bit floats, little-endian.
    F32,
    /// Any other. Only codes may have it (`quant_storage`): their bytes are what counts.
    Other,
}

impl StateDtype {
    /// The name in a safetensors header; [`StateDtype::Other`] has none of its own.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "U8",
            Self::F32 => "F32",
            Self::Other => "other",
        }
    }
}

/// A tensor to store.
#[derive(Debug, Clone, PartialEq)]
pub struct StateTensor {
    /// Its full name.
    pub name: String,
    /// Its dtype.
    pub dtype: StateDtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, little-endian.
    pub bytes: Vec<u8>,
}

/// A stored tensor, looked up.
#[derive(Debug, Clone, Copy)]
pub struct StateRef<'a> {
    /// Its dtype.
    pub dtype: StateDtype,
    /// Its elements, little-endian, at any alignment.
    pub bytes: &'a [u8],
}

/// A weight read back.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredWeight {
    /// Its blocks, the flattened weight.
    pub blocks: QuantizedBlocks,
    /// The weight's shape: for a linear layer [output features, input features].
    pub shape: Vec<usize>,
    /// What the weight was before, and what the reference decodes to.
    pub dtype: ElementType,
}

/// The JSON tensor. Field order is the reference's.
#[derive(serde::Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// The tensors of the weight called `name` (`model.layers.0.mlp.up_proj.weight`), of shape `shape` and originally of type `dtype`.
///
/// # Errors
/// [`Error::Sizes`] if `shape` does not have as many elements as `q`.
pub fn to_state(name: &str, q: &QuantizedBlocks, shape: &[usize], dtype: ElementType) -> Result<Vec<StateTensor>, Error> {
    check_sizes("to_state", &[("elements of the shape", q.len(), shape.iter().fold(1, |n: usize, &d| n.saturating_mul(d)))])?;
    let format = q.config().format;
    // Code 8 of FP4 decodes to -0, and is written as +0.
    let table = format.table().map(|level| level + 0.0);
    let mut tensors = vec![
        StateTensor { shape: vec![q.packed().len(), 1], ..bytes(name.to_owned(), q.packed()) },
        floats(format!("{name}.quant_map"), &table),
    ];
    match q.absmax() {
        Absmax::Plain(absmax) => tensors.insert(1, floats(format!("{name}.absmax"), absmax)),
        Absmax::Nested { codes, absmax, map, .. } => {
            tensors.insert(1, bytes(format!("{name}.absmax"), codes));
            tensors.push(floats(format!("{name}.nested_absmax"), absmax));
            tensors.push(floats(format!("{name}.nested_quant_map"), map.as_slice()));
        }
    }
    tensors.push(bytes(json_name(name, format), json(q, shape, dtype).as_bytes()));
    Ok(tensors)
}

fn bytes(name: String, data: &[u8]) -> StateTensor {
    StateTensor { name, dtype: StateDtype::U8, shape: vec![data.len()], bytes: data.to_vec() }
}

fn floats(name: String, data: &[f32]) -> StateTensor {
    let bytes = data.iter().flat_map(|v| v.to_le_bytes()).collect();
    StateTensor { name, dtype: StateDtype::F32, shape: vec![data.len()], bytes }
}

fn json_name(name: &str, format: Format) -> String {
    format!("{name}.quant_state.bitsandbytes__{}", format.name())
}

/// The quantisation state as `json.dumps` writes it: `, ` and `: ` between, floats as Python prints them.
fn json(q: &QuantizedBlocks, shape: &[usize], dtype: ElementType) -> String {
    let mut out = format!(
        r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": {shape:?}"#,
        q.config().format.name(),
        q.config().block_size,
        dtype.name(),
    );
    if let Absmax::Nested { offset, .. } = q.absmax() {
        let _ = write!(
            out,
            r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {}"#,
            python_float(f64::from(*offset))
        );
    }
    out.push('}');
    out
}

/// `repr(x)` of Python: the shortest digits that read back, positional for decimal exponents -4 to 15, else with an exponent of two digits at least.
fn python_float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x == 0.0 || (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Puts the weight called `name` together from the tensors that `lookup` finds by full name.
///
/// # Errors
/// [`Error::State`] naming every tensor or field that is missing or does not fit; [`Error::BlockSize`] for a block size we do not have.
pub fn from_state<'a>(name: &str, lookup: impl FnMut(&str) -> Option<StateRef<'a>>) -> Result<StoredWeight, Error> {
    let mut reader = Reader { name, lookup, mismatches: Vec::new() };
    let weight = reader.read();
    match weight {
        Some(weight) if reader.mismatches.is_empty() => weight,
        _ => Err(Error::State { name: name.to_owned(), mismatches: reader.mismatches }),
    }
}

/// Reads tensors, and keeps what did not fit.
struct Reader<'n, F> {
    name: &'n str,
    lookup: F,
    mismatches: Vec<Mismatch>,
}

impl<'a, F: FnMut(&str) -> Option<StateRef<'a>>> Reader<'_, F> {
    /// `None` only after a mismatch was noted; the inner result is of the last step, that the parts' sizes agree.
    fn read(&mut self) -> Option<Result<StoredWeight, Error>> {
        let (format, state) = self.state()?;
        let packed = self.tensor(self.name.to_owned(), None).map(<[u8]>::to_vec);
        let dtype = ElementType::from_name(&state.dtype);
        if dtype.is_none() {
            self.note("dtype", "`float32`, `bfloat16` or `float16`", &state.dtype);
        }
        if let Some(map) = self.floats("quant_map") {
            self.check_map(&map, format);
        }
        let absmax = self.absmax(&state);
        let len = state.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if len.is_none() {
            self.note("shape", "a size that fits memory", format!("{:?}", state.shape));
        }
        let (packed, dtype, absmax, len) = (packed?, dtype?, absmax?, len?);
        let blocks = QuantizedBlocks::from_parts(format, state.blocksize, len, packed, absmax);
        Some(match blocks {
            Ok(blocks) => Ok(StoredWeight { blocks, shape: state.shape, dtype }),
            Err(Error::Sizes { mismatches, .. }) => Err(Error::State { name: self.name.to_owned(), mismatches }),
            Err(other) => Err(other),
        })
    }

    /// The JSON tensor and the format that its name tells.
    fn state(&mut self) -> Option<(Format, QuantState)> {
        let found = [Format::Nf4, Format::Fp4].into_iter().find_map(|format| {
            let full = json_name(self.name, format);
            (self.lookup)(&full).map(|tensor| (format, full, tensor.bytes))
        });
        let Some((format, full, json)) = found else {
            self.note(format!("{}.quant_state.bitsandbytes__*", self.name), "`nf4` or `fp4`", "none");
            return None;
        };
        let state: QuantState = match serde_json::from_slice(json) {
            Ok(state) => state,
            Err(error) => {
                self.note(full, "a quantisation state in JSON", error);
                return None;
            }
        };
        if state.quant_type != format.name() {
            self.note("quant_type", format.name(), &state.quant_type);
        }
        Some((format, state))
    }

    /// Scales: nested if the state speaks of a nested block size.
    fn absmax(&mut self, state: &QuantState) -> Option<Absmax> {
        let Some(nested_block) = state.nested_blocksize else {
            return self.floats("absmax").map(Absmax::Plain);
        };
        if nested_block != NESTED_BLOCK {
            self.note("nested_blocksize", NESTED_BLOCK, nested_block);
        }
        if let Some(dtype) = state.nested_dtype.as_deref().filter(|&d| d != "float32") {
            self.note("nested_dtype", "float32", dtype);
        }
        if state.nested_offset.is_none() {
            self.note("nested_offset", "a number", "none");
        }
        let codes = self.tensor(format!("{}.absmax", self.name), Some(StateDtype::U8)).map(<[u8]>::to_vec);
        let absmax = self.floats("nested_absmax");
        let map = self.floats("nested_quant_map").and_then(|map| {
            let len = map.len();
            let map = <Box<[f32; 256]>>::try_from(map.into_boxed_slice());
            map.map_err(|_| self.note("nested_quant_map", "256 values", len)).ok()
        });
        Some(Absmax::Nested { codes: codes?, absmax: absmax?, offset: state.nested_offset? as f32, map: map? })
    }

    fn check_map(&mut self, map: &[f32], format: Format) {
        let table = format.table();
        if map.len() != table.len() {
            self.note("quant_map", "16 values", map.len());
        } else if let Some(i) = (0..16).find(|&i| map[i].is_nan() || (map[i] - table[i]).abs() > MAP_TOLERANCE) {
            self.note(format!("quant_map[{i}]"), table[i], map[i]);
        }
    }

    fn floats(&mut self, part: &str) -> Option<Vec<f32>> {
        let full = format!("{}.{part}", self.name);
        let bytes = self.tensor(full.clone(), Some(StateDtype::F32))?;
        let (chunks, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            self.note(full, "a multiple of 4 bytes", bytes.len());
            return None;
        }
        Some(chunks.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }

    fn tensor(&mut self, full: String, dtype: Option<StateDtype>) -> Option<&'a [u8]> {
        let found = (self.lookup)(&full);
        let expected = dtype.map_or("a tensor", StateDtype::name);
        match found {
            None => self.note(full, expected, "none"),
            Some(tensor) if dtype.is_some_and(|d| d != tensor.dtype) => self.note(full, expected, tensor.dtype.name()),
            Some(tensor) => return Some(tensor.bytes),
        }
        None
    }

    fn note(&mut self, what: impl std::fmt::Display, expected: impl std::fmt::Display, found: impl std::fmt::Display) {
        self.mismatches.push(Mismatch::new(what, expected, found));
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_print_as_python_prints_them() {
        let cases = [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e-100, "1e-100"),
            (0.04861922934651375, "0.04861922934651375"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e22, "-2.5e+22"),
        ];
        for (x, repr) in cases {
            assert_eq!(python_float(x), repr);
        }
    }
}
