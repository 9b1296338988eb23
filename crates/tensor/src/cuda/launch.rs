//! Kernels by name, with arguments checked against their signatures.

use std::{borrow::Cow, sync::PoisonError};

use cudarc::driver::sys;
use nibble_kernels::{ArgKind, Kernel};

use super::{
    context::{CudaDevice, Module},
    driver::check,
    matmul::Matrix,
    order::Order,
    product::Share,
    widen::Widen,
};
use crate::{DType, Device, Error, Owner, Result, Tensor, TensorMut};

/// A kernel ready to launch.
#[derive(Clone, Copy)]
pub(super) struct Function {
    handle: sys::CUfunction,
    kernel: &'static Kernel,
    /// Dynamic shared memory it was allowed so far.
    shared: u32,
    /// Whether it was launched early.
    early: bool,
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Blocks along x, y and z.
    pub(crate) blocks: [u32; 3],
    /// Threads of a block along x and y.
    pub(crate) threads: [u32; 2],
    /// Bytes of dynamic shared memory of a block.
    pub(crate) shared: u32,
}

impl Grid {
    /// `blocks` x `threads`, along x.
    pub(crate) fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks: [blocks as u32, 1, 1], threads: [threads, 1], shared: 0 }
    }

    /// Enough blocks for `items` with `each` a block.
    pub(crate) fn over(items: usize, each: usize, threads: u32) -> Self {
        Self::new(items.div_ceil(each), threads)
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// An address on the device; 0 for nothing.
    Pointer(u64),
    /// `u32`.
    U32(u32),
    /// `u64`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// A box of a tensor that the copy engine moves.
    Map(TensorMap),
    /// What a launch makes of a product.
    Share(Share),
    /// Weights to widen.
    Widen(Widen),
}

/// The driver's description of a tensor's boxes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct TensorMap(sys::CUtensorMap);

impl Arg {
    /// A null pointer.
    pub(crate) const NONE: Self = Self::Pointer(0);

    /// A size.
    pub(crate) fn size(n: usize) -> Self {
        Self::U32(n as u32)
    }

    /// A tensor that is read.
    pub(crate) fn read(tensor: &Tensor) -> Result<Self> {
        Ok(Self::Pointer(tensor.address()?))
    }

    /// A tensor that is read, or nothing.
    pub(crate) fn read_or_none(tensor: Option<&Tensor>) -> Result<Self> {
        tensor.map_or(Ok(Self::NONE), Self::read)
    }

    /// A tensor that is written: the only handle.
    pub(crate) fn write(tensor: &mut Tensor) -> Result<Self> {
        Ok(Self::Pointer(tensor.address_mut()?))
    }

    /// A borrowed part that is written.
    pub(crate) fn write_view(view: &mut TensorMut<'_>) -> Result<Self> {
        Ok(Self::Pointer(view.address()?))
    }

    const fn kind(self) -> ArgKind {
        match self {
            Self::Pointer(_) => ArgKind::Pointer,
            Self::U32(_) => ArgKind::U32,
            Self::U64(_) => ArgKind::U64,
            Self::F32(_) => ArgKind::F32,
            Self::Map(_) => ArgKind::TensorMap,
            Self::Share(_) => ArgKind::Share,
            Self::Widen(_) => ArgKind::Widen,
        }
    }

    /// Where the driver reads the value: the fields start where the enum's payload does.
    fn value(&self) -> *const std::ffi::c_void {
        match self {
            Self::Pointer(value) | Self::U64(value) => std::ptr::from_ref(value).cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast(),
            Self::Map(value) => std::ptr::from_ref(value).cast(),
            Self::Share(value) => std::ptr::from_ref(value).cast(),
            Self::Widen(value) => std::ptr::from_ref(value).cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast(),
        }
    }
}

impl TensorMap {
    /// Boxes of `rows` tokens of one head, 64 columns wide with a swizzle of 128 bytes, of a 16-bit tensor [T, H, D]; what lies
    /// outside comes as zeros.
    pub(crate) fn heads(x: &Tensor, rows: u32) -> Result<Self> {
        let &[tokens, heads, size] = x.dims() else {
            return Err(Error::Argument {
                op: "tensor map",
                argument: "rank",
                expected: "3, for [T, H, D]",
                found: x.dims().len(),
            });
        };
        let dims = [size as u64, heads as u64, tokens as u64];
        let strides = [2 * size as u64, 2 * (heads * size) as u64];
        let dry = matches!(x.device(), Device::Cuda(device) if device.is_dry());
        Self::encode(x.address()?, x.dtype(), &dims, &strides, &[64, 1, rows], dry)
    }

