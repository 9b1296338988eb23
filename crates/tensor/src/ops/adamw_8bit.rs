//! AdamW with 8-bit states over a flat buffer, in one pass, as bitsandbytes does it.
//!
//! The formula is that of [`super::adamw`]; m and v are decoded, updated and encoded anew ([`super::dynamic8`]): m with the
//! signed map, v with the unsigned one. p is updated with m and v as they are before they are encoded. Where a gradient is not
//! finite, p stays and m and v become 0. Not differentiable: there is no backward.
//!
//! Shapes: params and grads F32 \[len\]. Moves 16 bytes an element, and 24 a block.

use super::{
    adamw::Hyper,
    dynamic8::{Blocks, Moment},
    step as steps, typed,
};
use crate::{Device, Error, Result, Tensor, TensorMut};

const OP: &str = "adamw_8bit";

/// One step; `m` and `v` (zero before the first) are the running means of the gradient and of its square.
///
/// # Errors
/// [`crate::Error::Shape`] when the shapes do not fit `blocks`, [`crate::Error::DType`] unless params and grads are F32.
pub fn step(
    mut params: TensorMut<'_>,
    grads: &Tensor,
    mut m: Moment<'_>,
    mut v: Moment<'_>,
    blocks: &Blocks,
    grad_scale: f32,
    hyper: &Hyper,
) -> Result<()> {
    blocks.check(OP, &params, grads, &[&m, &v])?;
    match grads.device() {
        Device::Cpu => {
            let p = typed::slice_mut(OP, "params", &mut params)?;
            let tasks = blocks.tasks(p, grads.as_slice()?, [m.slices()?, v.slices()?]);
            cpu::step(tasks, hyper, grad_scale);
            Ok(())
        }
        Device::Cuda(device) => {
            let values = Tensor::from_slice(grads.arena(), &steps::values(hyper, grad_scale), [steps::LEN])?;
            cuda::step(device, params, grads, m, v, blocks, &values, hyper)
        }
    }
}

/// One step on a GPU whose learning rate, corrections and clipping factor are read from `values` ([`steps`]) when it runs; see
/// [`super::adamw::captured_step`].
///
/// # Errors
/// As [`step`]; [`Error::Argument`] on the CPU.
pub fn captured_step(
    params: TensorMut<'_>,
    grads: &Tensor,
    m: Moment<'_>,
    v: Moment<'_>,
    blocks: &Blocks,
    values: &Tensor,
    hyper: &Hyper,
) -> Result<()> {
    blocks.check(OP, &params, grads, &[&m, &v])?;
    match grads.device() {
        Device::Cuda(device) => cuda::step(device, params, grads, m, v, blocks, values, hyper),
        Device::Cpu => Err(Error::Argument { op: OP, argument: "device", expected: "a GPU", found: 0 }),
    }
}

mod cpu {
    use nibble_nf4::DynamicMap;
    use rayon::prelude::*;

    use super::Hyper;
    use crate::ops::{
        adamw::DecayOrder,
        dynamic8::{BLOCK, Coded, Part, Task, coded},
        simd::multiversion,
        step::correction,
    };

    /// What one element needs, computed in f64 once a step.
    #[derive(Clone, Copy)]
    struct Factors {
        grad: f32,
        before: f32,
        after: f32,
        beta1: f32,
        one_less_beta1: f32,
        beta2: f32,
        one_less_beta2: f32,
        size: f32,
        inverse_root: f32,
        eps: f32,
    }

    impl Factors {
        fn new(hyper: &Hyper, grad_scale: f32, decayed: bool) -> Self {
            let keep = if decayed { (1.0 - hyper.lr * hyper.weight_decay) as f32 } else { 1.0 };
            Self {
                grad: grad_scale,
                before: if hyper.decay == DecayOrder::Before { keep } else { 1.0 },
                after: if hyper.decay == DecayOrder::After { keep } else { 1.0 },
                beta1: hyper.beta1 as f32,
                one_less_beta1: (1.0 - hyper.beta1) as f32,
                beta2: hyper.beta2 as f32,
                one_less_beta2: (1.0 - hyper.beta2) as f32,
                size: (hyper.lr / correction(hyper.beta1, hyper.step)) as f32,
                inverse_root: (1.0 / correction(hyper.beta2, hyper.step).sqrt()) as f32,
                eps: hyper.eps as f32,
            }
        }
    }

