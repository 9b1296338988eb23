//! NVIDIA's driver and libraries: where they lie, and what GPUs the driver sees.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nibble_tensor::cuda::{
    CudaDevice, DeviceInfo,
    libraries::{self, Libraries},
};
use serde::Serialize;

use super::Check;
use crate::{base, env, ui};

/// What there is of CUDA.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Cuda {
    /// Whether the machine has an NVIDIA GPU, driver or not.
    hardware: bool,
    driver: Option<PathBuf>,
    /// What the kernel's part of the driver says of itself.
    driver_version: Option<String>,
    cublaslt: Option<PathBuf>,
    nvrtc: Option<PathBuf>,
    nccl: Option<PathBuf>,
    gpus: Vec<Gpu>,
    /// Why the first of them cannot be used, where it cannot.
    refused: Option<String>,
}

/// A GPU that the driver sees.
#[derive(Clone, Debug, Serialize)]
struct Gpu {
    name: String,
    compute_capability: String,
    memory: usize,
    multiprocessors: usize,
    /// Whether kernels are compiled on this machine: the build holds no images for it.
    needs_nvrtc: bool,
}

impl Cuda {
    pub(super) fn look() -> Self {
        let Libraries { driver, cublaslt, nvrtc, nccl } = libraries::find(&env::search_paths());
        let version = fs::read_to_string("/proc/driver/nvidia/version").ok();
        // One that cannot be described is not there for us.
        let gpus = (0..CudaDevice::count()).filter_map(|ordinal| CudaDevice::describe(ordinal).ok()).map(Gpu::of);
        let gpus: Vec<Gpu> = gpus.collect();
        // What a run does first: the surest answer.
        let refused = if gpus.is_empty() { None } else { base::open_gpu().err().map(|error| error.to_string()) };
        Self {
            hardware: version.is_some() || has_hardware(Path::new("/sys/bus/pci/devices")),
            driver,
            driver_version: version.and_then(|text| Some(text.lines().next()?.trim().to_owned())),
            cublaslt,
            nvrtc,
            nccl,
            gpus,
            refused,
        }
    }

    /// Whether a run can compute on the first GPU.
    pub(super) fn usable(&self) -> bool {
        !self.gpus.is_empty() && self.refused.is_none()
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks = vec![self.driver_check()];
        checks.extend(self.gpus.iter().map(Gpu::check));
        checks.extend(self.refused.as_ref().map(|why| {
            Check::missing("cuda", format!("the GPU cannot be used: {why}"), "get what is missing below, or use --device cpu")
        }));
        checks.extend([self.cublaslt_check(), self.nvrtc_check(), self.nccl_check()]);
        checks
    }

    fn driver_check(&self) -> Check {
        match (&self.driver, &self.driver_version) {
            (Some(path), _) if self.gpus.is_empty() && self.hardware => Check::missing(
                "driver",
                format!("{} sees no GPU", path.display()),
                format!(
                    "look at what nvidia-smi and CUDA_VISIBLE_DEVICES say; if the loader does not find the driver, set \
                     LD_LIBRARY_PATH={}",
                    path.parent().unwrap_or(Path::new("")).display()
                ),
            ),
            (Some(path), Some(version)) => Check::ok("driver", format!("{} ({version})", path.display())),
            (Some(path), None) => Check::ok("driver", path.display().to_string()),
            (None, Some(version)) => Check::missing(
                "driver",
                format!("no libcuda.so.1 beside {version}"),
                "start the container with --gpus all (NVIDIA Container Toolkit), or install the driver's user libraries",
            ),
            (None, None) if self.hardware => Check::missing(
                "driver",
                "no libcuda.so.1: an NVIDIA GPU without NVIDIA's driver",
                "install NVIDIA's driver, 525 or newer (Ubuntu: sudo ubuntu-drivers install)",
            ),
            (None, None) => Check::info("driver", "no libcuda.so.1: no NVIDIA driver is installed"),
        }
    }

    fn cublaslt_check(&self) -> Check {
        self.library("cublasLt", self.cublaslt.as_deref(), Some("nvidia-cublas-cu12"), "matrix products need it")
    }

    fn nvrtc_check(&self) -> Check {
        let needed = self.gpus.iter().any(|gpu| gpu.needs_nvrtc);
        let why = if needed { "this build holds no kernels for the GPU" } else { "not needed: this build holds the kernels" };
        self.library("nvrtc", self.nvrtc.as_deref(), needed.then_some("nvidia-cuda-nvrtc-cu12"), why)
    }

    fn nccl_check(&self) -> Check {
        let needed = self.gpus.len() > 1;
        self.library("nccl", self.nccl.as_deref(), needed.then_some("nvidia-nccl-cu12"), "several GPUs talk through it")
    }

