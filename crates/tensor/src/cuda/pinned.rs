//! Host memory that the device copies from and to by itself.

use cudarc::driver::sys;

use super::{context::CudaDevice, copy::new_event, driver::check};
use crate::{Result, Tensor};

/// Page-locked host memory of one device.
#[derive(Debug)]
pub struct Pinned {
    pub(super) device: CudaDevice,
    pub(super) address: *mut u8,
    len: usize,
    /// Recorded after the last copy, to wait for it alone.
    pub(super) event: sys::CUevent,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `len` bytes of zeros; on a dry device a length without memory, whose bytes are none.
    ///
    /// # Errors
    /// [`crate::Error::OutOfHostMemory`] when the host has no memory to lock.
    pub fn new(device: CudaDevice, len: usize) -> Result<Self> {
        if device.is_dry() {
            // A plan may ask for more than the machine has that makes it.
            let address = std::ptr::NonNull::dangling().as_ptr();
            return Ok(Self { device, address, len, event: std::ptr::null_mut() });
        }
        device.bind()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: `address` outlives the call.
        match unsafe { sys::cuMemHostAlloc(&raw mut address, len.max(1), 0) } {
            // A limit on locked pages is the system's refusal, not the driver's.
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY | sys::CUresult::CUDA_ERROR_OPERATING_SYSTEM => {
                return Err(crate::Error::OutOfHostMemory { requested: len });
            }
            status => check("cuMemHostAlloc", status)?,
        }
        let mut pinned = Self { device, address: address.cast(), len, event: new_event()? };
        pinned.bytes_mut().fill(0);
        Ok(pinned)
    }

    /// Begins to copy `tensor` here, in the order of the stream. [`Pinned::wait`] before reading.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when it does not fit, [`crate::Error::Cuda`].
    pub fn fetch(&mut self, tensor: &Tensor) -> Result<()> {
        let bytes = tensor.numel() * tensor.dtype().size();
        self.expect_len(bytes)?;
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        let stream = self.device.stream();
        // SAFETY: this value owns `bytes` bytes here, the tensor as many there.
        check("cuMemcpyDtoHAsync", unsafe { sys::cuMemcpyDtoHAsync_v2(self.address.cast(), tensor.address()?, bytes, stream) })?;
        // SAFETY: event and stream live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, stream) })
    }

    /// Begins to copy from here over `tensor`, in the order of the stream; its bytes must not change before [`Pinned::wait`].
    ///
    /// # Errors
    /// As [`Pinned::fetch`].
    pub fn send(&mut self, tensor: &mut Tensor) -> Result<()> {
        let bytes = tensor.numel() * tensor.dtype().size();
        self.expect_len(bytes)?;
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        let (target, stream) = (tensor.address_mut()?, self.device.stream());
        // SAFETY: this value owns `bytes` bytes here, the tensor as many there.
        check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(target, self.address.cast(), bytes, stream) })?;
        // SAFETY: event and stream live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, stream) })
    }

    /// As [`Pinned::send`], for the first `len` bytes here and those of `tensor` from byte `at` on.
    ///
    /// # Errors
    /// As [`Pinned::send`].
    pub fn send_part(&mut self, tensor: &mut Tensor, at: usize, len: usize) -> Result<()> {
        self.expect_len(len)?;
        let bytes = tensor.numel() * tensor.dtype().size();
        if at.checked_add(len).is_none_or(|end| end > bytes) {
            let expected = "bytes within the tensor";
            return Err(crate::Error::Argument { op: "pinned", argument: "at", expected, found: at });
        }
        self.device.bind()?;
        let (target, stream) = (tensor.address_mut()? + at as u64, self.device.stream());
        // SAFETY: this value owns `len` bytes here, the tensor as many from `at` on.
        check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(target, self.address.cast(), len, stream) })?;
        // SAFETY: event and stream live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, stream) })
    }

    /// Waits for the last copy.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn wait(&self) -> Result<()> {
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the event lives as long as this value.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// How many bytes; also on a dry device.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.len
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: this value owns as many bytes, which were written in `new`; none is read at a dangling address.
        unsafe { std::slice::from_raw_parts(self.address, self.owned()) }
    }

    /// The bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.owned()) }
    }

    /// Bytes with memory behind them.
    fn owned(&self) -> usize {
        if self.device.is_dry() { 0 } else { self.len }
    }

    pub(super) fn expect_len(&self, found: usize) -> Result<()> {
        if found <= self.len {
            return Ok(());
        }
        Err(crate::Error::Argument { op: "pinned", argument: "bytes", expected: "at most the buffer's length", found })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.is_dry() {
            return;
        }
        // The event cannot be waited for when its last copy was captured: both streams are.
        if self.device.bind().is_ok() && self.device.synchronize().is_ok() && self.device.synchronize_copies().is_ok() {
            // SAFETY: no copy is in flight, and both were made in `new`.
            unsafe {
                let _ = sys::cuMemFreeHost(self.address.cast());
                let _ = sys::cuEventDestroy_v2(self.event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{ComputeCapability, DeviceInfo};

    #[test]
    fn on_a_device_that_only_counts_it_has_a_length_and_no_memory() {
        let (name, capability) = ("a GPU of this test".to_owned(), ComputeCapability::new(9, 0));
        let info = DeviceInfo { ordinal: 0, name, capability, memory: 1 << 40, multiprocessors: 1, driver: 12_000 };
        // More than any machine has.
        let len = 1 << 50;
        let mut pinned = Pinned::new(CudaDevice::dry(&info), len).unwrap();
        assert_eq!((pinned.byte_len(), pinned.bytes().len(), pinned.bytes_mut().len()), (len, 0, 0));
        pinned.expect_len(len).unwrap();
        pinned.wait().unwrap();
    }
}