    /// Boxes of `deep` rows, 64 columns wide with a swizzle of 128 bytes, of a 16-bit matrix; what lies outside comes as zeros.
    /// Address and pitch are multiples of 16 bytes.
    pub(crate) fn rows(device: CudaDevice, matrix: Matrix, [rows, cols]: [usize; 2], dtype: DType, deep: u32) -> Result<Self> {
        Self::boxes(device, matrix, [rows, cols], dtype, [64, deep])
    }

    /// As [`Self::rows`], with boxes of `wide` columns, 32 (a swizzle of 64 bytes) or 64.
    pub(crate) fn boxes(
        device: CudaDevice,
        matrix: Matrix,
        [rows, cols]: [usize; 2],
        dtype: DType,
        [wide, deep]: [u32; 2],
    ) -> Result<Self> {
        let pitch = 2 * matrix.ld as u64;
        Self::encode(matrix.address, dtype, &[cols as u64, 1, rows as u64], &[pitch, pitch], &[wide, 1, deep], device.is_dry())
    }

    /// Of a 16-bit matrix whose rows are those of two matrices of `rows` (a multiple of 8) one below the other: boxes of 64 columns of
    /// `box_rows`, 8 of the one and 8 of the other in turn.
    pub(crate) fn paired(
        device: CudaDevice,
        matrix: Matrix,
        [rows, cols]: [usize; 2],
        dtype: DType,
        box_rows: u32,
    ) -> Result<Self> {
        let (pitch, dims) = (2 * matrix.ld as u64, [cols as u64, 8, 2, rows as u64 / 8]);
        let strides = [pitch, rows as u64 * pitch, 8 * pitch];
        Self::encode(matrix.address, dtype, &dims, &strides, &[64, 8, 2, box_rows / 16], device.is_dry())
    }

    /// Boxes of a tensor of as many sizes as `dims`, `strides` bytes apart from the second on, their rows swizzled; nothing of a dry
    /// device.
    fn encode(address: u64, dtype: DType, dims: &[u64], strides: &[u64], boxes: &[u32], dry: bool) -> Result<Self> {
        let kind = match dtype {
            DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            found => return Err(Error::DType { op: "tensor map", operand: "x", expected: "bfloat16 or float16", found }),
        };
        let steps = [1u32; 5];
        let swizzle = match boxes[0] {
            32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        // SAFETY: an all-zero map is a value to be written over.
        let mut map = Self(unsafe { std::mem::zeroed() });
        if dry {
            return Ok(map);
        }
        // SAFETY: the arrays have the elements that the rank calls for (of strides one less) and outlive the call; the address is only
        // noted.
        check("cuTensorMapEncodeTiled", unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map.0,
                kind,
                dims.len() as u32,
                address as *mut std::ffi::c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })?;
        Ok(map)
    }
}

/// The ending of kernels that compute in `dtype`.
pub(crate) fn suffix(op: &'static str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::Bf16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        found => Err(Error::DType { op, operand: "x", expected: "float32, bfloat16 or float16", found }),
    }
}

fn signature(name: &str) -> Result<&'static Kernel> {
    let missing = || Error::Kernel { kernel: name.into(), reason: "there is no kernel of this name".into() };
    nibble_kernels::kernel(name).ok_or_else(missing)
}

fn config(stream: sys::CUstream, grid: Grid) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: grid.blocks[0],
        gridDimY: grid.blocks[1],
        gridDimZ: grid.blocks[2],
        blockDimX: grid.threads[0],
        blockDimY: grid.threads[1],
        blockDimZ: 1,
        sharedMemBytes: grid.shared,
        hStream: stream,
        attrs: std::ptr::null_mut(),
        numAttrs: 0,
    }
}

/// Adds a kernel to the stream; with `overlap` it may begin before the end of the one before it.
fn enqueue(stream: sys::CUstream, overlap: bool, name: &str, function: Function, grid: Grid, args: &[Arg]) -> Result<()> {
    let mut values: Vec<*mut std::ffi::c_void> = args.iter().map(|arg| arg.value().cast_mut()).collect();
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig { attrs: &raw mut attribute, numAttrs: overlap.into(), ..config(stream, grid) };
    // SAFETY: the handle is of a module that is never unloaded; the values have the kinds of its signature; they, configuration and
    // attribute live until the driver has copied them, before it returns.
    let status = unsafe { sys::cuLaunchKernelEx(&raw const config, function.handle, values.as_mut_ptr(), std::ptr::null_mut()) };
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(Error::Kernel { kernel: name.into(), reason: super::driver::describe(failed) }),
    }
}

