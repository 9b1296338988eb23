//! `metrics.jsonl`: one object a line.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use nibble_tensor::Owner;
use serde::Serialize;

use crate::{Error, EvalStats, LogEntry, Result};

/// The log of a run, a JSON object a line: `step, epoch, loss, grad_norm, learning_rate, tokens, tokens_per_second` (with
/// gradients in f16 also `loss_scale, skipped_steps`; a `grad_norm` that is not finite is `null`), or
/// `step, eval_loss, eval_perplexity, eval_tokens`; the last line of a run, and of a part of one that was gone on with, is
/// `step, memory_peak, memory_by_owner`, in bytes. Each line is written whole, so that a run that ends early leaves a valid file.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

#[derive(Serialize)]
struct MemoryEntry {
    step: usize,
    memory_peak: usize,
    memory_by_owner: BTreeMap<String, usize>,
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

    /// Begins `path` with the lines of `earlier`, the log of the part of a run that is gone on with; without such a file, anew.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn go_on(path: &Path, earlier: &Path) -> Result<Self> {
        let fail = |path: &Path, source| Error::Io { path: path.to_path_buf(), source };
        let lines = match std::fs::read(earlier) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            lines => lines.map_err(|source| fail(earlier, source))?,
        };
        let mut log = Self::create(path)?;
        // A full disk may have cut the last line.
        let whole = lines.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        log.file.write_all(&lines[..whole]).map_err(|source| fail(path, source))?;
        Ok(log)
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

    /// Adds the line of who held the memory at its peak.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn memory(&mut self, step: usize, owners: &[(Owner, usize)]) -> Result<()> {
        let memory_by_owner: BTreeMap<String, usize> = owners.iter().map(|(owner, bytes)| (owner.to_string(), *bytes)).collect();
        self.line(&MemoryEntry { step, memory_peak: memory_by_owner.values().sum(), memory_by_owner })
    }

    fn line(&mut self, entry: &impl Serialize) -> Result<()> {
        let fail = |source| Error::Io { path: self.path.clone(), source };
        let mut text = serde_json::to_string(entry).map_err(|error| fail(error.into()))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(fail)
    }
}
