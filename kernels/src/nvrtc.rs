//! NVIDIA's run-time compiler, opened where it lies. The build and the run-time compile both go through here.
// The one module of the crate with `unsafe`: calls into a library of C functions.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::{Path, PathBuf},
    ptr,
};

use libloading::Library;

use crate::{
    arch::ComputeCapability,
    error::{Error, Result, Version},
};

type Handle = *mut c_void;

/// The functions that are used, by their names in the library.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    arch_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// The compiler.
pub(crate) struct Nvrtc {
    path: PathBuf,
    version: Version,
    /// Architectures it compiles for, as `90` for sm_90.
    archs: Vec<c_int>,
    functions: Functions,
    /// Holds the code that `functions` points into.
    _library: Library,
}

/// What is compiled: a source with the headers it includes, by the names it includes them under.
pub(crate) struct Program<'a> {
    pub(crate) name: &'a str,
    pub(crate) source: &'a str,
    pub(crate) headers: &'a [(&'a str, &'a str)],
}

/// What comes out.
pub(crate) struct Compiled {
    pub(crate) image: Vec<u8>,
    /// Warnings, and registers and spills of each kernel. The build reads it.
    #[allow(dead_code, reason = "the run-time compile has no use for it")]
    pub(crate) log: String,
}

/// The compiler's options: the build's and the run time's are the same.
pub(crate) fn options(device: ComputeCapability) -> Vec<String> {
    vec![format!("--gpu-architecture={}", device.arch_name()), "--std=c++17".to_owned(), "--ptxas-options=-v".to_owned()]
}

impl Nvrtc {
    /// Opens the library at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let wrap = |error: libloading::Error| Error::Open { path: path.to_path_buf(), reason: error.to_string() };
        // SAFETY: opening a library runs its initialisers; NVRTC's set up its own state alone.
        let library = unsafe { Library::new(path) }.map_err(wrap)?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type of the field is that of the function in nvrtc.h, unchanged from CUDA 11.2 on; the pointer is
                // kept beside the library that it points into.
                *unsafe { library.get($name) }.map_err(wrap)?
            };
        }
        let functions = Functions {
            version: function!(b"nvrtcVersion\0"),
            arch_count: function!(b"nvrtcGetNumSupportedArchs\0"),
            archs: function!(b"nvrtcGetSupportedArchs\0"),
            create: function!(b"nvrtcCreateProgram\0"),
            destroy: function!(b"nvrtcDestroyProgram\0"),
            compile: function!(b"nvrtcCompileProgram\0"),
            log_size: function!(b"nvrtcGetProgramLogSize\0"),
            log: function!(b"nvrtcGetProgramLog\0"),
            cubin_size: function!(b"nvrtcGetCUBINSize\0"),
            cubin: function!(b"nvrtcGetCUBIN\0"),
            error: function!(b"nvrtcGetErrorString\0"),
        };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: both arguments are valid for a write.
        let mut code = unsafe { (functions.version)(&raw mut major, &raw mut minor) };
        if code == 0 {
            // SAFETY: the argument is valid for a write.
            code = unsafe { (functions.arch_count)(&raw mut count) };
        }
        let mut archs = vec![0; count.max(0) as usize];
        if code == 0 {
            // SAFETY: the array has as many elements as the library said that it writes.
            code = unsafe { (functions.archs)(archs.as_mut_ptr()) };
        }
        let version = Version { major: major as u32, minor: minor as u32 };
        let nvrtc = Self { path: path.to_path_buf(), version, archs, functions, _library: library };
        match code {
            0 => Ok(nvrtc),
            code => Err(Error::Open { path: path.to_path_buf(), reason: nvrtc.explain(code) }),
        }
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// Whether it compiles for a device.
    pub(crate) fn knows(&self, device: ComputeCapability) -> bool {
        self.archs.contains(&(c_int::from(device.major) * 10 + c_int::from(device.minor)))
    }

    /// Compiles a program to the image for a device.
    pub(crate) fn compile(&self, program: &Program<'_>, device: ComputeCapability) -> Result<Compiled> {
        let arch = device.arch_name();
        if !self.knows(device) {
            return Err(Error::Architecture { path: self.path.clone(), version: self.version, arch });
        }
        let failed =
            |code, log| Error::Compile { module: program.name.to_owned(), arch: arch.clone(), reason: self.explain(code), log };
        let text = |text: &str| CString::new(text).map_err(|_| failed(0, "a zero byte in the text".to_owned()));
        let source = text(program.source)?;
        let name = text(&format!("{}.cu", program.name))?;
        let headers = program.headers.iter().map(|(_, source)| text(source)).collect::<Result<Vec<_>>>()?;
        let names = program.headers.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>>>()?;
        let options = options(device).iter().map(|option| text(option)).collect::<Result<Vec<_>>>()?;
        let pointers = |list: &[CString]| list.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (headers, names, options) = (pointers(&headers), pointers(&names), pointers(&options));

        let mut handle = ptr::null_mut();
        // SAFETY: every text ends in zero and outlives the call; both arrays have as many pointers as is said.
        let code = unsafe {
            let count = headers.len() as c_int;
            (self.functions.create)(&raw mut handle, source.as_ptr(), name.as_ptr(), count, headers.as_ptr(), names.as_ptr())
        };
        if code != 0 {
            return Err(failed(code, String::new()));
        }
        let program = Owned { handle, nvrtc: self };
        // SAFETY: the program is live, the texts end in zero, and the array has as many pointers as is said.
        let code = unsafe { (self.functions.compile)(program.handle, options.len() as c_int, options.as_ptr()) };
        let log = program.read(self.functions.log_size, self.functions.log);
        let log = log.map_or_else(|code| self.explain(code), |log| String::from_utf8_lossy(&log).into_owned());
        let log = log.trim_end_matches(['\0', '\n']).to_owned();
        if code != 0 {
            return Err(failed(code, log));
        }
        match program.read(self.functions.cubin_size, self.functions.cubin) {
            Ok(image) => Ok(Compiled { image, log }),
            Err(code) => Err(failed(code, log)),
        }
    }

    fn explain(&self, code: c_int) -> String {
        // SAFETY: the library returns a static text for every code, known or not.
        let text = unsafe {
            let text = (self.functions.error)(code);
            if text.is_null() { None } else { Some(CStr::from_ptr(text)) }
        };
        text.map_or_else(|| format!("error {code}"), |text| text.to_string_lossy().into_owned())
    }
}

