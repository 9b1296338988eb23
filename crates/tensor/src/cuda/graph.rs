//! A step recorded once and replayed with one call.

use std::sync::atomic::Ordering;

use cudarc::driver::sys;

use super::{context::CudaDevice, driver::check, heap::Span, memory::DeviceHeap};
use crate::{
    Arena, Device, Error, Owner, Result,
    ahead::{self, Captured, Found},
};

/// The work of a function, recorded: kernels, their arguments and the memory between them.
///
/// Replaying repeats it with the same addresses. The tensors that the function made are gone; their memory belongs to whoever
/// takes it next, so a graph only replays while nobody holds it ([`Graph::is_valid`]). What it reads and writes beyond them
/// must outlive it: the caller keeps those tensors. Weights that it found widened in free memory are widened there again before it runs,
/// where they are not any more.
#[derive(Debug)]
pub struct Graph {
    device: CudaDevice,
    arena: Arena,
    executable: sys::CUgraphExec,
    scratch: Vec<Span>,
    widened: Captured,
}

// SAFETY: the handle is used from one thread at a time, with the context bound.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `f` hands to the device of `arena`; nothing of it runs.
    ///
    /// # Errors
    /// What `f` returns, [`Error::Cuda`] when `f` does what cannot be recorded (copies from or to pageable host memory, waiting),
    /// [`Error::Argument`] on the CPU.
    pub fn capture<T, E: From<Error>>(arena: &Arena, f: impl FnOnce() -> Result<T, E>) -> Result<(Self, T), E> {
        let (Device::Cuda(device), Some(heap)) = (arena.device(), arena.device_heap()) else {
            return Err(Error::Argument { op: "capture", argument: "device", expected: "a GPU", found: 0 }.into());
        };
        device.bind()?;
        let gpu = device.gpu();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the process.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(device.stream(), mode) })?;
        gpu.capturing.store(true, Ordering::Relaxed);
        heap.record();
        arena.warm().record();
        let value = f();
        let (scratch, widened) = (heap.recorded(), arena.warm().recorded(heap));
        gpu.capturing.store(false, Ordering::Relaxed);
        let mut graph = std::ptr::null_mut();
        // SAFETY: ends the capture begun above, also when `f` failed.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(device.stream(), &raw mut graph) });
        let value = value?;
        ended?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph was just made, and is destroyed once.
        let made = device.charge(Owner::Graphs, || unsafe {
            let made = check("cuGraphInstantiate", sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0));
            let _ = sys::cuGraphDestroy(graph);
            made
        });
        made?;
        Ok((Self { device, arena: arena.clone(), executable, scratch, widened }, value))
    }

    /// Whether the memory between its kernels is nobody's now, and the weights that it needs are there.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let warm = self.arena.warm();
        let free = self.heap().is_ok_and(|heap| heap.all_free(&self.scratch));
        free && self.widened.found.iter().all(|found| warm.is_there(found) || found.holds.is_whole())
    }

    /// Whether it leaves the widened weights that it finds: else the same work captured again may find more of them.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.widened.is_settled()
    }

    /// Runs it again.
    ///
    /// # Errors
    /// [`Error::Cuda`], also when it is not valid any more.
    pub fn launch(&self) -> Result<()> {
        if !self.is_valid() {
            return Err(Error::Cuda {
                call: "cuGraphLaunch",
                reason: "the graph's memory holds tensors now, or a weight that it found is gone".into(),
            });
        }
        let heap = self.heap()?;
        let lost: Vec<&Found> = {
            let mut warm = self.arena.warm();
            let lost: Vec<&Found> = self.widened.found.iter().filter(|found| !warm.is_there(found)).collect();
            warm.forget(&lost.iter().map(|found| found.span).collect::<Vec<_>>());
            lost
        };
        for found in lost {
            ahead::restore(self.device, found, heap.address(found.span))?;
        }
        self.device.bind()?;
        // SAFETY: the executable lives as long as this value.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, self.device.stream()) })?;
        self.arena.warm().ran(&self.scratch, &self.widened);
        Ok(())
    }

    fn heap(&self) -> Result<&DeviceHeap> {
        self.arena.device_heap().ok_or(Error::Argument { op: "capture", argument: "device", expected: "a GPU", found: 0 })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() && self.device.synchronize().is_ok() {
            let _ = self.device.charge(Owner::Graphs, || {
                // SAFETY: nothing of it runs any more.
                check("cuGraphExecDestroy", unsafe { sys::cuGraphExecDestroy(self.executable) })
            });
        }
    }
}
