//! Kernels of a GPU on shapes of an 8B and a 70B Llama, by the device's clock, with caches that hold nothing of the operands. Ends
//! with a table: bytes or floating-point operations a second, and their share of a plain copy or a plain bf16 matrix product
//! in the same run.
//!
//! `cargo bench -p nibble-tensor --bench cuda_kernels [-- FILTER]`; without a GPU it says so and does nothing. cuBLASLt is looked for
//! in `LD_LIBRARY_PATH` and where systems keep it.
#![allow(missing_docs, clippy::print_stdout)]

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput};
use nibble_nf4::QuantConfig;
use nibble_tensor::{
    Arena, DType, Device, Result, Rng, Tensor, Weight,
    cuda::{
        CudaDevice, KernelTimer, OpenOptions,
        libraries::{self, SearchPaths},
    },
    ops::{
        Documents, adamw, attention, dequantize,
        glu::{self, Activation},
        linear::{self, Part, PartGrads},
        lm_head_loss, quantize, rms_norm,
        rope::{self, RopeTable},
        step,
    },
};

/// What a kernel is measured by.
#[derive(Clone, Copy)]
enum Work {
    Bytes(usize),
    Flops(f64),
}

struct Bench {
    criterion: Criterion,
    arena: Arena,
    timer: KernelTimer,
    /// Bytes and floating-point operations a second of a plain copy and a plain product.
    limits: [f64; 2],
    /// Of the table.
    rows: Vec<String>,
}

/// How long each is measured for.
const MEASURED: Duration = Duration::from_millis(150);

/// The median of some times, in seconds.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

impl Bench {
    fn new(device: CudaDevice) -> Result<Self> {
        let arena = Arena::on(Device::Cuda(device), usize::MAX)?;
        let (timer, criterion) = (KernelTimer::new(&arena)?, Criterion::default());
        let criterion = criterion.sample_size(10).nresamples(1000).warm_up_time(Duration::from_millis(20));
        let criterion = criterion.measurement_time(MEASURED).without_plots().configure_from_args();
        Ok(Self { criterion, arena, timer, limits: [0.0; 2], rows: Vec::new() })
    }

    /// Seconds of `work`, the median of as long a time as the others are measured for, after one that does not count.
    fn seconds(&mut self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        let mut times = Vec::new();
        while times.iter().sum::<f64>() < MEASURED.as_secs_f64() {
            times.push(self.timer.time(&mut work)?.as_secs_f64());
        }
        Ok(median(&mut times))
    }

    /// The rates that the others are a share of.
    fn find_limits(&mut self) -> Result<()> {
        let source = Tensor::zeros(&self.arena, DType::F32, [1 << 28])?;
        let mut target = Tensor::zeros(&self.arena, DType::F32, [1 << 28])?;
        let copy = self.seconds(|| source.convert_into(&mut target))?;
        self.limits[0] = (2usize << 30) as f64 / copy;
        self.rows.push(format!("| plain copy of 1 GiB | {:.1} | {:.0} GB/s | |", 1e6 * copy, self.limits[0] / 1e9));
        drop((source, target));
        self.find_product_limit()
    }

    /// The rate of a plain product by cuBLASLt.
    fn find_product_limit(&mut self) -> Result<()> {
        let mut plain = self.plain_product()?;
        let seconds = self.seconds(&mut plain)?;
        self.set_product_limit("at first", seconds);
        Ok(())
    }

    fn plain_product(&self) -> Result<impl FnMut() -> Result<()> + use<>> {
        let (m, n, k) = LINEAR;
        let (x, plain) = (self.normal(1, [m, k])?, dense(self.normal(2, [n, k])?));
        // A bias costs nothing that can be measured, and leaves the product to the library, whose rate ours are to be held against.
        let part = Part { bias: Some(Tensor::zeros(&self.arena, DType::Bf16, [n])?), ..plain };
        Ok(move || linear::forward(&x, std::slice::from_ref(&part)).map(drop))
    }

    fn set_product_limit(&mut self, when: &str, seconds: f64) {
        let (m, n, k) = LINEAR;
        self.limits[1] = flops_of(LINEAR) / seconds;
        let rate = self.limits[1] / 1e12;
        self.rows.push(format!(
            "| plain bf16 product by cuBLASLt, {m} x {n} x {k}, {when} | {:.1} | {rate:.1} TFLOP/s | |",
            1e6 * seconds
        ));
    }

