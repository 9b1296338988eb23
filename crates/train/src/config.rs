//! The settings of a run, in the names of Hugging Face's `TrainingArguments`.

use nibble_model::Checkpointing;
use nibble_optim::{LrSchedule, OptimizerConfig, OptimizerName, Paging, ScheduleName, ScheduleOptions};
use nibble_tensor::{DType, Device};

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

    /// Whether a paged optimizer can have its pages so on such a device, computing in such a type.
    ///
    /// # Errors
    /// [`Error::Optim`] as [`Paging::check`], [`Error::Setting`] for values in pages beside copies that would be as large.
    pub fn check_paging(&self, device: Device, compute_dtype: DType) -> Result<()> {
        if !self.optim.is_paged() {
            return Ok(());
        }
        self.optim_paging.check(device)?;
        if self.optim_paging.masters && compute_dtype == DType::F32 {
            let found = compute_dtype.name().to_owned();
            return Err(Error::Setting { option: "optim_page_masters", expected: "a compute type of 16 bits", found });
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use nibble_tensor::cuda::{ComputeCapability, CudaDevice, DeviceInfo};

    use super::*;

    #[test]
    fn pages_that_cannot_be_are_known_from_the_settings_alone() {
        let (name, capability) = ("a GPU of this test".to_owned(), ComputeCapability::new(9, 0));
        let info = DeviceInfo { ordinal: 0, name, capability, memory: 1 << 30, multiprocessors: 1, driver: 12_000 };
        let gpu = Device::Cuda(CudaDevice::dry(&info));
        let paging = |device_memory, file: Option<&str>, masters| Paging {
            device_memory,
            file: file.map(Into::into),
            masters,
            ..Paging::default()
        };
        let check = |optim, optim_paging, device, dtype| {
            TrainConfig { optim, optim_paging, ..TrainConfig::default() }.check_paging(device, dtype).is_ok()
        };
        let paged = OptimizerName::PagedAdamW8bit;
        for (paging, cpu, gpu_bf16, gpu_f32) in [
            (paging(None, None, false), true, true, true),
            (paging(None, Some("f"), false), true, false, false),
            (paging(Some(1), None, false), false, true, true),
            (paging(Some(1), Some("f"), false), true, false, false),
            (paging(None, None, true), false, true, false),
        ] {
            assert_eq!(check(paged, paging.clone(), Device::Cpu, DType::F32), cpu, "{paging:?}");
            assert_eq!(check(paged, paging.clone(), gpu, DType::Bf16), gpu_bf16, "{paging:?}");
            assert_eq!(check(paged, paging.clone(), gpu, DType::F32), gpu_f32, "{paging:?}");
            assert!(check(OptimizerName::AdamW8bit, paging, gpu, DType::F32), "without pages nothing is asked of them");
        }
    }
}
