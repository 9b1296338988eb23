//! Copies between pinned host memory and the device that run beside the kernels, on a stream of their own.
//!
//! A copy begins when the kernels enqueued before it are done, and the kernels go on meanwhile. What comes after
//! [`Pinned::join`] on the kernels' stream comes after the copy. Both orders are events, so that a captured step holds them.

use cudarc::driver::sys;

use super::{context::CudaDevice, driver::check, pinned::Pinned};
use crate::{Result, Tensor};

/// The stream of copies.
#[derive(Clone, Copy)]
pub(super) struct Copies {
    pub(super) stream: sys::CUstream,
    /// Recorded on the kernels' stream where a copy may begin.
    pub(super) fork: sys::CUevent,
}

/// An event that marks an order and no time.
pub(super) fn new_event() -> Result<sys::CUevent> {
    let mut event = std::ptr::null_mut();
    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: a context is bound; `event` outlives the call.
    check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
    Ok(event)
}

impl CudaDevice {
    /// What is enqueued on the stream of copies from here on waits for the kernels enqueued so far.
    fn fork_copies(self) -> Result<sys::CUstream> {
        self.bind()?;
        let (kernels, Copies { stream, fork }) = (self.stream(), self.gpu().copies);
        // SAFETY: streams and event live as long as the process.
        check("cuEventRecord", unsafe { sys::cuEventRecord(fork, kernels) })?;
        // SAFETY: as above.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, fork, 0) })?;
        Ok(stream)
    }

    /// Waits until all copies beside the kernels are done.
    pub(super) fn synchronize_copies(self) -> Result<()> {
        if self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the stream lives as long as the process.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.gpu().copies.stream) })
    }
}

impl Pinned {
    /// Begins to copy `tensor` here beside the kernels that follow. The tensor must keep its memory and content until
    /// [`Pinned::join`].
    ///
    /// # Errors
    /// As [`Pinned::fetch`].
    pub fn fetch_beside(&mut self, tensor: &Tensor) -> Result<()> {
        let bytes = tensor.span();
        self.expect_len(bytes)?;
        if self.device.is_dry() {
            return Ok(());
        }
        let stream = self.device.fork_copies()?;
        // SAFETY: this value owns `bytes` bytes here, the tensor as many there.
        check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(self.address.cast(), tensor.rows_address()?.0, bytes, stream)
        })?;
        self.mark(stream)
    }

    /// Begins to copy from here over `tensor` beside the kernels that follow. Nothing may read the tensor before
    /// [`Pinned::join`].
    ///
    /// # Errors
    /// As [`Pinned::fetch`].
    pub fn send_beside(&mut self, tensor: &mut Tensor) -> Result<()> {
        let bytes = tensor.span();
        self.expect_len(bytes)?;
        if self.device.is_dry() {
            return Ok(());
        }
        let stream = self.device.fork_copies()?;
        let (target, _) = tensor.rows_address_mut()?;
        // SAFETY: this value owns `bytes` bytes here, the tensor as many there.
        check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(target, self.address.cast(), bytes, stream) })?;
        self.mark(stream)
    }

    /// Kernels that follow come after the last copy beside them.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn join(&self) -> Result<()> {
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: stream and event live.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.device.stream(), self.event, 0) })
    }

    fn mark(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: stream and event live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, stream) })
    }
}
