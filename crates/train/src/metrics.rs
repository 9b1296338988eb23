//! `metrics.jsonl`: one object a line.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{Error, EvalStats, LogEntry, Result};

/// The log of a run, a JSON object a line: `step, epoch, loss, grad_norm, learning_rate, tokens, tokens_per_second` (with
/// gradients in f16 also `loss_scale, skipped_steps`; a `grad_norm` that is not finite is `null`), or
/// `step, eval_loss, eval_perplexity, eval_tokens`. Each line is written whole, so that a run that ends early leaves a valid file.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

#[derive(Serialize)]
struct EvalEntry {
    step: usize,
    eval_loss: f64,
    eval_perplexity: f64,
    eval_tokens: usize,
}

impl MetricsFile {
    /// Begins `path` anew.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Adds a line for training steps.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn log(&mut self, entry: &LogEntry) -> Result<()> {
        self.line(entry)
    }

    /// Adds a line for an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn evaluation(&mut self, step: usize, stats: &EvalStats) -> Result<()> {
        self.line(&EvalEntry { step, eval_loss: stats.loss, eval_perplexity: stats.perplexity, eval_tokens: stats.tokens })
    }

    fn line(&mut self, entry: &impl Serialize) -> Result<()> {
        let fail = |source| Error::Io { path: self.path.clone(), source };
        let mut text = serde_json::to_string(entry).map_err(|error| fail(error.into()))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(fail)
    }
}
