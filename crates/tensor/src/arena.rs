//! The memory of a device: blocks are taken for tensors and given back when they drop.

use std::{
    collections::BTreeMap,
    panic::Location,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    Device, Error, Owner, OwnerStats, Result,
    ahead::{Ahead, Warm, WeakRequest},
    cuda::{DeviceHeap, Span},
    owner::Owners,
    shape::size_class,
};

/// One cache line: the unit blocks are made of, so that every tensor starts on 64 bytes.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// What an arena may hold beyond its peak before it gives kept blocks back: a quarter of the peak, and this.
const SLACK_BYTES: usize = 64 << 20;

/// Sizes an octave that blocks are rounded up to, so that steps of slightly different lengths use the same. The pages behind the
/// rounding are never touched.
const CLASSES: usize = 8;

/// A pool of memory on one device, with an account of it.
///
/// Blocks are kept when tensors drop and handed out again, so that a step that makes the same calls gets the same blocks and
/// the system is not asked again. Cloning gives another handle to the same pool.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    device: Device,
    limit: usize,
    pool: Mutex<Pool>,
    /// The memory of a GPU; a processor's is in the pool.
    heap: Option<DeviceHeap>,
    ahead: Mutex<Ahead>,
    warm: Mutex<Warm>,
}

#[derive(Debug, Default)]
struct Pool {
    free: BTreeMap<usize, Vec<Vec<Line>>>,
    stats: ArenaStats,
    owners: Owners,
}

/// An account of an arena, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaStats {
    /// Held by tensors now.
    pub live: usize,
    /// The most that tensors held at once.
    pub peak: usize,
    /// Kept for reuse.
    pub free: usize,
    /// How many times the system was asked for memory: on a GPU, for physical memory behind the arena's addresses.
    pub system_allocations: usize,
}

