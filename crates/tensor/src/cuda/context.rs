//! A device opened for work.

use std::{
    cell::Cell,
    collections::HashMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::driver::sys;
use nibble_kernels::ComputeCapability;

use super::{
    charges::Charges,
    copy::{Copies, new_event},
    driver::{attribute, check, describe},
    dry::{Dry, nothing_runs},
    launch::Function,
    libraries::Libraries,
    matmul::Blas,
    order::{Order, Queue},
    profile::Timed,
};
use crate::{Error, Owner, Result};

/// The oldest driver that runs the embedded images: CUDA 12.0 (525).
const OLDEST_DRIVER: i32 = 12_000;

/// What opening a device needs to know.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Where the libraries are.
    pub libraries: Libraries,
    /// Folder for kernels compiled at run time; nothing is kept without one.
    pub cache: Option<PathBuf>,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number: 0 is the first that `CUDA_VISIBLE_DEVICES` leaves visible.
    pub ordinal: usize,
    /// The maker's name, such as `NVIDIA H200`.
    pub name: String,
    /// Compute capability.
    pub capability: ComputeCapability,
    /// Bytes of memory.
    pub memory: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// CUDA version of the driver, as 1000 x major + 10 x minor.
    pub driver: i32,
}

/// A GPU opened for work: a copyable handle to what lives as long as the process.
#[derive(Clone, Copy)]
pub struct CudaDevice(&'static Gpu);

pub(super) struct Gpu {
    pub(super) info: DeviceInfo,
    options: OpenOptions,
    context: sys::CUcontext,
    pub(super) queue: Queue,
    /// Copies between host and device that run beside the kernels.
    pub(super) copies: Copies,
    pub(super) functions: Mutex<HashMap<String, Function>>,
    pub(super) modules: Mutex<HashMap<&'static str, Module>>,
    pub(super) blas: Mutex<Option<Blas>>,
    pub(super) capturing: std::sync::atomic::AtomicBool,
    /// The root of this step's dropout masks, and where the device reads it.
    dropout: Mutex<Option<(u64, u64)>>,
    /// Code tables, by format.
    tables: Mutex<HashMap<&'static str, u64>>,
    /// Counters: address and bytes, by use.
    zeros: Mutex<HashMap<&'static str, (u64, usize)>>,
    /// Kernels timed so far, while a profile is made.
    pub(super) profile: Mutex<Option<Vec<Timed>>>,
    /// Memory taken outside arenas.
    pub(super) charges: Charges,
    /// Bytes in a second over the host link, once timed.
    pub(super) link: OnceLock<f64>,
    /// Clusters of eight blocks of a product that run at once, once asked.
    pub(super) eights: OnceLock<usize>,
    /// Of a device that only counts.
    pub(super) dry: Option<Dry>,
}

/// A loaded module of kernels.
#[derive(Clone, Copy)]
pub(super) struct Module(pub(super) sys::CUmodule);

// SAFETY: the driver's handles may be used from any thread that has the context bound, which every call here does first.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind mutexes.
unsafe impl Sync for Gpu {}

static OPENED: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());

thread_local! {
    /// The context bound to this thread.
    static BOUND: Cell<sys::CUcontext> = const { Cell::new(std::ptr::null_mut()) };
}

impl CudaDevice {
    /// How many devices there are: 0 without a driver.
    #[must_use]
    pub fn count() -> usize {
        match initialize() {
            Ok(()) => cudarc::driver::result::device::get_count().map_or(0, |count| count as usize),
            Err(_) => 0,
        }
    }

    /// Opens device `ordinal`; a second call gives the same device, with the options of the first.
    ///
    /// # Errors
    /// [`Error::NoDevice`] with what is missing: a driver, a device of that number, a new enough driver or architecture.
    pub fn open(ordinal: usize, options: &OpenOptions) -> Result<Self> {
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = opened.iter().find(|gpu| gpu.info.ordinal == ordinal) {
            return Ok(Self(gpu));
        }
        let device = Self(Box::leak(Box::new(Gpu::open(ordinal, options.clone())?)));
        device.0.charges.add(Owner::Context, device.used_memory()? as isize);
        opened.push(device.0);
        Ok(device)
    }

    /// What it is, without opening it for work.
    ///
    /// # Errors
    /// As [`CudaDevice::open`].
    pub fn describe(ordinal: usize) -> Result<DeviceInfo> {
        initialize()?;
        Ok(info(ordinal)?.1)
    }

