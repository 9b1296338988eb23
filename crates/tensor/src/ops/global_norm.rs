//! The Euclidean norm √Σ x² of a flat buffer: of all gradients, for clipping.
//!
//! Squares are summed in f64 over fixed lanes and tasks, so the result is right to f32's last place, no square overflows, and
//! the bits are the same for any number of threads. Shapes: x F32, any. There is no backward.

use super::{step, typed};
use crate::{DType, Device, Error, Result, Tensor};

const OP: &str = "global_norm";

/// √Σ x².
///
/// # Errors
/// [`crate::Error::DType`] unless `x` is F32.
pub fn forward(x: &Tensor) -> Result<f64> {
    typed::expect_dtype(OP, "x", x, DType::F32)?;
    match x.device() {
        Device::Cpu => Ok(cpu::sum_of_squares(x.as_slice()?).sqrt()),
        Device::Cuda(device) => {
            let mut values = step::empty(x.arena())?;
            values.write(&{
                let mut start = [0.0; step::LEN];
                start[0] = 1.0;
                start
            })?;
            cuda::clip(device, x, 0.0, &mut values)?;
            Ok(f64::from(values.to_f32_vec()?[step::NORM]))
        }
    }
}

/// On a GPU: writes the norm of `x`, times the gradients' scale, and the factor that brings it to `max_norm` (0: none) to a
/// step's `values` ([`step`]), without waiting for either.
///
/// # Errors
/// [`Error::DType`] unless `x` is F32, [`Error::Argument`] on the CPU.
pub fn clip(x: &Tensor, max_norm: f32, values: &mut Tensor) -> Result<()> {
    typed::expect_dtype(OP, "x", x, DType::F32)?;
    match x.device() {
        Device::Cuda(device) => cuda::clip(device, x, max_norm, values),
        Device::Cpu => Err(Error::Argument { op: OP, argument: "device", expected: "a GPU", found: 0 }),
    }
}

mod cuda {
    use crate::{
        DType, Result, Tensor,
        cuda::{Arg, CudaDevice, Grid},
    };

    pub(super) fn clip(device: CudaDevice, x: &Tensor, max_norm: f32, values: &mut Tensor) -> Result<()> {
        let blocks = x.numel().div_ceil(8192).clamp(1, 8 * device.info().multiprocessors);
        // f64 sums: two words each.
        let mut partials = Tensor::empty(x.arena(), DType::U32, [2 * blocks])?;
        let args = [Arg::write(&mut partials)?, Arg::read(x)?, Arg::U64(x.numel() as u64)];
        device.launch("sum_squares_f32", Grid::new(blocks, 256), &args)?;
        let args = [Arg::write(values)?, Arg::read(&partials)?, Arg::size(blocks), Arg::F32(max_norm)];
        device.launch("grad_clip", Grid::new(1, 256), &args)
    }
}

mod cpu {
    use rayon::prelude::*;

    use crate::ops::simd::{LANES, multiversion};

    /// Elements of a task.
    const TASK: usize = 65_536;

    pub(super) fn sum_of_squares(x: &[f32]) -> f64 {
        let partials: Vec<f64> = x.par_chunks(TASK).map(squares).collect();
        partials.iter().sum()
    }

    multiversion! {
        fn squares(x: &[f32]) -> f64 {
            let mut lanes = [0.0f64; LANES];
            let (chunks, rest) = x.as_chunks::<LANES>();
            for chunk in chunks {
                for (lane, &x) in lanes.iter_mut().zip(chunk) {
                    *lane += x as f64 * x as f64;
                }
            }
            for (lane, &x) in lanes.iter_mut().zip(rest) {
                *lane += x as f64 * x as f64;
            }
            lanes.iter().sum()
        }
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, size};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        DType,
        ops::samples::{arena, normal, on_cpu, wide},
    };

    proptest! {
        #[test]
        fn the_norm_is_within_its_rounding(n in size(400), seed in 0..1000u64) {
            let x = normal(seed, DType::F32, [n]);
            let want = wide(&x).iter().map(|x| x * x).sum::<f64>().sqrt();
            // A GPU adds eight squares in f32 before it widens, and keeps the result where its kernels read it, in f32.
            let bound = if on_cpu() { 1e-13 } else { 6.0 * UNIT_F32 };
            prop_assert!((forward(&x).unwrap() - want).abs() <= want * bound);
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        let x = normal(3, DType::F32, [300_001]);
        let run =
            |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| forward(&x).unwrap());
        assert_eq!(run(1).to_bits(), run(3).to_bits());
    }

    #[test]
    fn squares_beyond_f32_do_not_overflow_and_nan_is_seen() {
        let of = |values: &[f32]| forward(&Tensor::from_slice(&arena(), values, [values.len()]).unwrap()).unwrap();
        assert!((of(&[3e30, 4e30]) / 5e30 - 1.0).abs() < 1e-6);
        assert!(of(&[1.0, f32::NAN]).is_nan());
        assert_eq!(of(&[1.0, f32::INFINITY]), f64::INFINITY);
        assert_eq!(of(&[]), 0.0);
    }
}
