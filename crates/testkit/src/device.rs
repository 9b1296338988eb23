//! What tests run on, as the environment says.

use std::path::PathBuf;

/// `None`: the CPU. With `NIBBLE_TEST_DEVICE=cuda` the first GPU, whose libraries are looked for in these folders
/// (`LD_LIBRARY_PATH`) and where systems keep them.
///
/// # Panics
/// For another device; and for the CPU when `REQUIRE_CUDA=1` says that a GPU must be tested.
#[must_use]
pub fn gpu_library_folders() -> Option<Vec<PathBuf>> {
    let device = std::env::var("NIBBLE_TEST_DEVICE").unwrap_or_default();
    match device.as_str() {
        "cuda" => {
            let folders = std::env::var_os("LD_LIBRARY_PATH");
            Some(folders.map(|list| std::env::split_paths(&list).collect()).unwrap_or_default())
        }
        "" | "cpu" => {
            assert!(std::env::var_os("REQUIRE_CUDA").is_none(), "REQUIRE_CUDA is set, and NIBBLE_TEST_DEVICE is not `cuda`");
            None
        }
        other => panic!("NIBBLE_TEST_DEVICE: expected `cpu` or `cuda`, found `{other}`"),
    }
}
