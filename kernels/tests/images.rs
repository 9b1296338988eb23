//! The table of kernels, the images that the build embedded, and the compile at run time.
//!
//! Without NVRTC there are no images, and what needs them is skipped; `REQUIRE_KERNELS=1` makes that a failure.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use nibble_kernels::{ArgKind, ComputeCapability, Error, cached, compile, has_images, image, kernel, kernels, modules};

fn required() -> bool {
    std::env::var("REQUIRE_KERNELS").is_ok_and(|value| !value.is_empty() && value != "0")
}

/// The NVRTC that the build used.
fn nvrtc() -> Option<&'static Path> {
    let path = option_env!("NIBBLE_NVRTC").map(Path::new).filter(|path| path.is_file());
    assert!(path.is_some() || !required(), "REQUIRE_KERNELS=1 without NVRTC");
    path
}

/// The module that compiles fastest, and a device it is for.
fn small() -> (&'static str, ComputeCapability) {
    let module = modules().iter().filter(|module| !module.hopper_only).min_by_key(|module| module.source.len());
    (module.expect("there are modules").name, ComputeCapability::new(8, 0))
}

#[test]
fn kernels_are_sorted_unique_and_found_by_name() {
    assert!(kernels().windows(2).all(|pair| pair[0].name < pair[1].name));
    assert!(kernels().iter().all(|known| kernel(known.name) == Some(known)));
    assert_eq!(kernel("no_such_kernel"), None);
}

#[test]
fn a_kernel_is_named_in_words_and_after_its_16_bit_type() {
    let mut offenders = Vec::new();
    for kernel in kernels() {
        let words: Vec<&str> = kernel.name.split('_').collect();
        let spelled = |word: &&str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let named = words.len() > 1 && words.iter().all(spelled) && kernel.name.starts_with(|c: char| c.is_ascii_lowercase());
        let types = kernel.args.iter().filter_map(|arg| arg.element).filter(|element| matches!(*element, "bf16" | "f16"));
        let typed = types.into_iter().all(|element| words.contains(&element));
        if !named || !typed {
            offenders.push(format!("{}.cu: `{}`", kernel.module, kernel.name));
        }
    }
    assert!(offenders.is_empty(), "expected `op_fwd|bwd_dtype`, found:\n{}", offenders.join("\n"));
}

#[test]
fn a_kernel_writes_something_and_a_pointer_says_to_what() {
    for kernel in kernels() {
        assert!(kernel.args.iter().any(|arg| arg.writes), "`{}` writes nothing", kernel.name);
        assert!(kernel.args.iter().all(|arg| (arg.kind == ArgKind::Pointer) == arg.element.is_some()), "{kernel:?}");
    }
}

#[test]
fn every_source_is_a_module_with_kernels() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = fs::read_dir(folder).unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.strip_suffix(".cu").map(str::to_owned)
    });
    let found: BTreeSet<String> = modules().iter().map(|module| module.name.to_owned()).collect();
    assert_eq!(found, files.collect());
    for module in modules() {
        assert!(kernels().iter().any(|kernel| kernel.module == module.name), "{}.cu has no kernels", module.name);
        assert_eq!(module.hopper_only, module.name.ends_with("_sm90"));
    }
    assert!(kernels().iter().all(|kernel| modules().iter().any(|module| module.name == kernel.module)));
}

#[test]
fn every_module_has_an_image_for_every_architecture() {
    if !required() || std::env::var_os("NIBBLE_CUDA_ARCHS").is_some() {
        return;
    }
    assert!(ComputeCapability::BUILT.into_iter().all(has_images) && !has_images(ComputeCapability::new(7, 0)));
    for module in modules() {
        for device in ComputeCapability::BUILT {
            let image = image(module.name, device);
            let expected = !module.hopper_only || device == ComputeCapability::HOPPER;
            assert_eq!(image.is_some(), expected, "{}.cu for {}", module.name, device.arch_name());
            assert!(image.is_none_or(|image| image.starts_with(b"\x7fELF")), "{}.cu", module.name);
        }
        // Devices with no image of their own.
        assert_eq!(image(module.name, ComputeCapability::new(8, 7)), image(module.name, ComputeCapability::new(8, 6)));
        assert_eq!(image(module.name, ComputeCapability::new(12, 1)), None);
    }
}

#[test]
fn the_compile_at_run_time_gives_the_image_of_the_build() {
    let Some(nvrtc) = nvrtc() else { return };
    let (module, device) = small();
    let compiled = compile(nvrtc, module, device).unwrap();
    assert!(compiled.starts_with(b"\x7fELF"));
    if let Some(image) = image(module, device) {
        assert!(image == compiled, "{module}.cu");
    }
}

#[test]
fn what_cannot_be_compiled_is_said() {
    let (module, device) = small();
    let none = PathBuf::from("/no/libnvrtc.so.12");
    assert!(matches!(compile(&none, "none", device), Err(Error::UnknownModule { .. })));
    assert!(matches!(compile(&none, module, device), Err(Error::Open { .. })));
    if let Some(module) = modules().iter().find(|module| module.hopper_only) {
        assert!(matches!(compile(&none, module.name, device), Err(Error::HopperOnly { .. })));
    }
    let Some(nvrtc) = nvrtc() else { return };
    let error = compile(nvrtc, module, ComputeCapability::new(2, 0)).unwrap_err();
    assert!(matches!(error, Error::Architecture { .. }), "{error}");
}

#[test]
fn a_cached_image_is_the_compiled_one_and_a_damaged_file_is_replaced() {
    let Some(nvrtc) = nvrtc() else { return };
    let (module, device) = small();
    let folder = tempfile::tempdir().unwrap();
    let cached = || cached(folder.path(), nvrtc, module, device).unwrap();
    let files = || fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let first = cached();
    let [path] = &files()[..] else { panic!("expected one file, found {:?}", files()) };
    let whole = fs::read(path).unwrap();
    assert_eq!(cached(), first);
    fs::write(path, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(cached(), first);
    assert_eq!(fs::read(path).unwrap(), whole);
    assert_eq!(files().len(), 1);
}
