//! Device memory taken outside arenas, by owner: measured, as it is the driver and the libraries that take it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use super::context::CudaDevice;
use crate::{Owner, Result};

/// Bytes by owner.
#[derive(Debug, Default)]
pub(super) struct Charges(Mutex<BTreeMap<Owner, usize>>);

impl Charges {
    pub(super) fn add(&self, owner: Owner, bytes: isize) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = all.entry(owner).or_default();
        *held = held.saturating_add_signed(bytes);
    }
}

impl CudaDevice {
    /// Bytes taken outside arenas, by owner: context, kernels, libraries and graphs.
    #[must_use]
    pub fn outside(self) -> Vec<(Owner, usize)> {
        let all = self.gpu().charges.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|(_, bytes)| **bytes > 0).map(|(owner, bytes)| (*owner, *bytes)).collect()
    }

    /// Bytes that are in use on the device, by the driver's account: this process's and others'.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn used_memory(self) -> Result<usize> {
        let (free, total) = self.memory()?;
        Ok(total - free)
    }

    /// Runs `f`, and counts what the device's free memory loses by it (or gains) as `owner`'s.
    pub(super) fn charge<T>(self, owner: Owner, f: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_capturing() || self.is_dry() {
            return f();
        }
        let before = self.free_memory()?;
        let value = f()?;
        let taken = before as isize - self.free_memory()? as isize;
        self.gpu().charges.add(owner, taken);
        Ok(value)
    }
}
