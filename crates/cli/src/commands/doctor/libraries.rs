//! NVIDIA's driver and libraries: where they lie. Nothing is opened or run.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::Check;
use crate::env;

/// Folders that systems keep libraries in.
const SYSTEM: [&str; 7] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
    "/run/opengl-driver/lib",
];

/// What there is of CUDA.
#[derive(Debug, Serialize)]
pub(super) struct Cuda {
    /// Whether this build computes on it.
    supported: bool,
    driver: Option<PathBuf>,
    driver_version: Option<String>,
    cublaslt: Option<PathBuf>,
    nvrtc: Option<PathBuf>,
}

impl Cuda {
    pub(super) fn look() -> Self {
        let places = places();
        let version = fs::read_to_string("/proc/driver/nvidia/version").ok();
        Self {
            supported: false,
            driver: find(&places, "libcuda.so.1"),
            driver_version: version.and_then(|text| Some(text.lines().next()?.trim().to_owned())),
            cublaslt: find(&places, "libcublasLt.so"),
            nvrtc: find(&places, "libnvrtc.so"),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks = vec![Check::info("cuda", "this build computes on the CPU only: what follows is not used yet")];
        checks.push(match (&self.driver, &self.driver_version) {
            (Some(path), Some(version)) => Check::ok("driver", format!("{} ({version})", path.display())),
            (Some(path), None) => Check::ok("driver", path.display().to_string()),
            (None, _) => Check::info("driver", "no libcuda.so.1: no NVIDIA driver is installed"),
        });
        for (name, path, package) in
            [("cublasLt", &self.cublaslt, "nvidia-cublas-cu12"), ("nvrtc", &self.nvrtc, "nvidia-cuda-nvrtc-cu12")]
        {
            checks.push(match path {
                Some(path) => Check::ok(name, path.display().to_string()),
                // Without a driver there is nothing to be done with it.
                None if self.driver.is_none() => Check::info(name, "not found"),
                None => Check::missing(name, "not found", format!("python3 -m pip install {package}, or install a CUDA toolkit")),
            });
        }
        checks
    }
}

/// Where libraries are looked for, the nearest first.
fn places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> =
        env::var("LD_LIBRARY_PATH").map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
    for toolkit in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var) {
        places.extend(["lib64", "lib"].map(|lib| Path::new(&toolkit).join(lib)));
    }
    for prefix in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env::var) {
        places.extend(wheels(&Path::new(&prefix).join("lib")));
        places.push(Path::new(&prefix).join("lib"));
    }
    let local = Path::new("/usr/local");
    let toolkits = children(local).into_iter().filter(|path| name(path).starts_with("cuda"));
    places.extend(toolkits.flat_map(|toolkit| [toolkit.join("lib64"), toolkit.join("targets/x86_64-linux/lib")]));
    places.extend(SYSTEM.map(PathBuf::from));
    places.extend(wheels(&local.join("lib")));
    places.extend(wheels(Path::new("/usr/lib")));
    places
}

/// `PREFIX/lib/python3.x/site-packages/nvidia/*/lib`: where NVIDIA's wheels put their libraries.
fn wheels(lib: &Path) -> Vec<PathBuf> {
    let pythons = children(lib).into_iter().filter(|path| name(path).starts_with("python3"));
    let packages = pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|packages| python.join(packages)));
    packages.flat_map(|packages| children(&packages.join("nvidia"))).map(|package| package.join("lib")).collect()
}

/// The first file whose name begins so.
fn find(places: &[PathBuf], begins: &str) -> Option<PathBuf> {
    places.iter().find_map(|place| children(place).into_iter().find(|path| name(path).starts_with(begins)))
}

/// The entries of a folder, sorted; none where there is no such folder.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.sort();
    found
}

fn name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_wheels_are_found() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("python3.12/site-packages/nvidia/cublas/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::write(lib.join("libcublasLt.so.12"), "").unwrap();
        let places = wheels(root.path());
        assert_eq!(places, std::slice::from_ref(&lib));
        assert_eq!(find(&places, "libcublasLt.so"), Some(lib.join("libcublasLt.so.12")));
        assert_eq!(find(&places, "libnvrtc.so"), None);
    }

    #[test]
    fn without_a_driver_no_library_is_missed() {
        let none = Cuda { supported: false, driver: None, driver_version: None, cublaslt: None, nvrtc: None };
        assert!(none.checks().iter().all(|check| check.fix.is_none()));
        let driver = Cuda { driver: Some("libcuda.so.1".into()), ..none };
        assert_eq!(driver.checks().iter().filter(|check| check.fix.is_some()).count(), 2);
    }
}
