//! Lion, with an f32 or an 8-bit state.

use nibble_tensor::{
    DType, Tensor, TensorMut,
    ops::{
        dynamic8::Moment,
        lion::{self, Hyper},
    },
};

use crate::{
    Layout, Result,
    adamw::{coded_specs, exactly},
    optimizer::{expect_at_least_zero, expect_beta},
    plan::{Now, Plan, Spec},
};

/// The constants of Lion; the defaults are the paper's. (Hugging Face's Trainer gives it Adam's β₂, 0.999.)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionConfig {
    /// β₁, of the direction (0.9).
    pub beta1: f64,
    /// β₂, of the mean (0.99).
    pub beta2: f64,
    /// Decoupled decay, times the learning rate (0).
    pub weight_decay: f64,
}

impl Default for LionConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

impl LionConfig {
    pub(crate) fn check(&self, of: &'static str) -> Result<()> {
        expect_beta(of, "beta1", self.beta1)?;
        expect_beta(of, "beta2", self.beta2)?;
        expect_at_least_zero(of, "weight_decay", self.weight_decay)
    }

    fn hyper(&self, lr: f64) -> Hyper {
        let Self { beta1, beta2, weight_decay } = *self;
        Hyper { lr, beta1, beta2, weight_decay }
    }

    pub(crate) fn specs(layout: &Layout) -> Vec<Spec> {
        vec![Spec::new("exp_avg", DType::F32, layout.numel())]
    }

    pub(crate) fn update(
        &self,
        plan: &Plan,
        now: Now<'_>,
        params: TensorMut<'_>,
        grads: &Tensor,
        states: Vec<TensorMut<'_>>,
    ) -> Result<()> {
        let [m] = exactly(states)?;
        match now {
            Now::Device(values) => Ok(lion::captured_step(params, grads, m, plan.no_decay.as_ref(), values, &self.hyper(0.0))?),
            Now::Host { lr, grad_scale, .. } => {
                for ((run, p), m) in plan.runs.iter().zip(plan.cut(params)?).zip(plan.cut(m)?) {
                    let hyper = Hyper { weight_decay: run.decay(self.weight_decay), ..self.hyper(lr) };
                    lion::step(p, &run.view(grads)?, m, grad_scale, &hyper)?;
                }
                Ok(())
            }
        }
    }

    pub(crate) fn specs_8bit(layout: &Layout) -> Vec<Spec> {
        coded_specs(layout, ["state1", "absmax1", "state1_f32"])
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
        let [codes, absmax, exact] = exactly(states)?;
        let m = Moment { codes, absmax, exact };
        match now {
            Now::Device(values) => Ok(lion::captured_step_8bit(params, grads, m, blocks, values, &self.hyper(0.0))?),
            Now::Host { lr, grad_scale, .. } => Ok(lion::step_8bit(params, grads, m, blocks, grad_scale, &self.hyper(lr))?),
        }
    }
}
