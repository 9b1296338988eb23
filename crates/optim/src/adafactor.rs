//! Adafactor, with a mean a row and a mean a column.

use nibble_tensor::{
    DType, Tensor, TensorMut,
    ops::adafactor::{self, Hyper},
};

use crate::{
    Error, Layout, Result,
    adamw::exactly,
    optimizer::expect_at_least_zero,
    plan::{Now, Plan, Spec},
};

/// The constants of Adafactor; the defaults are those of transformers, with the schedule's learning rate (`relative_step` and
/// `scale_parameter` off, as the Trainer has them). A parameter of more than two sizes counts as a matrix of its last one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdafactorConfig {
    /// Added to squared gradients (1e-30).
    pub eps: f64,
    /// The root mean square that an update is cut down to (1).
    pub clip_threshold: f64,
    /// Exponent of the running means' decay (-0.8).
    pub decay_rate: f64,
    /// Decay of the parameters, times the learning rate (0).
    pub weight_decay: f64,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        Self { eps: 1e-30, clip_threshold: 1.0, decay_rate: -0.8, weight_decay: 0.0 }
    }
}

impl AdafactorConfig {
    pub(crate) fn check(&self, of: &'static str) -> Result<()> {
        let above_zero = |option, found: f64| {
            let fits = found.is_finite() && found > 0.0;
            if fits { Ok(()) } else { Err(Error::Option { of, option, expected: "finite and above 0", found }) }
        };
        above_zero("eps", self.eps)?;
        above_zero("clip_threshold", self.clip_threshold)?;
        if !(self.decay_rate.is_finite() && self.decay_rate < 0.0) {
            return Err(Error::Option { of, option: "decay_rate", expected: "finite and below 0", found: self.decay_rate });
        }
        expect_at_least_zero(of, "weight_decay", self.weight_decay)
    }

    pub(crate) fn hyper(&self, lr: f64, step: u32) -> Hyper {
        let Self { eps, clip_threshold, decay_rate, weight_decay } = *self;
        Hyper { lr, eps, clip_threshold, decay_rate, weight_decay, step }
    }

    pub(crate) fn specs(layout: &Layout) -> Vec<Spec> {
        let matrices = layout.matrices(true);
        let sum = |of: fn(&adafactor::Matrix) -> usize| matrices.iter().map(of).sum();
        vec![
            Spec::new("exp_avg_sq_row", DType::F32, sum(|matrix| matrix.rows)),
            Spec::new("exp_avg_sq_col", DType::F32, sum(|matrix| matrix.cols)),
        ]
    }

    pub(crate) fn update(
        &self,
        plan: &Plan,
        now: Now<'_>,
        params: TensorMut<'_>,
        grads: &Tensor,
        states: Vec<TensorMut<'_>>,
    ) -> Result<()> {
        let Some(matrices) = &plan.matrices else { return Ok(()) };
        let [row, col] = exactly(states)?;
        Ok(match now {
            Now::Device(values) => adafactor::captured_step(params, grads, row, col, matrices, values, &self.hyper(0.0, 1)),
            Now::Host { lr, step, grad_scale } => {
                adafactor::step(params, grads, row, col, matrices, grad_scale, &self.hyper(lr, step))
            }
        }?)
    }
}
