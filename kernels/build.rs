//! Compiles the CUDA sources with NVRTC and writes the table of kernels, modules and images that the library includes.
//!
//! Needs no CUDA toolkit, no GPU and no C compiler: NVRTC is one library (`pip install nvidia-cuda-nvrtc-cu12`). Variables:
//!
//! * `NVRTC_DIR`: the folder of libnvrtc.so.12 or .13; else it is looked for in `CUDA_HOME`, `CUDA_PATH`, the active Python
//!   environment and `/usr/local/cuda*`;
//! * `REQUIRE_KERNELS=1`: without NVRTC, or when a source does not compile or spills registers unsaid, the build fails. Else it
//!   embeds what there is and warns: the program then compiles kernels at run time;
//! * `NIBBLE_CUDA_ARCHS=90a,86`: compiles for these alone, for `none` embeds nothing.
//!
//! What is compiled is kept in the target folder for all profiles; an image is compiled again when its text, a header or the
//! compiler changes.

#![allow(dead_code, unreachable_pub, reason = "modules shared with the library have more than the build needs")]

#[path = "src/arch.rs"]
mod arch;
#[path = "src/error.rs"]
mod error;
#[path = "src/hash.rs"]
mod hash;
#[path = "build/images.rs"]
mod images;
#[path = "build/log.rs"]
mod log;
#[path = "src/nvrtc.rs"]
mod nvrtc;
#[path = "src/places.rs"]
mod places;
#[path = "build/signatures.rs"]
mod signatures;
#[path = "build/sources.rs"]
mod sources;
#[path = "build/table.rs"]
mod table;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use arch::ComputeCapability;

const VARIABLES: [&str; 7] =
    ["NVRTC_DIR", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "REQUIRE_KERNELS", "NIBBLE_CUDA_ARCHS"];

#[allow(clippy::print_stderr, reason = "cargo shows it when the build fails")]
fn main() -> ExitCode {
    for name in VARIABLES {
        println!("cargo:rerun-if-env-changed={name}");
    }
    for path in ["build.rs", "build", "src"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let required = variable("REQUIRE_KERNELS").is_some_and(|value| value != "0");
    match build(required) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problems) => {
            eprintln!("{}", problems.join("\n"));
            ExitCode::FAILURE
        }
    }
}

/// Everything; the problems that fail the build.
fn build(required: bool) -> Result<(), Vec<String>> {
    let out = PathBuf::from(variable("OUT_DIR").unwrap_or_default());
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR").unwrap_or_default());
    let (modules, mut problems) = sources::read(&root.join("src"));
    let devices = devices().map_err(|problem| vec![problem])?;
    let images = match open() {
        _ if devices.is_empty() => Vec::new(),
        Ok(nvrtc) => {
            let (images, failed) = images::compile(&nvrtc, &modules, &devices, &out, &cache(&out));
            problems.extend(failed);
            images
        }
        Err(problem) => {
            problems.push(problem);
            Vec::new()
        }
    };
    table::write(&out, &modules, &images).map_err(|error| vec![format!("write the table of kernels: {error}")])?;
    if required && !problems.is_empty() {
        return Err(problems);
    }
    warn(&problems, &out);
    Ok(())
}

/// One line for all problems; their whole text is in a file.
fn warn(problems: &[String], out: &Path) {
    let Some(first) = problems.first() else { return };
    let path = out.join("problems.txt");
    let first = first.lines().next().unwrap_or_default();
    let more = match (problems.len(), std::fs::write(&path, problems.join("\n\n"))) {
        (1, Ok(())) if first == problems[0] => String::new(),
        (count, Ok(())) => format!(" ({count} problems: {})", path.display()),
        (count, Err(_)) => format!(" ({count} problems)"),
    };
    println!("cargo:warning=CUDA kernels: {first}{more}");
}

/// Where images are kept between builds: in the target folder, which cargo marks with a file, for all its profiles.
fn cache(out: &Path) -> PathBuf {
    let target = out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    target.unwrap_or(out).join("cuda-images")
}

/// The architectures to compile for.
fn devices() -> Result<Vec<ComputeCapability>, String> {
    let Some(list) = variable("NIBBLE_CUDA_ARCHS") else { return Ok(ComputeCapability::BUILT.to_vec()) };
    if list == "none" {
        return Ok(Vec::new());
    }
    list.split(',')
        .map(|name| {
            let number = name.trim().trim_start_matches("sm_").trim_end_matches('a').parse::<u8>();
            number.map(|number| ComputeCapability::new(number / 10, number % 10))
        })
        .collect::<Result<_, _>>()
        .map_err(|_| format!("NIBBLE_CUDA_ARCHS: expected a list such as `86,90a`, found `{list}`"))
}

/// The compiler.
fn open() -> Result<nvrtc::Nvrtc, String> {
    let folders = folders();
    let path = places::find_nvrtc(&folders).ok_or_else(|| {
        "none is embedded, no libnvrtc.so.12 or .13 was found: python3 -m pip install nvidia-cuda-nvrtc-cu12, or set NVRTC_DIR to its folder".to_owned()
    })?;
    println!("cargo:rerun-if-changed={}", path.display());
    // For the tests.
    println!("cargo:rustc-env=NIBBLE_NVRTC={}", path.display());
    nvrtc::Nvrtc::open(&path).map_err(|error| error.to_string())
}

/// Where NVRTC is looked for, the nearest first.
fn folders() -> Vec<PathBuf> {
    let path = |name: &str| variable(name).map(PathBuf::from);
    let mut folders: Vec<PathBuf> = path("NVRTC_DIR").into_iter().collect();
    for toolkit in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(path) {
        folders.extend(places::toolkit_folders(&toolkit));
    }
    for prefix in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path) {
        folders.extend(places::wheel_folders(&prefix));
        folders.push(prefix.join("lib"));
    }
    let toolkits = places::toolkits(Path::new("/usr/local"));
    folders.extend(toolkits.iter().flat_map(|toolkit| places::toolkit_folders(toolkit)));
    folders
}

/// A variable's text, if it is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