impl Arena {
    /// An arena without a limit.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self::with_limit(device, usize::MAX)
    }

    /// An arena whose live tensors take at most `limit` bytes.
    ///
    /// # Panics
    /// When the GPU's driver has no addresses to give: [`Arena::on`] returns it as an error.
    #[must_use]
    pub fn with_limit(device: Device, limit: usize) -> Self {
        // Only a device can fail, and its callers use `on`.
        Self::on(device, limit).expect("addresses for a device's memory")
    }

    /// An arena whose live tensors take at most `limit` bytes.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver has no addresses to give.
    pub fn on(device: Device, limit: usize) -> Result<Self> {
        let heap = match device {
            Device::Cpu => None,
            Device::Cuda(device) => Some(DeviceHeap::new(device)?),
        };
        Ok(Self(Arc::new(Inner { device, limit, pool: Mutex::default(), heap, ahead: Mutex::default(), warm: Mutex::default() })))
    }

    /// The device the memory is on.
    #[must_use]
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// The account so far.
    #[must_use]
    pub fn stats(&self) -> ArenaStats {
        let stats = self.pool().stats;
        let system_allocations = self.0.heap.as_ref().map_or(stats.system_allocations, DeviceHeap::requests);
        ArenaStats { system_allocations, ..stats }
    }

    /// Bytes that tensors can take beside those that live: within the limit and what the device has free. Nothing without
    /// either, on the CPU.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn room(&self) -> Result<Option<usize>> {
        let live = self.stats().live;
        let limit = (self.0.limit != usize::MAX).then(|| self.0.limit.saturating_sub(live));
        let (Device::Cuda(device), Some(heap)) = (self.0.device, &self.0.heap) else { return Ok(limit) };
        let free = heap.backed_with(device.free_memory()?).saturating_sub(live);
        Ok(Some(limit.map_or(free, |limit| limit.min(free))))
    }

    /// Starts the peak afresh from what is live now.
    pub fn reset_peak(&self) {
        let mut pool = self.pool();
        pool.stats.peak = pool.stats.live;
        pool.owners.reset_peak();
    }

    /// The account by owner: blocks belong to the innermost [`Arena::scope`] they were taken in, else to the op that took them.
    #[must_use]
    pub fn owners(&self) -> Vec<OwnerStats> {
        self.pool().owners.stats()
    }

    /// Who held how much of the device when this arena held the most, in bytes: its owners, and on a GPU the gaps between their
    /// blocks and what is held outside arenas. Together they are what the driver says is in use.
    #[must_use]
    pub fn at_peak(&self) -> Vec<(Owner, usize)> {
        let owners = self.owners().into_iter().filter(|stats| stats.at_peak > 0);
        let mut all: Vec<(Owner, usize)> = owners.map(|stats| (stats.owner, stats.at_peak)).collect();
        if let Device::Cuda(device) = self.0.device {
            all.extend(device.outside());
            let gaps = self.device_bytes().unwrap_or_default().saturating_sub(self.stats().peak);
            all.push((Owner::Gaps, gaps));
        }
        all
    }

    /// Makes `owner` the owner of all blocks that are taken while the scope lives.
    #[must_use = "it ends when it drops"]
    pub fn scope(&self, owner: Owner) -> OwnerScope {
        let before = self.pool().owners.enter(owner);
        OwnerScope { arena: self.clone(), before }
    }

    /// Gives the blocks kept for reuse back to the system.
    pub fn trim(&self) {
        self.pool().release();
    }

    /// Bytes that the driver has given to this arena; nothing on the CPU.
    #[must_use]
    pub fn device_bytes(&self) -> Option<usize> {
        self.0.heap.as_ref().map(DeviceHeap::backed)
    }

    pub(crate) fn device_heap(&self) -> Option<&DeviceHeap> {
        self.0.heap.as_ref()
    }

    pub(crate) fn ahead(&self) -> MutexGuard<'_, Ahead> {
        self.0.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn warm(&self) -> MutexGuard<'_, Warm> {
        self.0.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both are handles to one pool.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.0.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `bytes` of memory; its content is whatever was there (zero when fresh from the system).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the limit would be passed or the system has no more.
    pub(crate) fn take(&self, bytes: usize, place: &'static Location<'static>) -> Result<Block> {
        self.take_placed(bytes, place, |_, _, _| None)
    }

    /// The same on a GPU: where `find` says, if it does.
    ///
    /// # Errors
    /// As [`Arena::take`].
    pub(crate) fn take_placed(&self, bytes: usize, place: &'static Location<'static>, find: impl Find) -> Result<Block> {
        match self.take_once(bytes, place, &find) {
            // A weight that is widened for later waits for its turn.
            Err(_) if self.ahead().let_go() => self.take_once(bytes, place, &find),
            taken => taken,
        }
    }

    fn take_once(&self, bytes: usize, place: &'static Location<'static>, find: &impl Find) -> Result<Block> {
        let lines = size_class(bytes.div_ceil(64), CLASSES);
        let mut pool = self.pool();
        let out_of_memory =
            |live, limit| Err(Error::OutOfMemory { device: self.0.device.to_string(), requested: bytes, live, limit });
        let wanted = if self.0.heap.is_some() { bytes } else { lines.saturating_mul(64) };
        if pool.stats.live.saturating_add(wanted) > self.0.limit {
            return out_of_memory(pool.stats.live, self.0.limit);
        }
        let memory = match &self.0.heap {
            None => pool.take(lines).map(Memory::Host),
            Some(heap) => self.span(heap, bytes, find)?.map(|span| Memory::Device { span, address: heap.address(span) }),
        };
        let Some(memory) = memory else {
            return out_of_memory(pool.stats.live, pool.stats.live);
        };
        let owner = pool.count(memory.len(), place);
        drop(pool);
        Ok(Block { memory, owner, arena: self.clone(), holds: None })
    }

    /// A part of a device's memory, whatever it held.
    fn span(&self, heap: &DeviceHeap, bytes: usize, find: &impl Find) -> Result<Option<Span>> {
        let mut warm = self.warm();
        let span = match find(&mut warm, heap, bytes) {
            None => heap.take(bytes)?,
            found => found,
        };
        if let Some(span) = span {
            warm.taken(span, heap.free());
        }
        Ok(span)
    }
}

/// Takes memory for so many bytes, if it has a place for them.
pub(crate) trait Find: Fn(&mut Warm, &DeviceHeap, usize) -> Option<Span> {}
impl<F: Fn(&mut Warm, &DeviceHeap, usize) -> Option<Span>> Find for F {}

