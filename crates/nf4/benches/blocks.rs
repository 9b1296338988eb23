//! GB/s of quantising and decoding a 14336 x 4096 weight (Llama-3-8B's up projection), beside a memcpy of the same bytes.
//!
//! Throughput counts the bytes of the unquantised side: what is read in quantising, what is written in decoding, what a
//! memcpy writes. `cargo bench -p nibble-nf4`

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use half::bf16;
use nibble_nf4::{DynamicMap, Element, Format, QuantConfig, dequantize, quantize, quantize_dynamic};
use rayon::prelude::*;

const ROWS: usize = 14336;
const COLS: usize = 4096;

/// A weight with values that look normal: sums of uniform ones.
fn weight<T: Element>() -> Vec<T> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..ROWS * COLS).map(|_| T::from_f32(0.04 * (uniform() + uniform() + uniform()))).collect()
}

fn copy<T: Element>(from: &[T], to: &mut [T]) {
    let chunk = from.len().div_ceil(rayon::current_num_threads());
    to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
}

fn group<'a>(c: &'a mut Criterion, name: &str, bytes: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::BytesDecimal(bytes as u64)).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group
}

fn element<T: Element>(c: &mut Criterion) {
    let x: Vec<T> = weight();
    let mut out = x.clone();
    let mut group = group(c, T::TYPE.name(), size_of_val(x.as_slice()));
    group.bench_function("memcpy", |b| b.iter(|| copy(black_box(&x), &mut out)));
    for format in [Format::Nf4, Format::Fp4] {
        for double_quant in [false, true] {
            let config = QuantConfig { format, block_size: 64, double_quant };
            let name = format!("{}{}", format.name(), if double_quant { "_double" } else { "" });
            let q = quantize(&x, &config).expect("finite");
            group.bench_function(format!("quantize_{name}"), |b| b.iter(|| quantize(black_box(&x), &config)));
            group.bench_function(format!("dequantize_{name}"), |b| b.iter(|| dequantize(black_box(&q), &mut out)));
        }
    }
    group.finish();
}

/// Decoding runs of a packer's size into a buffer that stays in cache, on one thread.
fn ranges(c: &mut Criterion) {
    let x: Vec<f32> = weight();
    let q = quantize(&x, &QuantConfig::default()).expect("finite");
    for run in [64, 256, 4096] {
        let mut out = vec![0f32; run];
        let mut group = group(c, "dequantize_range", 4 * run);
        let mut at = 0;
        group.bench_function(run.to_string(), |b| {
            b.iter(|| {
                at = (at + run) % (1 << 20);
                q.view().dequantize_range(at, black_box(&mut out));
            });
        });
    }
}

fn dynamic(c: &mut Criterion) {
    let x: Vec<f32> = weight();
    let x = &x[..ROWS * COLS / 8];
    let mut group = group(c, "dynamic8", size_of_val(x));
    group.bench_function("quantize", |b| b.iter(|| quantize_dynamic(black_box(x), DynamicMap::Signed, 256)));
}

criterion_group!(benches, element::<f32>, element::<bf16>, ranges, dynamic);
criterion_main!(benches);
