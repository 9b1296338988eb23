//! Where a GPU's time goes, by kernel.

use std::{collections::HashMap, sync::PoisonError};

use cudarc::driver::sys;

use super::{context::CudaDevice, driver::check};
use crate::Result;

/// One launch: its name and the events around it.
pub(super) struct Timed {
    name: String,
    start: sys::CUevent,
    end: sys::CUevent,
}

/// A kernel's share of a profile.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The kernel, or `matmul` with its sizes (m x n x k).
    pub name: String,
    /// How often it ran.
    pub calls: usize,
    /// Milliseconds in all.
    pub milliseconds: f64,
}

impl CudaDevice {
    /// Begins to time every kernel. Steps are not captured while it lasts.
    pub fn start_profile(self) {
        *self.gpu().profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// Ends it: the kernels, the longest first.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn end_profile(self) -> Result<Vec<KernelTime>> {
        self.synchronize()?;
        let timed = self.gpu().profile.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        let mut sums: HashMap<String, (usize, f64)> = HashMap::new();
        for Timed { name, start, end } in timed {
            let mut milliseconds = 0.0;
            // SAFETY: both were recorded and have happened; they are destroyed once.
            unsafe {
                check("cuEventElapsedTime", sys::cuEventElapsedTime_v2(&raw mut milliseconds, start, end))?;
                let _ = (sys::cuEventDestroy_v2(start), sys::cuEventDestroy_v2(end));
            }
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + 1, sum.1 + f64::from(milliseconds));
        }
        let mut all: Vec<KernelTime> =
            sums.into_iter().map(|(name, (calls, milliseconds))| KernelTime { name, calls, milliseconds }).collect();
        all.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Ok(all)
    }

    /// Whether a profile is being made.
    #[must_use]
    pub fn is_profiling(self) -> bool {
        self.gpu().profile.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Runs `launch`, timed under `name` if a profile is being made.
    pub(super) fn timed(self, name: impl FnOnce() -> String, launch: impl FnOnce() -> Result<()>) -> Result<()> {
        if !self.is_profiling() {
            return launch();
        }
        let start = self.event()?;
        launch()?;
        let timed = Timed { name: name(), start, end: self.event()? };
        if let Some(profile) = self.gpu().profile.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            profile.push(timed);
        }
        Ok(())
    }

    /// How long what `launch` adds to the stream takes: waits for it.
    pub(super) fn milliseconds(self, launch: impl FnOnce() -> Result<()>) -> Result<f64> {
        let start = self.event()?;
        launch()?;
        let end = self.event()?;
        self.synchronize()?;
        let mut milliseconds = 0.0;
        // SAFETY: both were recorded and have happened; they are destroyed once.
        unsafe {
            check("cuEventElapsedTime", sys::cuEventElapsedTime_v2(&raw mut milliseconds, start, end))?;
            let _ = (sys::cuEventDestroy_v2(start), sys::cuEventDestroy_v2(end));
        }
        Ok(f64::from(milliseconds))
    }

    /// A new event, recorded in the stream.
    fn event(self) -> Result<sys::CUevent> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a context is bound; `event` outlives the call; the stream lives as long as the process.
        unsafe {
            check("cuEventCreate", sys::cuEventCreate(&raw mut event, 0))?;
            check("cuEventRecord", sys::cuEventRecord(event, self.stream()))?;
        }
        Ok(event)
    }
}
