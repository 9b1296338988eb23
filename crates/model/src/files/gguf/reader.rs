//! A cursor over the bytes of a header. Every length is checked against what is left before it is believed.

use super::value::Value;
use crate::error::GgufProblem;

type Result<T> = std::result::Result<T, GgufProblem>;

/// Arrays in arrays, at most. No writer goes beyond one.
const MAX_NESTING: usize = 4;

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes left.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        if count > self.left() {
            return Err(GgufProblem::Cut { what: what.to_owned(), needed: count, available: self.left() });
        }
        let start = self.at;
        self.at += count as usize;
        Ok(&self.bytes[start..self.at])
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of at least `size` bytes each, refused where they cannot fit.
    pub(super) fn count(&mut self, size: u64, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let needed = count.saturating_mul(size);
        if needed > self.left() {
            return Err(GgufProblem::Cut { what: what.to_owned(), needed, available: self.left() });
        }
        Ok(count as usize)
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        let text = std::str::from_utf8(bytes).map_err(|_| GgufProblem::NotUtf8 { what: what.to_owned() })?;
        Ok(text.to_owned())
    }

    /// A metadata value of the type with this code.
    pub(super) fn value(&mut self, code: u32, key: &str) -> Result<Value> {
        self.value_at(code, key, 0)
    }

    fn value_at(&mut self, code: u32, key: &str, depth: usize) -> Result<Value> {
        Ok(match code {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.array::<1>(key)? != [0]),
            8 => Value::String(self.string(key)?),
            9 => return self.list(key, depth),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            found => return Err(GgufProblem::ValueType { key: key.to_owned(), found }),
        })
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<Value> {
        if depth == MAX_NESTING {
            return Err(GgufProblem::Nesting { key: key.to_owned(), limit: MAX_NESTING });
        }
        let code = self.u32(key)?;
        let size = match code {
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => 1,
        };
        let count = self.count(size, key)?;
        (0..count).map(|_| self.value_at(code, key, depth + 1)).collect::<Result<_>>().map(Value::Array)
    }
}
