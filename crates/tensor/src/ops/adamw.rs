//! AdamW (Loshchilov and Hutter 2019) over a flat buffer, in one pass.
//!
//! With g = grad_scale · grad and t the number of this step:
//!
//! ```text
//! m = m + (1 − β₁)(g − m)
//! v = β₂ v + (1 − β₂) g²
//! p = p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)
//! ```
//!
//! and p is multiplied by 1 − lr · weight_decay before ([`DecayOrder::Before`], torch) or after it ([`DecayOrder::After`],
//! bitsandbytes). Not differentiable: there is no backward.
//!
//! Shapes: all F32, of one shape. Moves 28 bytes an element.

use super::{step as steps, typed};
use crate::{DType, Device, Error, Result, Tensor, TensorMut};

const OP: &str = "adamw";

/// When the parameters are decayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DecayOrder {
    /// Before the update, as torch does.
    Before,
    /// After the update, as bitsandbytes does.
    After,
}

/// The constants of one step. They are f64 because 1 − β₂ is: in f32 it would be off by 5e-5 for β₂ = 0.999.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate.
    pub lr: f64,
    /// β₁, of the mean.
    pub beta1: f64,
    /// β₂, of the mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Decoupled decay, times the learning rate.
    pub weight_decay: f64,
    /// t, from 1.
    pub step: u32,
    /// When the parameters are decayed.
    pub decay: DecayOrder,
}

/// One step; `m` and `v` (zero before the first) are the running means of the gradient and of its square.
///
/// # Errors
/// [`crate::Error::Shape`] when the shapes differ, [`crate::Error::DType`] unless all are F32.
pub fn step(
    mut params: TensorMut<'_>,
    grads: &Tensor,
    mut m: TensorMut<'_>,
    mut v: TensorMut<'_>,
    grad_scale: f32,
    hyper: &Hyper,
) -> Result<()> {
    typed::expect_dtype(OP, "grads", grads, DType::F32)?;
    grads.expect_shape(OP, "grads", params.shape())?;
    m.expect_shape(OP, "m", params.shape())?;
    v.expect_shape(OP, "v", params.shape())?;
    match grads.device() {
        Device::Cpu => {
            let p = typed::slice_mut(OP, "params", &mut params)?;
            let (m, v) = (typed::slice_mut(OP, "m", &mut m)?, typed::slice_mut(OP, "v", &mut v)?);
            cpu::step(p, grads.as_slice()?, m, v, cpu::Factors::new(hyper, grad_scale));
            Ok(())
        }
        Device::Cuda(device) => {
            let values = Tensor::from_slice(grads.arena(), &steps::values(hyper, grad_scale), [steps::LEN])?;
            cuda::step(device, params, grads, m, v, None, &values, hyper)
        }
    }
}

