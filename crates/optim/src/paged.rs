//! States in pages: on a GPU in pinned host memory, on the CPU in a file, as far as they do not fit into what they may take of
//! the device.
//!
//! A page is the states of a slice of the flat buffer, one after the other. While one slice is updated the page of the next one
//! comes and that of the one before goes. The updates are those of the whole buffer, slice by slice: bit for bit the same.

use std::{ops::Range, path::PathBuf};

use nibble_tensor::{
    Arena, DType, Device, Tensor, TensorMut,
    cuda::{Pager, Pinned},
};

use crate::{
    Error, OptimizerConfig, Result,
    layout::Layout,
    page_file::PageFile,
    plan::{Now, Plan, Spec},
};

/// Where states may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// Bytes of the device that states may take; nothing: half of what is free. At least two pages, which is what visits the
    /// device at once.
    pub device_memory: Option<usize>,
    /// On the CPU, a file that holds what does not fit; without one all states stay in memory.
    pub file: Option<PathBuf>,
    /// On a GPU, whether the f32 values live in the pages too: on the device stay copies of 16 bits.
    pub masters: bool,
    /// Bytes of a page; nothing: 8 MiB.
    pub page: Option<usize>,
}

impl Paging {
    /// Whether pages can be so on such a device, whatever the sizes: for those who want to know before there is anything to page.
    ///
    /// # Errors
    /// [`Error::MastersOnCpu`], [`Error::PageFileOnGpu`], [`Error::NoPageFile`].
    pub fn check(&self, device: Device) -> Result<()> {
        match (device, self) {
            (Device::Cpu, Self { masters: true, .. }) => Err(Error::MastersOnCpu),
            (Device::Cpu, Self { device_memory: Some(_), file: None, .. }) => Err(Error::NoPageFile),
            (Device::Cuda(_), Self { file: Some(_), .. }) => Err(Error::PageFileOnGpu),
            _ => Ok(()),
        }
    }
}

const PAGE: usize = 8 << 20;
/// Pages that visit a GPU at once, if they may: one comes, one is worked on, one goes.
const VISITORS: usize = 3;
/// At least: one is worked on while the other goes and comes.
const FEWEST: usize = 2;

/// The states of an optimizer in pages.
#[derive(Debug)]
pub(crate) struct Paged {
    visits: Visits,
    pages: Vec<Page>,
    masters: bool,
}

/// How pages that are not on the device come there.
#[derive(Debug)]
enum Visits {
    /// To these places of it.
    Pinned { pager: Pager, slots: Vec<Tensor> },
    /// To these two buffers.
    File { file: PageFile, buffers: [Tensor; 2] },
    /// There are none.
    None,
}

/// The states of a slice.
#[derive(Debug)]
struct Page {
    slice: Slice,
    home: Home,
}

/// A slice of the flat buffer.
#[derive(Debug)]
struct Slice {
    /// First element.
    start: usize,
    plan: Plan,
    /// What lies in its page: the values, if they do, then the states.
    specs: Vec<Spec>,
    /// Of its page.
    bytes: usize,
}

/// Where a page is between updates.
#[derive(Debug)]
enum Home {
    Device(Tensor),
    Pinned(Pinned),
    /// At this byte.
    File(u64),
}

impl Spec {
    /// Bytes in a page.
    fn padded(&self) -> usize {
        self.bytes().next_multiple_of(TensorMut::ALIGN)
    }
}

impl Slice {
    /// Where a tensor of this name lies in the page.
    fn place(&self, wanted: &Spec) -> Range<usize> {
        let before = self.specs.iter().take_while(|spec| spec.name != wanted.name);
        let start = before.map(Spec::padded).sum();
        let bytes = self.specs.iter().find(|spec| spec.name == wanted.name).map_or(0, Spec::bytes);
        start..start + bytes
    }

    fn carve<'a>(&self, bytes: TensorMut<'a>) -> Result<Vec<TensorMut<'a>>> {
        Ok(bytes.carve(self.specs.iter().map(|spec| (spec.dtype, spec.len)))?)
    }
}