/// A program in the library, destroyed when dropped.
struct Owned<'a> {
    handle: Handle,
    nvrtc: &'a Nvrtc,
}

impl Owned<'_> {
    /// Bytes that the library hands out by a pair of functions: one says how many, one writes them.
    fn read(
        &self,
        size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
        write: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, c_int> {
        let mut length = 0;
        // SAFETY: the program is live, and the length is valid for a write.
        let code = unsafe { size(self.handle, &raw mut length) };
        if code != 0 {
            return Err(code);
        }
        let mut bytes = vec![0u8; length];
        // SAFETY: the program is live, and the buffer is as long as the library said.
        let code = unsafe { write(self.handle, bytes.as_mut_ptr().cast()) };
        if code == 0 { Ok(bytes) } else { Err(code) }
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created by this library and is destroyed once; a failure leaves nothing to be done.
        unsafe { (self.nvrtc.functions.destroy)(&raw mut self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_carries_the_log_and_headers_are_found() {
        let Some(path) = option_env!("NIBBLE_NVRTC") else { return };
        let nvrtc = Nvrtc::open(Path::new(path)).unwrap();
        let device = ComputeCapability::new(8, 0);
        let headers = [("common/a.cuh", "constexpr int A = 3;")];
        let source = "#include \"common/a.cuh\"\nextern \"C\" __global__ void a_f32(float *y) { *y = A; }";
        let program = |source| Program { name: "a", source, headers: &headers };
        let compiled = nvrtc.compile(&program(source), device).unwrap();
        assert!(compiled.log.contains("Compiling entry function 'a_f32'"), "{}", compiled.log);
        let error = nvrtc.compile(&program("int f() { return missing; }"), device).err().unwrap();
        let Error::Compile { module, log, .. } = &error else { panic!("{error}") };
        assert!(module == "a" && log.contains("missing") && log.contains("a.cu(1)"), "{error}");
    }
}
