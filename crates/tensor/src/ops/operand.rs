//! Tensors and weights as the operands and results of matrix products.

use super::matmul::{Output, Precision, Source};
use crate::{DType, Error, Result, Tensor, Weight};

const FLOATS: &str = "float32, bfloat16 or float16";

/// A tensor as a matrix of its rows.
pub(crate) fn dense(x: &Tensor) -> Result<Source<'_>> {
    let ld = x.shape().last();
    match x.dtype() {
        DType::F32 => Ok(Source::F32 { data: x.as_slice()?, ld }),
        DType::Bf16 => Ok(Source::Bf16 { data: x.as_slice()?, ld }),
        DType::F16 => Ok(Source::F16 { data: x.as_slice()?, ld }),
        found => Err(Error::DType { op: "matmul", operand: "operand", expected: FLOATS, found }),
    }
}

/// A weight in any format as a matrix.
pub(crate) fn weight(w: &Weight) -> Result<Source<'_>> {
    match w {
        Weight::Nf4(blocks) | Weight::Fp4(blocks) => Ok(Source::Blocks { view: blocks.view()?, cols: blocks.shape.last() }),
        Weight::Int8(w) => {
            Ok(Source::Int8 { codes: w.codes.as_slice()?, row_scale: w.scale.as_slice()?, ld: w.codes.shape().last() })
        }
        Weight::Dense(w) => dense(w),
    }
}

/// A tensor as the place of a result.
pub(crate) fn output(y: &mut Tensor) -> Result<Output<'_>> {
    match y.dtype() {
        DType::F32 => Ok(Output::F32(y.as_mut_slice()?)),
        DType::Bf16 => Ok(Output::Bf16(y.as_mut_slice()?)),
        DType::F16 => Ok(Output::F16(y.as_mut_slice()?)),
        found => Err(Error::DType { op: "matmul", operand: "output", expected: FLOATS, found }),
    }
}

/// What operands are rounded to when activations are of `dtype`.
pub(crate) fn precision(dtype: DType) -> Precision {
    match dtype {
        DType::Bf16 => Precision::Bf16,
        DType::F16 => Precision::F16,
        _ => Precision::F32,
    }
}