impl Paged {
    /// Pages for `layout`; nothing when all states may stay on the device.
    pub(crate) fn new(arena: &Arena, layout: &Layout, config: &OptimizerConfig, paging: &Paging) -> Result<Option<Self>> {
        paging.check(arena.device())?;
        let on_gpu = arena.device() != Device::Cpu;
        let specs = |layout: &Layout| {
            let values = paging.masters.then(|| Spec::new("values", DType::F32, layout.numel()));
            values.into_iter().chain(config.specs(layout)).collect::<Vec<_>>()
        };
        let total = specs(layout).iter().map(Spec::bytes).sum();
        let budget = match (paging.device_memory, &paging.file, on_gpu) {
            (_, None, false) => return Ok(None),
            (Some(bytes), ..) => bytes,
            (None, _, false) => 0,
            (None, _, true) => arena.room()?.map_or(usize::MAX, |room| room / 2),
        };
        if config.is_factored() || (total <= budget && paging.file.is_none()) {
            return Ok(None);
        }
        let layouts = layout.cut(page_elements(layout, total, paging.page.unwrap_or(PAGE)));
        let sizes: Vec<usize> = layouts.iter().map(|layout| specs(layout).iter().map(Spec::padded).sum()).collect();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let visiting = if on_gpu { visitors(budget, largest)? } else { FEWEST };
        let mut left = budget.saturating_sub(visiting * largest);
        let file = match &paging.file {
            Some(path) => Some(PageFile::new(path, sizes.iter().map(|&bytes| bytes as u64).sum())?),
            None => None,
        };
        let (mut pages, mut start, mut at) = (Vec::new(), 0, 0);
        for (layout, bytes) in layouts.iter().zip(sizes) {
            let home = match arena.device() {
                _ if bytes <= left => {
                    left -= bytes;
                    Home::Device(Tensor::zeros(arena, DType::U8, [bytes])?)
                }
                Device::Cuda(device) => Home::Pinned(Pinned::new(device, bytes)?),
                _ => Home::File(at),
            };
            let (plan, specs) = (Plan::new(arena, layout, config)?, specs(layout));
            pages.push(Page { slice: Slice { start, plan, specs, bytes }, home });
            start += layout.numel();
            at += bytes as u64;
        }
        let buffer = || Ok::<_, Error>(Tensor::zeros(arena, DType::U8, [largest])?);
        let visits = match (arena.device(), file) {
            (Device::Cuda(device), _) => {
                let slots = (0..visiting).map(|_| buffer()).collect::<Result<Vec<_>>>()?;
                Visits::Pinned { pager: Pager::new(device, visiting)?, slots }
            }
            (_, Some(file)) => Visits::File { file, buffers: [buffer()?, buffer()?] },
            _ => Visits::None,
        };
        Ok(Some(Self { visits, pages, masters: paging.masters }))
    }

    /// One update of the whole buffer.
    pub(crate) fn update(&mut self, config: &OptimizerConfig, now: Now<'_>, params: &mut Tensor, grads: &Tensor) -> Result<()> {
        let parts: Vec<_> = self.pages.iter().map(|page| (page.slice.start, [page.slice.plan.numel()].into())).collect();
        let mut slices = Vec::with_capacity(parts.len());
        for ((start, shape), params) in parts.iter().zip(params.views_mut(&parts)?) {
            slices.push((Some(params), grads.view(*start, *shape)?));
        }
        let work = Work { config, now, slices, masters: self.masters };
        match &mut self.visits {
            Visits::Pinned { pager, slots } => work.beside_copies(&mut self.pages, pager, slots),
            Visits::File { file, buffers } => work.beside_file(&mut self.pages, file, buffers),
            Visits::None => work.at_home(&mut self.pages),
        }
    }

    /// Whether the values are in the pages.
    pub(crate) fn has_masters(&self) -> bool {
        self.masters
    }

