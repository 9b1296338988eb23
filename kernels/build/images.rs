//! Compiles modules for architectures, in parallel, and keeps what it compiled for the next build.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use crate::{
    arch::ComputeCapability,
    log,
    nvrtc::{Nvrtc, Program, options},
    sources::Module,
};

/// A compiled module.
pub(crate) struct Image {
    pub(crate) module: String,
    pub(crate) device: ComputeCapability,
    /// The file that holds it.
    pub(crate) path: PathBuf,
}

/// The images of all modules for all devices, and what went wrong.
pub(crate) fn compile(nvrtc: &Nvrtc, modules: &[Module], devices: &[ComputeCapability], out: &Path) -> (Vec<Image>, Vec<String>) {
    let folder = out.join("images");
    if let Err(error) = fs::create_dir_all(&folder) {
        return (Vec::new(), vec![format!("create {}: {error}", folder.display())]);
    }
    let mut jobs: Vec<(&Module, ComputeCapability)> =
        modules.iter().flat_map(|module| devices.iter().map(move |&device| (module, device))).collect();
    jobs.retain(|(module, device)| !module.hopper_only() || *device == ComputeCapability::HOPPER);
    // Long sources first, so that no thread is left with one at the end.
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|&job| std::cmp::Reverse(jobs[job].0.source.len()));

    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let work = || {
        let mut done = Vec::new();
        while let Some(&job) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (module, device) = jobs[job];
            done.push((job, image(nvrtc, module, device, &folder)));
        }
        done
    };
    let mut results: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a compile does not panic")).collect()
    });
    results.sort_by_key(|(job, _)| *job);
    let (mut images, mut problems) = (Vec::new(), Vec::new());
    for (_, result) in results {
        match result {
            Ok((image, found)) => {
                images.push(image);
                problems.extend(found);
            }
            Err(problem) => problems.push(problem),
        }
    }
    (images, problems)
}

/// One image: from the folder if it was compiled from the same text before.
fn image(nvrtc: &Nvrtc, module: &Module, device: ComputeCapability, folder: &Path) -> Result<(Image, Vec<String>), String> {
    let arch = device.arch_name();
    let hash = options(device).iter().fold(module.hash(), |hash, option| hash.add(option.as_bytes()));
    let key = hash.add(nvrtc.version().to_string().as_bytes()).name();
    let begins = format!("{}.{arch}.", module.name);
    let (path, log_path) = (folder.join(format!("{begins}{key}.cubin")), folder.join(format!("{begins}{key}.log")));
    let known = if path.is_file() { fs::read_to_string(&log_path).ok() } else { None };
    let log = if let Some(log) = known {
        log
    } else {
        let headers: Vec<(&str, &str)> = module.headers.iter().map(|(name, source)| (&name[..], &source[..])).collect();
        let program = Program { name: &module.name, source: &module.source, headers: &headers };
        let compiled = nvrtc.compile(&program, device).map_err(|error| error.to_string())?;
        remove(folder, &begins);
        let write = || {
            fs::write(&log_path, &compiled.log)?;
            let beside = path.with_extension("part");
            fs::write(&beside, &compiled.image)?;
            fs::rename(beside, &path)
        };
        write().map_err(|error| format!("write {}: {error}", path.display()))?;
        compiled.log
    };
    let problems = check(module, device, &log);
    Ok((Image { module: module.name.clone(), device, path }, problems))
}

/// Removes what earlier texts of a module left. A file that stays costs disk space alone.
fn remove(folder: &Path, begins: &str) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(begins) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The image has the kernels of the table and no other, and none spills registers unsaid.
fn check(module: &Module, device: ComputeCapability, log: &str) -> Vec<String> {
    let (name, arch) = (&module.name, device.arch_name());
    let found = log::spills(log);
    let mut problems = Vec::new();
    for (kernel, &spilled) in &found {
        if !module.kernels.iter().any(|known| known.name == *kernel) {
            problems.push(format!("{name}.cu for {arch}: kernel `{kernel}` is not written out in the source"));
        }
        let declared = module.spills.iter().find(|declared| declared.kernel == *kernel).map_or(0, |declared| declared.bytes);
        if spilled > declared {
            problems.push(format!("{name}.cu for {arch}: `{kernel}` spills {spilled} bytes, {declared} declared"));
        }
    }
    // sm_75 has no bf16: sources leave those kernels out.
    if device.major >= 8 {
        let missing = module.kernels.iter().filter(|kernel| !found.contains_key(&kernel.name));
        problems.extend(missing.map(|kernel| format!("{name}.cu for {arch}: the image has no kernel `{}`", kernel.name)));
    }
    problems
}