    /// As [`Bench::run`], by turns with the plain product that it is a share of: the rate of both falls and rises with the card's clock.
    fn run_beside_plain(&mut self, name: &str, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        let (mut plain, mut times) = (self.plain_product()?, Vec::new());
        let amount = Work::Flops(flops_of(LINEAR));
        let median_of_work = self.measure(name, amount, |timer| {
            times.push(timer.time(&mut plain)?.as_secs_f64());
            timer.time(&mut work)
        });
        if let Some(seconds) = median_of_work {
            self.set_product_limit("by turns with the next", median(&mut times));
            self.report(name, amount, seconds);
        }
        Ok(())
    }

    /// Measures what `work` hands to the device, gaps included.
    fn run(&mut self, name: &str, amount: Work, mut work: impl FnMut() -> Result<()>) {
        let seconds = self.measure(name, amount, |timer| timer.time(&mut work));
        if let Some(seconds) = seconds {
            self.report(name, amount, seconds);
        }
    }

    /// Measures the kernels of `work` whose names begin with `prefix`.
    fn run_kernels(&mut self, name: &str, prefix: &str, amount: Work, mut work: impl FnMut() -> Result<()>) {
        let seconds = self.measure(name, amount, |timer| {
            let times = timer.time_kernels(&mut work)?;
            let milliseconds: f64 = times.iter().filter(|time| time.name.starts_with(prefix)).map(|time| time.milliseconds).sum();
            Ok(Duration::from_secs_f64(milliseconds / 1e3))
        });
        if let Some(seconds) = seconds {
            self.report(name, amount, seconds);
        }
    }

    /// The median of the seconds that `once` says; nothing where the command's filter leaves it out.
    fn measure(&mut self, name: &str, amount: Work, mut once: impl FnMut(&mut KernelTimer) -> Result<Duration>) -> Option<f64> {
        let (timer, mut times) = (&mut self.timer, Vec::new());
        let mut group = self.criterion.benchmark_group("cuda");
        group.throughput(match amount {
            Work::Bytes(bytes) => Throughput::Bytes(bytes as u64),
            Work::Flops(flops) => Throughput::Elements(flops as u64),
        });
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let times = (0..count).map(|_| once(timer).expect("the device")).inspect(|time| times.push(time.as_secs_f64()));
                times.sum()
            });
        });
        group.finish();
        (!times.is_empty()).then(|| median(&mut times))
    }

    fn report(&mut self, name: &str, amount: Work, seconds: f64) {
        let (amount, limit, scale, unit) = match amount {
            Work::Bytes(bytes) => (bytes as f64, self.limits[0], 1e9, "GB/s"),
            Work::Flops(flops) => (flops, self.limits[1], 1e12, "TFLOP/s"),
        };
        let rate = amount / seconds;
        let share = 100.0 * rate / limit;
        self.rows.push(format!("| {name} | {:.1} | {:.1} {unit} | {share:.1} % |", 1e6 * seconds, rate / scale));
    }

    /// bf16 numbers of the standard normal distribution, a million of them again and again.
    fn normal<const N: usize>(&self, seed: u64, shape: [usize; N]) -> Result<Tensor> {
        normals(&self.arena, seed, shape)
    }
}

fn normals<const N: usize>(arena: &Arena, seed: u64, shape: [usize; N]) -> Result<Tensor> {
    let rng = Rng::new(seed);
    let numel = shape.iter().product::<usize>();
    let pattern: Vec<f32> = (0..numel.min(1 << 20) as u64).map(|n| rng.normal(n)).collect();
    Tensor::tiled(arena, &pattern, shape)?.to_dtype(DType::Bf16)
}

/// Rows, outputs and inputs of the products.
const LINEAR: (usize, usize, usize) = (8192, 14_336, 4096);

fn flops_of((m, n, k): (usize, usize, usize)) -> f64 {
    2.0 * (m * n * k) as f64
}

fn dense(weight: Tensor) -> Part {
    Part { weight: Weight::Dense(weight), bias: None, adapter: None }
}

fn nf4(arena: &Arena, shape: [usize; 2]) -> Result<Part> {
    let weight = Weight::random(arena, shape, &QuantConfig::default(), 0.02, Rng::new(7))?;
    Ok(Part { weight, bias: None, adapter: None })
}

