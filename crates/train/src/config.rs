//! The settings of a run, in the names of Hugging Face's `TrainingArguments`.

use nibble_model::Checkpointing;
use nibble_optim::{LrSchedule, OptimizerConfig, OptimizerName, Paging, ScheduleName, ScheduleOptions};

use crate::{Error, Result};

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Passes over the data; `max_steps` overrides it.
    pub num_train_epochs: f64,
    /// Optimizer steps, when given.
    pub max_steps: Option<usize>,
    /// Micro-batches of one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// The schedule's peak.
    pub learning_rate: f64,
    /// How the learning rate goes on from there.
    pub lr_scheduler_type: ScheduleName,
    /// The schedule's own options.
    pub lr_scheduler_kwargs: ScheduleOptions,
    /// Steps in which the learning rate rises from 0.
    pub warmup_steps: usize,
    /// The same as a fraction of all steps; counts when `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// λ of the decay.
    pub weight_decay: f64,
    /// The gradient's norm is clipped to it; 0 leaves it.
    pub max_grad_norm: f64,
    /// The optimizer.
    pub optim: OptimizerName,
    /// Its constants where they differ from the Trainer's defaults ([`OptimizerConfig::with_args`]).
    pub optim_args: String,
    /// Where the states of a paged optimizer may be.
    pub optim_paging: Paging,
    /// What is kept of the forward pass.
    pub checkpointing: Checkpointing,
    /// Seed of dropout.
    pub seed: u64,
    /// Steps between lines of the log.
    pub logging_steps: usize,
    /// Steps between evaluations; nothing: only at the end.
    pub eval_steps: Option<usize>,
    /// Documents of an evaluation's micro-batch.
    pub eval_batch_size: usize,
}

impl Default for TrainConfig {
    /// Hugging Face's defaults, but a learning rate for adapters and a log line every step.
    fn default() -> Self {
        Self {
            num_train_epochs: 3.0,
            max_steps: None,
            gradient_accumulation_steps: 1,
            learning_rate: 2e-4,
            lr_scheduler_type: ScheduleName::Linear,
            lr_scheduler_kwargs: ScheduleOptions::default(),
            warmup_steps: 0,
            warmup_ratio: 0.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            optim: OptimizerName::AdamWTorchFused,
            optim_args: String::new(),
            optim_paging: Paging::default(),
            checkpointing: Checkpointing::Selective,
            seed: 42,
            logging_steps: 1,
            eval_steps: None,
            eval_batch_size: 8,
        }
    }
}

impl TrainConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first that no run can have.
    pub fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("logging_steps", self.logging_steps),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("eval_steps", self.eval_steps.unwrap_or(1)),
            ("per_device_eval_batch_size", self.eval_batch_size),
        ];
        if let Some((option, found)) = at_least_one.into_iter().find(|(_, n)| *n == 0) {
            return Err(Error::Setting { option, expected: "at least 1", found: found.to_string() });
        }
        let not_negative = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("num_train_epochs", self.num_train_epochs),
        ];
        if let Some((option, found)) = not_negative.into_iter().find(|(_, x)| !(x.is_finite() && *x >= 0.0)) {
            return Err(Error::Setting { option, expected: "a number from 0 on", found: found.to_string() });
        }
        if !(0.0..=1.0).contains(&self.warmup_ratio) {
            return Err(Error::Setting { option: "warmup_ratio", expected: "from 0 to 1", found: self.warmup_ratio.to_string() });
        }
        if self.max_steps.is_none() && self.num_train_epochs == 0.0 {
            return Err(Error::Setting { option: "num_train_epochs", expected: "above 0", found: "0".to_owned() });
        }
        Ok(())
    }

    /// The optimizer's constants.
    ///
    /// # Errors
    /// [`Error::Optim`] for arguments that it does not take, or out of range.
    pub fn optimizer(&self) -> Result<OptimizerConfig> {
        Ok(self.optim.config(self.weight_decay).with_args(&self.optim_args)?)
    }

    /// The learning rates of a run of `max_steps`.
    ///
    /// # Errors
    /// [`Error::Optim`] for options that the schedule does not take.
    pub fn schedule(&self, max_steps: usize) -> Result<LrSchedule> {
        let warmup = self.warmup(max_steps) as u64;
        Ok(LrSchedule::new(self.lr_scheduler_type, self.learning_rate, warmup, max_steps as u64, self.lr_scheduler_kwargs)?)
    }

    /// Warmup steps of a run of `max_steps`.
    #[must_use]
    pub fn warmup(&self, max_steps: usize) -> usize {
        if self.warmup_steps > 0 { self.warmup_steps } else { (self.warmup_ratio * max_steps as f64).ceil() as usize }
    }
}