/// One step on a GPU whose learning rate, corrections and clipping factor are read from `values` ([`steps`]) when it runs, so
/// that it can be captured; of `hyper` only the constants are used. `no_decay` U32 \[2 n\] holds the starts and ends of what
/// is not decayed.
///
/// # Errors
/// As [`step`]; [`Error::Argument`] on the CPU.
pub fn captured_step(
    params: TensorMut<'_>,
    grads: &Tensor,
    m: TensorMut<'_>,
    v: TensorMut<'_>,
    no_decay: Option<&Tensor>,
    values: &Tensor,
    hyper: &Hyper,
) -> Result<()> {
    match grads.device() {
        Device::Cuda(device) => cuda::step(device, params, grads, m, v, no_decay, values, hyper),
        Device::Cpu => Err(Error::Argument { op: OP, argument: "device", expected: "a GPU", found: 0 }),
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{DecayOrder, Hyper};
    use crate::ops::{simd::multiversion, step::correction};

    /// Elements of a task.
    const TASK: usize = 16_384;

    /// What one element needs, computed in f64 once a step.
    #[derive(Clone, Copy)]
    pub(super) struct Factors {
        grad: f32,
        before: f32,
        after: f32,
        one_less_beta1: f32,
        beta2: f32,
        one_less_beta2: f32,
        size: f32,
        inverse_root: f32,
        eps: f32,
    }

    impl Factors {
        pub(super) fn new(hyper: &Hyper, grad_scale: f32) -> Self {
            let keep = (1.0 - hyper.lr * hyper.weight_decay) as f32;
            Self {
                grad: grad_scale,
                before: if hyper.decay == DecayOrder::Before { keep } else { 1.0 },
                after: if hyper.decay == DecayOrder::After { keep } else { 1.0 },
                one_less_beta1: (1.0 - hyper.beta1) as f32,
                beta2: hyper.beta2 as f32,
                one_less_beta2: (1.0 - hyper.beta2) as f32,
                size: (hyper.lr / correction(hyper.beta1, hyper.step)) as f32,
                inverse_root: (1.0 / correction(hyper.beta2, hyper.step).sqrt()) as f32,
                eps: hyper.eps as f32,
            }
        }
    }

    pub(super) fn step(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], factors: Factors) {
        (p.par_chunks_mut(TASK), g.par_chunks(TASK), m.par_chunks_mut(TASK), v.par_chunks_mut(TASK))
            .into_par_iter()
            .for_each(|(p, g, m, v)| update(p, g, m, v, factors));
    }

    multiversion! {
        fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: Factors) {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * f.grad;
                *m += f.one_less_beta1 * (g - *m);
                *v = f.beta2 * *v + f.one_less_beta2 * (g * g);
                let update = f.size * (*m / (v.sqrt() * f.inverse_root + f.eps));
                *p = (*p * f.before - update) * f.after;
            }
        }
    }
}

mod cuda {
    use super::{DecayOrder, Hyper};
    use crate::{
        Result, Tensor, TensorMut,
        cuda::{Arg, CudaDevice, Grid},
    };

    pub(super) fn step(
        device: CudaDevice,
        mut params: TensorMut<'_>,
        grads: &Tensor,
        mut m: TensorMut<'_>,
        mut v: TensorMut<'_>,
        no_decay: Option<&Tensor>,
        values: &Tensor,
        hyper: &Hyper,
    ) -> Result<()> {
        let args = [
            Arg::write_view(&mut params)?,
            Arg::write_view(&mut m)?,
            Arg::write_view(&mut v)?,
            Arg::NONE,
            Arg::read(grads)?,
            Arg::read(values)?,
            Arg::read_or_none(no_decay)?,
            Arg::size(no_decay.map_or(0, |ranges| ranges.numel() / 2)),
            Arg::F32((1.0 - hyper.beta1) as f32),
            Arg::F32(hyper.beta2 as f32),
            Arg::F32((1.0 - hyper.beta2) as f32),
            Arg::F32(hyper.eps as f32),
            Arg::U32((hyper.decay == DecayOrder::After).into()),
            Arg::U32(0),
            Arg::U64(grads.numel() as u64),
        ];
        device.launch("adamw_f32", Grid::over(grads.numel(), 2048, 256), &args)
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, assert_within, size};
    use proptest::prelude::*;

    use super::*;
    use crate::ops::samples::{normal, wide};

    /// One element in f64; returns (p, m, v).
    fn reference([mut p, g, m, v]: [f64; 4], h: &Hyper) -> [f64; 3] {
        if h.decay == DecayOrder::Before {
            p *= 1.0 - h.lr * h.weight_decay;
        }
        let m = h.beta1 * m + (1.0 - h.beta1) * g;
        let v = h.beta2 * v + (1.0 - h.beta2) * g * g;
        let (c1, c2) = (1.0 - h.beta1.powi(h.step as i32), (1.0 - h.beta2.powi(h.step as i32)).sqrt());
        p -= h.lr / c1 * m / (v.sqrt() / c2 + h.eps);
        if h.decay == DecayOrder::After {
            p *= 1.0 - h.lr * h.weight_decay;
        }
        [p, m, v]
    }

