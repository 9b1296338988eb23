//! Lion (Chen et al. 2023) over a flat buffer, in one pass.
//!
//! With g = grad_scale · grad:
//!
//! ```text
//! p = p · (1 − lr · weight_decay) − lr · sign(β₁ m + (1 − β₁) g)
//! m = β₂ m + (1 − β₂) g
//! ```
//!
//! [`step_8bit`] holds m in 8 bits ([`super::dynamic8`], the signed map), as bitsandbytes does; there a gradient that is not finite
//! leaves p as it is and makes m 0. Not differentiable: there is no backward.
//!
//! Shapes: params and grads F32 \[len\]. Moves 20 bytes an element, with 8 bits 14.

use super::{
    dynamic8::{Blocks, Moment},
    step as steps, typed,
};
use crate::{DType, Device, Error, Result, Tensor, TensorMut};

const OP: &str = "lion";
const OP_8BIT: &str = "lion_8bit";

/// The constants of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate.
    pub lr: f64,
    /// β₁, of the direction.
    pub beta1: f64,
    /// β₂, of the mean.
    pub beta2: f64,
    /// Decoupled decay, times the learning rate.
    pub weight_decay: f64,
}

/// One step; `m` (zero before the first) is the running mean of the gradient.
///
/// # Errors
/// [`crate::Error::Shape`] when the shapes differ, [`crate::Error::DType`] unless all are F32.
pub fn step(mut params: TensorMut<'_>, grads: &Tensor, mut m: TensorMut<'_>, grad_scale: f32, hyper: &Hyper) -> Result<()> {
    typed::expect_dtype(OP, "grads", grads, DType::F32)?;
    grads.expect_shape(OP, "grads", params.shape())?;
    m.expect_shape(OP, "m", params.shape())?;
    match grads.device() {
        Device::Cpu => {
            let (p, m) = (typed::slice_mut(OP, "params", &mut params)?, typed::slice_mut(OP, "m", &mut m)?);
            cpu::step(p, grads.as_slice()?, m, cpu::Factors::new(hyper, grad_scale, true));
            Ok(())
        }
        Device::Cuda(device) => {
            let values =
                Tensor::from_slice(grads.arena(), &steps::start(hyper.lr, hyper.weight_decay, grad_scale), [steps::LEN])?;
            cuda::step(device, params, grads, m, None, &values, hyper)
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
    m: TensorMut<'_>,
    no_decay: Option<&Tensor>,
    values: &Tensor,
    hyper: &Hyper,
) -> Result<()> {
    match grads.device() {
        Device::Cuda(device) => cuda::step(device, params, grads, m, no_decay, values, hyper),
        Device::Cpu => Err(Error::Argument { op: OP, argument: "device", expected: "a GPU", found: 0 }),
    }
}

/// One step with an 8-bit state.
///
/// # Errors
/// [`crate::Error::Shape`] when the shapes do not fit `blocks`, [`crate::Error::DType`] unless params and grads are F32.
pub fn step_8bit(
    mut params: TensorMut<'_>,
    grads: &Tensor,
    mut m: Moment<'_>,
    blocks: &Blocks,
    grad_scale: f32,
    hyper: &Hyper,
) -> Result<()> {
    blocks.check(OP_8BIT, &params, grads, &[&m])?;
    match grads.device() {
        Device::Cpu => {
            let p = typed::slice_mut(OP_8BIT, "params", &mut params)?;
            cpu::step_8bit(blocks.tasks(p, grads.as_slice()?, [m.slices()?]), hyper, grad_scale);
            Ok(())
        }
        Device::Cuda(device) => {
            let values =
                Tensor::from_slice(grads.arena(), &steps::start(hyper.lr, hyper.weight_decay, grad_scale), [steps::LEN])?;
            cuda::step_8bit(device, params, grads, m, blocks, &values, hyper)
        }
    }
}

/// The same on a GPU, as [`captured_step`].
///
/// # Errors
/// As [`step_8bit`]; [`Error::Argument`] on the CPU.
pub fn captured_step_8bit(
    params: TensorMut<'_>,
    grads: &Tensor,
    m: Moment<'_>,
    blocks: &Blocks,
    values: &Tensor,
    hyper: &Hyper,
) -> Result<()> {
    blocks.check(OP_8BIT, &params, grads, &[&m])?;
    match grads.device() {
        Device::Cuda(device) => cuda::step_8bit(device, params, grads, m, blocks, values, hyper),
        Device::Cpu => Err(Error::Argument { op: OP_8BIT, argument: "device", expected: "a GPU", found: 0 }),
    }
}

mod cpu {
    use nibble_nf4::DynamicMap;
    use rayon::prelude::*;

    use super::Hyper;
    use crate::ops::{
        dynamic8::{BLOCK, Part, Task, coded},
        simd::multiversion,
    };

    /// Elements of a task.
    const TASK: usize = 16_384;

    #[derive(Clone, Copy)]
    pub(super) struct Factors {
        grad: f32,
        lr: f32,
        keep: f32,
        beta1: f32,
        one_less_beta1: f32,
        beta2: f32,
        one_less_beta2: f32,
    }

    impl Factors {
        pub(super) fn new(hyper: &Hyper, grad_scale: f32, decayed: bool) -> Self {
            Self {
                grad: grad_scale,
                lr: hyper.lr as f32,
                keep: if decayed { (1.0 - hyper.lr * hyper.weight_decay) as f32 } else { 1.0 },
                beta1: hyper.beta1 as f32,
                one_less_beta1: (1.0 - hyper.beta1) as f32,
                beta2: hyper.beta2 as f32,
                one_less_beta2: (1.0 - hyper.beta2) as f32,
            }
        }
    }

    pub(super) fn step(p: &mut [f32], g: &[f32], m: &mut [f32], factors: Factors) {
        let tasks = (p.par_chunks_mut(TASK), g.par_chunks(TASK), m.par_chunks_mut(TASK)).into_par_iter();
        tasks.for_each(|(p, g, m)| update(p, g, m, factors));
    }

    multiversion! {
        fn update(p: &mut [f32], g: &[f32], m: &mut [f32], f: Factors) {
            for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
                let g = g * f.grad;
                let toward = f.beta1 * *m + f.one_less_beta1 * g;
                let sign = if toward > 0.0 { f.lr } else if toward < 0.0 { -f.lr } else { 0.0 };
                *p = *p * f.keep - sign;
                *m = f.beta2 * *m + f.one_less_beta2 * g;
            }
        }
    }

    pub(super) fn step_8bit(tasks: Vec<Task<'_, 1>>, hyper: &Hyper, grad_scale: f32) {
        tasks.into_par_iter().for_each(|Task { p, g, decayed, states: [state] }| {
            let factors = Factors::new(hyper, grad_scale, decayed);
            match state {
                Part::Exact(m) => update_finite(p, g, m, factors),
                Part::Coded { codes, absmax } => {
                    for ((p, g), m) in p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(coded(codes, absmax)) {
                        let mut wide = [0.0; BLOCK];
                        let wide = &mut wide[..p.len()];
                        m.decode(DynamicMap::Signed, wide);
                        update_finite(p, g, wide, factors);
                        m.encode(DynamicMap::Signed, wide);
                    }
                }
            }
        });
    }

    multiversion! {
        fn update_finite(p: &mut [f32], g: &[f32], m: &mut [f32], f: Factors) {
            for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
                let g = g * f.grad;
                let finite = g.is_finite();
                let toward = f.beta1 * *m + f.one_less_beta1 * g;
                let sign = if toward > 0.0 { f.lr } else if toward < 0.0 { -f.lr } else { 0.0 };
                *p = if finite { *p * f.keep - sign } else { *p };
                let next = f.beta2 * *m + f.one_less_beta2 * g;
                *m = if finite { next } else { 0.0 };
            }
        }
    }
}