impl Pool {
    fn take(&mut self, lines: usize) -> Option<Vec<Line>> {
        if let Some(blocks) = self.free.get_mut(&lines)
            && let Some(block) = blocks.pop()
        {
            self.stats.free -= lines * 64;
            return Some(block);
        }
        // Blocks of other sizes would pile up when lengths change from step to step.
        let held = self.stats.live + self.stats.free + lines * 64;
        if held > self.stats.peak + self.stats.peak / 4 + SLACK_BYTES {
            self.release();
        }
        self.stats.system_allocations += 1;
        bytemuck::allocation::try_zeroed_vec(lines).ok()
    }

    /// Counts a block taken; gives the index of its owner.
    fn count(&mut self, bytes: usize, place: &'static Location<'static>) -> usize {
        self.stats.live += bytes;
        let rises = self.stats.live > self.stats.peak;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        self.owners.take(place, bytes, rises)
    }

    fn release(&mut self) {
        self.free.clear();
        self.stats.free = 0;
    }
}

/// While it lives, blocks of its arena are taken for one owner.
#[derive(Debug)]
pub struct OwnerScope {
    arena: Arena,
    before: Option<usize>,
}

impl Drop for OwnerScope {
    fn drop(&mut self) {
        self.arena.pool().owners.leave(self.before);
    }
}

/// Memory taken from an arena; dropping gives it back.
#[derive(Debug)]
pub(crate) struct Block {
    memory: Memory,
    /// Index in the arena's account.
    owner: usize,
    arena: Arena,
    /// What may be found in it when nobody holds it any more.
    holds: Option<WeakRequest>,
}

#[derive(Debug)]
enum Memory {
    Host(Vec<Line>),
    Device {
        span: Span,
        address: u64,
    },
    /// A share of another block's, which lives as long as one of its shares.
    Share(Arc<Block>),
}

impl Memory {
    /// Bytes.
    fn len(&self) -> usize {
        match self {
            Self::Host(lines) => lines.len() * 64,
            Self::Device { span, .. } => span.len,
            Self::Share(_) => 0,
        }
    }
}

impl Block {
    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// A block over the same memory of a device: whose elements are whose is up to those who share it.
    pub(crate) fn share(whole: &Arc<Self>) -> Self {
        Self { memory: Memory::Share(whole.clone()), owner: whole.owner, arena: whole.arena.clone(), holds: None }
    }

    /// Whoever asks for these weights finds them here when nobody holds it any more and until it is needed.
    pub(crate) fn remember(&mut self, holds: WeakRequest) {
        self.holds = Some(holds);
    }

    /// Whether both are shares of one block.
    pub(crate) fn shares_with(&self, other: &Self) -> bool {
        matches!((&self.memory, &other.memory), (Memory::Share(a), Memory::Share(b)) if Arc::ptr_eq(a, b))
    }

    /// The bytes, on the CPU.
    pub(crate) fn bytes(&self, op: &'static str) -> Result<&[u8]> {
        match &self.memory {
            Memory::Host(lines) => Ok(bytemuck::cast_slice(lines)),
            Memory::Device { .. } | Memory::Share(_) => Err(self.not_on_host(op)),
        }
    }

    /// The bytes for writing, on the CPU.
    pub(crate) fn bytes_mut(&mut self, op: &'static str) -> Result<&mut [u8]> {
        if !matches!(self.memory, Memory::Host(_)) {
            return Err(self.not_on_host(op));
        }
        match &mut self.memory {
            Memory::Host(lines) => Ok(bytemuck::cast_slice_mut(lines)),
            Memory::Device { .. } | Memory::Share(_) => Ok(&mut []),
        }
    }

    /// The address on the device; nothing on the CPU.
    pub(crate) fn address(&self) -> Option<u64> {
        match &self.memory {
            Memory::Host(_) => None,
            Memory::Device { address, .. } => Some(*address),
            Memory::Share(whole) => whole.address(),
        }
    }

