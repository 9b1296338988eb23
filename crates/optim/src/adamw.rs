//! AdamW, with f32 or 8-bit states.

use nibble_tensor::{
    DType, Tensor, TensorMut,
    ops::{
        adamw::{self, DecayOrder, Hyper},
        adamw_8bit,
        dynamic8::{BLOCK, Moment},
    },
};

use crate::{
    Error, Layout, Result,
    optimizer::{expect_at_least_zero, expect_beta},
    plan::{Now, Plan, Spec},
};

/// The constants of AdamW; the defaults are those of Hugging Face's Trainer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// β₁ (0.9).
    pub beta1: f64,
    /// β₂ (0.999).
    pub beta2: f64,
    /// Added to the root of the mean square (1e-8).
    pub eps: f64,
    /// Decoupled decay, times the learning rate (0).
    pub weight_decay: f64,
    /// When parameters are decayed (before the update, as torch; bitsandbytes decays after it).
    pub decay: DecayOrder,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, decay: DecayOrder::Before }
    }
}

impl AdamWConfig {
    pub(crate) fn check(&self, of: &'static str) -> Result<()> {
        expect_beta(of, "adam_beta1", self.beta1)?;
        expect_beta(of, "adam_beta2", self.beta2)?;
        expect_at_least_zero(of, "adam_epsilon", self.eps)?;
        expect_at_least_zero(of, "weight_decay", self.weight_decay)
    }

    pub(crate) fn hyper(&self, lr: f64, step: u32) -> Hyper {
        let Self { beta1, beta2, eps, weight_decay, decay } = *self;
        Hyper { lr, beta1, beta2, eps, weight_decay, step, decay }
    }

    pub(crate) fn specs(layout: &Layout) -> Vec<Spec> {
        ["exp_avg", "exp_avg_sq"].map(|name| Spec::new(name, DType::F32, layout.numel())).to_vec()
    }

    pub(crate) fn update(
        &self,
        plan: &Plan,
        now: Now<'_>,
        params: TensorMut<'_>,
        grads: &Tensor,
        states: Vec<TensorMut<'_>>,
    ) -> Result<()> {
        let [m, v] = exactly(states)?;
        match now {
            Now::Device(values) => {
                Ok(adamw::captured_step(params, grads, m, v, plan.no_decay.as_ref(), values, &self.hyper(0.0, 1))?)
            }
            Now::Host { lr, step, grad_scale } => {
                let states = plan.cut(m)?.into_iter().zip(plan.cut(v)?);
                for ((run, p), (m, v)) in plan.runs.iter().zip(plan.cut(params)?).zip(states) {
                    let hyper = Hyper { weight_decay: run.decay(self.weight_decay), ..self.hyper(lr, step) };
                    adamw::step(p, &run.view(grads)?, m, v, grad_scale, &hyper)?;
                }
                Ok(())
            }
        }
    }

    pub(crate) fn specs_8bit(layout: &Layout) -> Vec<Spec> {
        [coded_specs(layout, ["state1", "absmax1", "state1_f32"]), coded_specs(layout, ["state2", "absmax2", "state2_f32"])]
            .concat()
    }

    pub(crate) fn update_8bit(
        &self,
        plan: &Plan,
        now: Now<'_>,
        params: TensorMut<'_>,
        grads: &Tensor,
        states: Vec<TensorMut<'_>>,
    ) -> Result<()> {
        let Some(blocks) = &plan.blocks else { return Ok(()) };
        let [m, m_max, m_exact, v, v_max, v_exact] = exactly(states)?;
        let m = Moment { codes: m, absmax: m_max, exact: m_exact };
        let v = Moment { codes: v, absmax: v_max, exact: v_exact };
        match now {
            Now::Device(values) => Ok(adamw_8bit::captured_step(params, grads, m, v, blocks, values, &self.hyper(0.0, 1))?),
            Now::Host { lr, step, grad_scale } => {
                Ok(adamw_8bit::step(params, grads, m, v, blocks, grad_scale, &self.hyper(lr, step))?)
            }
        }
    }
}

/// The tensors of an 8-bit state, named codes, scales and f32 values of small parameters.
pub(crate) fn coded_specs(layout: &Layout, names: [&'static str; 3]) -> Vec<Spec> {
    let (coded, exact) = layout.block_counts();
    let [codes, absmax, small] = names;
    vec![
        Spec::new(codes, DType::U8, BLOCK * coded),
        Spec::new(absmax, DType::F32, coded),
        Spec::new(small, DType::F32, BLOCK * exact),
    ]
}

/// The states of an optimizer that has `N` of them.
pub(crate) fn exactly<const N: usize>(states: Vec<TensorMut<'_>>) -> Result<[TensorMut<'_>; N]> {
    let found = states.len();
    states.try_into().map_err(|_| {
        let expected = "those of the optimizer";
        Error::Tensor(nibble_tensor::Error::Argument { op: "optimizer", argument: "states", expected, found })
    })
}