    /// What the pages hold under these names as tensors of the host.
    pub(crate) fn gather(&self, specs: &[Spec]) -> Result<Vec<(&'static str, Tensor)>> {
        let mut states: Vec<Vec<u8>> = specs.iter().map(|spec| Vec::with_capacity(spec.bytes())).collect();
        for page in &self.pages {
            let bytes = self.read(page)?;
            for (state, wanted) in states.iter_mut().zip(specs) {
                state.extend_from_slice(&bytes[page.slice.place(wanted)]);
            }
        }
        let host = Arena::new(Device::Cpu);
        let tensor = |(spec, bytes): (&Spec, Vec<u8>)| {
            if spec.dtype == DType::U8 {
                return Ok((spec.name, Tensor::from_slice(&host, &bytes, [spec.len])?));
            }
            let floats: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)).collect();
            Ok((spec.name, Tensor::from_slice(&host, &floats, [spec.len])?))
        };
        specs.iter().zip(states).map(tensor).collect()
    }

    /// Takes over what `specs` name, which is as long.
    pub(crate) fn scatter(&mut self, specs: &[Spec], states: &[&Tensor]) -> Result<()> {
        let bytes = |state: &&Tensor| match state.dtype() {
            DType::U8 => state.to_vec::<u8>(),
            _ => Ok(state.to_vec::<f32>()?.into_iter().flat_map(f32::to_ne_bytes).collect()),
        };
        let states = states.iter().map(bytes).collect::<Result<Vec<_>, _>>()?;
        let mut done = vec![0; states.len()];
        for i in 0..self.pages.len() {
            let mut page = self.read(&self.pages[i])?;
            for ((state, done), spec) in states.iter().zip(&mut done).zip(specs) {
                let place = self.pages[i].slice.place(spec);
                let next = *done + place.len();
                page[place].copy_from_slice(&state[*done..next]);
                *done = next;
            }
            self.write(i, &page)?;
        }
        Ok(())
    }

    /// Takes the values over, page by page.
    pub(crate) fn set_masters(&mut self, values: &Tensor) -> Result<()> {
        if matches!(values.device(), Device::Cuda(device) if device.is_dry()) {
            return Ok(());
        }
        for i in 0..self.pages.len() {
            let slice = &self.pages[i].slice;
            let part = values.view(slice.start, [slice.plan.numel()])?.to_vec::<f32>()?;
            let mut page = self.read(&self.pages[i])?;
            for (to, value) in page[..4 * part.len()].as_chunks_mut::<4>().0.iter_mut().zip(part) {
                *to = value.to_ne_bytes();
            }
            self.write(i, &page)?;
        }
        Ok(())
    }

    fn read(&self, page: &Page) -> Result<Vec<u8>> {
        Ok(match (&page.home, &self.visits) {
            (Home::Device(tensor), _) => tensor.to_vec::<u8>()?,
            (Home::Pinned(pinned), _) => {
                self.wait()?;
                let mut bytes = pinned.bytes().to_vec();
                // A device that only counts has none.
                bytes.resize(page.slice.bytes, 0);
                bytes
            }
            (Home::File(at), Visits::File { file, .. }) => {
                let mut bytes = vec![0; page.slice.bytes];
                file.read(*at, &mut bytes)?;
                bytes
            }
            (Home::File(_), _) => Vec::new(),
        })
    }

    fn write(&mut self, page: usize, bytes: &[u8]) -> Result<()> {
        self.wait()?;
        match (&mut self.pages[page].home, &self.visits) {
            (Home::Device(tensor), _) => Ok(tensor.write(bytes)?),
            (Home::Pinned(pinned), _) => {
                let own = pinned.bytes_mut();
                own.copy_from_slice(&bytes[..own.len()]);
                Ok(())
            }
            (Home::File(at), Visits::File { file, .. }) => file.write(*at, bytes),
            (Home::File(_), _) => Ok(()),
        }
    }

    /// Until the device is done with the pages.
    fn wait(&self) -> Result<()> {
        match self.device() {
            Device::Cuda(device) => Ok(device.synchronize()?),
            _ => Ok(()),
        }
    }

    fn device(&self) -> Device {
        match &self.visits {
            Visits::Pinned { slots, .. } => slots.first().map_or(Device::Cpu, Tensor::device),
            _ => Device::Cpu,
        }
    }

    /// Bytes of pinned host memory.
    pub(crate) fn host_bytes(&self) -> usize {
        let pinned = self.pages.iter().filter(|page| matches!(page.home, Home::Pinned(_)));
        pinned.map(|page| page.slice.bytes).sum()
    }

    /// Pages, and how many of them are on the device.
    pub(crate) fn count(&self) -> (usize, usize) {
        (self.pages.len(), self.pages.iter().filter(|page| matches!(page.home, Home::Device(_))).count())
    }
}

/// Elements whose states take about `page` bytes.
fn page_elements(layout: &Layout, total: usize, page: usize) -> usize {
    let elements = page as f64 / (total.max(1) as f64 / layout.numel().max(1) as f64);
    (elements as usize / 256 * 256).max(256)
}

fn visitors(budget: usize, largest: usize) -> Result<usize> {
    match budget / largest.max(1) {
        pages if pages > VISITORS => Ok(VISITORS),
        pages if pages >= FEWEST => Ok(FEWEST),
        _ => Err(Error::DeviceMemory { expected: FEWEST * largest, found: budget }),
    }
}

