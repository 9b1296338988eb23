//! The optimizers under one type: their constants, their states, their updates.

use nibble_tensor::{Tensor, TensorMut, ops::step_count::Corrections};

use crate::{
    AdafactorConfig, AdamWConfig, Layout, LionConfig, Result, SgdConfig,
    plan::{Now, Plan, Spec},
};

/// The constants of an optimizer, and which one it is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum OptimizerConfig {
    /// AdamW with f32 states ([`nibble_tensor::ops::adamw`]).
    AdamW(AdamWConfig),
    /// AdamW with 8-bit states in blocks of 256 ([`nibble_tensor::ops::adamw_8bit`]).
    AdamW8bit(AdamWConfig),
    /// Lion with an f32 state ([`nibble_tensor::ops::lion`]).
    Lion(LionConfig),
    /// Lion with an 8-bit state in blocks of 256.
    Lion8bit(LionConfig),
    /// Adafactor ([`nibble_tensor::ops::adafactor`]).
    Adafactor(AdafactorConfig),
    /// Stochastic gradient descent ([`nibble_tensor::ops::sgd`]).
    Sgd(SgdConfig),
}

impl OptimizerConfig {
    /// The optimizer's name in messages.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
            Self::AdamW8bit(_) => "adamw_8bit",
            Self::Lion(_) => "lion",
            Self::Lion8bit(_) => "lion_8bit",
            Self::Adafactor(_) => "adafactor",
            Self::Sgd(_) => "sgd",
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::AdamW(config) | Self::AdamW8bit(config) => config.check(self.name()),
            Self::Lion(config) | Self::Lion8bit(config) => config.check(self.name()),
            Self::Adafactor(config) => config.check(self.name()),
            Self::Sgd(config) => config.check(self.name()),
        }
    }

    /// λ of the decay.
    #[must_use]
    pub const fn weight_decay(&self) -> f64 {
        match self {
            Self::AdamW(config) | Self::AdamW8bit(config) => config.weight_decay,
            Self::Lion(config) | Self::Lion8bit(config) => config.weight_decay,
            Self::Adafactor(config) => config.weight_decay,
            Self::Sgd(config) => config.weight_decay,
        }
    }

    /// Whether states are codes in blocks.
    pub(crate) const fn is_coded(&self) -> bool {
        matches!(self, Self::AdamW8bit(_) | Self::Lion8bit(_))
    }

    /// Whether an update of a part of a parameter needs to know the rest of it.
    pub(crate) const fn is_factored(&self) -> bool {
        matches!(self, Self::Adafactor(_))
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
            Self::Lion(_) => LionConfig::specs(layout),
            Self::Lion8bit(_) => LionConfig::specs_8bit(layout),
            Self::Adafactor(_) => AdafactorConfig::specs(layout),
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
            Self::Lion(config) => config.update(plan, now, params, grads, states),
            Self::Lion8bit(config) => config.update_8bit(plan, now, params, grads, states),
            Self::Adafactor(config) => config.update(plan, now, params, grads, states),
            Self::Sgd(config) => config.update(plan, now, params, grads, states),
        }
    }

    /// What of an update depends on its number.
    pub(crate) fn corrections(&self) -> Corrections {
        match self {
            Self::AdamW(AdamWConfig { beta1, beta2, .. }) | Self::AdamW8bit(AdamWConfig { beta1, beta2, .. }) => {
                Corrections { beta1: *beta1, beta2: *beta2, exponent: 0.0 }
            }
            Self::Adafactor(config) => Corrections { exponent: config.decay_rate, ..Corrections::default() },
            Self::Lion(_) | Self::Lion8bit(_) | Self::Sgd(_) => Corrections::default(),
        }
    }
}
