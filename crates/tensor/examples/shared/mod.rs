//! What the examples that measure a GPU share.

use std::time::Instant;

use nibble_tensor::{
    Arena, DType, Device, Rng, Tensor,
    cuda::{
        CudaDevice, Graph, OpenOptions,
        libraries::{self, SearchPaths},
    },
};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const REPLAYS: u32 = 10;

/// The first GPU, an arena of it, and the GB/s of a copy of 1 GiB on it, read and written.
pub(crate) fn open() -> Result<(CudaDevice, Arena, f64)> {
    let folders = std::env::var_os("LD_LIBRARY_PATH").map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
    let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
    let device = CudaDevice::open(0, &OpenOptions { libraries, cache: None })?;
    let arena = Arena::on(Device::Cuda(device), usize::MAX)?;
    let copy = copy_rate(device, &arena)?;
    println!("copy: {copy:.0} GB/s on {}", device.info().name);
    Ok((device, arena, copy))
}

fn copy_rate(device: CudaDevice, arena: &Arena) -> Result<f64> {
    let from = Tensor::zeros(arena, DType::F32, [1 << 28])?;
    let mut to = Tensor::zeros(arena, DType::F32, [1 << 28])?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        device.synchronize()?;
        let begin = Instant::now();
        for _ in 0..4 {
            to.copy_rows(0, &from)?;
        }
        device.synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64() / 4.0);
    }
    Ok((8u64 << 28) as f64 / best / 1e9)
}

/// Seconds of `work` as a graph, the best of three times that it is replayed in a row.
pub(crate) fn seconds(device: CudaDevice, arena: &Arena, mut work: impl FnMut() -> nibble_tensor::Result<()>) -> Result<f64> {
    work()?;
    let (graph, ()) = Graph::capture(arena, work)?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        graph.launch()?;
        device.synchronize()?;
        let begin = Instant::now();
        for _ in 0..REPLAYS {
            graph.launch()?;
        }
        device.synchronize()?;
        best = best.min(begin.elapsed().as_secs_f64() / f64::from(REPLAYS));
    }
    Ok(best)
}

/// bf16 numbers of the standard normal distribution, a million of them again and again.
pub(crate) fn normal(seed: u64, arena: &Arena, shape: [usize; 2]) -> Result<Tensor> {
    let rng = Rng::new(seed);
    let pattern: Vec<f32> = (0..(shape[0] * shape[1]).min(1 << 20) as u64).map(|n| rng.normal(n)).collect();
    Ok(Tensor::tiled(arena, &pattern, shape)?.to_dtype(DType::Bf16)?)
}
