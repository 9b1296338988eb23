//! The optimizers' names.

use std::str::FromStr;

use crate::{AdamWConfig, DecayOrder, Error, OptimizerConfig, Result, SgdConfig, names};

/// An optimizer by the name that Hugging Face's `optim` option gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OptimizerName {
    /// `adamw_torch`.
    AdamWTorch,
    /// `adamw_torch_fused`: the same arithmetic.
    AdamWTorchFused,
    /// `adamw_bnb_32bit`: bitsandbytes' order (decay after the update), f32 states.
    AdamWBnb32bit,
    /// `adamw_bnb_8bit`: the same with 8-bit states.
    AdamWBnb8bit,
    /// `adamw_8bit`: another name of it.
    AdamW8bit,
    /// `sgd`.
    Sgd,
}

impl OptimizerName {
    /// Every name.
    pub const ALL: [Self; 6] =
        [Self::AdamWTorch, Self::AdamWTorchFused, Self::AdamWBnb32bit, Self::AdamWBnb8bit, Self::AdamW8bit, Self::Sgd];

    /// As it is spelt.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AdamWTorch => "adamw_torch",
            Self::AdamWTorchFused => "adamw_torch_fused",
            Self::AdamWBnb32bit => "adamw_bnb_32bit",
            Self::AdamWBnb8bit => "adamw_bnb_8bit",
            Self::AdamW8bit => "adamw_8bit",
            Self::Sgd => "sgd",
        }
    }

    /// The optimizer's constants, the Trainer's defaults but for `weight_decay`.
    #[must_use]
    pub fn config(self, weight_decay: f64) -> OptimizerConfig {
        let torch = AdamWConfig { weight_decay, ..AdamWConfig::default() };
        let bitsandbytes = AdamWConfig { decay: DecayOrder::After, ..torch };
        match self {
            Self::AdamWTorch | Self::AdamWTorchFused => OptimizerConfig::AdamW(torch),
            Self::AdamWBnb32bit => OptimizerConfig::AdamW(bitsandbytes),
            Self::AdamWBnb8bit | Self::AdamW8bit => OptimizerConfig::AdamW8bit(bitsandbytes),
            Self::Sgd => OptimizerConfig::Sgd(SgdConfig { weight_decay, ..SgdConfig::default() }),
        }
    }
}

impl std::fmt::Display for OptimizerName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for OptimizerName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == name).ok_or_else(|| Error::UnknownOptimizer {
            name: name.to_owned(),
            nearest: names::nearest(name, &Self::ALL.map(Self::as_str)),
        })
    }
}
