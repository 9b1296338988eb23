//! Where the libraries are that are opened at run time. Nothing is opened here.

use std::path::{Path, PathBuf};

use nibble_kernels::{ComputeCapability, find_library, find_nvrtc, has_images, toolkit_folders, toolkits, wheel_folders};

/// Folders that systems keep libraries in.
const SYSTEM: [&str; 9] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/local/lib",
    "/run/opengl-driver/lib",
];

/// Where to look, the nearest to the user first. What is not set is not looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SearchPaths {
    /// Folders of libraries (`LD_LIBRARY_PATH`).
    pub folders: Vec<PathBuf>,
    /// CUDA toolkits (`CUDA_HOME`, `CUDA_PATH`).
    pub toolkits: Vec<PathBuf>,
    /// Prefixes of Python environments (`VIRTUAL_ENV`, `CONDA_PREFIX`, that of `python3`): NVIDIA's packages, such as those that
    /// PyTorch brings, lie below `lib/python3*/site-packages`.
    pub environments: Vec<PathBuf>,
    /// Where systems install toolkits (`/usr/local`).
    pub installed: Vec<PathBuf>,
    /// Folders where systems keep libraries.
    pub system: Vec<PathBuf>,
}

impl SearchPaths {
    /// What does not depend on the environment: toolkits and Python packages of the whole machine, and the system's folders.
    #[must_use]
    pub fn of_system() -> Self {
        Self {
            environments: ["/usr/local", "/usr"].map(PathBuf::from).to_vec(),
            installed: vec!["/usr/local".into()],
            system: SYSTEM.map(PathBuf::from).to_vec(),
            ..Self::default()
        }
    }

    /// All folders, in order.
    fn all(&self) -> Vec<PathBuf> {
        let mut all = self.folders.clone();
        all.extend(self.toolkits.iter().flat_map(|root| toolkit_folders(root)));
        for prefix in &self.environments {
            all.extend(wheel_folders(prefix));
            all.push(prefix.join("lib"));
        }
        all.extend(self.installed.iter().flat_map(|folder| toolkits(folder)).flat_map(|root| toolkit_folders(&root)));
        all.extend(self.system.iter().cloned());
        all
    }
}

/// The libraries found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Libraries {
    /// `libcuda.so.1`, which comes with the driver.
    pub driver: Option<PathBuf>,
    /// cuBLASLt.
    pub cublaslt: Option<PathBuf>,
    /// NVRTC, for kernels that the build holds no image of.
    pub nvrtc: Option<PathBuf>,
    /// NCCL.
    pub nccl: Option<PathBuf>,
}

/// Looks for the libraries. Of versions side by side the newest cuBLASLt is taken, but the older NVRTC: its images run with
/// older drivers too.
#[must_use]
pub fn find(paths: &SearchPaths) -> Libraries {
    let all = paths.all();
    // A toolkit brings a stand-in for the driver, to link with, under `stubs`; it is in none of the folders unless named.
    let drivers: Vec<PathBuf> = all.iter().filter(|folder| !is_stub(folder)).cloned().collect();
    Libraries {
        driver: find_library(&drivers, &["libcuda.so.1"]),
        cublaslt: find_library(&all, &["libcublasLt.so.13", "libcublasLt.so.12"]),
        nvrtc: find_nvrtc(&all),
        nccl: find_library(&all, &["libnccl.so.2"]),
    }
}

/// Whether a device needs NVRTC: the build holds no images of its kernels.
#[must_use]
pub fn needs_nvrtc(device: ComputeCapability) -> bool {
    !has_images(device)
}

fn is_stub(folder: &Path) -> bool {
    folder.file_name().is_some_and(|name| name == "stubs")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A folder tree with empty files.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        root
    }

    #[test]
    fn the_nearest_library_is_found_and_nothing_where_nothing_is() {
        assert_eq!(find(&SearchPaths::default()), Libraries::default());
        let root = tree(&[
            "env/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13",
            "env/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "env/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2",
            "local/cuda-12.9/lib64/libcublasLt.so.12",
            "local/cuda-12.9/lib64/libnvrtc.so.12",
            "stubs/libcuda.so.1",
            "system/libcuda.so.1",
        ]);
        let at = |path: &str| root.path().join(path);
        let packages = "env/lib/python3.12/site-packages/nvidia";
        let mut paths = SearchPaths {
            folders: vec![at("stubs")],
            environments: vec![at("env")],
            installed: vec![at("local")],
            system: vec![at("system")],
            ..SearchPaths::default()
        };
        let found = find(&paths);
        assert_eq!(found.driver, Some(at("system/libcuda.so.1")));
        assert_eq!(found.cublaslt, Some(at(&format!("{packages}/cu13/lib/libcublasLt.so.13"))));
        assert_eq!(found.nvrtc, Some(at("local/cuda-12.9/lib64/libnvrtc.so.12")));
        assert_eq!(found.nccl, Some(at(&format!("{packages}/nccl/lib/libnccl.so.2"))));
        paths.toolkits = vec![at("local/cuda-12.9")];
        assert_eq!(find(&paths).cublaslt, Some(at("local/cuda-12.9/lib64/libcublasLt.so.12")));
    }
}
