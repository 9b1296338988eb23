//! Pages of host memory that visit the device: brought there, worked on, and taken back, beside the kernels.
//!
//! Copies to the device and copies from it run on a stream each, so that the link carries both at once. All orders are events,
//! so that a captured step holds them.

use cudarc::driver::sys;

use super::{
    context::{CudaDevice, new_stream},
    copy::new_event,
    driver::check,
    pinned::Pinned,
};
use crate::{Result, Tensor};

/// Brings pages to a few places on the device, its slots, and takes them back.
///
/// Between [`Pager::begin`] and [`Pager::end`], for each page: [`Pager::load`] into a slot whose page has been taken back,
/// [`Pager::arrive`], kernels that work on it, [`Pager::unload`].
#[derive(Debug)]
pub struct Pager {
    device: CudaDevice,
    /// Copies to the device, and from it.
    there: sys::CUstream,
    back: sys::CUstream,
    begun: sys::CUevent,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    /// The page is there, the kernels are done with it, it is back.
    arrived: sys::CUevent,
    done: sys::CUevent,
    left: sys::CUevent,
    /// Whether it has been unloaded since the step began.
    leaving: bool,
}

// SAFETY: the handles may be used from any thread that has the context bound, which every call here does first.
unsafe impl Send for Pager {}

impl Pager {
    /// With `slots` places.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn new(device: CudaDevice, slots: usize) -> Result<Self> {
        if device.is_dry() {
            let none = std::ptr::null_mut;
            let slots = (0..slots).map(|_| Slot { arrived: none(), done: none(), left: none(), leaving: false }).collect();
            let stream = std::ptr::null_mut();
            return Ok(Self { device, there: stream, back: stream, begun: none(), slots });
        }
        device.bind()?;
        let slot = || Ok(Slot { arrived: new_event()?, done: new_event()?, left: new_event()?, leaving: false });
        let slots = (0..slots).map(|_| slot()).collect::<Result<_>>()?;
        Ok(Self { device, there: new_stream()?, back: new_stream()?, begun: new_event()?, slots })
    }

    /// Number of slots.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Copies wait for what the device has been given so far. At least one [`Pager::load`] follows.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn begin(&mut self) -> Result<()> {
        self.slots.iter_mut().for_each(|slot| slot.leaving = false);
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        record(self.begun, self.device.stream())?;
        wait(self.there, self.begun)
    }

    /// Begins to copy `page` over `place`, the memory of `slot`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when it does not fit, [`crate::Error::Cuda`].
    pub fn load(&mut self, slot: usize, page: &Pinned, place: &mut Tensor) -> Result<()> {
        let bytes = fitting(page, place)?;
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        let (there, slot) = (self.there, &self.slots[slot]);
        if slot.leaving {
            wait(there, slot.left)?;
        }
        let target = place.address_mut()?;
        // SAFETY: the page owns `bytes` bytes here, the tensor at least as many there.
        check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(target, page.address.cast(), bytes, there) })?;
        record(slot.arrived, there)
    }

    /// Kernels that follow find the slot's page there.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn arrive(&self, slot: usize) -> Result<()> {
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        wait(self.device.stream(), self.slots[slot].arrived)
    }

    /// Begins to copy `place`, the memory of `slot`, to `page` when the kernels enqueued so far are done.
    ///
    /// # Errors
    /// As [`Pager::load`].
    pub fn unload(&mut self, slot: usize, page: &mut Pinned, place: &Tensor) -> Result<()> {
        let bytes = fitting(page, place)?;
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        let (kernels, back, slot) = (self.device.stream(), self.back, &mut self.slots[slot]);
        record(slot.done, kernels)?;
        wait(back, slot.done)?;
        // SAFETY: the page owns `bytes` bytes here, the tensor at least as many there.
        check("cuMemcpyDtoHAsync", unsafe { sys::cuMemcpyDtoHAsync_v2(page.address.cast(), place.address()?, bytes, back) })?;
        slot.leaving = true;
        record(slot.left, back)
    }

    /// What follows on the device comes after all copies.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn end(&mut self) -> Result<()> {
        if self.device.is_dry() {
            return Ok(());
        }
        self.device.bind()?;
        let kernels = self.device.stream();
        self.slots.iter().filter(|slot| slot.leaving).try_for_each(|slot| wait(kernels, slot.left))
    }
}

/// Bytes of a page, if there is room for them.
fn fitting(page: &Pinned, place: &Tensor) -> Result<usize> {
    let room = place.numel() * place.dtype().size();
    if page.byte_len() <= room {
        return Ok(page.byte_len());
    }
    let expected = "at most the slot's";
    Err(crate::Error::Argument { op: "pager", argument: "bytes", expected, found: page.byte_len() })
}

fn record(event: sys::CUevent, stream: sys::CUstream) -> Result<()> {
    // SAFETY: event and stream live as long as their owners, which hand them in.
    check("cuEventRecord", unsafe { sys::cuEventRecord(event, stream) })
}

fn wait(stream: sys::CUstream, event: sys::CUevent) -> Result<()> {
    // SAFETY: as above.
    check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, event, 0) })
}

impl Drop for Pager {
    fn drop(&mut self) {
        if self.device.is_dry() || self.device.bind().is_err() || self.device.synchronize().is_err() {
            return;
        }
        let events = self.slots.iter().flat_map(|slot| [slot.arrived, slot.done, slot.left]).chain([self.begun]);
        // SAFETY: all were made in `new` and are destroyed once, after the streams have nothing left to do.
        unsafe {
            for stream in [self.there, self.back] {
                let _ = (sys::cuStreamSynchronize(stream), sys::cuStreamDestroy_v2(stream));
            }
            for event in events {
                let _ = sys::cuEventDestroy_v2(event);
            }
        }
    }
}
