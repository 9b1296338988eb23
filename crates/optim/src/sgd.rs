//! Stochastic gradient descent with momentum.

use std::ops::Range;

use nibble_tensor::{
    Arena, DType, Shape, Tensor,
    ops::{
        adamw::{self, DecayOrder},
        sgd::{self, Hyper},
    },
};

use crate::{
    Error, Result,
    captured::StepMemory,
    optimizer::{expect_at_least_zero, load_tensors},
    ranges::{Run, runs},
};

/// The constants of [`Sgd`]; the defaults are torch's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SgdConfig {
    /// μ (0: no momentum buffer is kept).
    pub momentum: f64,
    /// Whether to use Nesterov's form, which needs momentum.
    pub nesterov: bool,
    /// Added to the gradient as weight_decay · p (0).
    pub weight_decay: f64,
}

/// SGD (formula: [`nibble_tensor::ops::sgd`]) over one flat buffer, with its momentum.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    runs: Vec<Run>,
    shape: Shape,
    momentum_buffer: Option<Tensor>,
    steps: u32,
    memory: Option<StepMemory>,
}

impl Sgd {
    /// For `len` parameters, of which those in `no_decay` are not decayed.
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::NoDecayRange`], or out of memory.
    pub fn new(arena: &Arena, len: usize, config: SgdConfig, no_decay: &[Range<usize>]) -> Result<Self> {
        expect_at_least_zero("sgd", "momentum", config.momentum)?;
        expect_at_least_zero("sgd", "weight_decay", config.weight_decay)?;
        if config.nesterov && config.momentum == 0.0 {
            return Err(Error::Option { of: "sgd", option: "momentum", expected: "above 0 with `nesterov`", found: 0.0 });
        }
        let no_decay = if config.weight_decay == 0.0 { &[] } else { no_decay };
        let momentum_buffer = if config.momentum == 0.0 { None } else { Some(Tensor::zeros(arena, DType::F32, [len])?) };
        let runs = runs(len, no_decay)?;
        let memory = StepMemory::new(arena, &runs)?;
        Ok(Self { config, runs, shape: [len].into(), momentum_buffer, steps: 0, memory })
    }

    /// One update of `params` (F32 \[len\]) with gradients `grad_scale` · `grads`.
    ///
    /// # Errors
    /// [`Error::Option`] for a learning rate below 0 or not finite; [`Error::Tensor`] when the buffers do not fit or `params` is
    /// shared.
    pub fn step(&mut self, params: &mut Tensor, grads: &Tensor, lr: f64, grad_scale: f32) -> Result<()> {
        expect_at_least_zero("sgd", "learning_rate", lr)?;
        params.expect_shape("sgd", "params", self.shape)?;
        grads.expect_shape("sgd", "grads", self.shape)?;
        let SgdConfig { momentum, nesterov, weight_decay } = self.config;
        let parts: Vec<_> = self.runs.iter().map(Run::part).collect();
        let mut buffers = self.momentum_buffer.as_mut().map(|buffer| buffer.views_mut(&parts)).transpose()?.into_iter().flatten();
        for (run, p) in self.runs.iter().zip(params.views_mut(&parts)?) {
            let hyper = Hyper { lr, momentum, nesterov, weight_decay: run.decay(weight_decay) };
            sgd::step(p, &run.view(grads)?, buffers.next(), grad_scale, &hyper)?;
        }
        self.steps += 1;
        Ok(())
    }

    pub(crate) fn memory(&self) -> Option<&StepMemory> {
        self.memory.as_ref()
    }

    /// See [`crate::Optimizer::begin`].
    pub(crate) fn begin(&mut self, lr: f64) -> Result<()> {
        expect_at_least_zero("sgd", "learning_rate", lr)?;
        self.steps += 1;
        let weight_decay = self.config.weight_decay;
        // Of AdamW's values, plain descent reads the rate and the factors alone.
        let (beta1, beta2, eps, step, decay) = (0.0, 0.0, 0.0, self.steps, DecayOrder::Before);
        let hyper = adamw::Hyper { lr, beta1, beta2, eps, weight_decay, step, decay };
        self.memory.as_mut().map_or(Ok(()), |memory| memory.begin(&hyper, 1.0))
    }

    /// See [`crate::Optimizer::apply`].
    pub(crate) fn apply(&mut self, params: &mut Tensor, grads: &Tensor, max_norm: f64) -> Result<()> {
        let Some(memory) = &mut self.memory else { return Ok(()) };
        memory.clip(grads, max_norm)?;
        let SgdConfig { momentum, nesterov, weight_decay } = self.config;
        let hyper = Hyper { lr: 0.0, momentum, nesterov, weight_decay };
        let buffer = self.momentum_buffer.as_mut().map(Tensor::view_mut).transpose()?;
        Ok(sgd::captured_step(params.view_mut()?, grads, buffer, memory.no_decay(), memory.values(), &hyper)?)
    }

    /// Steps taken.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The momentum under torch's name, if there is one.
    #[must_use]
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        self.momentum_buffer.iter().map(|buffer| ("momentum_buffer", buffer)).collect()
    }

    /// Continues from a saved state: copies of what [`Sgd::state`] and [`Sgd::steps`] gave.
    ///
    /// # Errors
    /// [`Error::State`] with every missing, unknown or misshapen tensor; nothing is changed then.
    pub fn load_state(&mut self, steps: u32, state: &[(&str, &Tensor)]) -> Result<()> {
        let mut own: Vec<_> = self.momentum_buffer.iter_mut().map(|buffer| ("momentum_buffer", buffer)).collect();
        load_tensors("sgd", &mut own, state)?;
        self.steps = steps;
        Ok(())
    }
}
