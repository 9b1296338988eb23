//! Stochastic gradient descent with momentum over a flat buffer, in one pass, as torch does it (without dampening).
//!
//! With g = grad_scale · grad + weight_decay · p: without momentum p = p − lr · g; with momentum μ
//! b = μ b + g, then p = p − lr · b, or p − lr · (g + μ b) with Nesterov's. Not differentiable: there is no backward.
//!
//! Shapes: all F32, of one shape. b is zero before the first step, which makes the first b equal to g.

use super::{step as steps, typed};
use crate::{DType, Device, Error, Result, Tensor, TensorMut};

const OP: &str = "sgd";

/// The constants of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate.
    pub lr: f64,
    /// μ; read only with a momentum buffer.
    pub momentum: f64,
    /// Whether the update looks one step ahead along the momentum.
    pub nesterov: bool,
    /// Added to the gradient as weight_decay · p.
    pub weight_decay: f64,
}

/// One step; `momentum` is b, absent for plain descent.
///
/// # Errors
/// [`crate::Error::Shape`] when the shapes differ, [`crate::Error::DType`] unless all are F32.
pub fn step(
    mut params: TensorMut<'_>,
    grads: &Tensor,
    mut momentum: Option<TensorMut<'_>>,
    grad_scale: f32,
    hyper: &Hyper,
) -> Result<()> {
    typed::expect_dtype(OP, "grads", grads, DType::F32)?;
    grads.expect_shape(OP, "grads", params.shape())?;
    if let Some(momentum) = &momentum {
        momentum.expect_shape(OP, "momentum", grads.shape())?;
    }
    match grads.device() {
        Device::Cpu => {
            let p = typed::slice_mut(OP, "params", &mut params)?;
            let buffer = momentum.as_mut().map(|momentum| typed::slice_mut(OP, "momentum", momentum)).transpose()?;
            cpu::step(p, grads.as_slice()?, buffer, cpu::Factors::new(hyper, grad_scale));
            Ok(())
        }
        Device::Cuda(device) => {
            let values = steps::start(hyper.lr, hyper.weight_decay, grad_scale);
            let values = Tensor::from_slice(grads.arena(), &values, [steps::LEN])?;
            cuda::step(device, params, grads, momentum, None, &values, hyper)
        }
    }
}