fn expect_args(name: &str, kernel: &Kernel, args: &[Arg]) -> Result<()> {
    if args.iter().map(|arg| arg.kind()).eq(kernel.args.iter().map(|arg| arg.kind)) {
        return Ok(());
    }
    let kinds: Vec<ArgKind> = args.iter().map(|arg| arg.kind()).collect();
    let expected: Vec<ArgKind> = kernel.args.iter().map(|arg| arg.kind).collect();
    Err(Error::Kernel { kernel: name.into(), reason: format!("it takes {expected:?}, and was given {kinds:?}") })
}

impl CudaDevice {
    /// Adds a kernel to the stream.
    ///
    /// # Errors
    /// [`Error::Kernel`] when there is no kernel `name`, no image of it for this device, or the arguments do not fit its
    /// signature; [`Error::Cuda`] from the driver.
    pub(crate) fn launch(self, name: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        self.launch_in(Order::Strict, name, grid, grid.shared, args)
    }

    /// Adds a kernel that lets the next begin before its end, and itself may begin before the end of one like it right before: what
    /// it reads before it waits (`wait_for_launches` in its source) is written by no such kernel.
    ///
    /// # Errors
    /// As [`Self::launch`].
    pub(crate) fn launch_early(self, name: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        self.launch_in(Order::Early, name, grid, grid.shared, args)
    }

    /// As [`Self::launch_early`], a kernel of one block a multiprocessor, two of which fit. Where another early kernel is right before,
    /// some multiprocessors have less room than others and would be passed over for a second block: each block then asks for `alone`
    /// bytes of shared memory, of which two do not fit. After a launch of its own each multiprocessor has room for one more.
    ///
    /// # Errors
    /// As [`Self::launch`].
    pub(crate) fn launch_spread(self, name: &str, grid: Grid, alone: u32, args: &[Arg]) -> Result<()> {
        self.launch_in(Order::Early, name, grid, alone, args)
    }

    /// Adds two kernels: the first as [`Self::launch_early`] does, the second beside it, so that it may begin when all blocks of the first
    /// have begun. Nothing comes between them, and while kernels are timed both are timed together, under the name of the first.
    ///
    /// # Errors
    /// As [`Self::launch`]; the first may have been added.
    pub(crate) fn launch_beside(self, kernels: [(&str, Grid, &[Arg]); 2]) -> Result<()> {
        let [first, second] = kernels;
        if self.is_dry() {
            return kernels.into_iter().try_for_each(|(name, _, args)| expect_args(name, signature(name)?, args));
        }
        self.bind()?;
        let function = |(name, grid, args): (&str, Grid, &[Arg])| self.function_for(name, grid, args, Order::Early);
        let functions = [function(first)?, function(second)?];
        let launch = || {
            let entered = self.gpu().queue.enter(Order::Early, None);
            let overlap = entered.before == Order::Early && self.overlaps();
            enqueue(entered.stream, overlap, first.0, functions[0], first.1, first.2)?;
            enqueue(entered.stream, true, second.0, functions[1], second.1, second.2)
        };
        self.timed(|| first.0.to_owned(), launch)
    }