    pub(super) fn step(tasks: Vec<Task<'_, 2>>, hyper: &Hyper, grad_scale: f32) {
        tasks.into_par_iter().for_each(|Task { p, g, decayed, states }| {
            let factors = Factors::new(hyper, grad_scale, decayed);
            match states {
                [Part::Exact(m), Part::Exact(v)] => update(p, g, m, v, factors),
                [Part::Coded { codes: m, absmax: m_max }, Part::Coded { codes: v, absmax: v_max }] => {
                    let states = coded(m, m_max).zip(coded(v, v_max));
                    for ((p, g), (m, v)) in p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(states) {
                        update_block(p, g, m, v, factors);
                    }
                }
                // Both states of a piece are held alike.
                _ => {}
            }
        });
    }

    fn update_block(p: &mut [f32], g: &[f32], m: Coded<'_>, v: Coded<'_>, factors: Factors) {
        let ([mut wide_m, mut wide_v], len) = ([[0.0; BLOCK]; 2], p.len());
        let (wide_m, wide_v) = (&mut wide_m[..len], &mut wide_v[..len]);
        m.decode(DynamicMap::Signed, wide_m);
        v.decode(DynamicMap::Unsigned, wide_v);
        update(p, g, wide_m, wide_v, factors);
        m.encode(DynamicMap::Signed, wide_m);
        v.encode(DynamicMap::Unsigned, wide_v);
    }

    multiversion! {
        fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: Factors) {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * f.grad;
                let finite = g.is_finite();
                let (next_m, next_v) = (f.beta1 * *m + f.one_less_beta1 * g, f.beta2 * *v + f.one_less_beta2 * g * g);
                *m = if finite { next_m } else { 0.0 };
                *v = if finite { next_v } else { 0.0 };
                let update = f.size * (*m / (v.sqrt() * f.inverse_root + f.eps));
                let next_p = (*p * f.before - update) * f.after;
                *p = if finite { next_p } else { *p };
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
        ops::{
            adamw::DecayOrder,
            dynamic8::{Blocks, Moment, tables},
        },
    };

    pub(super) fn step(
        device: CudaDevice,
        mut params: TensorMut<'_>,
        grads: &Tensor,
        mut m: Moment<'_>,
        mut v: Moment<'_>,
        blocks: &Blocks,
        values: &Tensor,
        hyper: &Hyper,
    ) -> Result<()> {
        let tables = device.words("adamw_8bit", || [tables(DynamicMap::Signed), tables(DynamicMap::Unsigned)].concat())?;
        let args = [
            Arg::write_view(&mut params)?,
            Arg::write_view(&mut m.codes)?,
            Arg::write_view(&mut v.codes)?,
            Arg::write_view(&mut m.absmax)?,
            Arg::write_view(&mut v.absmax)?,
            Arg::write_view(&mut m.exact)?,
            Arg::write_view(&mut v.exact)?,
            Arg::read(grads)?,
            Arg::read(values)?,
            Arg::read_or_none(blocks.table())?,
            Arg::size(blocks.quantised()),
            Arg::size(blocks.exact()),
            Arg::Pointer(tables),
            Arg::F32(hyper.beta1 as f32),
            Arg::F32((1.0 - hyper.beta1) as f32),
            Arg::F32(hyper.beta2 as f32),
            Arg::F32((1.0 - hyper.beta2) as f32),
            Arg::F32(hyper.eps as f32),
            Arg::U32((hyper.decay == DecayOrder::After).into()),
        ];
        let grid = (blocks.quantised() + blocks.exact()).div_ceil(8).min(4 * device.info().multiprocessors);
        device.launch("adamw_8bit", Grid::new(grid, 256), &args)
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, assert_within};

    use super::*;
    use crate::{
        DType,
        ops::{
            adamw::DecayOrder,
            dynamic8::{BLOCK, Piece},
            samples::{normal, wide},
        },
    };

    const HYPER: Hyper =
        Hyper { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 1, decay: DecayOrder::After };

    /// Codes, absmax and exact values of one state, zeros.
    struct Owned([Tensor; 3]);

    impl Owned {
        fn new(like: &Tensor, blocks: &Blocks) -> Self {
            let zeros = |dtype, len| Tensor::zeros(like.arena(), dtype, [len]).unwrap();
            let (coded, exact) = (blocks.quantised(), blocks.exact());
            Self([zeros(DType::U8, BLOCK * coded), zeros(DType::F32, coded), zeros(DType::F32, BLOCK * exact)])
        }

