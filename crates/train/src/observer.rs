//! What a front end is told.

use serde::Serialize;

/// What a run will do, before its first step.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Optimizer steps in all.
    pub max_steps: usize,
    /// Optimizer steps an epoch.
    pub steps_per_epoch: usize,
    /// Trained values.
    pub trainable_parameters: usize,
    /// Values of the base.
    pub base_parameters: usize,
    /// Examples of the training data.
    pub examples: usize,
    /// Documents that one optimizer step learns from.
    pub effective_batch_size: usize,
}

/// One optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// From 1.
    pub step: usize,
    /// Fraction of epochs done after this step.
    pub epoch: f64,
    /// Cross entropy in nats, mean over the step's labelled tokens.
    pub loss: f64,
    /// Norm of the gradient before clipping; not finite where the step was skipped.
    pub grad_norm: f64,
    /// The learning rate of this update.
    pub learning_rate: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Labelled tokens of the step.
    pub labels: usize,
    /// Seconds the step took.
    pub seconds: f64,
    /// What the loss was multiplied by before its gradient was taken, with gradients in f16.
    pub loss_scale: Option<f64>,
    /// Whether gradients beyond f16's range left everything as it was, but for the loss scale, which is halved.
    pub skipped: bool,
}

/// A line of `metrics.jsonl`: the steps since the line before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LogEntry {
    /// The last of the steps.
    pub step: usize,
    /// Fraction of epochs done.
    pub epoch: f64,
    /// Mean of the steps' losses.
    pub loss: f64,
    /// Of the last step.
    pub grad_norm: f64,
    /// Of the last step.
    pub learning_rate: f64,
    /// Tokens since the run began.
    pub tokens: usize,
    /// Over the steps since the line before.
    pub tokens_per_second: f64,
    /// Of the last step, with gradients in f16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// How many of the steps since the line before were skipped, with gradients in f16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<usize>,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalStats {
    /// Cross entropy in nats, mean over all labelled tokens.
    pub loss: f64,
    /// e^loss.
    pub perplexity: f64,
    /// Labelled tokens.
    pub tokens: usize,
}

/// Hears what happens in a run. Each method does nothing unless it is given a body.
pub trait Observer {
    /// Before the first step.
    fn on_start(&mut self, _plan: &Plan) {}
    /// After every step.
    fn on_step(&mut self, _stats: &StepStats) {}
    /// After every `logging_steps` steps, and after the last.
    fn on_log(&mut self, _entry: &LogEntry) {}
    /// After an evaluation; `step` steps were done.
    fn on_evaluate(&mut self, _step: usize, _stats: &EvalStats) {}
    /// Asked after every step: true ends the run, which is then saved as it is.
    fn should_stop(&mut self) -> bool {
        false
    }
}

impl Observer for () {}
