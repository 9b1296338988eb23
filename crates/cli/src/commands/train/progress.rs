//! What a run shows and logs while it goes on.

use std::path::Path;

use nibble_tensor::Owner;
use nibble_train::{Error as TrainError, EvalStats, LogEntry, MetricsFile, Observer, StepStats};

use super::interrupt::Interrupt;
use crate::{
    error::Result,
    ui::{self, Bar},
};

/// The log, in the output folder.
const LOG: &str = "metrics.jsonl";

/// The screen and the log of a run.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Bar,
    metrics: MetricsFile,
    /// Why the log could not be written: the run ends.
    failed: Option<TrainError>,
    interrupt: Interrupt,
    max_steps: usize,
    seconds: Smoothed,
    /// Steps that were learned from.
    pub(crate) learned: usize,
    /// Seconds of all steps; evaluations are not training.
    pub(crate) spent: f64,
    /// The last evaluation.
    pub(crate) evaluation: Option<EvalStats>,
    /// The last line of the log.
    pub(crate) last: Option<LogEntry>,
}

impl Progress {
    /// For a run of `max_steps`; the log goes into `folder`, behind that of the run in `earlier` that is gone on with.
    ///
    /// # Errors
    /// When the log cannot be created.
    pub(crate) fn new(folder: &Path, earlier: Option<&Path>, max_steps: usize, interrupt: &Interrupt) -> Result<Self> {
        let log = folder.join(LOG);
        Ok(Self {
            bar: Bar::new("training", max_steps),
            metrics: match earlier {
                Some(earlier) => MetricsFile::go_on(&log, &earlier.join(LOG))?,
                None => MetricsFile::create(&log)?,
            },
            failed: None,
            interrupt: interrupt.clone(),
            max_steps,
            seconds: Smoothed::default(),
            learned: 0,
            spent: 0.0,
            evaluation: None,
            last: None,
        })
    }

    /// Takes the bar away; gives how the run `ended`, or what went wrong with the log if nothing else did.
    ///
    /// # Errors
    /// The run's own, or that the log could not be written.
    pub(crate) fn finish<T>(&mut self, ended: Result<T>) -> Result<T> {
        self.bar.finish();
        ended.and_then(|ended| self.failed.take().map_or(Ok(ended), |error| Err(error.into())))
    }

    /// Logs who held the memory at its peak.
    pub(crate) fn memory(&mut self, owners: &[(Owner, usize)]) {
        let step = self.last.map_or(0, |entry| entry.step);
        let done = self.metrics.memory(step, owners);
        self.keep(done);
    }

    fn keep(&mut self, done: Result<(), TrainError>) {
        if let Err(error) = done {
            self.failed.get_or_insert(error);
        }
    }

    fn left(&self, step: usize) -> String {
        ui::duration((self.max_steps - step.min(self.max_steps)) as f64 * self.seconds.0.unwrap_or(0.0))
    }
}

/// What the log says about steps that were skipped.
fn skipped(entry: &LogEntry) -> String {
    match (entry.loss_scale, entry.skipped_steps) {
        (Some(scale), Some(steps)) if steps > 0 => format!("{steps} skipped at loss scale {scale}  "),
        _ => String::new(),
    }
}

impl Observer for Progress {
    fn on_step(&mut self, stats: &StepStats) {
        self.learned += usize::from(!stats.skipped);
        self.seconds.add(stats.seconds);
        self.spent += stats.seconds;
        let rate = stats.tokens as f64 / stats.seconds.max(1e-9);
        let StepStats { step, loss, learning_rate, grad_norm, .. } = *stats;
        let (left, skipped) = (self.left(step), if stats.skipped { " (skipped)" } else { "" });
        self.bar.set(
            step,
            format!("loss {loss:.4}  lr {learning_rate:.2e}  norm {grad_norm:.3}{skipped}  {rate:.0} tokens/s  {left} left"),
        );
    }

    fn on_log(&mut self, entry: &LogEntry) {
        let done = self.metrics.log(entry);
        self.keep(done);
        self.last = Some(*entry);
        if !self.bar.is_drawn() {
            let LogEntry { step, epoch, loss, grad_norm, learning_rate, tokens_per_second, .. } = *entry;
            ui::say(format_args!(
                "step {step}/{}  epoch {epoch:.2}  loss {loss:.4}  lr {learning_rate:.2e}  norm {grad_norm:.3}  \
                 {}{tokens_per_second:.0} tokens/s  {} left",
                self.max_steps,
                skipped(entry),
                self.left(step)
            ));
        }
    }

    fn on_evaluate(&mut self, step: usize, stats: &EvalStats) {
        let done = self.metrics.evaluation(step, stats);
        self.keep(done);
        self.evaluation = Some(*stats);
        let EvalStats { loss, perplexity, .. } = stats;
        self.bar.line(format_args!("step {step}/{}  eval loss {loss:.4}  perplexity {perplexity:.3}", self.max_steps));
    }

    fn should_stop(&mut self) -> bool {
        self.failed.is_some() || self.interrupt.is_asked()
    }
}

/// A mean in which older values count less.
#[derive(Clone, Copy, Debug, Default)]
struct Smoothed(Option<f64>);

impl Smoothed {
    fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + 0.1 * (value - mean)));
    }
}
