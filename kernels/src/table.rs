//! Kernels, modules and images, as the build wrote them down.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::{
    arch::ComputeCapability,
    error::{Error, Result},
    nvrtc::{Nvrtc, Program},
};

/// A kernel's signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its name in the image.
    pub name: &'static str,
    /// The module it is in.
    pub module: &'static str,
    /// Its arguments, in order.
    pub args: &'static [Arg],
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arg {
    /// Its name in the source.
    pub name: &'static str,
    /// What is passed.
    pub kind: ArgKind,
    /// Whether the kernel may write through it: a pointer to values that are not `const`.
    pub writes: bool,
    /// The source's name of the type that a pointer points to, such as `bf16`.
    pub element: Option<&'static str>,
}

/// What is passed for an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgKind {
    /// A device address, 8 bytes.
    Pointer,
    /// `u32`.
    U32,
    /// `i32`.
    I32,
    /// `u64`.
    U64,
    /// `i64`.
    I64,
    /// `float`.
    F32,
    /// A `CUtensorMap` by value: 128 bytes, aligned to 64.
    TensorMap,
    /// A `Share` of `common/product.cuh` by value.
    Share,
    /// A `Widen` of `common/widen.cuh` by value.
    Widen,
}

/// A source file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
    /// Whether it is for Hopper (sm_90a) alone: its name ends in `_sm90`.
    pub hopper_only: bool,
    /// The headers it includes, directly or not.
    pub headers: &'static [Header],
}

/// A header of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// As `#include` names it.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
}

/// A compiled module.
struct Image {
    module: &'static str,
    device: ComputeCapability,
    /// As deflate packed it.
    packed: &'static [u8],
    /// Bytes unpacked.
    size: usize,
}

include!(concat!(env!("OUT_DIR"), "/table.rs"));

/// All kernels, sorted by name.
#[must_use]
pub fn kernels() -> &'static [Kernel] {
    KERNELS
}

/// The kernel of a name.
#[must_use]
pub fn kernel(name: &str) -> Option<&'static Kernel> {
    KERNELS.binary_search_by(|kernel| kernel.name.cmp(name)).ok().map(|at| &KERNELS[at])
}

/// All modules, sorted by name.
#[must_use]
pub fn modules() -> &'static [Module] {
    MODULES
}

/// The module of a name.
#[must_use]
pub fn module(name: &str) -> Option<&'static Module> {
    MODULES.binary_search_by(|module| module.name.cmp(name)).ok().map(|at| &MODULES[at])
}

/// The embedded image (a cubin) of a module that runs on a device: the one for it, or the newest of the same generation before
/// it. `None` where the build embedded none.
#[must_use]
pub fn image(module: &str, device: ComputeCapability) -> Option<Cow<'static, [u8]>> {
    let image = fitting(module, device)?;
    miniz_oxide::inflate::decompress_to_vec_with_limit(image.packed, image.size).ok().map(Cow::Owned)
}

fn fitting(module: &str, device: ComputeCapability) -> Option<&'static Image> {
    let fitting = IMAGES.iter().filter(|image| image.module == module && image.device.runs_on(device));
    fitting.max_by_key(|image| image.device)
}

/// Whether the build embedded images of all modules that a device uses: it needs no NVRTC then.
#[must_use]
pub fn has_images(device: ComputeCapability) -> bool {
    let mut used = MODULES.iter().filter(|module| !module.hopper_only || device == ComputeCapability::HOPPER);
    used.all(|module| fitting(module.name, device).is_some())
}

impl Module {
    pub(crate) fn program<'a>(&'a self, headers: &'a [(&'a str, &'a str)]) -> Program<'a> {
        Program { name: self.name, source: self.source, headers }
    }

    pub(crate) fn header_pairs(&self) -> Vec<(&str, &str)> {
        self.headers.iter().map(|header| (header.name, header.source)).collect()
    }

    /// The module of a name, if it is for the device.
    pub(crate) fn find(name: &str, device: ComputeCapability) -> Result<&'static Self> {
        let module = module(name).ok_or_else(|| Error::UnknownModule { module: name.to_owned() })?;
        if module.hopper_only && device != ComputeCapability::HOPPER {
            return Err(Error::HopperOnly { module: name.to_owned(), arch: device.arch_name() });
        }
        Ok(module)
    }
}

/// Compiles a module for a device with the NVRTC at `nvrtc` and the build's options.
///
/// # Errors
/// An unknown module, one that is not for the device, a library that is no NVRTC or does not know the device, and what the
/// compiler refuses, with its log.
pub fn compile(nvrtc: &Path, module: &str, device: ComputeCapability) -> Result<Vec<u8>> {
    let module = Module::find(module, device)?;
    Ok(opened(nvrtc)?.compile(&module.program(&module.header_pairs()), device)?.image)
}

/// The library, opened once a process: it takes long, and several modules are compiled in a row.
pub(crate) fn opened(path: &Path) -> Result<&'static Nvrtc> {
    static OPENED: Mutex<Vec<(PathBuf, &'static Nvrtc)>> = Mutex::new(Vec::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, nvrtc)) = opened.iter().find(|(known, _)| known == path) {
        return Ok(nvrtc);
    }
    let nvrtc: &'static Nvrtc = Box::leak(Box::new(Nvrtc::open(path)?));
    opened.push((path.to_path_buf(), nvrtc));
    Ok(nvrtc)
}
