//! How long work takes on a device whose caches hold nothing of it.

use std::time::Duration;

use cudarc::driver::sys;

use super::{
    context::CudaDevice,
    driver::{attribute, describe},
    launch::{Arg, Grid},
    profile::KernelTime,
};
use crate::{Arena, DType, Device, Error, Result, Tensor};

/// The least that is read before each measurement: long enough for the host to hand over some launches meanwhile, so that
/// their way to the device is not measured.
const LEAST_BYTES: usize = 256 << 20;
const BLOCKS: usize = 1024;

/// Times work by the device's own clock.
///
/// Each measurement begins with a reading of four times the level-two cache: nothing of the operands is left in it, and no line that
/// has yet to be written to memory.
#[derive(Debug)]
pub struct KernelTimer {
    device: CudaDevice,
    cold: Tensor,
    sums: Tensor,
}

impl KernelTimer {
    /// A timer for the device of `arena`, from which it takes what it reads.
    ///
    /// # Errors
    /// [`Error::Argument`] on the CPU, [`Error::OutOfMemory`], [`Error::Cuda`].
    pub fn new(arena: &Arena) -> Result<Self> {
        let Device::Cuda(device) = arena.device() else {
            return Err(Error::Argument { op: "timer", argument: "device", expected: "a GPU", found: 0 });
        };
        device.bind()?;
        let handle = cudarc::driver::result::device::get(device.info().ordinal as i32);
        let handle = handle.map_err(|error| Error::Cuda { call: "cuDeviceGet", reason: describe(error.0) })?;
        let cache = attribute(handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;
        let cold = Tensor::zeros(arena, DType::F32, [LEAST_BYTES.max(4 * cache) / 4])?;
        // f64 sums: two words each.
        let sums = Tensor::empty(arena, DType::U32, [2 * BLOCKS])?;
        Ok(Self { device, cold, sums })
    }

    /// How long the device takes for what `work` hands to it, from the first kernel's start to the last one's end, gaps included.
    ///
    /// # Errors
    /// What `work` returns, [`Error::Cuda`].
    pub fn time(&mut self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.flush()?;
        self.device.milliseconds(work).map(|milliseconds| Duration::from_secs_f64(milliseconds / 1e3))
    }

    /// How long each kernel of `work` takes: without what the host does between them.
    ///
    /// # Errors
    /// As [`KernelTimer::time`].
    pub fn time_kernels(&mut self, work: impl FnOnce() -> Result<()>) -> Result<Vec<KernelTime>> {
        self.flush()?;
        self.device.start_profile();
        let done = work();
        let times = self.device.end_profile()?;
        done.map(|()| times)
    }

    fn flush(&mut self) -> Result<()> {
        let args = [Arg::write(&mut self.sums)?, Arg::read(&self.cold)?, Arg::U64(self.cold.numel() as u64)];
        self.device.launch("sum_squares_f32", Grid::new(BLOCKS, 256), &args)
    }
}
