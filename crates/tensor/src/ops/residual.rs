//! The residual sum r = x + a, rounded to their type. Its gradient goes to both as it is: there is no backward.
//!
//! Shapes: x, a, r any, all equal, of one type. [`super::rms_norm::residual_forward`] makes the same r and its norm in one pass;
//! this is for where r is kept and the norm is not.

use rayon::prelude::*;

use super::typed;
use crate::{Device, Float, Result, Tensor, dtype::with_float};

const OP: &str = "residual";

/// Elements of a task.
const TASK: usize = 16_384;

/// r, written over `a` if that is its only handle.
///
/// # Errors
/// [`crate::Error::Shape`] and [`crate::Error::DType`] when `a` differs from `x` in shape or type, [`crate::Error::OutOfMemory`].
pub fn forward(x: &Tensor, a: Tensor) -> Result<Tensor> {
    a.expect_shape(OP, "a", x.shape())?;
    typed::expect_dtype(OP, "a", &a, x.dtype())?;
    let mut r = typed::writable(OP, "a", a)?;
    match x.device() {
        Device::Cpu => with_float!(x.dtype(), OP, "x", E => {
            r.as_mut_slice::<E>()?.par_chunks_mut(TASK).zip(x.as_slice::<E>()?.par_chunks(TASK)).for_each(|(r, x)| {
                for (r, x) in r.iter_mut().zip(x) {
                    *r = E::from_f32(Float::to_f32(*x) + Float::to_f32(*r));
                }
            });
            Ok(())
        })?,
        Device::Cuda(device) => cuda::forward(device, x, &mut r)?,
    }
    Ok(r)
}

mod cuda {
    use super::OP;
    use crate::{
        Result, Tensor,
        cuda::{Arg, CudaDevice, Grid, suffix},
    };

    pub(super) fn forward(device: CudaDevice, x: &Tensor, r: &mut Tensor) -> Result<()> {
        let each = 512 * 16 / x.dtype().size();
        let args = [Arg::write(r)?, Arg::read(x)?, Arg::U64(x.numel() as u64)];
        device.launch(&format!("add_{}", suffix(OP, x.dtype())?), Grid::over(x.numel(), each, 256), &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, ops::samples::arena};

    #[test]
    fn the_sum_is_that_of_the_fused_norm() {
        let arena = arena();
        for dtype in [DType::F32, DType::Bf16] {
            let make = |from: f32| {
                let values: Vec<f32> = (0..64).map(|i| from + 0.37 * i as f32).collect();
                Tensor::from_slice(&arena, &values, [4, 16]).unwrap().to_dtype(dtype).unwrap()
            };
            let w = Tensor::from_slice(&arena, &[1.0f32; 16], [16]).unwrap();
            let config = super::super::rms_norm::Config { eps: 1e-6, offset: 0.0 };
            let (fused, ..) = super::super::rms_norm::residual_forward(&make(-3.0), make(0.11), &w, config).unwrap();
            let alone = forward(&make(-3.0), make(0.11)).unwrap();
            assert_eq!(alone.to_f32_vec().unwrap(), fused.to_f32_vec().unwrap());
        }
    }
}