    /// What it is.
    #[must_use]
    pub fn info(self) -> &'static DeviceInfo {
        &self.0.info
    }

    /// Bytes of its memory that nobody uses.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn free_memory(self) -> Result<usize> {
        Ok(self.memory()?.0)
    }

    /// Bytes that nobody uses, and bytes in all.
    pub(super) fn memory(self) -> Result<(usize, usize)> {
        if let Some(dry) = &self.0.dry {
            return Ok((self.0.info.memory - dry.used(), self.0.info.memory));
        }
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both outlive the call; the context is bound.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }

    /// Waits until all work handed to it is done.
    ///
    /// # Errors
    /// [`Error::Cuda`] when a kernel failed.
    pub fn synchronize(self) -> Result<()> {
        if self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the stream lives as long as the process.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream()) })
    }

    /// The kernels' stream, for all but kernels that may overlap.
    pub(super) fn stream(self) -> sys::CUstream {
        self.0.queue.enter(Order::Strict, None).stream
    }

    pub(super) fn gpu(self) -> &'static Gpu {
        self.0
    }

    /// Makes its context that of this thread.
    pub(super) fn bind(self) -> Result<()> {
        if self.is_dry() {
            return Err(nothing_runs());
        }
        if BOUND.get() != self.0.context {
            // SAFETY: the context was retained in `open` and is never released.
            check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.0.context) })?;
            BOUND.set(self.0.context);
        }
        Ok(())
    }

    /// Copies host bytes to `address`, in the order of the stream; `source` may change when it returns.
    pub(crate) fn upload(self, address: u64, source: &[u8]) -> Result<()> {
        self.expect_not_capturing("a copy from the host")?;
        if source.is_empty() || self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's tensor owns `source.len()` bytes at `address`; pageable memory has been read when the call returns.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(address, source.as_ptr().cast(), source.len(), self.stream())
        })
    }

    /// Copies bytes at `address` to the host, and waits for them; a dry device leaves what is there.
    pub(crate) fn download(self, target: &mut [u8], address: u64) -> Result<()> {
        self.expect_not_capturing("a copy to the host")?;
        if self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        if !target.is_empty() {
            // SAFETY: the caller's tensor owns as many bytes at `address`; `target` is not touched before the wait below.
            check("cuMemcpyDtoHAsync", unsafe {
                sys::cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), address, target.len(), self.stream())
            })?;
        }
        self.synchronize()
    }

    /// Copies `bytes` within the device.
    pub(crate) fn copy(self, target: u64, source: u64, bytes: usize) -> Result<()> {
        if bytes == 0 || self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both ranges belong to tensors of the caller.
        check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, bytes, self.stream()) })
    }

    /// Sets `bytes` to `value`.
    pub(crate) fn fill(self, target: u64, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 || self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the range belongs to a tensor of the caller.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(target, value, bytes, self.stream()) })
    }

    /// Where kernels read the root of the step's dropout masks; sets it to `root` if it is another.
    ///
    /// # Errors
    /// [`Error::Cuda`], also when it would change inside a captured step: set it before.
    pub(crate) fn dropout_root(self, root: u64) -> Result<u64> {
        let mut slot = self.0.dropout.lock().unwrap_or_else(PoisonError::into_inner);
        let address = match *slot {
            Some((held, address)) if held == root => return Ok(address),
            Some((_, address)) => address,
            None => self.allocate(8)?,
        };
        self.upload(address, &root.to_le_bytes())?;
        *slot = Some((root, address));
        Ok(address)
    }

    /// The address of a table that never changes.
    pub(crate) fn table(self, name: &'static str, values: &[f32]) -> Result<u64> {
        self.words(name, || bytemuck::cast_slice(values).to_vec())
    }

    /// The address of words that never change, made when they are first asked for.
    pub(crate) fn words(self, name: &'static str, make: impl FnOnce() -> Vec<u32>) -> Result<u64> {
        let mut tables = self.0.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(address) = tables.get(name) {
            return Ok(*address);
        }
        let words = make();
        let address = self.allocate(size_of_val(&words[..]))?;
        self.upload(address, bytemuck::cast_slice(&words))?;
        tables.insert(name, address);
        Ok(address)
    }

    /// The address of the number `n` on the device: one of a table of the first ones.
    pub(crate) fn number(self, n: usize) -> Result<u64> {
        const NUMBERS: usize = 1 << 18;
        if n >= NUMBERS {
            return Err(Error::Argument { op: "cached attention", argument: "len", expected: "below 262144 on a GPU", found: n });
        }
        let numbers: Vec<f32> =
            if self.has_table("numbers") { Vec::new() } else { (0..NUMBERS as u32).map(f32::from_bits).collect() };
        Ok(self.table("numbers", &numbers)? + 4 * n as u64)
    }

    fn has_table(self, name: &'static str) -> bool {
        self.0.tables.lock().unwrap_or_else(PoisonError::into_inner).contains_key(name)
    }

    /// The address of at least `bytes` of memory that kernels find zero and leave zero.
    pub(crate) fn zeros(self, name: &'static str, bytes: usize) -> Result<u64> {
        let mut zeros = self.0.zeros.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(address, held)) = zeros.get(name)
            && held >= bytes
        {
            return Ok(address);
        }
        self.expect_not_capturing("more memory for a kernel's counters")?;
        // What was there stays: captured steps know its address.
        let bytes = bytes.next_power_of_two();
        let address = self.allocate(bytes)?;
        self.fill(address, 0, bytes)?;
        zeros.insert(name, (address, bytes));
        Ok(address)
    }

    /// Memory for as long as the process lives, for kernels.
    fn allocate(self, bytes: usize) -> Result<u64> {
        if let Some(dry) = &self.0.dry {
            return Ok(dry.addresses(bytes));
        }
        self.bind()?;
        let mut address = 0;
        self.charge(Owner::Kernels, || {
            // SAFETY: a context is bound; `address` outlives the call.
            check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) })
        })?;
        Ok(address)
    }

    pub(super) fn options(self) -> &'static OpenOptions {
        &self.0.options
    }

    pub(super) fn is_capturing(self) -> bool {
        self.0.capturing.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn expect_not_capturing(self, what: &str) -> Result<()> {
        if self.is_capturing() {
            return Err(Error::Cuda { call: "capture", reason: format!("{what} inside a captured step") });
        }
        Ok(())
    }
}