mod cuda {
    use nibble_nf4::DynamicMap;

    use super::Hyper;
    use crate::{
        Result, Tensor, TensorMut,
        cuda::{Arg, CudaDevice, Grid},
        ops::dynamic8::{Blocks, Moment, tables},
    };

    fn betas(hyper: &Hyper) -> [Arg; 4] {
        [hyper.beta1, 1.0 - hyper.beta1, hyper.beta2, 1.0 - hyper.beta2].map(|beta| Arg::F32(beta as f32))
    }

    pub(super) fn step(
        device: CudaDevice,
        mut params: TensorMut<'_>,
        grads: &Tensor,
        mut m: TensorMut<'_>,
        no_decay: Option<&Tensor>,
        values: &Tensor,
        hyper: &Hyper,
    ) -> Result<()> {
        let [beta1, one_less_beta1, beta2, one_less_beta2] = betas(hyper);
        let args = [
            Arg::write_view(&mut params)?,
            Arg::write_view(&mut m)?,
            Arg::read(grads)?,
            Arg::read(values)?,
            Arg::read_or_none(no_decay)?,
            Arg::size(no_decay.map_or(0, |ranges| ranges.numel() / 2)),
            beta1,
            one_less_beta1,
            beta2,
            one_less_beta2,
            Arg::U64(grads.numel() as u64),
        ];
        device.launch("lion_f32", Grid::over(grads.numel(), 2048, 256), &args)
    }