    proptest! {
        #[test]
        fn steps_follow_the_formula(n in size(300), after in any::<bool>(), scale in prop_oneof![Just(1.0f32), Just(0.25)], seed in 0..1000u64) {
            let mut hyper = Hyper { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 0, decay: DecayOrder::Before };
            if after {
                hyper.decay = DecayOrder::After;
            }
            let mut p = normal(seed, DType::F32, [n]);
            let (mut m, mut v) = (Tensor::zeros(p.arena(), DType::F32, [n]).unwrap(), Tensor::zeros(p.arena(), DType::F32, [n]).unwrap());
            let (mut p64, mut m64, mut v64) = (wide(&p), vec![0.0; n], vec![0.0; n]);
            let mut largest = vec![0.0f64; n];
            for step in 1..=4 {
                hyper.step = step;
                let g = normal(seed + u64::from(step), DType::F32, [n]);
                for (i, g) in wide(&g).into_iter().enumerate() {
                    [p64[i], m64[i], v64[i]] = reference([p64[i], g * f64::from(scale), m64[i], v64[i]], &hyper);
                    largest[i] = largest[i].max(g.abs());
                }
                super::step(p.view_mut().unwrap(), &g, m.view_mut().unwrap(), v.view_mut().unwrap(), scale, &hyper).unwrap();
            }
            assert_within("v", &v.to_f32_vec().unwrap(), &v64, |i| 20.0 * UNIT_F32 * v64[i]);
            assert_within("m", &m.to_f32_vec().unwrap(), &m64, |i| 20.0 * UNIT_F32 * largest[i]);
            // The ratio m/√v is off by a few units of g/√v at most, which is below √(1/(1 − β₂)) after the corrections.
            assert_within("p", &p.to_f32_vec().unwrap(), &p64, |i| UNIT_F32 * (8.0 * p64[i].abs() + 40.0 * hyper.lr * 4.0 + 1.0));
        }
    }

    #[test]
    fn the_first_step_moves_by_the_learning_rate_whatever_the_gradient() {
        let hyper = Hyper { lr: 0.5, beta1: 0.9, beta2: 0.999, eps: 0.0, weight_decay: 0.0, step: 1, decay: DecayOrder::Before };
        let mut p = normal(1, DType::F32, [5]);
        let before = wide(&p);
        let g = normal(2, DType::F32, [5]);
        let [mut m, mut v] = [(); 2].map(|()| Tensor::zeros(p.arena(), DType::F32, [5]).unwrap());
        step(p.view_mut().unwrap(), &g, m.view_mut().unwrap(), v.view_mut().unwrap(), 1e-3, &hyper).unwrap();
        let want: Vec<f64> = before.iter().zip(wide(&g)).map(|(p, g)| p - 0.5 * g.signum()).collect();
        assert_within("p", &p.to_f32_vec().unwrap(), &want, |_| 1e-6);
    }

    #[test]
    fn buffers_that_do_not_fit_are_named() {
        let hyper = Hyper { lr: 0.5, beta1: 0.9, beta2: 0.999, eps: 0.0, weight_decay: 0.0, step: 1, decay: DecayOrder::Before };
        let [mut p, mut m, mut v] = [5, 5, 4].map(|n| normal(1, DType::F32, [n]));
        let g = normal(2, DType::F32, [5]);
        let error = step(p.view_mut().unwrap(), &g, m.view_mut().unwrap(), v.view_mut().unwrap(), 1.0, &hyper).unwrap_err();
        assert_eq!(error.to_string(), "adamw: `v` has the wrong shape: expected (5,), found (4,)");
        let half = normal(2, DType::Bf16, [5]);
        let mut v = normal(1, DType::F32, [5]);
        let error = step(p.view_mut().unwrap(), &half, m.view_mut().unwrap(), v.view_mut().unwrap(), 1.0, &hyper).unwrap_err();
        assert_eq!(error.to_string(), "adamw: `grads` has the wrong dtype: expected float32, found bfloat16");
    }
}
