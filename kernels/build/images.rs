//! Compiles modules for architectures, in parallel, and keeps what it compiled for the next build.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use crate::{
    arch::ComputeCapability,
    log::Log,
    nvrtc::{Nvrtc, Program, options},
    sources::Module,
};

/// How hard deflate tries: a tenth smaller than at its usual 6, for a second of the whole build.
const LEVEL: u8 = 9;

/// A compiled module.
pub(crate) struct Image {
    pub(crate) module: String,
    pub(crate) device: ComputeCapability,
    /// The file that holds it, packed.
    pub(crate) path: PathBuf,
    /// Bytes unpacked.
    pub(crate) size: usize,
}

/// The images of all modules for all devices, in the folder `out`, and what went wrong. `cache` keeps them for later builds.
pub(crate) fn compile(
    nvrtc: &Nvrtc,
    modules: &[Module],
    devices: &[ComputeCapability],
    out: &Path,
    cache: &Path,
) -> (Vec<Image>, Vec<String>) {
    for folder in [out, cache] {
        if let Err(error) = fs::create_dir_all(folder) {
            return (Vec::new(), vec![format!("create {}: {error}", folder.display())]);
        }
    }
    let mut jobs: Vec<(&Module, ComputeCapability)> =
        modules.iter().flat_map(|module| devices.iter().map(move |&device| (module, device))).collect();
    jobs.retain(|(module, device)| !module.hopper_only() || *device == ComputeCapability::HOPPER);
    // Those that take long first, so that no thread is left with one at the end.
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|&job| std::cmp::Reverse(jobs[job].0.source.len() * jobs[job].0.kernels.len()));

    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(&job) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (module, device) = jobs[job];
            done.push((job, image(nvrtc, module, device, out, cache)));
        }
        done
    };
    let mut results: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads()).map(|_| scope.spawn(work)).collect();
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

/// As many as cargo runs jobs.
fn threads() -> usize {
    let jobs = crate::variable("NUM_JOBS").and_then(|jobs| jobs.parse().ok());
    jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// One image: from the cache if it was compiled from the same text before. An image with undeclared spills is one all the same.
fn image(
    nvrtc: &Nvrtc,
    module: &Module,
    device: ComputeCapability,
    out: &Path,
    cache: &Path,
) -> Result<(Image, Vec<String>), String> {
    let arch = device.arch_name();
    let hash = options(device).iter().fold(module.hash(), |hash, option| hash.add(option.as_bytes()));
    let key = hash.add(nvrtc.version().to_string().as_bytes()).add(&[LEVEL]).name();
    let begins = format!("{}.{arch}.", module.name);
    let name = format!("{begins}{key}");
    let (size, log, packed) = if let Some(known) = read(&cache.join(&name)) {
        known
    } else {
        let headers: Vec<(&str, &str)> = module.headers.iter().map(|(name, source)| (&name[..], &source[..])).collect();
        let program = Program { name: &module.name, source: &module.source, headers: &headers };
        let compiled = nvrtc.compile(&program, device).map_err(|error| error.to_string())?;
        let (size, packed) = (compiled.image.len(), miniz_oxide::deflate::compress_to_vec(&compiled.image, LEVEL));
        remove(cache, &begins);
        write(&cache.join(&name), size, &compiled.log, &packed).map_err(|error| format!("keep {name}: {error}"))?;
        (size, compiled.log, packed)
    };
    let path = out.join(format!("{begins}packed"));
    // An unchanged file is left alone, or cargo would see a change.
    if fs::read(&path).ok().as_ref() != Some(&packed) {
        fs::write(&path, &packed).map_err(|error| format!("write {}: {error}", path.display()))?;
    }
    let problems = check(module, device, &log);
    Ok((Image { module: module.name.clone(), device, path, size }, problems))
}

/// A file of the cache: the image's size and the log's, in bytes, the log, the packed image.
fn read(path: &Path) -> Option<(usize, String, Vec<u8>)> {
    let bytes = fs::read(path).ok()?;
    let (sizes, rest) = bytes.split_at_checked(16)?;
    let number = |at: usize| Some(u64::from_le_bytes(sizes[at..at + 8].try_into().ok()?) as usize);
    let (log, packed) = rest.split_at_checked(number(8)?)?;
    Some((number(0)?, String::from_utf8(log.to_vec()).ok()?, packed.to_vec()))
}

/// Written beside, then renamed: builds of two profiles may run at once.
fn write(path: &Path, size: usize, log: &str, packed: &[u8]) -> io::Result<()> {
    let sizes = [size, log.len()].map(|size| (size as u64).to_le_bytes()).concat();
    let beside = path.with_extension(format!("part{}", std::process::id()));
    fs::write(&beside, [&sizes, log.as_bytes(), packed].concat())?;
    fs::rename(beside, path)
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
    let place = format!("{}.cu for {}", module.name, device.arch_name());
    let Log { kernels, spills } = Log::read(log);
    let mut problems = Vec::new();
    let known = |name: &String| module.kernels.iter().any(|kernel| kernel.name == *name);
    let unknown = kernels.iter().filter(|name| !known(name));
    problems.extend(unknown.map(|name| format!("{place}: kernel `{name}` is not written out in the source")));
    // sm_75 has no bf16: sources leave those kernels out.
    if device.major >= 8 {
        let missing = module.kernels.iter().filter(|kernel| !kernels.contains(&kernel.name));
        problems.extend(missing.map(|kernel| format!("{place}: the image has no kernel `{}`", kernel.name)));
    }
    for (name, spilled) in spills {
        let declared = module.spills.iter().find(|declared| declared.kernel == name).map_or(0, |declared| declared.bytes);
        if spilled > declared {
            problems.push(format!("{place}: `{name}` spills {spilled} bytes, {declared} declared"));
        }
    }
    problems
}
