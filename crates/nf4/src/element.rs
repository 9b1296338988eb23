//! The element types that blocks are made from and decoded to.

use half::{bf16, f16};

/// Names of the element types, as bitsandbytes stores them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum ElementType {
    /// IEEE single precision.
    #[serde(rename = "float32")]
    F32,
    /// bfloat16.
    #[serde(rename = "bfloat16")]
    Bf16,
    /// IEEE half precision.
    #[serde(rename = "float16")]
    F16,
}

impl ElementType {
    /// PyTorch's name less `torch.`: `float32`, `bfloat16`, `float16`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The inverse of [`ElementType::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16].into_iter().find(|t| t.name() == name)
    }
}

/// A slice of one of the element types, so that kernels are chosen by a match.
#[derive(Clone, Copy)]
pub enum Slice<'a> {
    /// `f32` values.
    F32(&'a [f32]),
    /// The bits of `bf16` values.
    Bf16(&'a [u16]),
    /// The bits of `f16` values.
    F16(&'a [u16]),
}

/// A mutable [`Slice`].
pub enum SliceMut<'a> {
    /// `f32` values.
    F32(&'a mut [f32]),
    /// The bits of `bf16` values.
    Bf16(&'a mut [u16]),
    /// The bits of `f16` values.
    F16(&'a mut [u16]),
}

mod sealed {
    use super::{Slice, SliceMut};

    /// The views are the crate's own business, and so is the list of implementors.
    pub trait Sealed: Sized {
        fn view(xs: &[Self]) -> Slice<'_>;
        fn view_mut(xs: &mut [Self]) -> SliceMut<'_>;
    }
}
pub(crate) use sealed::Sealed;

/// `f32`, [`struct@bf16`] or [`struct@f16`]: what can be quantised, and what can be decoded to.
///
/// Arithmetic is always in `f32`; results are rounded to nearest, ties to even, once at the end.
pub trait Element: Sealed + Copy + Send + Sync + 'static {
    /// Which of the types this is.
    const TYPE: ElementType;
    /// The exact value.
    fn to_f32(self) -> f32;
    /// The nearest value, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl Sealed for f32 {
    fn view(xs: &[Self]) -> Slice<'_> {
        Slice::F32(xs)
    }
    fn view_mut(xs: &mut [Self]) -> SliceMut<'_> {
        SliceMut::F32(xs)
    }
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Sealed for bf16 {
    fn view(xs: &[Self]) -> Slice<'_> {
        Slice::Bf16(bytemuck::cast_slice(xs))
    }
    fn view_mut(xs: &mut [Self]) -> SliceMut<'_> {
        SliceMut::Bf16(bytemuck::cast_slice_mut(xs))
    }
}

impl Element for bf16 {
    const TYPE: ElementType = ElementType::Bf16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

impl Sealed for f16 {
    fn view(xs: &[Self]) -> Slice<'_> {
        Slice::F16(bytemuck::cast_slice(xs))
    }
    fn view_mut(xs: &mut [Self]) -> SliceMut<'_> {
        SliceMut::F16(bytemuck::cast_slice_mut(xs))
    }
}

impl Element for f16 {
    const TYPE: ElementType = ElementType::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}
