//! A borrowed part of a tensor, for writing.

use crate::{DType, Device, Element, Error, Result, Shape};

/// A part of a tensor borrowed for writing: gradients of one parameter inside the flat buffer of all.
#[derive(Debug)]
pub struct TensorMut<'a> {
    bytes: &'a mut [u8],
    dtype: DType,
    shape: Shape,
    device: Device,
}

impl<'a> TensorMut<'a> {
    pub(crate) fn new(bytes: &'a mut [u8], dtype: DType, shape: Shape, device: Device) -> Self {
        Self { bytes, dtype, shape, device }
    }

    /// The sizes.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The device the memory is on.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// The elements, on the CPU.
    ///
    /// # Errors
    /// [`Error::DType`] when `E` is not the element type.
    pub fn as_mut_slice<E: Element>(&mut self) -> Result<&mut [E]> {
        if self.dtype != E::DTYPE {
            return Err(Error::DType { op: "as_mut_slice", operand: "self", expected: E::DTYPE.name(), found: self.dtype });
        }
        Ok(bytemuck::cast_slice_mut(self.bytes))
    }

    /// The same view for a shorter time, to hand it on and keep it.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { bytes: self.bytes, dtype: self.dtype, shape: self.shape, device: self.device }
    }

    /// Checks a shape on behalf of `op`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the operand.
    pub fn expect_shape(&self, op: &'static str, operand: &'static str, expected: impl Into<Shape>) -> Result<()> {
        let expected = expected.into();
        if self.shape == expected { Ok(()) } else { Err(Error::Shape { op, operand, expected, found: self.shape }) }
    }
}
