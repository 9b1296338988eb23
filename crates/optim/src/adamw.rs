//! AdamW with f32 states.

use std::ops::Range;

use nibble_tensor::{
    Arena, DType, Tensor,
    ops::adamw::{self, DecayOrder, Hyper},
};

use crate::{
    Error, Result,
    captured::StepMemory,
    optimizer::{expect_at_least_zero, load_tensors},
    ranges::{Run, runs},
};

/// The constants of [`AdamW`]; the defaults are those of Hugging Face's Trainer.
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
    /// When parameters are decayed (before the update, as torch).
    pub decay: DecayOrder,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, decay: DecayOrder::Before }
    }
}

/// AdamW (formula: [`nibble_tensor::ops::adamw`]) over one flat buffer, with its two running means.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    runs: Vec<Run>,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: u32,
    memory: Option<StepMemory>,
}

impl AdamW {
    /// For `len` parameters, of which those in `no_decay` are not decayed (biases and norms in the Trainer).
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::NoDecayRange`], or out of memory.
    pub fn new(arena: &Arena, len: usize, config: AdamWConfig, no_decay: &[Range<usize>]) -> Result<Self> {
        for (option, beta) in [("adam_beta1", config.beta1), ("adam_beta2", config.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::Option { of: "adamw", option, expected: "at least 0 and below 1", found: beta });
            }
        }
        expect_at_least_zero("adamw", "adam_epsilon", config.eps)?;
        expect_at_least_zero("adamw", "weight_decay", config.weight_decay)?;
        // Without decay all parameters are treated alike: one run.
        let no_decay = if config.weight_decay == 0.0 { &[] } else { no_decay };
        let runs = runs(len, no_decay)?;
        Ok(Self {
            config,
            memory: StepMemory::new(arena, &runs)?,
            runs,
            exp_avg: Tensor::zeros(arena, DType::F32, [len])?,
            exp_avg_sq: Tensor::zeros(arena, DType::F32, [len])?,
            steps: 0,
        })
    }

    /// One update of `params` (F32 \[len\]) with gradients `grad_scale` · `grads`.
    ///
    /// # Errors
    /// [`Error::Option`] for a learning rate below 0 or not finite; [`Error::Tensor`] when the buffers do not fit or `params` is
    /// shared.
    pub fn step(&mut self, params: &mut Tensor, grads: &Tensor, lr: f64, grad_scale: f32) -> Result<()> {
        expect_at_least_zero("adamw", "learning_rate", lr)?;
        params.expect_shape("adamw", "params", self.exp_avg.shape())?;
        grads.expect_shape("adamw", "grads", self.exp_avg.shape())?;
        let AdamWConfig { beta1, beta2, eps, weight_decay, decay } = self.config;
        let step = self.steps + 1;
        let parts: Vec<_> = self.runs.iter().map(Run::part).collect();
        let states = self.exp_avg.views_mut(&parts)?.into_iter().zip(self.exp_avg_sq.views_mut(&parts)?);
        for ((run, p), (m, v)) in self.runs.iter().zip(params.views_mut(&parts)?).zip(states) {
            let hyper = Hyper { lr, beta1, beta2, eps, weight_decay: run.decay(weight_decay), step, decay };
            adamw::step(p, &run.view(grads)?, m, v, grad_scale, &hyper)?;
        }
        self.steps = step;
        Ok(())
    }

    pub(crate) fn memory(&self) -> Option<&StepMemory> {
        self.memory.as_ref()
    }

    /// See [`crate::Optimizer::begin`].
    pub(crate) fn begin(&mut self, lr: f64) -> Result<()> {
        expect_at_least_zero("adamw", "learning_rate", lr)?;
        self.steps += 1;
        let hyper = self.hyper(lr);
        self.memory.as_mut().map_or(Ok(()), |memory| memory.begin(&hyper, 1.0))
    }

    /// See [`crate::Optimizer::apply`].
    pub(crate) fn apply(&mut self, params: &mut Tensor, grads: &Tensor, max_norm: f64) -> Result<()> {
        let hyper = self.hyper(0.0);
        let Some(memory) = &mut self.memory else { return Ok(()) };
        memory.clip(grads, max_norm)?;
        let (m, v) = (self.exp_avg.view_mut()?, self.exp_avg_sq.view_mut()?);
        Ok(adamw::captured_step(params.view_mut()?, grads, m, v, memory.no_decay(), memory.values(), &hyper)?)
    }

    fn hyper(&self, lr: f64) -> Hyper {
        let AdamWConfig { beta1, beta2, eps, weight_decay, decay } = self.config;
        Hyper { lr, beta1, beta2, eps, weight_decay, step: self.steps, decay }
    }

    /// Steps taken.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The running means under torch's names.
    #[must_use]
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)]
    }

    /// Continues from a saved state: copies of what [`AdamW::state`] and [`AdamW::steps`] gave.
    ///
    /// # Errors
    /// [`Error::State`] with every missing, unknown or misshapen tensor; nothing is changed then.
    pub fn load_state(&mut self, steps: u32, state: &[(&str, &Tensor)]) -> Result<()> {
        load_tensors("adamw", &mut [("exp_avg", &mut self.exp_avg), ("exp_avg_sq", &mut self.exp_avg_sq)], state)?;
        self.steps = steps;
        Ok(())
    }
}