/// An update under way: the slices of the pages that are still to come.
struct Work<'a> {
    config: &'a OptimizerConfig,
    now: Now<'a>,
    slices: Vec<(Option<TensorMut<'a>>, Tensor)>,
    masters: bool,
}

impl Work<'_> {
    /// Updates the slice of page `i`, whose states are in `bytes`.
    fn update(&mut self, i: usize, slice: &Slice, bytes: &mut Tensor) -> Result<()> {
        let (params, grads) = &mut self.slices[i];
        let Some(params) = params.take() else { return Ok(()) };
        let mut states = slice.carve(bytes.view_mut()?)?;
        if !self.masters {
            return self.config.update(&slice.plan, self.now, params, grads, states);
        }
        let mut values = states.remove(0);
        self.config.update(&slice.plan, self.now, values.reborrow(), grads, states)?;
        Ok(values.convert_into(params)?)
    }

    /// The pages that are on the device.
    fn at_home(mut self, pages: &mut [Page]) -> Result<()> {
        self.resident(pages)
    }

    fn resident(&mut self, pages: &mut [Page]) -> Result<()> {
        for (i, page) in pages.iter_mut().enumerate() {
            if let Home::Device(bytes) = &mut page.home {
                self.update(i, &page.slice, bytes)?;
            }
        }
        Ok(())
    }

    fn beside_copies(mut self, pages: &mut [Page], pager: &mut Pager, slots: &mut [Tensor]) -> Result<()> {
        let visiting: Vec<usize> = (0..pages.len()).filter(|&i| matches!(pages[i].home, Home::Pinned(_))).collect();
        if visiting.is_empty() {
            return self.resident(pages);
        }
        pager.begin()?;
        for (slot, &i) in visiting.iter().take(slots.len()).enumerate() {
            load(pager, slot, &pages[i], &mut slots[slot])?;
        }
        // What is there is updated while the first pages come.
        self.resident(pages)?;
        for (turn, &i) in visiting.iter().enumerate() {
            let slot = turn % slots.len();
            pager.arrive(slot)?;
            self.update(i, &pages[i].slice, &mut slots[slot])?;
            if let Home::Pinned(page) = &mut pages[i].home {
                pager.unload(slot, page, &slots[slot])?;
            }
            if let Some(&next) = visiting.get(turn + slots.len()) {
                load(pager, slot, &pages[next], &mut slots[slot])?;
            }
        }
        Ok(pager.end()?)
    }

    fn beside_file(mut self, pages: &mut [Page], file: &PageFile, buffers: &mut [Tensor; 2]) -> Result<()> {
        self.resident(pages)?;
        let visiting: Vec<(usize, u64)> =
            pages.iter().enumerate().filter_map(|(i, page)| page.offset().map(|at| (i, at))).collect();
        let [current, other] = buffers;
        let (mut current, mut other) = (current, other);
        let mut before = None;
        if let Some(&(i, at)) = visiting.first() {
            file.read(at, &mut current.as_mut_slice::<u8>()?[..pages[i].slice.bytes])?;
        }
        for (turn, &(i, at)) in visiting.iter().enumerate() {
            let next = visiting.get(turn + 1).map(|&(next, at)| (at, pages[next].slice.bytes));
            let free = other.as_mut_slice::<u8>()?;
            // The page before goes and the next one comes meanwhile, through the same buffer.
            let (moved, updated) = std::thread::scope(|scope| {
                let moving = scope.spawn(move || -> Result<()> {
                    if let Some((at, bytes)) = before {
                        file.write(at, &free[..bytes])?;
                    }
                    next.map_or(Ok(()), |(at, bytes)| file.read(at, &mut free[..bytes]))
                });
                let updated = self.update(i, &pages[i].slice, current);
                (moving.join(), updated)
            });
            updated?;
            moved.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            before = Some((at, pages[i].slice.bytes));
            (current, other) = (other, current);
        }
        match before {
            Some((at, bytes)) => file.write(at, &other.as_slice::<u8>()?[..bytes]),
            None => Ok(()),
        }
    }
}

impl Page {
    fn offset(&self) -> Option<u64> {
        if let Home::File(at) = self.home { Some(at) } else { None }
    }
}

fn load(pager: &mut Pager, slot: usize, page: &Page, place: &mut Tensor) -> Result<()> {
    if let Home::Pinned(pinned) = &page.home {
        pager.load(slot, pinned, place)?;
    }
    Ok(())
}
