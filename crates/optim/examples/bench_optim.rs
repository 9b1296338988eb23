//! Optimizer steps over the 168 M values of a rank-64 adapter of Llama-3-8B: milliseconds, GB/s, and the share of the copy rate
//! measured in the same run.
//!
//! `cargo run --release -p nibble-optim --example bench_optim -- [--device cuda|cpu] [--layers 32] [--steps 20] [--only NAME] [--page BYTES]`
#![allow(clippy::print_stdout)]

use std::time::Instant;

use nibble_optim::{Layout, Optimizer, OptimizerName, Paging};
use nibble_tensor::{
    Arena, DType, Device, Rng, Shape, Tensor,
    cuda::{
        CudaDevice, OpenOptions, Pinned,
        libraries::{self, SearchPaths},
    },
};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Out and in of the linears of a block.
const LINEARS: [[usize; 2]; 7] =
    [[4096, 4096], [1024, 4096], [1024, 4096], [4096, 4096], [14336, 4096], [14336, 4096], [4096, 14336]];
const RANK: usize = 64;

fn option(name: &str, default: &str) -> String {
    let args: Vec<String> = std::env::args().collect();
    let at = args.iter().position(|arg| arg == name);
    at.and_then(|at| args.get(at + 1)).cloned().unwrap_or_else(|| default.to_owned())
}

fn arena(device: &str) -> Result<Arena> {
    if device == "cpu" {
        return Ok(Arena::new(Device::Cpu));
    }
    let folders = std::env::var_os("LD_LIBRARY_PATH").map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
    let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
    let device = CudaDevice::open(0, &OpenOptions { libraries, cache: None })?;
    Ok(Arena::on(Device::Cuda(device), usize::MAX)?)
}

/// As in an adapter's flat buffer: the A of all layers, then the B.
fn layout(layers: usize) -> Layout {
    let each = |make: fn([usize; 2]) -> Shape| (0..layers).flat_map(move |_| LINEARS.map(make));
    Layout::new(
        each(|[_, input]| [RANK, input].into()).chain(each(|[output, _]| [output, RANK].into())).map(|shape| (shape, true)),
    )
}

/// Seconds a call, the device waited for at the end.
fn seconds(arena: &Arena, calls: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let wait = || match arena.device() {
        Device::Cuda(device) => device.synchronize(),
        _ => Ok(()),
    };
    f()?;
    f()?;
    wait()?;
    let begin = Instant::now();
    for _ in 0..calls {
        f()?;
    }
    wait()?;
    Ok(begin.elapsed().as_secs_f64() / calls as f64)
}

fn random(arena: &Arena, len: usize, seed: u64) -> Result<Tensor> {
    let pattern: Vec<f32> = (0..(1 << 20) - 3).map(|i| Rng::new(seed).normal(i) * 0.01).collect();
    Ok(Tensor::tiled(arena, &pattern, [len])?)
}

/// Bytes a second that a copy within memory reads and writes.
fn copy_rate(arena: &Arena, len: usize) -> Result<f64> {
    let (source, mut target) = (random(arena, len, 0)?, Tensor::zeros(arena, DType::F32, [len])?);
    let time = seconds(arena, 20, || Ok(target.copy_rows(0, &source)?))?;
    let rate = 8.0 * len as f64 / time;
    println!("copy within memory: {:.0} GB/s", rate / 1e9);
    Ok(rate)
}

/// Bytes a second to the host, from it, and each way when both go at once.
fn link_rates(arena: &Arena) -> Result<[f64; 3]> {
    let Device::Cuda(device) = arena.device() else { return Ok([f64::INFINITY; 3]) };
    let len = 64 << 20;
    let (mut first, second) = (Tensor::zeros(arena, DType::F32, [len])?, Tensor::zeros(arena, DType::F32, [len])?);
    let (mut source, mut target) = (Pinned::new(device, 4 * len)?, Pinned::new(device, 4 * len)?);
    let there = seconds(arena, 4, || Ok(source.send(&mut first)?))?;
    let back = seconds(arena, 4, || Ok(target.fetch(&second)?))?;
    let both = seconds(arena, 4, || {
        source.send_beside(&mut first)?;
        target.fetch(&second)?;
        Ok(source.join()?)
    })?;
    let rates = [there, back, both].map(|time| 4.0 * len as f64 / time);
    let [there, back, both] = rates.map(|rate| rate / 1e9);
    println!("host link: {there:.1} GB/s to the device, {back:.1} GB/s from it, {both:.1} GB/s each way at once");
    Ok(rates)
}

