//! The optimizers' names.

use std::str::FromStr;

use crate::{AdafactorConfig, AdamWConfig, DecayOrder, Error, LionConfig, OptimizerConfig, Result, SgdConfig, names};

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
    /// `paged_adamw_32bit`: as `adamw_bnb_32bit`, states in pages.
    PagedAdamW32bit,
    /// `paged_adamw`: another name of it.
    PagedAdamW,
    /// `paged_adamw_8bit`.
    PagedAdamW8bit,
    /// `lion_32bit`.
    Lion32bit,
    /// `lion`: another name of it.
    Lion,
    /// `lion_8bit`.
    Lion8bit,
    /// `paged_lion_32bit`.
    PagedLion32bit,
    /// `paged_lion_8bit`.
    PagedLion8bit,
    /// `adafactor`.
    Adafactor,
    /// `sgd`.
    Sgd,
}

impl OptimizerName {
    /// Every name.
    pub const ALL: [Self; 15] = [
        Self::AdamWTorch,
        Self::AdamWTorchFused,
        Self::AdamWBnb32bit,
        Self::AdamWBnb8bit,
        Self::AdamW8bit,
        Self::PagedAdamW32bit,
        Self::PagedAdamW,
        Self::PagedAdamW8bit,
        Self::Lion32bit,
        Self::Lion,
        Self::Lion8bit,
        Self::PagedLion32bit,
        Self::PagedLion8bit,
        Self::Adafactor,
        Self::Sgd,
    ];

    /// As it is spelt.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AdamWTorch => "adamw_torch",
            Self::AdamWTorchFused => "adamw_torch_fused",
            Self::AdamWBnb32bit => "adamw_bnb_32bit",
            Self::AdamWBnb8bit => "adamw_bnb_8bit",
            Self::AdamW8bit => "adamw_8bit",
            Self::PagedAdamW32bit => "paged_adamw_32bit",
            Self::PagedAdamW => "paged_adamw",
            Self::PagedAdamW8bit => "paged_adamw_8bit",
            Self::Lion32bit => "lion_32bit",
            Self::Lion => "lion",
            Self::Lion8bit => "lion_8bit",
            Self::PagedLion32bit => "paged_lion_32bit",
            Self::PagedLion8bit => "paged_lion_8bit",
            Self::Adafactor => "adafactor",
            Self::Sgd => "sgd",
        }
    }

    /// Whether states are kept in pages.
    #[must_use]
    pub const fn is_paged(self) -> bool {
        matches!(
            self,
            Self::PagedAdamW32bit | Self::PagedAdamW | Self::PagedAdamW8bit | Self::PagedLion32bit | Self::PagedLion8bit
        )
    }

    /// The first of the names that stand for the same arithmetic, whatever holds its states.
    #[must_use]
    pub const fn arithmetic(self) -> Self {
        match self {
            Self::AdamWTorch | Self::AdamWTorchFused => Self::AdamWTorch,
            Self::AdamWBnb32bit | Self::PagedAdamW32bit | Self::PagedAdamW => Self::AdamWBnb32bit,
            Self::AdamWBnb8bit | Self::AdamW8bit | Self::PagedAdamW8bit => Self::AdamWBnb8bit,
            Self::Lion32bit | Self::Lion | Self::PagedLion32bit => Self::Lion32bit,
            Self::Lion8bit | Self::PagedLion8bit => Self::Lion8bit,
            Self::Adafactor | Self::Sgd => self,
        }
    }

    /// The optimizer's constants, the Trainer's defaults but for `weight_decay`.
    #[must_use]
    pub fn config(self, weight_decay: f64) -> OptimizerConfig {
        let torch = AdamWConfig { weight_decay, ..AdamWConfig::default() };
        let bitsandbytes = AdamWConfig { decay: DecayOrder::After, ..torch };
        // The Trainer gives Lion Adam's betas.
        let lion = LionConfig { beta1: torch.beta1, beta2: torch.beta2, weight_decay };
        match self {
            Self::AdamWTorch | Self::AdamWTorchFused => OptimizerConfig::AdamW(torch),
            Self::AdamWBnb32bit | Self::PagedAdamW32bit | Self::PagedAdamW => OptimizerConfig::AdamW(bitsandbytes),
            Self::AdamWBnb8bit | Self::AdamW8bit | Self::PagedAdamW8bit => OptimizerConfig::AdamW8bit(bitsandbytes),
            Self::Lion32bit | Self::Lion | Self::PagedLion32bit => OptimizerConfig::Lion(lion),
            Self::Lion8bit | Self::PagedLion8bit => OptimizerConfig::Lion8bit(lion),
            Self::Adafactor => OptimizerConfig::Adafactor(AdafactorConfig { weight_decay, ..AdafactorConfig::default() }),
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
