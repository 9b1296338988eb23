//! Ctrl-C: the first ends the run after its step, the second ends the process.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    error::{CliError, Result},
    ui,
};

/// Signals so close to the first one are not another request.
const ECHO: Duration = Duration::from_millis(500);

/// Nothing is learned yet: Ctrl-C ends the process.
const LOADING: u8 = 0;
/// Ctrl-C asks the run to stop.
const TRAINING: u8 = 1;
/// It was asked to.
const STOPPING: u8 = 2;

/// Hears Ctrl-C (and SIGTERM) from its making on.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// From now on. A process that ends at once takes the unfinished folder `staging` with it.
    ///
    /// # Errors
    /// When the system has no such signals.
    pub(crate) fn install(staging: &Path) -> Result<Self> {
        let state = Arc::new(AtomicU8::new(LOADING));
        let (seen, staging) = (state.clone(), staging.to_path_buf());
        let mut asked: Option<Instant> = None;
        let handler = move || {
            // `timeout` and some supervisors signal a process and its group: the same request, heard twice.
            if asked.is_some_and(|asked| asked.elapsed() < ECHO) {
                return;
            }
            if seen.compare_exchange(TRAINING, STOPPING, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                asked = Some(Instant::now());
                ui::say("\nstopping after this step, then saving; Ctrl-C again ends at once");
                return;
            }
            let _ = std::fs::remove_dir_all(&staging);
            std::process::exit(130);
        };
        ctrlc::set_handler(handler).map_err(|error| CliError::Command { source: Box::new(error), hint: None })?;
        Ok(Self(state))
    }

    /// There is something to save now.
    pub(crate) fn begin_training(&self) {
        self.0.store(TRAINING, Ordering::SeqCst);
    }

    /// Whether the run is to stop.
    pub(crate) fn is_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst) == STOPPING
    }
}