    /// With `alone` bytes of dynamic shared memory, no fewer than the grid has, where another early kernel is right before.
    fn launch_in(self, order: Order, name: &str, grid: Grid, alone: u32, args: &[Arg]) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        if self.is_dry() {
            return expect_args(name, signature(name)?, args);
        }
        self.bind()?;
        let function = self.function_for(name, Grid { shared: alone, ..grid }, args, order)?;
        let launch = || {
            let entered = self.gpu().queue.enter(order, Some(function.handle as usize));
            let overlap = (entered.before, order) == (Order::Early, Order::Early) && self.overlaps();
            let shared = if overlap && !entered.again { alone } else { grid.shared };
            enqueue(entered.stream, overlap, name, function, Grid { shared, ..grid }, args)
        };
        self.timed(|| name.to_owned(), launch)
    }

    fn function_for(self, name: &str, grid: Grid, args: &[Arg], order: Order) -> Result<Function> {
        let function = self.function(name, grid.shared, order)?;
        expect_args(name, function.kernel, args)?;
        Ok(function)
    }

    /// How many clusters of a kernel whose blocks come in clusters the device runs at once.
    pub(super) fn clusters_at_once(self, name: &str, grid: Grid) -> Result<usize> {
        self.bind()?;
        let function = self.function(name, grid.shared, Order::Strict)?;
        let (config, mut count) = (config(std::ptr::null_mut(), grid), 0);
        // SAFETY: the handle is of a module that is never unloaded; both others outlive the call.
        check("cuOccupancyMaxActiveClusters", unsafe {
            sys::cuOccupancyMaxActiveClusters(&raw mut count, function.handle, &raw const config)
        })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Whether launches may overlap. While kernels are timed each runs alone, or with that beside it.
    fn overlaps(self) -> bool {
        self.can_overlap() && !self.is_profiling()
    }

    /// Whether the device can overlap launches: from Hopper on, and captured in graphs too from CUDA 12.3 on.
    pub(super) fn can_overlap(self) -> bool {
        self.info().capability.major >= 9 && self.info().driver >= 12030
    }

    /// Whether there is a kernel of that name for this device.
    pub(super) fn expect_kernel(self, name: &str) -> Result<()> {
        self.function(name, 0, Order::Strict).map(drop)
    }

    /// A kernel with that much dynamic shared memory, in a launch of that order.
    fn function(self, name: &str, shared: u32, order: Order) -> Result<Function> {
        use sys::CUfunction_attribute::{
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST,
            CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT as CARVEOUT,
        };
        let mut functions = self.gpu().functions.lock().unwrap_or_else(PoisonError::into_inner);
        let known = functions.get(name).copied();
        let mut function = match known {
            Some(function) => function,
            None => self.charge(Owner::Kernels, || self.load(name))?,
        };
        let set = |attribute, value| {
            // SAFETY: the handle is of a loaded module.
            check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(function.handle, attribute, value) })
        };
        let more = shared > function.shared;
        if more {
            set(MOST, shared as i32)?;
        }
        // Blocks of two launches fit beside each other where a multiprocessor's memory is divided alike for both.
        let divide = order == Order::Early && !function.early && self.overlaps();
        if divide {
            set(CARVEOUT, 100)?;
        }
        if known.is_none() || more || divide {
            function.shared = shared.max(function.shared);
            function.early |= divide;
            functions.insert(name.to_owned(), function);
        }
        Ok(function)
    }

    fn load(self, name: &str) -> Result<Function> {
        let missing = |reason| Error::Kernel { kernel: name.into(), reason };
        let kernel = signature(name)?;
        let module = self.module(kernel.module)?;
        let symbol = std::ffi::CString::new(name).map_err(|error| missing(error.to_string()))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the module is loaded and never unloaded; the name is a C string that outlives the call.
        check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&raw mut handle, module.0, symbol.as_ptr()) })
            .map_err(|error| missing(error.to_string()))?;
        // 48 KiB need no permission, what the kernel has besides included.
        Ok(Function { handle, kernel, shared: 32 << 10, early: false })
    }

    fn module(self, name: &'static str) -> Result<Module> {
        let mut modules = self.gpu().modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(name) {
            return Ok(*module);
        }
        let image = self.image(name)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the image is a complete cubin that outlives the call.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&raw mut handle, image.as_ptr().cast()) })?;
        let module = Module(handle);
        modules.insert(name, module);
        Ok(module)
    }

    /// The embedded image, else one compiled now.
    fn image(self, module: &'static str) -> Result<Cow<'static, [u8]>> {
        let capability = self.info().capability;
        if let Some(image) = nibble_kernels::image(module, capability) {
            return Ok(image);
        }
        let failed = |reason| Error::Kernel { kernel: module.into(), reason };
        let options = self.options();
        let Some(nvrtc) = &options.libraries.nvrtc else {
            let reason = format!(
                "this build holds no image for compute capability {capability}, and no NVRTC was found to compile one: \
                 `pip install nvidia-cuda-nvrtc-cu12`"
            );
            return Err(failed(reason));
        };
        let compiled = match &options.cache {
            Some(folder) => nibble_kernels::cached(folder, nvrtc, module, capability),
            None => nibble_kernels::compile(nvrtc, module, capability),
        };
        compiled.map(Cow::Owned).map_err(|error| failed(error.to_string()))
    }
}
