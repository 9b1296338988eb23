//! A GPU that is not there: what is asked of it is checked and counted, and nothing runs.
//!
//! Ops run on it as on a real one, down to the check of a launch's arguments; memory has addresses and no content. The same calls
//! take the same memory on the device that it stands for, so that a step's peak is known without one.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use super::context::{CudaDevice, DeviceInfo, Gpu};
use crate::Error;

/// Where the addresses begin: none is 0, and all are aligned as a driver's are.
const FIRST_ADDRESS: u64 = 1 << 40;

/// What a dry device has given away.
#[derive(Debug)]
pub(super) struct Dry {
    used: AtomicUsize,
    next: AtomicU64,
}

/// One device for each description.
static DEVICES: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());

impl CudaDevice {
    /// A device like `info` that only counts. A second call with the same gives the same.
    #[must_use]
    pub fn dry(info: &DeviceInfo) -> Self {
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = devices.iter().find(|gpu| gpu.info == *info) {
            return Self::from(*gpu);
        }
        let dry = Dry { used: AtomicUsize::new(0), next: AtomicU64::new(FIRST_ADDRESS) };
        let gpu: &'static Gpu = Box::leak(Box::new(Gpu::dry(info.clone(), dry)));
        devices.push(gpu);
        Self::from(gpu)
    }

    /// Whether it only counts.
    #[must_use]
    pub fn is_dry(self) -> bool {
        self.gpu().dry.is_some()
    }
}

impl Dry {
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `bytes` of `total`; false when there are not as many.
    pub(super) fn take(&self, bytes: usize, total: usize) -> bool {
        let more = |used: usize| used.checked_add(bytes).filter(|used| *used <= total);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    pub(super) fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Addresses for `bytes` that nothing else has.
    pub(super) fn addresses(&self, bytes: usize) -> u64 {
        self.next.fetch_add(bytes.next_multiple_of(1 << 21) as u64, Ordering::Relaxed)
    }
}

/// What a call that a dry device cannot count returns.
pub(super) fn nothing_runs() -> Error {
    Error::Cuda { call: "bind", reason: "nothing runs on a device that only counts".to_owned() }
}