    /// A library that is there, or is not needed, or comes with a package of Python's.
    fn library(&self, name: &'static str, path: Option<&Path>, package: Option<&str>, why: &str) -> Check {
        match (path, package) {
            (Some(path), _) => Check::ok(name, path.display().to_string()),
            // Without a driver there is nothing to be done with it.
            (None, _) if self.driver.is_none() => Check::info(name, "not found"),
            (None, None) => Check::info(name, format!("not found ({why})")),
            (None, Some(package)) => {
                let fix = format!("python3 -m pip install {package}, or install a CUDA toolkit");
                Check::missing(name, format!("not found ({why})"), fix)
            }
        }
    }
}

impl Gpu {
    fn of(info: DeviceInfo) -> Self {
        Self {
            name: info.name,
            compute_capability: info.capability.to_string(),
            memory: info.memory,
            multiprocessors: info.multiprocessors,
            needs_nvrtc: libraries::needs_nvrtc(info.capability),
        }
    }

    fn check(&self) -> Check {
        let Self { name, compute_capability, memory, multiprocessors, .. } = self;
        let memory = ui::bytes(*memory);
        let found = format!("{name}, {memory}, {multiprocessors} multiprocessors, compute capability {compute_capability}");
        Check::ok("gpu", found)
    }
}

/// Whether one of the PCI devices in a folder of the system's is a display or compute controller (class 03) of NVIDIA's.
fn has_hardware(devices: &Path) -> bool {
    let says = |device: &Path, file: &str, begins: &str| {
        fs::read_to_string(device.join(file)).is_ok_and(|text| text.trim().starts_with(begins))
    };
    let devices = fs::read_dir(devices).into_iter().flatten().flatten().map(|entry| entry.path());
    devices.into_iter().any(|device| says(&device, "vendor", "0x10de") && says(&device, "class", "0x03"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(cuda: &Cuda) -> Vec<&'static str> {
        cuda.checks().into_iter().filter(|check| check.fix.is_some()).map(|check| check.name).collect()
    }

    fn gpu(needs_nvrtc: bool) -> Gpu {
        let (name, compute_capability) = ("GPU".to_owned(), "9.0".to_owned());
        Gpu { name, compute_capability, memory: 8 << 30, multiprocessors: 100, needs_nvrtc }
    }

    #[test]
    fn without_a_gpu_no_library_is_missed() {
        let none = Cuda::default();
        assert_eq!(missing(&none), [] as [&str; 0]);
        assert_eq!(missing(&Cuda { driver: Some("libcuda.so.1".into()), ..none }), ["cublasLt"]);
    }

    #[test]
    fn a_gpu_is_used_unless_it_was_refused() {
        let cuda = Cuda { gpus: vec![gpu(false)], ..Cuda::default() };
        assert!(cuda.usable() && !Cuda::default().usable());
        let refused = Cuda { refused: Some("no cuBLASLt".into()), ..cuda };
        assert!(!refused.usable() && missing(&refused) == ["cuda"]);
    }

    #[test]
    fn a_gpu_without_its_driver_is_told_which_part_is_missing() {
        let hardware = Cuda { hardware: true, ..Cuda::default() };
        let container = Cuda { driver_version: Some("NVRM version: 580".into()), ..hardware.clone() };
        let blind = Cuda { driver: Some("/odd/libcuda.so.1".into()), cublaslt: Some("lib".into()), ..hardware.clone() };
        for (cuda, fix) in [(hardware, "install NVIDIA's driver"), (container, "--gpus all"), (blind, "LD_LIBRARY_PATH=/odd")] {
            assert_eq!(missing(&cuda), ["driver"]);
            assert!(cuda.driver_check().fix.unwrap().contains(fix), "{cuda:?}");
        }
    }

    #[test]
    fn libraries_are_missed_when_they_are_needed() {
        let one = Cuda { hardware: true, driver: Some("libcuda.so.1".into()), gpus: vec![gpu(false)], ..Cuda::default() };
        assert_eq!(missing(&one), ["cublasLt"]);
        let two = Cuda { gpus: vec![gpu(true), gpu(true)], ..one };
        assert_eq!(missing(&two), ["cublasLt", "nvrtc", "nccl"]);
        let fixes: Vec<_> = two.checks().into_iter().filter_map(|check| check.fix).collect();
        assert!(fixes[1].contains("pip install nvidia-cuda-nvrtc-cu12"), "{fixes:?}");
    }

    #[test]
    fn hardware_is_a_display_controller_of_the_maker() {
        let root = tempfile::tempdir().unwrap();
        let device = |name: &str, vendor: &str, class: &str| {
            let folder = root.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("vendor"), vendor).unwrap();
            fs::write(folder.join("class"), class).unwrap();
        };
        device("0000:00:01.0", "0x8086\n", "0x030000\n");
        device("0000:00:02.0", "0x10de\n", "0x040300\n");
        assert!(!has_hardware(root.path()));
        device("0000:00:03.0", "0x10de\n", "0x030200\n");
        assert!(has_hardware(root.path()));
    }
}