/// Seconds a step.
fn time(arena: &Arena, optimizer: &mut Optimizer, buffers: &mut (Tensor, Tensor), steps: usize) -> Result<f64> {
    let (params, grads) = buffers;
    seconds(arena, steps, || Ok(optimizer.step(params, grads, 1e-4, 1.0)?))
}

/// An optimizer in pages, with all, half or none of them on the device.
fn paged(
    arena: &Arena,
    layout: &Layout,
    name: OptimizerName,
    buffers: &mut (Tensor, Tensor),
    (steps, link): (usize, [f64; 3]),
) -> Result<()> {
    let config = name.config(0.01);
    let all = config.state_bytes(layout);
    let page: usize = option("--page", "8388608").parse()?;
    let file = (arena.device() == Device::Cpu).then(|| std::env::temp_dir().join("bench_optim.pages"));
    let cases =
        [("all", 2 * all, false), ("half", all / 2, false), ("none", 4 * page, false), ("none, values neither", 4 * page, true)];
    for (share, budget, masters) in cases.into_iter().filter(|case| !case.2 || file.is_none()) {
        let paging = Paging { device_memory: Some(budget), file: file.clone(), masters, page: Some(page) };
        let mut optimizer = Optimizer::paged(arena, layout, config, &paging)?;
        let (time, all) = if masters {
            let mut copies = (buffers.0.to_dtype(DType::Bf16)?, buffers.1.clone());
            optimizer.set_values(&buffers.0)?;
            (time(arena, &mut optimizer, &mut copies, steps)?, all + 4 * layout.numel())
        } else {
            (time(arena, &mut optimizer, buffers, steps)?, all)
        };
        let (pages, resident) = optimizer.pages().unwrap_or((1, 1));
        let away = all as f64 * (pages - resident) as f64 / pages as f64;
        println!(
            "RESULT {name}, {share} of its states on the device ({resident} of {pages} pages): {:.3} ms; {:.1} GB/s each way over the link, {:.0} % of its rate one way, {:.0} % of its rate both ways",
            time * 1e3,
            away / time / 1e9,
            100.0 * away / time / link[0].min(link[1]),
            100.0 * away / time / link[2]
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let arena = arena(&option("--device", "cuda"))?;
    let layout = layout(option("--layers", "32").parse()?);
    let (steps, only): (usize, String) = (option("--steps", "20").parse()?, option("--only", ""));
    let n = layout.numel();
    println!("{:.1} M values", n as f64 / 1e6);
    let rate = copy_rate(&arena, n)?;
    let link = link_rates(&arena)?;
    let mut buffers = (random(&arena, n, 1)?, random(&arena, n, 2)?);
    let mut done = Vec::new();
    for name in OptimizerName::ALL.into_iter().filter(|name| name.as_str().contains(&only)) {
        // Other names of what has been measured.
        if done.contains(&(name.config(0.01), name.is_paged())) {
            continue;
        }
        done.push((name.config(0.01), name.is_paged()));
        if name.is_paged() {
            paged(&arena, &layout, name, &mut buffers, (steps, link))?;
            continue;
        }
        let config = name.config(0.01);
        let time = time(&arena, &mut Optimizer::new(&arena, &layout, config)?, &mut buffers, steps)?;
        // Parameters and states are read and written, gradients read.
        let bytes = 12.0 * n as f64 + 2.0 * config.state_bytes(&layout) as f64;
        println!(
            "RESULT {name}: {:.3} ms, {:.0} GB/s, {:.0} % of the copy rate",
            time * 1e3,
            bytes / time / 1e9,
            100.0 * bytes / time / rate
        );
    }
    Ok(())
}