impl From<&'static Gpu> for CudaDevice {
    fn from(gpu: &'static Gpu) -> Self {
        Self(gpu)
    }
}

impl PartialEq for CudaDevice {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for CudaDevice {}

impl std::hash::Hash for CudaDevice {
    fn hash<S: std::hash::Hasher>(&self, state: &mut S) {
        self.0.info.ordinal.hash(state);
    }
}

impl std::fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{}", self.0.info.ordinal)
    }
}

impl Gpu {
    fn open(ordinal: usize, options: OpenOptions) -> Result<Self> {
        initialize()?;
        let (device, info) = info(ordinal)?;
        if info.driver < OLDEST_DRIVER {
            return Err(Error::NoDevice {
                reason: format!(
                    "the driver supports CUDA {}.{}, and 12.0 (driver 525) or newer is needed",
                    info.driver / 1000,
                    info.driver % 1000 / 10
                ),
            });
        }
        if (info.capability.major, info.capability.minor) < (7, 5) {
            return Err(Error::NoDevice {
                reason: format!("{} has compute capability {}, and 7.5 (Turing) or newer is needed", info.name, info.capability),
            });
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: `device` came from the driver; the context is retained for the life of the process.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) })?;
        // SAFETY: the context was made in the line above.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(context) })?;
        BOUND.set(context);
        let streams = (new_stream()?, Copies { stream: new_stream()?, fork: new_event()? });
        Ok(Self::new(info, options, context, streams, None))
    }

    /// One that only counts.
    pub(super) fn dry(info: DeviceInfo, dry: Dry) -> Self {
        let nothing = (std::ptr::null_mut(), Copies { stream: std::ptr::null_mut(), fork: std::ptr::null_mut() });
        Self::new(info, OpenOptions::default(), std::ptr::null_mut(), nothing, Some(dry))
    }

    fn new(
        info: DeviceInfo,
        options: OpenOptions,
        context: sys::CUcontext,
        (stream, copies): (sys::CUstream, Copies),
        dry: Option<Dry>,
    ) -> Self {
        Self {
            info,
            options,
            context,
            queue: Queue::new(stream),
            copies,
            functions: Mutex::default(),
            modules: Mutex::default(),
            blas: Mutex::default(),
            capturing: false.into(),
            dropout: Mutex::default(),
            tables: Mutex::default(),
            zeros: Mutex::default(),
            profile: Mutex::default(),
            charges: Charges::default(),
            link: OnceLock::new(),
            eights: OnceLock::new(),
            dry,
        }
    }

    pub(super) fn blas(&self) -> MutexGuard<'_, Option<Blas>> {
        self.blas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn new_stream() -> Result<sys::CUstream> {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: a context is bound; `stream` outlives the call.
    check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
    Ok(stream)
}

/// Opens the driver, once.
fn initialize() -> Result<()> {
    // SAFETY: only looks for the library by its names.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDevice { reason: "no NVIDIA driver was found (libcuda.so.1)".into() });
    }
    // SAFETY: the library is there; initialising twice is allowed.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(Error::NoDevice { reason: format!("the NVIDIA driver does not start: {}", describe(failed)) }),
    }
}

fn info(ordinal: usize) -> Result<(sys::CUdevice, DeviceInfo)> {
    let count = cudarc::driver::result::device::get_count().map_or(0, |count| count as usize);
    if ordinal >= count {
        return Err(Error::NoDevice { reason: format!("device {ordinal} was asked for, and the driver sees {count}") });
    }
    let failed = |error: cudarc::driver::DriverError| Error::Cuda { call: "cuDeviceGet", reason: describe(error.0) };
    let device = cudarc::driver::result::device::get(ordinal as i32).map_err(failed)?;
    // SAFETY: `device` came from the line above.
    let memory = unsafe { cudarc::driver::result::device::total_mem(device) }.map_err(failed)?;
    let mut driver = 0;
    // SAFETY: `driver` outlives the call.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut driver) })?;
    let capability = ComputeCapability {
        major: attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as _,
        minor: attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as _,
    };
    let multiprocessors = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
    let name = cudarc::driver::result::device::get_name(device).map_err(failed)?;
    Ok((device, DeviceInfo { ordinal, name, capability, memory, multiprocessors, driver }))
}
