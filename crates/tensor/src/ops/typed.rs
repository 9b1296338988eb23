//! Operands as typed slices, with errors that name the op and the operand.

use crate::{Arena, DType, Element, Error, Owner, Result, Shape, Tensor, TensorMut};

const FLOATS: &str = "float32, bfloat16 or float16";

/// The elements of `tensor`.
pub(super) fn slice<'a, E: Element>(op: &'static str, operand: &'static str, tensor: &'a Tensor) -> Result<&'a [E]> {
    expect_dtype(op, operand, tensor, E::DTYPE)?;
    tensor.as_slice()
}

/// The elements of `view`, for writing.
pub(super) fn slice_mut<'a, E: Element>(
    op: &'static str,
    operand: &'static str,
    view: &'a mut TensorMut<'_>,
) -> Result<&'a mut [E]> {
    view.as_mut_slice().map_err(|error| match error {
        Error::DType { expected, found, .. } => Error::DType { op, operand, expected, found },
        other => other,
    })
}

pub(super) fn expect_dtype(op: &'static str, operand: &'static str, tensor: &Tensor, expected: DType) -> Result<()> {
    if tensor.dtype() == expected {
        return Ok(());
    }
    Err(Error::DType { op, operand, expected: expected.name(), found: tensor.dtype() })
}

/// Memory that lives within one call, with unspecified content.
pub(super) fn scratch(arena: &Arena, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    let _scope = arena.scope(Owner::Scratch);
    Tensor::empty(arena, dtype, shape)
}

/// A parameter of any floating-point type, in f32 (shared, not copied, if it is f32 already).
#[track_caller]
pub(super) fn widened(op: &'static str, operand: &'static str, tensor: &Tensor) -> Result<Tensor> {
    if !tensor.dtype().is_float() {
        return Err(Error::DType { op, operand, expected: FLOATS, found: tensor.dtype() });
    }
    tensor.to_dtype(DType::F32)
}

/// The tensor itself if it is the only handle to its memory, else a copy to write over.
#[track_caller]
pub(super) fn writable(op: &'static str, operand: &'static str, tensor: Tensor) -> Result<Tensor> {
    if tensor.is_unique() {
        return Ok(tensor);
    }
    if !tensor.dtype().is_float() {
        return Err(Error::DType { op, operand, expected: FLOATS, found: tensor.dtype() });
    }
    tensor.to_arena(tensor.arena())
}
