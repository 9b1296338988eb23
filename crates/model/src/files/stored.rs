//! Element types of files.

use std::fmt;

/// An element type as a file stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoredType {
    /// 64-bit floats.
    F64,
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// GGUF: 32 weights in 18 bytes, (q − 8) · d.
    Q4_0,
    /// GGUF: 32 weights in 20 bytes, q · d + m.
    Q4_1,
    /// GGUF: 32 weights in 34 bytes, q · d.
    Q8_0,
    /// Signed 64-bit integers.
    I64,
    /// Signed 32-bit integers.
    I32,
    /// Signed 16-bit integers.
    I16,
    /// Signed bytes.
    I8,
    /// Bytes.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl StoredType {
    /// Elements that are stored together: 32 for GGUF's quantised types, else 1.
    #[must_use]
    pub const fn block(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => 32,
            _ => 1,
        }
    }

    /// Bytes of one such block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
        }
    }

    /// Bytes of `elements`, or none where they are not whole blocks or the product does not fit 64 bits.
    #[must_use]
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let whole = elements.is_multiple_of(self.block());
        whole.then(|| (elements / self.block()).checked_mul(self.block_bytes())).flatten()
    }

    /// Whether its elements are read as floats.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16) || self.is_quantized()
    }

    /// Whether it is one of GGUF's quantised types.
    #[must_use]
    pub const fn is_quantized(self) -> bool {
        self.block() > 1
    }

    /// The name in a config's `dtype`.
    #[must_use]
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 | Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => "bfloat16",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::I16 => "int16",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::Bool => "bool",
        }
    }

    /// The float type that a config's `dtype` names.
    #[must_use]
    pub fn from_torch_name(name: &str) -> Option<Self> {
        [Self::F64, Self::F32, Self::F16, Self::BF16].into_iter().find(|dtype| dtype.torch_name() == name)
    }

    /// Its safetensors counterpart; none for GGUF's quantised types.
    pub(crate) fn safetensors(self) -> Option<safetensors::Dtype> {
        use safetensors::Dtype;
        Some(match self {
            Self::F64 => Dtype::F64,
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
            Self::I64 => Dtype::I64,
            Self::I32 => Dtype::I32,
            Self::I16 => Dtype::I16,
            Self::I8 => Dtype::I8,
            Self::U8 => Dtype::U8,
            Self::Bool => Dtype::BOOL,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => return None,
        })
    }

    /// The counterpart of a safetensors type, where there is one.
    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        [Self::F64, Self::F32, Self::F16, Self::BF16, Self::I64, Self::I32, Self::I16, Self::I8, Self::U8, Self::Bool]
            .into_iter()
            .find(|stored| stored.safetensors() == Some(dtype))
    }
}

/// The spelling of safetensors headers and of ggml: `BF16`, `Q4_1`.
impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("BOOL"),
            other => fmt::Debug::fmt(other, f),
        }
    }
}