/// One step on a GPU whose learning rate and clipping factor are read from `values` ([`steps`]) when it runs; see
/// [`super::adamw::captured_step`].
///
/// # Errors
/// As [`step`]; [`Error::Argument`] on the CPU.
pub fn captured_step(
    params: TensorMut<'_>,
    grads: &Tensor,
    momentum: Option<TensorMut<'_>>,
    no_decay: Option<&Tensor>,
    values: &Tensor,
    hyper: &Hyper,
) -> Result<()> {
    match grads.device() {
        Device::Cuda(device) => cuda::step(device, params, grads, momentum, no_decay, values, hyper),
        Device::Cpu => Err(Error::Argument { op: OP, argument: "device", expected: "a GPU", found: 0 }),
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::Hyper;
    use crate::ops::simd::multiversion;

    /// Elements of a task.
    const TASK: usize = 16_384;

    #[derive(Clone, Copy)]
    pub(super) struct Factors {
        grad: f32,
        lr: f32,
        decay: f32,
        momentum: f32,
        /// The update is lr · (now · g + carried · b).
        now: f32,
        carried: f32,
    }

    impl Factors {
        pub(super) fn new(hyper: &Hyper, grad_scale: f32) -> Self {
            let momentum = hyper.momentum as f32;
            let (now, carried) = if hyper.nesterov { (1.0, momentum) } else { (0.0, 1.0) };
            Self { grad: grad_scale, lr: hyper.lr as f32, decay: hyper.weight_decay as f32, momentum, now, carried }
        }
    }

    pub(super) fn step(p: &mut [f32], g: &[f32], buffer: Option<&mut [f32]>, factors: Factors) {
        let tasks = p.par_chunks_mut(TASK).zip(g.par_chunks(TASK));
        match buffer {
            Some(b) => tasks.zip(b.par_chunks_mut(TASK)).for_each(|((p, g), b)| with_momentum(p, g, b, factors)),
            None => tasks.for_each(|(p, g)| plain(p, g, factors)),
        }
    }

    multiversion! {
        fn with_momentum(p: &mut [f32], g: &[f32], b: &mut [f32], f: Factors) {
            for ((p, g), b) in p.iter_mut().zip(g).zip(b) {
                let g = g * f.grad + f.decay * *p;
                *b = f.momentum * *b + g;
                *p -= f.lr * (f.now * g + f.carried * *b);
            }
        }
    }

    multiversion! {
        fn plain(p: &mut [f32], g: &[f32], f: Factors) {
            for (p, g) in p.iter_mut().zip(g) {
                *p -= f.lr * (g * f.grad + f.decay * *p);
            }
        }
    }
}

mod cuda {
    use super::Hyper;
    use crate::{
        Result, Tensor, TensorMut,
        cuda::{Arg, CudaDevice, Grid},
    };

    pub(super) fn step(
        device: CudaDevice,
        mut params: TensorMut<'_>,
        grads: &Tensor,
        mut momentum: Option<TensorMut<'_>>,
        no_decay: Option<&Tensor>,
        values: &Tensor,
        hyper: &Hyper,
    ) -> Result<()> {
        let args = [
            Arg::write_view(&mut params)?,
            momentum.as_mut().map_or(Ok(Arg::NONE), Arg::write_view)?,
            Arg::NONE,
            Arg::read(grads)?,
            Arg::read(values)?,
            Arg::read_or_none(no_decay)?,
            Arg::size(no_decay.map_or(0, |ranges| ranges.numel() / 2)),
            Arg::F32(hyper.momentum as f32),
            Arg::F32(hyper.weight_decay as f32),
            Arg::U32(hyper.nesterov.into()),
            Arg::U32(0),
            Arg::U64(grads.numel() as u64),
        ];
        device.launch("sgd_f32", Grid::over(grads.numel(), 2048, 256), &args)
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, assert_within, size};
    use proptest::prelude::*;

    use super::*;
    use crate::ops::samples::{normal, wide};

    proptest! {
        #[test]
        fn steps_follow_the_formula(n in size(200), kind in 0..3usize, seed in 0..1000u64) {
            let hyper = Hyper { lr: 0.1, momentum: 0.9, nesterov: kind == 2, weight_decay: 0.01 };
            let mut p = normal(seed, DType::F32, [n]);
            let mut b = Tensor::zeros(p.arena(), DType::F32, [n]).unwrap();
            let (mut p64, mut b64) = (wide(&p), vec![0.0; n]);
            for t in 1..4 {
                let g = normal(seed + t, DType::F32, [n]);
                for (i, g) in wide(&g).into_iter().enumerate() {
                    let g = 0.5 * g + 0.01 * p64[i];
                    b64[i] = 0.9 * b64[i] + g;
                    p64[i] -= 0.1 * [g, b64[i], g + 0.9 * b64[i]][kind];
                }
                let buffer = (kind > 0).then(|| b.view_mut().unwrap());
                step(p.view_mut().unwrap(), &g, buffer, 0.5, &hyper).unwrap();
            }
            assert_within("p", &p.to_f32_vec().unwrap(), &p64, |i| 16.0 * UNIT_F32 * (p64[i].abs() + 4.0));
        }
    }

    #[test]
    fn buffers_that_do_not_fit_are_named() {
        let hyper = Hyper { lr: 0.1, momentum: 0.9, nesterov: false, weight_decay: 0.0 };
        let [mut p, g, mut b] = [5, 5, 4].map(|n| normal(1, DType::F32, [n]));
        let error = step(p.view_mut().unwrap(), &g, Some(b.view_mut().unwrap()), 1.0, &hyper).unwrap_err();
        assert_eq!(error.to_string(), "sgd: `momentum` has the wrong shape: expected (5,), found (4,)");
    }
}
