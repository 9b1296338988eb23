//! Tensors that wait in host memory until they are needed again.
//!
//! On a GPU the copies run beside the kernels, between device memory and pinned pages; on the CPU they are plain copies, by
//! which the order of calls is tested.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Arena, DType, Device, Error, Result, Shape, Tensor, cuda::Pinned, shape::size_class};

/// Sizes an octave that buffers are rounded up to.
const CLASSES: usize = 4;

/// Host memory for copies, kept from step to step: the same calls get the same buffers, and smaller tensors those of larger ones. What
/// it takes for tensors of any sizes is that of the largest set of them, a quarter more for rounding, and what smaller ones took before.
///
/// Cloning gives another handle to the same memory.
#[derive(Clone, Debug)]
pub struct HostPool(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    device: Device,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: BTreeMap<usize, Vec<Buffer>>,
    bytes: usize,
}

#[derive(Debug)]
enum Buffer {
    Plain(Vec<u8>),
    Pinned(Pinned),
}

impl Buffer {
    fn len(&self) -> usize {
        match self {
            Self::Plain(buffer) => buffer.len(),
            Self::Pinned(pinned) => pinned.byte_len(),
        }
    }
}

/// A tensor's content on the host, or on its way there or back.
#[derive(Debug)]
pub struct HostCopy {
    pool: HostPool,
    /// Taken when this value drops.
    buffer: Option<Buffer>,
    bytes: usize,
    dtype: DType,
    shape: Shape,
    /// Behind the rows of the tensor, copied as well.
    room: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// On the device, being copied to the host.
    Leaving(Tensor),
    /// On the host alone.
    Away,
    /// Being copied to the device.
    Coming(Tensor),
    /// On the device again.
    Back(Tensor),
}