    pub(super) fn step_8bit(
        device: CudaDevice,
        mut params: TensorMut<'_>,
        grads: &Tensor,
        mut m: Moment<'_>,
        blocks: &Blocks,
        values: &Tensor,
        hyper: &Hyper,
    ) -> Result<()> {
        let tables = device.words("lion_8bit", || tables(DynamicMap::Signed))?;
        let [beta1, one_less_beta1, beta2, one_less_beta2] = betas(hyper);
        let args = [
            Arg::write_view(&mut params)?,
            Arg::write_view(&mut m.codes)?,
            Arg::write_view(&mut m.absmax)?,
            Arg::write_view(&mut m.exact)?,
            Arg::read(grads)?,
            Arg::read(values)?,
            Arg::read_or_none(blocks.table())?,
            Arg::size(blocks.quantised()),
            Arg::size(blocks.exact()),
            Arg::Pointer(tables),
            beta1,
            one_less_beta1,
            beta2,
            one_less_beta2,
        ];
        let grid = (blocks.quantised() + blocks.exact()).div_ceil(8).min(4 * device.info().multiprocessors);
        device.launch("lion_8bit", Grid::new(grid, 256), &args)
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
        fn steps_follow_the_formula(n in size(200), seed in 0..1000u64) {
            let hyper = Hyper { lr: 0.1, beta1: 0.9, beta2: 0.99, weight_decay: 0.01 };
            let mut p = normal(seed, DType::F32, [n]);
            let mut m = Tensor::zeros(p.arena(), DType::F32, [n]).unwrap();
            let (mut p64, mut m64) = (wide(&p), vec![0.0; n]);
            for t in 1..4 {
                let g = normal(seed + t, DType::F32, [n]);
                for (i, g) in wide(&g).into_iter().enumerate() {
                    let toward: f64 = 0.9 * m64[i] + 0.1 * 0.5 * g;
                    p64[i] = p64[i] * (1.0 - 0.1 * 0.01) - 0.1 * toward.signum();
                    m64[i] = 0.99 * m64[i] + 0.01 * 0.5 * g;
                }
                step(p.view_mut().unwrap(), &g, m.view_mut().unwrap(), 0.5, &hyper).unwrap();
            }
            assert_within("m", &m.to_f32_vec().unwrap(), &m64, |_| 0.2 * UNIT_F32);
            assert_within("p", &p.to_f32_vec().unwrap(), &p64, |i| 16.0 * UNIT_F32 * (p64[i].abs() + 1.0));
        }
    }

    #[test]
    fn no_direction_is_no_step() {
        let hyper = Hyper { lr: 0.5, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 };
        let mut p = normal(1, DType::F32, [3]);
        let (before, g) = (p.to_f32_vec().unwrap(), Tensor::zeros(p.arena(), DType::F32, [3]).unwrap());
        let mut m = Tensor::zeros(p.arena(), DType::F32, [3]).unwrap();
        step(p.view_mut().unwrap(), &g, m.view_mut().unwrap(), 1.0, &hyper).unwrap();
        assert_eq!(before, p.to_f32_vec().unwrap());
    }

    #[test]
    fn buffers_that_do_not_fit_are_named() {
        let hyper = Hyper { lr: 0.1, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 };
        let [mut p, g, mut m] = [5, 5, 4].map(|n| normal(1, DType::F32, [n]));
        let error = step(p.view_mut().unwrap(), &g, m.view_mut().unwrap(), 1.0, &hyper).unwrap_err();
        assert_eq!(error.to_string(), "lion: `m` has the wrong shape: expected (5,), found (4,)");
    }
}