/// 4-bit weights: widened, made, and multiplied by one row.
fn formats(bench: &mut Bench) -> Result<()> {
    for [n, k] in [[14_336, 4096], [28_672, 8192]] {
        let (part, x) = (nf4(&bench.arena, [n, k])?, bench.normal(1, [1, k])?);
        let (packed, wide) = (part.weight.bytes(), 2 * n * k);
        bench.run(&format!("dequantize NF4 + DQ, {n} x {k}"), Work::Bytes(packed + wide), || {
            dequantize::forward(&part.weight, DType::Bf16).map(drop)
        });
        bench.run(&format!("one row x NF4 + DQ, {n} x {k}"), Work::Bytes(packed), || {
            linear::forward(&x, std::slice::from_ref(&part)).map(drop)
        });
        let source = bench.normal(2, [n, k])?;
        bench.run_kernels(&format!("quantize NF4 + DQ, {n} x {k}"), "quantize", Work::Bytes(packed + wide), || {
            quantize::forward(&source, &QuantConfig::default()).map(drop)
        });
    }
    Ok(())
}

const TOKENS: usize = 8192;
const CHANNELS: usize = 4096;
const HIDDEN: usize = 14_336;
const VOCAB: usize = 128_256;

fn elementwise(bench: &mut Bench) -> Result<()> {
    let config = rms_norm::Config { eps: 1e-5, offset: 0.0 };
    let (bytes, shape) = (2 * TOKENS * CHANNELS, [TOKENS, CHANNELS]);
    let (x, weight) = (bench.normal(1, shape)?, bench.normal(3, [CHANNELS])?.to_dtype(DType::F32)?);
    let mut r = Some(bench.normal(2, shape)?);
    bench.run("residual + RMSNorm forward", Work::Bytes(4 * bytes), || {
        let (sum, ..) = rms_norm::residual_forward(&x, taken(&mut r), &weight, config)?;
        r = Some(sum);
        Ok(())
    });
    let (r, _, inv) = rms_norm::residual_forward(&x, bench.normal(2, shape)?, &weight, config)?;
    let mut dr = Some(bench.normal(4, shape)?);
    bench.run("residual + RMSNorm backward", Work::Bytes(4 * bytes), || {
        dr = Some(rms_norm::residual_backward(taken(&mut dr), &x, &r, &weight, &inv, config, None)?);
        Ok(())
    });

    let frequencies: Vec<f32> = (0..64).map(|i| 500_000f32.powf(-(i as f32) / 64.0)).collect();
    let table = RopeTable::new(&bench.arena, &frequencies, 1.0, 2048)?;
    let positions: Vec<u32> = (0..TOKENS as u32).map(|t| t % 2048).collect();
    let positions = Tensor::from_slice(&bench.arena, &positions, [TOKENS])?;
    let mut q = Some(bench.normal(1, [TOKENS, 32, 128])?);
    bench.run("rope, 32 heads of 128", Work::Bytes(2 * bytes), || {
        q = Some(rope::forward(taken(&mut q), &positions, &table)?);
        Ok(())
    });

    let bytes = 2 * TOKENS * HIDDEN;
    let [gate, up, dy] =
        [bench.normal(1, [TOKENS, HIDDEN])?, bench.normal(2, [TOKENS, HIDDEN])?, bench.normal(3, [TOKENS, HIDDEN])?];
    bench.run("GLU forward", Work::Bytes(3 * bytes), || glu::forward(&gate, &up, Activation::Silu).map(drop));
    bench
        .run("GLU backward", Work::Bytes(5 * bytes), || glu::backward(&dy, gate.clone(), up.clone(), Activation::Silu).map(drop));
    Ok(())
}

/// A value that is put back after each use, so that it is written in place.
fn taken(slot: &mut Option<Tensor>) -> Tensor {
    slot.take().expect("a value")
}