impl HostPool {
    /// For tensors of `device`; takes no memory yet.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self(Arc::new(Pool { device, state: Mutex::default() }))
    }

    /// Bytes of host memory taken so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// Begins to copy `tensor` to the host; its memory is held until [`HostCopy::release`].
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`] when the host has no more memory to lock.
    pub fn store(&self, tensor: Tensor) -> Result<HostCopy> {
        tensor.expect_alone("store")?;
        let bytes = tensor.span();
        let mut buffer = self.take(bytes)?;
        match &mut buffer {
            Buffer::Plain(buffer) => buffer[..bytes].copy_from_slice(tensor.host_bytes("store")?),
            Buffer::Pinned(pinned) => pinned.fetch_beside(&tensor)?,
        }
        let (dtype, shape, room) = (tensor.dtype(), tensor.shape(), tensor.room());
        Ok(HostCopy { pool: self.clone(), buffer: Some(buffer), bytes, dtype, shape, room, place: Place::Leaving(tensor) })
    }

    fn take(&self, bytes: usize) -> Result<Buffer> {
        let mut state = self.state();
        if let Some(buffer) = state.free.range_mut(bytes..).find_map(|(_, buffers)| buffers.pop()) {
            return Ok(buffer);
        }
        let len = size_class(bytes, CLASSES);
        let buffer = match self.0.device {
            Device::Cpu => Buffer::Plain(vec![0; len]),
            Device::Cuda(device) => Buffer::Pinned(Pinned::new(device, len)?),
        };
        state.bytes += len;
        Ok(buffer)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostCopy {
    /// Whether the content is `tensor`'s, whose memory it still holds.
    #[must_use]
    pub fn is_leaving(&self, tensor: &Tensor) -> bool {
        matches!(&self.place, Place::Leaving(leaving) if leaving.is_same_memory(tensor))
    }

    /// Whether the content is on the host alone.
    #[must_use]
    pub fn is_away(&self) -> bool {
        matches!(self.place, Place::Away)
    }

    /// Bytes of the content.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives the device's memory back once the content is on the host: what follows on the device waits for the copy.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn release(&mut self) -> Result<()> {
        if matches!(self.place, Place::Leaving(_)) {
            self.join()?;
            self.place = Place::Away;
        }
        Ok(())
    }

    /// Begins to copy the content back, into memory of `arena`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Cuda`].
    pub fn recall(&mut self, arena: &Arena) -> Result<()> {
        if !matches!(self.place, Place::Away) {
            return Ok(());
        }
        let mut tensor = Tensor::with_room(arena, self.dtype, self.shape, self.room)?;
        match &mut self.buffer {
            Some(Buffer::Plain(buffer)) => tensor.write_bytes(&buffer[..self.bytes])?,
            Some(Buffer::Pinned(pinned)) => pinned.send_beside(&mut tensor)?,
            None => {}
        }
        self.place = Place::Coming(tensor);
        Ok(())
    }

    /// The tensor on the device, copied back if need be.
    ///
    /// # Errors
    /// As [`HostCopy::recall`].
    pub fn get(&mut self, arena: &Arena) -> Result<Tensor> {
        self.recall(arena)?;
        if matches!(self.place, Place::Leaving(_) | Place::Coming(_)) {
            self.join()?;
        }
        self.place = match std::mem::replace(&mut self.place, Place::Away) {
            Place::Leaving(tensor) | Place::Coming(tensor) | Place::Back(tensor) => Place::Back(tensor),
            Place::Away => Place::Away,
        };
        match &self.place {
            Place::Back(tensor) => Ok(tensor.clone()),
            // `recall` has left no copy away.
            _ => Err(Error::Argument { op: "host copy", argument: "place", expected: "a tensor that was recalled", found: 0 }),
        }
    }

    /// Lets go of the tensor on the device; the content on the host is what it was.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn forget(&mut self) -> Result<()> {
        if matches!(self.place, Place::Leaving(_) | Place::Coming(_)) {
            self.join()?;
        }
        self.place = Place::Away;
        Ok(())
    }

    fn join(&self) -> Result<()> {
        match &self.buffer {
            Some(Buffer::Pinned(pinned)) => pinned.join(),
            _ => Ok(()),
        }
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        if matches!(self.place, Place::Leaving(_) | Place::Coming(_)) {
            // A device that fails here fails in the next call as well.
            let _ = self.join();
        }
        if let Some(buffer) = self.buffer.take() {
            self.pool.state().free.entry(buffer.len()).or_default().push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(arena: &Arena) -> Tensor {
        Tensor::from_slice(arena, &[1.0f32, 2.0, 3.0], [3]).unwrap()
    }

    #[test]
    fn what_went_away_comes_back_and_its_memory_is_free_meanwhile() {
        let (arena, pool) = (Arena::new(Device::Cpu), HostPool::new(Device::Cpu));
        let idle = arena.stats().live;
        let mut copy = pool.store(tensor(&arena)).unwrap();
        assert!(arena.stats().live > idle);
        copy.release().unwrap();
        assert_eq!(arena.stats().live, idle);
        copy.recall(&arena).unwrap();
        assert_eq!(copy.get(&arena).unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(copy.get(&arena).unwrap().shape(), [3].into());
        drop(copy);
        assert_eq!(arena.stats().live, idle);
    }

    #[test]
    fn a_copy_that_was_not_released_is_the_tensor_itself() {
        let (arena, pool) = (Arena::new(Device::Cpu), HostPool::new(Device::Cpu));
        let mut copy = pool.store(tensor(&arena)).unwrap();
        let live = arena.stats().live;
        assert_eq!(copy.get(&arena).unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(arena.stats().live, live);
    }

    #[test]
    fn tensors_of_changing_sizes_take_no_more_than_the_largest_set_and_what_came_before_it() {
        let (arena, pool) = (Arena::new(Device::Cpu), HostPool::new(Device::Cpu));
        let set =
            |n: usize| (0..3).map(|_| pool.store(Tensor::zeros(&arena, DType::F32, [n]).unwrap()).unwrap()).collect::<Vec<_>>();
        let largest = 3 * 4 * size_class(1000, CLASSES);
        drop(set(900));
        let mut copies = set(1000);
        assert!(pool.bytes() <= 2 * largest);
        copies[0].release().unwrap();
        assert_eq!(copies[0].get(&arena).unwrap().to_vec::<f32>().unwrap(), [0.0; 1000]);
        drop(copies);
        let taken = pool.bytes();
        for n in (1..=1000).rev().step_by(7) {
            drop(set(n));
        }
        assert_eq!(pool.bytes(), taken);
    }

    #[test]
    fn buffers_are_used_again() {
        let (arena, pool) = (Arena::new(Device::Cpu), HostPool::new(Device::Cpu));
        for _ in 0..3 {
            drop((pool.store(tensor(&arena)).unwrap(), pool.store(tensor(&arena)).unwrap()));
        }
        assert_eq!(pool.bytes(), 24);
    }
}
