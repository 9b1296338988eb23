//! Stochastic gradient descent with momentum.

use nibble_tensor::{
    DType, Tensor, TensorMut,
    ops::sgd::{self, Hyper},
};

use crate::{
    Error, Layout, Result,
    optimizer::expect_at_least_zero,
    plan::{Now, Plan, Spec},
};

/// The constants of plain or heavy-ball descent; the defaults are torch's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SgdConfig {
    /// μ (0: no momentum buffer is kept).
    pub momentum: f64,
    /// Whether to use Nesterov's form, which needs momentum.
    pub nesterov: bool,
    /// Added to the gradient as weight_decay · p (0).
    pub weight_decay: f64,
}

impl SgdConfig {
    pub(crate) fn check(&self, of: &'static str) -> Result<()> {
        expect_at_least_zero(of, "momentum", self.momentum)?;
        expect_at_least_zero(of, "weight_decay", self.weight_decay)?;
        if self.nesterov && self.momentum == 0.0 {
            return Err(Error::Option { of, option: "momentum", expected: "above 0 with `nesterov`", found: 0.0 });
        }
        Ok(())
    }

    pub(crate) fn specs(&self, layout: &Layout) -> Vec<Spec> {
        if self.momentum == 0.0 { Vec::new() } else { vec![Spec::new("momentum_buffer", DType::F32, layout.numel())] }
    }

    pub(crate) fn update(
        &self,
        plan: &Plan,
        now: Now<'_>,
        params: TensorMut<'_>,
        grads: &Tensor,
        states: Vec<TensorMut<'_>>,
    ) -> Result<()> {
        let buffer = states.into_iter().next();
        let Self { momentum, nesterov, weight_decay } = *self;
        match now {
            Now::Device(values) => {
                let hyper = Hyper { lr: 0.0, momentum, nesterov, weight_decay };
                Ok(sgd::captured_step(params, grads, buffer, plan.no_decay.as_ref(), values, &hyper)?)
            }
            Now::Host { lr, grad_scale, .. } => {
                let mut buffers = buffer.map(|buffer| plan.cut(buffer)).transpose()?.into_iter().flatten();
                for (run, p) in plan.runs.iter().zip(plan.cut(params)?) {
                    let hyper = Hyper { lr, momentum, nesterov, weight_decay: run.decay(weight_decay) };
                    sgd::step(p, &run.view(grads)?, buffers.next(), grad_scale, &hyper)?;
                }
                Ok(())
            }
        }
    }
}
