//! The optimizers under one type: their constants, their states, their updates.

use nibble_tensor::{
    Tensor, TensorMut,
    ops::adamw::{DecayOrder, Hyper},
};

use crate::{
    AdamWConfig, Layout, Result, SgdConfig,
    plan::{Now, Plan, Spec},
};

/// The constants of an optimizer, and which one it is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum OptimizerConfig {
    /// AdamW with f32 states.
    AdamW(AdamWConfig),
    /// AdamW with 8-bit states in blocks of 256 ([`nibble_tensor::ops::adamw_8bit`]).
    AdamW8bit(AdamWConfig),
    /// Stochastic gradient descent.
    Sgd(SgdConfig),
}

impl OptimizerConfig {
    /// The optimizer's name in messages.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
            Self::AdamW8bit(_) => "adamw_8bit",
            Self::Sgd(_) => "sgd",
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::AdamW(config) | Self::AdamW8bit(config) => config.check(self.name()),
            Self::Sgd(config) => config.check(self.name()),
        }
    }

    pub(crate) fn weight_decay(&self) -> f64 {
        match self {
            Self::AdamW(config) | Self::AdamW8bit(config) => config.weight_decay,
            Self::Sgd(config) => config.weight_decay,
        }
    }

    /// Whether states are codes in blocks.
    pub(crate) const fn coded(&self) -> bool {
        matches!(self, Self::AdamW8bit(_))
    }

    /// Bytes of the states of parameters laid out as `layout` says.
    #[must_use]
    pub fn state_bytes(&self, layout: &Layout) -> usize {
        self.specs(layout).iter().map(Spec::bytes).sum()
    }

    /// The state tensors of a part of the buffer.
    pub(crate) fn specs(&self, layout: &Layout) -> Vec<Spec> {
        match self {
            Self::AdamW(_) => AdamWConfig::specs(layout),
            Self::AdamW8bit(_) => AdamWConfig::specs_8bit(layout),
            Self::Sgd(config) => config.specs(layout),
        }
    }

    /// Updates a part of the buffer; `states` are in the order of [`OptimizerConfig::specs`].
    pub(crate) fn update(
        &self,
        plan: &Plan,
        now: Now<'_>,
        params: TensorMut<'_>,
        grads: &Tensor,
        states: Vec<TensorMut<'_>>,
    ) -> Result<()> {
        match self {
            Self::AdamW(config) => config.update(plan, now, params, grads, states),
            Self::AdamW8bit(config) => config.update_8bit(plan, now, params, grads, states),
            Self::Sgd(config) => config.update(plan, now, params, grads, states),
        }
    }

    /// What a GPU's kernels read of a step, as AdamW's: the others read the rate and the factors alone.
    pub(crate) fn values(&self, lr: f64, step: u32) -> Hyper {
        match self {
            Self::AdamW(config) | Self::AdamW8bit(config) => config.hyper(lr, step),
            Self::Sgd(_) => {
                let weight_decay = self.weight_decay();
                Hyper { lr, beta1: 0.0, beta2: 0.0, eps: 0.0, weight_decay, step, decay: DecayOrder::Before }
            }
        }
    }
}