    fn not_on_host(&self, op: &'static str) -> Error {
        Error::NotOnHost { op, device: self.arena.device().to_string() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.memory, Memory::Host(Vec::new()));
        // The last share drops the whole, which locks the pool itself.
        if matches!(memory, Memory::Share(_)) {
            return;
        }
        let mut pool = self.arena.pool();
        pool.stats.live -= memory.len();
        pool.owners.give(self.owner, memory.len());
        match memory {
            Memory::Host(lines) => {
                pool.stats.free += lines.len() * 64;
                pool.free.entry(lines.len()).or_default().push(lines);
            }
            Memory::Share(_) => {}
            Memory::Device { span, .. } => {
                drop(pool);
                // Nobody may take it in between.
                let mut warm = self.arena.warm();
                if let Some(heap) = &self.arena.0.heap {
                    heap.give(span);
                }
                if let Some(holds) = self.holds.take() {
                    warm.put(holds, span);
                }
            }
        }
    }
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Line")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_step_asks_the_system_for_nothing() {
        let arena = Arena::new(Device::Cpu);
        let step = || {
            let a = arena.take(1000, Location::caller()).unwrap();
            let b = arena.take(50_000, Location::caller()).unwrap();
            drop(a);
            let c = arena.take(960, Location::caller()).unwrap();
            (b.bytes("test").unwrap().len(), c.bytes("test").unwrap().len())
        };
        step();
        let before = arena.stats();
        step();
        assert_eq!(arena.stats(), before);
        assert_eq!(before.live, 0);
    }

    /// An arena of a GPU that is not there.
    fn dry() -> Arena {
        let capability = crate::cuda::ComputeCapability::new(9, 0);
        let name = "a GPU of the arena's tests".to_owned();
        let info = crate::cuda::DeviceInfo { ordinal: 0, name, capability, memory: 1 << 30, multiprocessors: 1, driver: 12_090 };
        Arena::on(Device::Cuda(crate::cuda::CudaDevice::dry(&info)), usize::MAX).unwrap()
    }

    #[test]
    fn tensors_side_by_side_are_written_alone_and_free_their_memory_together() {
        let arena = dry();
        let shapes = [[4, 24].into(), [4, 8].into()];
        let [mut a, mut b] = crate::Tensor::side_by_side(&arena, crate::DType::Bf16, shapes, 8).unwrap();
        assert!(b.continues(&a) && !a.continues(&b));
        assert_eq!((arena.stats().live, a.room(), b.room()), (512, 0, 8));
        let (a_at, b_at) = (a.rows_address_mut().unwrap(), b.rows_address_mut().unwrap());
        assert_eq!((a_at.1, b_at), (40, (a_at.0 + 48, 40)));
        assert_eq!(a.rows(2, 2).unwrap().rows_address().unwrap(), (a_at.0 + 160, 40));
        // Another handle to the same rows shares them, another's rows are no one's business.
        let again = a.clone();
        assert!(a.rows_address_mut().is_err() && b.rows_address_mut().is_ok());
        assert!(again.is_same_memory(&a) && a.reshape([8, 12]).is_err() && a.view(0, [2]).is_err() && a.address().is_err());
        assert!(a.reshape([4, 3, 8]).unwrap().expect_alone("store").is_err());
        drop((a, again));
        assert_eq!(arena.stats().live, 512);
        drop(b);
        assert_eq!(arena.stats().live, 0);
    }

    #[test]
    fn a_gpu_is_asked_for_memory_once_a_granule_and_not_for_what_came_back() {
        let arena = dry();
        let asked = |bytes: usize| {
            drop(arena.take(bytes, Location::caller()).unwrap());
            arena.stats().system_allocations
        };
        assert_eq!([asked(1000), asked(1 << 20), asked(40 << 20), asked(39 << 20)], [1, 1, 2, 2]);
    }

    #[test]
    fn changing_lengths_never_hold_much_more_than_the_peak() {
        let arena = Arena::new(Device::Cpu);
        for size in 1..2000 {
            drop(arena.take(size * 100_000, Location::caller()).unwrap());
            let stats = arena.stats();
            assert!(stats.live + stats.free <= stats.peak + stats.peak / 4 + SLACK_BYTES, "{stats:?}");
        }
    }

    #[test]
    fn the_limit_is_an_error_with_the_facts() {
        let arena = Arena::with_limit(Device::Cpu, 1024);
        let _held = arena.take(512, Location::caller()).unwrap();
        let error = arena.take(1024, Location::caller()).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { requested: 1024, live: 512, limit: 1024, .. }), "{error}");
    }
}
