//! Folders where NVIDIA's libraries lie. The build and the run time look at the same ones.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The library folders of a CUDA toolkit at `root`, such as `/usr/local/cuda`.
#[must_use]
pub fn toolkit_folders(root: &Path) -> Vec<PathBuf> {
    ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|lib| root.join(lib)).to_vec()
}

/// The toolkits below a folder, such as `/usr/local`: its entries whose names begin with `cuda`, the newest first.
#[must_use]
pub fn toolkits(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = children(folder).into_iter().filter(|path| name(path).starts_with("cuda")).collect();
    found.sort_by_key(|path| std::cmp::Reverse(numbers(&name(path))));
    found
}

/// The library folders of NVIDIA's Python packages below a prefix, such as a virtual environment:
/// `lib/python3*/site-packages/nvidia/*/lib`.
#[must_use]
pub fn wheel_folders(prefix: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for lib in ["lib", "lib64"] {
        for python in children(&prefix.join(lib)).iter().filter(|path| name(path).starts_with("python3")) {
            found.extend(["site-packages", "dist-packages"].iter().flat_map(|kind| site_folders(&python.join(kind))));
        }
    }
    found
}

/// The library folders of NVIDIA's Python packages in one folder of packages: `nvidia/*/lib`.
#[must_use]
pub fn site_folders(packages: &Path) -> Vec<PathBuf> {
    children(&packages.join("nvidia")).into_iter().map(|package| package.join("lib")).filter(|lib| lib.is_dir()).collect()
}

/// The library of one of the names in the first folder that has one; the names in order of preference.
#[must_use]
pub fn find_library(folders: &[PathBuf], names: &[&str]) -> Option<PathBuf> {
    folders.iter().find_map(|folder| names.iter().map(|name| folder.join(name)).find(|path| path.is_file()))
}

/// NVRTC in one of the folders: version 12 before 13, wherever it is, since its images run with drivers from 525 on.
#[must_use]
pub fn find_nvrtc(folders: &[PathBuf]) -> Option<PathBuf> {
    ["libnvrtc.so.12", "libnvrtc.so.13"].iter().find_map(|name| find_library(folders, &[name]))
}

/// The entries of a folder, sorted; none where there is no such folder.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.sort();
    found
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The numbers of a version; `cuda` alone, which links to the toolkit chosen by the machine's owner, comes before all.
fn numbers(name: &str) -> Vec<u32> {
    let version = name.trim_start_matches("cuda").trim_start_matches('-');
    if version.is_empty() { vec![u32::MAX] } else { version.split('.').map(|part| part.parse().unwrap_or(0)).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_wheels_are_found() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::write(lib.join("libnvrtc.so.12"), "").unwrap();
        fs::write(lib.join("libnvrtc.alt.so.12"), "").unwrap();
        let folders = wheel_folders(root.path());
        assert_eq!(folders, std::slice::from_ref(&lib));
        assert_eq!(find_nvrtc(&folders), Some(lib.join("libnvrtc.so.12")));
        assert_eq!(find_library(&folders, &["libnccl.so.2"]), None);
    }

    #[test]
    fn the_chosen_toolkit_comes_first_and_then_the_newest() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cuda-12.9", "cuda-12.10", "cuda", "lib", "cuda-13"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let found: Vec<_> = toolkits(root.path()).iter().map(|path| name(path)).collect();
        assert_eq!(found, ["cuda", "cuda-13", "cuda-12.10", "cuda-12.9"]);
    }
}