        fn moment(&mut self) -> Moment<'_> {
            let [codes, absmax, exact] = self.0.each_mut().map(|tensor| tensor.view_mut().unwrap());
            Moment { codes, absmax, exact }
        }
    }

    fn blocks(like: &Tensor, quantised: bool) -> Blocks {
        let half = like.numel() / 2 / BLOCK * BLOCK;
        let piece = |range, decayed| Piece { range, decayed, quantised };
        Blocks::new(like.arena(), vec![piece(0..half, true), piece(half..like.numel(), false)]).unwrap()
    }

    #[test]
    fn the_first_step_is_that_of_adamw_and_states_keep_to_half_a_level() {
        let n = 5 * BLOCK + 77;
        let (mut p, g) = (normal(1, DType::F32, [n]), normal(2, DType::F32, [n]));
        let blocks = blocks(&p, true);
        let [mut m, mut v] = [(); 2].map(|()| Owned::new(&p, &blocks));
        let before = wide(&p);
        step(p.view_mut().unwrap(), &g, m.moment(), v.moment(), &blocks, 0.5, &HYPER).unwrap();
        let g64 = wide(&g);
        let want: Vec<f64> = (0..n)
            .map(|i| {
                let keep = if i < 2 * BLOCK { 1.0 - 0.01 * 0.1 } else { 1.0 };
                let g = 0.5 * g64[i];
                (before[i] - 0.01 * g / (g.abs() + 1e-8)) * keep
            })
            .collect();
        assert_within("p", &p.to_f32_vec().unwrap(), &want, |i| 8.0 * UNIT_F32 * (want[i].abs() + 0.04));
        let levels = nibble_nf4::dynamic_map_signed();
        let (codes, absmax) = (m.0[0].to_vec::<u8>().unwrap(), m.0[1].to_vec::<f32>().unwrap());
        for i in 0..n {
            // The second piece begins anew, at a multiple of a block here.
            let found = levels[usize::from(codes[i])] * absmax[i / BLOCK];
            let off = (f64::from(found) - 0.05 * g64[i]).abs() / f64::from(absmax[i / BLOCK]);
            assert!(off <= 0.5 * 0.9 / 64.0 + 1e-6, "{i}: off by {off} of absmax");
        }
    }

    #[test]
    fn exact_states_step_as_adamw_does() {
        let n = 700;
        let [mut ours, mut theirs] = [(); 2].map(|()| normal(1, DType::F32, [n]));
        let pieces = vec![Piece { range: 0..n, decayed: true, quantised: false }];
        let blocks = Blocks::new(ours.arena(), pieces).unwrap();
        let [mut m, mut v] = [(); 2].map(|()| Owned::new(&ours, &blocks));
        let [mut m32, mut v32] = [(); 2].map(|()| Tensor::zeros(ours.arena(), DType::F32, [n]).unwrap());
        for t in 1..4 {
            let (g, hyper) = (normal(t + 9, DType::F32, [n]), Hyper { step: t as u32, ..HYPER });
            step(ours.view_mut().unwrap(), &g, m.moment(), v.moment(), &blocks, 1.0, &hyper).unwrap();
            let states = (m32.view_mut().unwrap(), v32.view_mut().unwrap());
            crate::ops::adamw::step(theirs.view_mut().unwrap(), &g, states.0, states.1, 1.0, &hyper).unwrap();
        }
        assert_within("p", &ours.to_f32_vec().unwrap(), &wide(&theirs), |_| 1e-6);
    }

    #[test]
    fn an_element_without_a_finite_gradient_stays_and_forgets() {
        let n = 2 * BLOCK;
        let (mut p, mut g) = (normal(1, DType::F32, [n]), normal(2, DType::F32, [n]));
        let blocks = blocks(&p, true);
        let [mut m, mut v] = [(); 2].map(|()| Owned::new(&p, &blocks));
        step(p.view_mut().unwrap(), &g, m.moment(), v.moment(), &blocks, 1.0, &HYPER).unwrap();
        let before = p.to_f32_vec().unwrap();
        let mut spoilt = g.to_f32_vec().unwrap();
        spoilt[300] = f32::NAN;
        g.write(&spoilt).unwrap();
        step(p.view_mut().unwrap(), &g, m.moment(), v.moment(), &blocks, 1.0, &Hyper { step: 2, ..HYPER }).unwrap();
        let after = p.to_f32_vec().unwrap();
        assert_eq!(before[300], after[300]);
        assert!((0..n).all(|i| i == 300 || before[i] != after[i]));
        let code = |state: &Tensor| state.to_vec::<u8>().unwrap()[300];
        assert_eq!((code(&m.0[0]), code(&v.0[0])), (127, 0));
    }

    #[test]
    fn buffers_that_do_not_fit_are_named() {
        let (mut p, g) = (normal(1, DType::F32, [512]), normal(2, DType::F32, [512]));
        let blocks = blocks(&p, true);
        let [mut m, mut v] = [(); 2].map(|()| Owned::new(&p, &blocks));
        v.0[1] = normal(1, DType::F32, [1]);
        let error = step(p.view_mut().unwrap(), &g, m.moment(), v.moment(), &blocks, 1.0, &HYPER).unwrap_err();
        assert_eq!(error.to_string(), "adamw_8bit: `absmax` has the wrong shape: expected (2,), found (1,)");
    }
}
