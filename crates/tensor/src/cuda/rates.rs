//! What a device does in a second: for plans of what to keep, send away or compute again.

use cudarc::driver::sys;

use super::{
    context::CudaDevice,
    driver::{attribute, check},
    pinned::Pinned,
};
use crate::{Arena, DType, Device, Result, Tensor};

/// The share of a card's peak that matrix products reach in a training step (measured on Hopper: 0.65 to 0.75).
const SUSTAINED: f64 = 0.65;
/// What a link is taken for when it cannot be timed: PCIe 3.0 with 16 lanes.
const SLOW_LINK: f64 = 12e9;
const SAMPLE: usize = 32 << 20;

impl CudaDevice {
    /// Floating-point operations in a second that 16-bit matrix products of a step run at: multiprocessors times clock times
    /// operations of a cycle (NVIDIA's architecture whitepapers, sums in f32), times the share that is reached.
    #[must_use]
    pub fn matmul_rate(self) -> f64 {
        let capability = self.info().capability;
        let each = match (capability.major, capability.minor) {
            (7, _) => 1024.0,
            (8, 0) => 2048.0,
            (9, _) => 4096.0,
            (10, _) => 8192.0,
            _ => 512.0,
        };
        let kilohertz = self.clock().unwrap_or(1_500_000);
        SUSTAINED * each * self.info().multiprocessors as f64 * 1e3 * f64::from(kilohertz)
    }

    /// Bytes in a second from the device to pinned host memory: timed once for each device, which may have links of their own.
    #[must_use]
    pub fn link_rate(self) -> f64 {
        let time = || if self.is_dry() { SLOW_LINK } else { self.time_link().unwrap_or(SLOW_LINK) };
        *self.gpu().link.get_or_init(time)
    }

    fn clock(self) -> Result<i32> {
        self.bind()?;
        let device = cudarc::driver::result::device::get(self.info().ordinal as i32);
        let device =
            device.map_err(|error| crate::Error::Cuda { call: "cuDeviceGet", reason: super::driver::describe(error.0) })?;
        attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)
    }

    fn time_link(self) -> Result<f64> {
        let arena = Arena::on(Device::Cuda(self), usize::MAX)?;
        let tensor = Tensor::zeros(&arena, DType::U8, [SAMPLE])?;
        let mut pinned = Pinned::new(self, SAMPLE)?;
        pinned.fetch(&tensor)?;
        let [begin, end] = [self.timing_event()?, self.timing_event()?];
        let stream = self.stream();
        // SAFETY: event and stream live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(begin, stream) })?;
        pinned.fetch(&tensor)?;
        // SAFETY: as above.
        check("cuEventRecord", unsafe { sys::cuEventRecord(end, stream) })?;
        self.synchronize()?;
        let mut milliseconds = 0.0;
        // SAFETY: both events have been recorded and reached; they are not used again.
        unsafe {
            let timed = check("cuEventElapsedTime", sys::cuEventElapsedTime_v2(&raw mut milliseconds, begin, end));
            let _ = (sys::cuEventDestroy_v2(begin), sys::cuEventDestroy_v2(end));
            timed?;
        }
        Ok(SAMPLE as f64 / (1e-3 * f64::from(milliseconds)))
    }

    fn timing_event(self) -> Result<sys::CUevent> {
        self.bind()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: a context is bound; `event` outlives the call.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, 0) })?;
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{ComputeCapability, DeviceInfo};

    fn device(ordinal: usize) -> CudaDevice {
        CudaDevice::dry(&DeviceInfo {
            ordinal,
            name: "of the test of links".to_owned(),
            capability: ComputeCapability { major: 9, minor: 0 },
            memory: 1 << 30,
            multiprocessors: 132,
            driver: 12_000,
        })
    }

    #[test]
    fn each_device_has_a_link_of_its_own() {
        device(0).gpu().link.set(50e9).unwrap();
        assert_eq!([0, 1, 0, 1].map(|ordinal| device(ordinal).link_rate()), [50e9, SLOW_LINK, 50e9, SLOW_LINK]);
    }
}
