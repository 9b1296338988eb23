//! The device that the tests run on.

use nibble_tensor::{
    Arena, Device,
    cuda::{
        CudaDevice, OpenOptions,
        libraries::{self, SearchPaths},
    },
};

/// Memory of the CPU, or with `NIBBLE_TEST_DEVICE=cuda` of the first GPU (whose libraries are looked for in `LD_LIBRARY_PATH`
/// and where systems keep them).
pub(crate) fn arena() -> Arena {
    if std::env::var_os("NIBBLE_TEST_DEVICE").is_none_or(|device| device != "cuda") {
        return Arena::new(Device::Cpu);
    }
    let folders = std::env::var_os("LD_LIBRARY_PATH").map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
    let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
    let device = CudaDevice::open(0, &OpenOptions { libraries, cache: None }).expect("a GPU");
    Arena::on(Device::Cuda(device), usize::MAX).expect("its memory")
}
