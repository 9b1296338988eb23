//! The Euclidean norm √Σ x² of a flat buffer: of all gradients, for clipping.
//!
//! Squares are summed in f64 over fixed lanes and tasks, so the result is right to f32's last place, no square overflows, and
//! the bits are the same for any number of threads. Shapes: x F32, any. There is no backward.

use super::typed;
use crate::{Device, Result, Tensor};

/// √Σ x².
///
/// # Errors
/// [`crate::Error::DType`] unless `x` is F32.
pub fn forward(x: &Tensor) -> Result<f64> {
    let values = typed::slice::<f32>("global_norm", "x", x)?;
    match x.device() {
        Device::Cpu => Ok(cpu::sum_of_squares(values).sqrt()),
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
    use nibble_testkit::size;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        Arena, DType,
        ops::samples::{normal, wide},
    };

    proptest! {
        #[test]
        fn the_norm_is_right_to_f64(n in size(400), seed in 0..1000u64) {
            let x = normal(seed, DType::F32, [n]);
            let want = wide(&x).iter().map(|x| x * x).sum::<f64>().sqrt();
            prop_assert!((forward(&x).unwrap() - want).abs() <= want * 1e-13);
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
        let of =
            |values: &[f32]| forward(&Tensor::from_slice(&Arena::new(Device::Cpu), values, [values.len()]).unwrap()).unwrap();
        assert!((of(&[3e30, 4e30]) / 5e30 - 1.0).abs() < 1e-6);
        assert!(of(&[1.0, f32::NAN]).is_nan());
        assert_eq!(of(&[1.0, f32::INFINITY]), f64::INFINITY);
        assert_eq!(of(&[]), 0.0);
    }
}
