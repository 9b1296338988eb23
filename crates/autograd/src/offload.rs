//! Activations that wait on the host between forward and backward.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nibble_tensor::{Arena, Device, HostCopy, HostPool, Result, Tensor};

/// Sends what backwards need to the host, and brings it back in reverse order, ahead of its use.
///
/// Tensors on their way take device memory: the newest that leaves and the next that is needed always may; others while they
/// stay within `window` bytes. Tensors of fewer than `smallest` bytes stay where they are. Cloning gives another handle to the same order.
#[derive(Clone, Debug)]
pub struct Offload {
    pool: HostPool,
    arena: Arena,
    window: usize,
    smallest: usize,
    sent: Arc<Mutex<Vec<Weak<Mutex<HostCopy>>>>>,
}

/// A value kept for a backward: on the device, or on the host until then.
#[derive(Clone, Debug)]
pub struct Kept(Place);

#[derive(Clone, Debug)]
enum Place {
    Here(Tensor),
    Sent(Sent),
}

#[derive(Clone, Debug)]
struct Sent {
    copy: Arc<Mutex<HostCopy>>,
    /// Its place in the order.
    index: usize,
    offload: Offload,
    dims: nibble_tensor::Shape,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Offload {
    /// For one forward and backward pass, in buffers of `pool`.
    #[must_use]
    pub fn new(pool: &HostPool, arena: &Arena, window: usize, smallest: usize) -> Self {
        Self { pool: pool.clone(), arena: arena.clone(), window, smallest, sent: Arc::default() }
    }

    /// A good `smallest`: on a GPU 1 MiB, below which little memory is won for a copy's latency.
    #[must_use]
    pub fn smallest_on(device: Device) -> usize {
        if device == Device::Cpu { 0 } else { 1 << 20 }
    }

    /// Begins to send `tensor`; one that is on its way already is sent once.
    fn keep(&self, tensor: &Tensor) -> Result<Kept> {
        let bytes = tensor.numel() * tensor.dtype().size();
        if bytes < self.smallest {
            return Ok(Kept::here(tensor));
        }
        let mut sent = lock(&self.sent);
        let found = sent.iter().enumerate().rev().take(8).find_map(|(index, copy)| {
            let copy = copy.upgrade()?;
            let same = lock(&copy).is_leaving(tensor);
            same.then_some((index, copy))
        });
        let (index, copy) = if let Some(found) = found {
            found
        } else {
            let copy = Arc::new(Mutex::new(self.pool.store(tensor.clone())?));
            sent.push(Arc::downgrade(&copy));
            self.release(&sent)?;
            (sent.len() - 1, copy)
        };
        Ok(Kept(Place::Sent(Sent { copy, index, offload: self.clone(), dims: tensor.shape() })))
    }

    /// Lets go of the memory of those that leave beyond the window, oldest first; the newest is not waited for.
    fn release(&self, sent: &[Weak<Mutex<HostCopy>>]) -> Result<()> {
        let mut leaving = 0;
        for copy in sent.iter().rev().skip(1).filter_map(Weak::upgrade) {
            let mut copy = lock(&copy);
            if copy.is_away() {
                break;
            }
            leaving += copy.bytes();
            if leaving > self.window {
                copy.release()?;
            }
        }
        Ok(())
    }

    /// Brings back those sent before `index`, the latest first: one, and more while they stay within the window.
    fn recall_before(&self, index: usize) -> Result<()> {
        let sent = lock(&self.sent);
        let mut coming = 0;
        for copy in sent[..index].iter().rev().filter_map(Weak::upgrade) {
            let mut copy = lock(&copy);
            let first = coming == 0;
            coming += copy.bytes();
            if !first && coming > self.window {
                break;
            }
            copy.recall(&self.arena)?;
        }
        Ok(())
    }
}

impl Kept {
    /// Kept on the device.
    #[must_use]
    pub fn here(tensor: &Tensor) -> Self {
        Self(Place::Here(tensor.clone()))
    }

    /// Kept where `offload` says.
    pub(crate) fn by(offload: Option<&Offload>, tensor: &Tensor) -> Result<Self> {
        offload.map_or_else(|| Ok(Self::here(tensor)), |offload| offload.keep(tensor))
    }

    /// The value, brought back if it was sent.
    ///
    /// # Errors
    /// [`nibble_tensor::Error::OutOfMemory`], what the device reports.
    pub fn get(self) -> Result<Tensor> {
        let Sent { copy, index, offload, dims } = match self.0 {
            Place::Here(tensor) => return Ok(tensor),
            Place::Sent(sent) => sent,
        };
        lock(&copy).recall(&offload.arena)?;
        offload.recall_before(index)?;
        let tensor = lock(&copy).get(&offload.arena)?;
        // The last to need it gets the only handle.
        drop(copy);
        if tensor.shape() == dims { Ok(tensor) } else { tensor.reshape(dims) }
    }
}
