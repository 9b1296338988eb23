//! The optimizers under one type, and their names.

use std::{ops::Range, str::FromStr};

use nibble_tensor::{Arena, DType, Owner, Tensor};

use crate::{AdamW, AdamWConfig, DecayOrder, Error, Result, Sgd, SgdConfig, StateMismatch, captured::StepMemory, names};

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
    /// `sgd`.
    Sgd,
}

impl OptimizerName {
    /// Every name.
    pub const ALL: [Self; 4] = [Self::AdamWTorch, Self::AdamWTorchFused, Self::AdamWBnb32bit, Self::Sgd];

    /// As it is spelt.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AdamWTorch => "adamw_torch",
            Self::AdamWTorchFused => "adamw_torch_fused",
            Self::AdamWBnb32bit => "adamw_bnb_32bit",
            Self::Sgd => "sgd",
        }
    }

    /// The optimizer's constants, the Trainer's defaults but for `weight_decay`.
    #[must_use]
    pub fn config(self, weight_decay: f64) -> OptimizerConfig {
        match self {
            Self::AdamWTorch | Self::AdamWTorchFused => {
                OptimizerConfig::AdamW(AdamWConfig { weight_decay, ..AdamWConfig::default() })
            }
            Self::AdamWBnb32bit => {
                OptimizerConfig::AdamW(AdamWConfig { weight_decay, decay: DecayOrder::After, ..AdamWConfig::default() })
            }
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

/// The constants of an optimizer, and which one it is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum OptimizerConfig {
    /// [`AdamW`].
    AdamW(AdamWConfig),
    /// [`Sgd`].
    Sgd(SgdConfig),
}

/// One of the optimizers, over one flat buffer.
#[derive(Debug)]
#[non_exhaustive]
pub enum Optimizer {
    /// See [`AdamW`].
    AdamW(AdamW),
    /// See [`Sgd`].
    Sgd(Sgd),
}

impl Optimizer {
    /// For `len` parameters, of which those in `no_decay` are not decayed; states are taken from `arena`.
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::NoDecayRange`], or out of memory.
    pub fn new(arena: &Arena, len: usize, config: OptimizerConfig, no_decay: &[Range<usize>]) -> Result<Self> {
        let _scope = arena.scope(Owner::Optimizer);
        Ok(match config {
            OptimizerConfig::AdamW(config) => Self::AdamW(AdamW::new(arena, len, config, no_decay)?),
            OptimizerConfig::Sgd(config) => Self::Sgd(Sgd::new(arena, len, config, no_decay)?),
        })
    }

    /// One update of `params` (F32 \[len\]) with gradients `grad_scale` · `grads`; `grad_scale` is the clipping factor.
    ///
    /// # Errors
    /// [`Error::Option`] for a learning rate below 0 or not finite; [`Error::Tensor`] when the buffers do not fit or `params` is
    /// shared.
    pub fn step(&mut self, params: &mut Tensor, grads: &Tensor, lr: f64, grad_scale: f32) -> Result<()> {
        match self {
            Self::AdamW(optimizer) => optimizer.step(params, grads, lr, grad_scale),
            Self::Sgd(optimizer) => optimizer.step(params, grads, lr, grad_scale),
        }
    }

    /// On a GPU, the first part of a step that is captured: writes what changes from step to step. [`Optimizer::apply`] reads it.
    ///
    /// # Errors
    /// [`Error::Option`] for a learning rate below 0 or not finite.
    pub fn begin(&mut self, lr: f64) -> Result<()> {
        match self {
            Self::AdamW(optimizer) => optimizer.begin(lr),
            Self::Sgd(optimizer) => optimizer.begin(lr),
        }
    }

    /// On a GPU, the second part: clips by `max_norm` (0: not) and updates, without waiting. Gradients that are not finite leave
    /// everything as it was. On the CPU it does nothing: [`Optimizer::step`] is the whole step there.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the buffers do not fit or `params` is shared.
    pub fn apply(&mut self, params: &mut Tensor, grads: &Tensor, max_norm: f64) -> Result<()> {
        match self {
            Self::AdamW(optimizer) => optimizer.apply(params, grads, max_norm),
            Self::Sgd(optimizer) => optimizer.apply(params, grads, max_norm),
        }
    }

    /// Where [`Optimizer::apply`] leaves the gradient's norm, on a GPU: see [`nibble_tensor::ops::step`].
    #[must_use]
    pub fn report(&self) -> Option<&Tensor> {
        let memory = match self {
            Self::AdamW(optimizer) => optimizer.memory(),
            Self::Sgd(optimizer) => optimizer.memory(),
        };
        memory.map(StepMemory::values)
    }

    /// Steps taken.
    #[must_use]
    pub fn steps(&self) -> u32 {
        match self {
            Self::AdamW(optimizer) => optimizer.steps(),
            Self::Sgd(optimizer) => optimizer.steps(),
        }
    }

    /// The states under torch's names (`exp_avg`, `exp_avg_sq`, `momentum_buffer`), each as long as the parameters.
    #[must_use]
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::AdamW(optimizer) => optimizer.state(),
            Self::Sgd(optimizer) => optimizer.state(),
        }
    }

    /// Continues from a saved state: copies of what [`Optimizer::state`] and [`Optimizer::steps`] gave.
    ///
    /// # Errors
    /// [`Error::State`] with every missing, unknown or misshapen tensor; nothing is changed then.
    pub fn load_state(&mut self, steps: u32, state: &[(&str, &Tensor)]) -> Result<()> {
        match self {
            Self::AdamW(optimizer) => optimizer.load_state(steps, state),
            Self::Sgd(optimizer) => optimizer.load_state(steps, state),
        }
    }
}

pub(crate) fn expect_at_least_zero(of: &'static str, option: &'static str, found: f64) -> Result<()> {
    if found.is_finite() && found >= 0.0 {
        Ok(())
    } else {
        Err(Error::Option { of, option, expected: "finite and at least 0", found })
    }
}

/// Copies the tensors of a saved state into an optimizer's own, if they fit one to one.
pub(crate) fn load_tensors(optimizer: &'static str, own: &mut [(&str, &mut Tensor)], saved: &[(&str, &Tensor)]) -> Result<()> {
    let find = |name: &str| saved.iter().find(|(saved, _)| *saved == name).map(|(_, tensor)| *tensor);
    let mut mismatches = Vec::new();
    for (name, own) in &*own {
        let found = find(name);
        if found.is_none_or(|found| found.shape() != own.shape() || found.dtype() != DType::F32) {
            let found = found.map(|found| format!("{} {}", found.dtype(), found.shape()));
            mismatches.push(StateMismatch { name: (*name).to_owned(), expected: Some(own.shape()), found });
        }
    }
    for (name, found) in saved.iter().filter(|(name, _)| own.iter().all(|(own, _)| own != name)) {
        let found = Some(format!("{} {}", found.dtype(), found.shape()));
        mismatches.push(StateMismatch { name: (*name).to_owned(), expected: None, found });
    }
    if !mismatches.is_empty() {
        return Err(Error::State { optimizer, mismatches });
    }
    for (name, own) in own {
        if let Some(found) = find(name) {
            own.write(&found.to_vec::<f32>()?)?;
        }
    }
    Ok(())
}
