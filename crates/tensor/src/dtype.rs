//! Element types.

use bytemuck::Pod;
use half::{bf16, f16};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// bfloat16: 8 exponent bits, 7 of fraction.
    Bf16,
    /// IEEE 754 half precision.
    F16,
    /// Token ids, positions, offsets.
    U32,
    /// Labels; -100 where there is none.
    I32,
    /// Packed codes.
    U8,
    /// Row-wise 8-bit codes.
    I8,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::U8 | Self::I8 => 1,
        }
    }

    /// Whether ops compute in it.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::Bf16 | Self::F16)
    }

    /// The name as safetensors and Hugging Face spell it in lower case (`float32`, `bfloat16`, ...).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::U8 => "uint8",
            Self::I8 => "int8",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that a tensor may hold.
pub trait Element: Pod + Send + Sync + std::fmt::Debug + PartialEq {
    /// Its tag.
    const DTYPE: DType;
}

/// A floating-point element; arithmetic is done in f32, and rounded to nearest even when stored.
pub trait Float: Element {
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Rounding to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

macro_rules! element {
    ($($t:ty => $tag:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$tag; })* };
}
element!(f32 => F32, bf16 => Bf16, f16 => F16, u32 => U32, i32 => I32, u8 => U8, i8 => I8);

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    /// Integer arithmetic without a branch but for NaN, so that loops over it vectorise.
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Runs `$body` with the type alias `$t` bound to the Rust type of the floating-point `$dtype`, or returns [`crate::Error::DType`].
macro_rules! with_float {
    ($dtype:expr, $op:expr, $operand:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::Bf16 => {
                type $t = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $t = half::f16;
                $body
            }
            found => Err($crate::Error::DType { op: $op, operand: $operand, expected: "float32, bfloat16 or float16", found }),
        }
    };
}
pub(crate) use with_float;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_equals_the_half_crate() {
        for bits in (0..=u32::MAX).step_by(65_521 / 3) {
            let x = f32::from_bits(bits);
            assert_eq!(<bf16 as Float>::from_f32(x).to_bits(), bf16::from_f32(x).to_bits(), "{bits:#x}");
        }
    }
}
