//! The memory of an arena on a device: one range of addresses, given physical memory from its start as it grows.
//!
//! A range of its own keeps a step's tensors free of gaps between separate allocations, and lets the peak of the driver's
//! account be the peak of ours up to one granule.

use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use super::{
    context::CudaDevice,
    driver::{check, describe},
    heap::{Heap, Span},
};
use crate::{Error, Result};

/// Physical memory is taken in multiples of this, unless the driver's own granularity is larger.
const GRANULE: usize = 16 << 20;

/// The taken and free parts of an arena's memory.
#[derive(Debug)]
pub(crate) struct DeviceHeap {
    device: CudaDevice,
    base: u64,
    reserved: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    heap: Heap,
    /// Bytes with physical memory behind them, from the base on, by allocation.
    backed: usize,
    handles: Vec<(sys::CUmemGenericAllocationHandle, usize)>,
    /// How many times more was asked for.
    requests: usize,
    /// Parts taken since a recording began, for a graph.
    recording: Option<Vec<Span>>,
}

impl DeviceHeap {
    /// Reserves addresses for all of the device's memory; nothing is taken yet.
    pub(crate) fn new(device: CudaDevice) -> Result<Self> {
        let reserved = device.info().memory.next_multiple_of(GRANULE);
        if let Some(dry) = &device.gpu().dry {
            return Ok(Self { device, base: dry.addresses(reserved), reserved, state: Mutex::default() });
        }
        device.bind()?;
        let mut base = 0;
        // SAFETY: reserves addresses only; `base` outlives the call.
        check("cuMemAddressReserve", unsafe { sys::cuMemAddressReserve(&raw mut base, reserved, 0, 0, 0) })?;
        Ok(Self { device, base, reserved, state: Mutex::default() })
    }

    /// A part of what has memory, by one of the heap's ways.
    pub(crate) fn take_within(&self, way: impl FnOnce(&mut Heap) -> Option<Span>) -> Option<Span> {
        let mut state = self.state();
        let span = way(&mut state.heap)?;
        if let Some(recording) = &mut state.recording {
            recording.push(span);
        }
        Some(span)
    }

    /// A part of at least `bytes`; nothing when the device has no more memory.
    pub(crate) fn take(&self, bytes: usize) -> Result<Option<Span>> {
        let mut state = self.state();
        let before = state.heap.end();
        let span = state.heap.take(bytes);
        let end = state.heap.end();
        if end > state.backed && !self.back(&mut state, end)? {
            state.heap.give(span);
            state.heap.shrink(before);
            return Ok(None);
        }
        if let Some(recording) = &mut state.recording {
            recording.push(span);
        }
        Ok(Some(span))
    }

    pub(crate) fn give(&self, span: Span) {
        self.state().heap.give(span);
    }

    /// The address of a part.
    pub(crate) fn address(&self, span: Span) -> u64 {
        self.base + span.offset as u64
    }

    /// Bytes of physical memory taken from the device.
    pub(crate) fn backed(&self) -> usize {
        self.state().backed
    }

    /// Bytes of physical memory taken from the device, and the whole granules that fit into `free` more.
    pub(crate) fn backed_with(&self, free: usize) -> usize {
        self.state().backed + free / GRANULE * GRANULE
    }

    /// How many times the device was asked for physical memory.
    pub(crate) fn requests(&self) -> usize {
        self.state().requests
    }

    /// Begins to note the parts that are taken.
    pub(crate) fn record(&self) {
        self.state().recording = Some(Vec::new());
    }

    /// The parts taken since [`DeviceHeap::record`], joined.
    pub(crate) fn recorded(&self) -> Vec<Span> {
        let mut spans = self.state().recording.take().unwrap_or_default();
        spans.sort_unstable_by_key(|span| span.offset);
        let mut joined: Vec<Span> = Vec::new();
        for span in spans {
            match joined.last_mut() {
                Some(last) if last.offset + last.len >= span.offset => {
                    last.len = last.len.max(span.offset + span.len - last.offset);
                }
                _ => joined.push(span),
            }
        }
        joined
    }

    /// Whether none of `spans` is taken.
    pub(crate) fn all_free(&self, spans: &[Span]) -> bool {
        let state = self.state();
        spans.iter().all(|&span| state.heap.is_free(span))
    }

    /// Free bytes of those that were taken once.
    pub(crate) fn free(&self) -> usize {
        self.state().heap.free()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts physical memory behind the first `end` bytes; false when the device has no more.
    fn back(&self, state: &mut State, end: usize) -> Result<bool> {
        if end > self.reserved {
            return Ok(false);
        }
        state.requests += 1;
        let bytes = (end - state.backed).next_multiple_of(GRANULE).min(self.reserved - state.backed);
        if let Some(dry) = &self.device.gpu().dry {
            let taken = dry.take(bytes, self.device.info().memory);
            state.backed += if taken { bytes } else { 0 };
            return Ok(taken);
        }
        self.device.bind()?;
        let location = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.device.info().ordinal as i32,
        };
        // SAFETY: an all-zero `CUmemAllocationProp` is the documented default; the fields that matter are set below.
        let mut prop: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        prop.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location = location;
        let mut handle = 0;
        // SAFETY: `handle` and `prop` outlive the call.
        match unsafe { sys::cuMemCreate(&raw mut handle, bytes, &raw const prop, 0) } {
            sys::CUresult::CUDA_SUCCESS => {}
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Ok(false),
            failed => return Err(Error::Cuda { call: "cuMemCreate", reason: describe(failed) }),
        }
        let at = self.base + state.backed as u64;
        let access = sys::CUmemAccessDesc { location, flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
        // SAFETY: `at .. at + bytes` lies in the range reserved in `new` and has no memory yet; `handle` was just made.
        check("cuMemMap", unsafe { sys::cuMemMap(at, bytes, 0, handle, 0) })?;
        // SAFETY: the range was mapped in the line above; `access` outlives the call.
        check("cuMemSetAccess", unsafe { sys::cuMemSetAccess(at, bytes, &raw const access, 1) })?;
        state.backed += bytes;
        state.handles.push((handle, bytes));
        Ok(true)
    }
}

impl Drop for DeviceHeap {
    fn drop(&mut self) {
        if let Some(dry) = &self.device.gpu().dry {
            dry.give(self.backed());
            return;
        }
        if self.device.bind().is_err() || self.device.synchronize().is_err() {
            return;
        }
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: no tensor is left (each holds the arena), no work is in flight, and the ranges are those mapped in `back`.
        unsafe {
            if state.backed > 0 {
                let _ = sys::cuMemUnmap(self.base, state.backed);
            }
            for (handle, _) in state.handles.drain(..) {
                let _ = sys::cuMemRelease(handle);
            }
            let _ = sys::cuMemAddressFree(self.base, self.reserved);
        }
    }
}