fn losses_and_updates(bench: &mut Bench) -> Result<()> {
    let rows = 2048;
    let (h, weight) = (bench.normal(1, [rows, CHANNELS])?, bench.normal(2, [VOCAB, CHANNELS])?);
    let labels: Vec<i32> = (0..rows).map(|row| (row * 61 % VOCAB) as i32).collect();
    let labels = lm_head_loss::Labels::new(&bench.arena, &labels, 1.0 / rows as f32)?;
    let config = lm_head_loss::Config { softcap: None };
    let bytes = 2 * 2 * rows * VOCAB;
    bench.run_kernels("cross entropy rows, forward and backward", "cross_entropy", Work::Bytes(bytes), || {
        lm_head_loss::forward(&h, &weight, &labels, config, true).map(drop)
    });

    let n = 168_000_000;
    let zeros = || Tensor::zeros(&bench.arena, DType::F32, [n]);
    let (mut p, g, mut m, mut v) = (zeros()?, normals(&bench.arena, 5, [n])?.to_dtype(DType::F32)?, zeros()?, zeros()?);
    let decay = adamw::DecayOrder::Before;
    let hyper = adamw::Hyper { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 10, decay };
    let values = Tensor::from_slice(&bench.arena, &step::values(&hyper, 1.0), [step::LEN])?;
    bench.run("AdamW f32 over 168 M", Work::Bytes(28 * n), || {
        adamw::captured_step(p.view_mut()?, &g, m.view_mut()?, v.view_mut()?, None, &values, &hyper)
    });
    Ok(())
}

fn products(bench: &mut Bench) -> Result<()> {
    let (m, n, k) = LINEAR;
    let (x, dy, part) = (bench.normal(1, [m, k])?, [bench.normal(2, [m, n])?], nf4(&bench.arena, [n, k])?);
    let parts = std::slice::from_ref(&part);
    bench.run_beside_plain(&format!("linear {m} x {n} x {k}, NF4 base, forward"), || linear::forward(&x, parts).map(drop))?;
    let (_, saved) = linear::forward(&x, parts)?;
    bench.run_beside_plain(&format!("linear {m} x {n} x {k}, NF4 base, input gradient"), || {
        linear::backward(&dy, x.clone(), &saved, parts, vec![PartGrads::default()], true).map(drop)
    })
}

fn attentions(bench: &mut Bench) -> Result<()> {
    let (heads, size) = (32, 128);
    for (length, batch) in [(2048, 4), (8192, 1), (16_384, 1)] {
        for kv_heads in [32, 8] {
            let tokens = length * batch;
            let offsets: Vec<u32> = (0..=batch).map(|i| (i * length) as u32).collect();
            let documents = Documents::new(&bench.arena, &offsets)?;
            let [q, d_o] = [bench.normal(1, [tokens, heads, size])?, bench.normal(2, [tokens, heads, size])?];
            let [k, v] = [bench.normal(3, [tokens, kv_heads, size])?, bench.normal(4, [tokens, kv_heads, size])?];
            let config = attention::Config { scale: 1.0 / (size as f32).sqrt(), window: None, softcap: None };
            // Two products over the visible half of the pairs; backward five.
            let flops = 2.0 * (tokens * length * heads * size) as f64;
            let name = |pass| format!("attention {pass}, {batch} x {length}, 32 heads, {kv_heads} key/value heads");
            bench.run(&name("forward"), Work::Flops(flops), || attention::forward(&q, &k, &v, &documents, config).map(drop));
            let (o, lse) = attention::forward(&q, &k, &v, &documents, config)?;
            bench.run(&name("backward"), Work::Flops(2.5 * flops), || {
                black_box(attention::backward(&d_o, &q, &k, &v, &o, &lse, &documents, config)?);
                Ok(())
            });
            let table = RopeTable::new(&bench.arena, &[0.5; 64], 1.0, length)?;
            bench.run(&name("backward, to before rope"), Work::Flops(2.5 * flops), || {
                let saved = attention::Saved { d_o: &d_o, q: &q, k: &k, v: &v, o: &o, lse: &lse };
                let wanted = attention::Wanted { side_by_side: None, rope: Some(&table) };
                black_box(attention::backward_to(&saved, &documents, config, wanted)?);
                Ok(())
            });
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    if CudaDevice::count() == 0 {
        println!("no GPU");
        return Ok(());
    }
    let folders = std::env::var_os("LD_LIBRARY_PATH").map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
    let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
    let device = CudaDevice::open(0, &OpenOptions { libraries, cache: None })?;
    let mut bench = Bench::new(device)?;
    bench.find_limits()?;
    for group in [formats, elementwise, losses_and_updates, products, attentions] {
        group(&mut bench)?;
    }
    bench.criterion.final_summary();
    println!("\n| kernel | microseconds | rate | share |\n|---|---|---|---|\n{}", bench.rows.join("\n"));
    Ok(())
}
