//! Attention in FLOP/s (criterion's "elem/s") over the visible half of the scores: 4 D of them forward, 10 D backward, for each
//! visible pair of tokens and each head. The peak is a loop of multiply-adds on as many threads.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nibble_tensor::{
    Arena, DType, Device, Rng, Tensor,
    ops::{
        Documents,
        attention::{self, Config},
    },
};
use rayon::prelude::*;

struct Shape {
    name: &'static str,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    size: usize,
}

const SHAPES: [Shape; 3] = [
    Shape { name: "smollm2-135m", tokens: 512, heads: 9, kv_heads: 3, size: 64 },
    Shape { name: "llama-8b", tokens: 2048, heads: 32, kv_heads: 8, size: 128 },
    Shape { name: "llama-7b", tokens: 2048, heads: 32, kv_heads: 32, size: 128 },
];

fn random(arena: &Arena, seed: u64, dtype: DType, shape: [usize; 3]) -> Tensor {
    let rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| rng.uniform(i) - 0.5).collect();
    Tensor::from_slice(arena, &values, shape).unwrap().to_dtype(dtype).unwrap()
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    group.sample_size(10);
    for Shape { name, tokens, heads, kv_heads, size } in SHAPES {
        for dtype in [DType::F32, DType::Bf16] {
            let arena = Arena::new(Device::Cpu);
            let query = |seed| random(&arena, seed, dtype, [tokens, heads, size]);
            let key = |seed| random(&arena, seed, dtype, [tokens, kv_heads, size]);
            let (q, k, v, d_o) = (query(1), key(2), key(3), query(4));
            let documents = Documents::new(&arena, &[0, tokens as u32]).unwrap();
            let config = Config { scale: 1.0 / (size as f32).sqrt(), window: None, softcap: None };
            let pairs = (tokens * (tokens + 1) / 2 * heads * size) as u64;
            group.throughput(Throughput::Elements(4 * pairs));
            group.bench_function(format!("forward/{name}/{dtype}"), |b| {
                b.iter(|| attention::forward(&q, &k, &v, &documents, config).unwrap());
            });
            let (o, lse) = attention::forward(&q, &k, &v, &documents, config).unwrap();
            group.throughput(Throughput::Elements(10 * pairs));
            group.bench_function(format!("backward/{name}/{dtype}"), |b| {
                b.iter(|| attention::backward(&d_o, &q, &k, &v, &o, &lse, &documents, config).unwrap());
            });
            let last = q.rows(tokens - 1, 1).unwrap();
            group.throughput(Throughput::Elements((4 * tokens * heads * size) as u64));
            group.bench_function(format!("one-token/{name}/{dtype}"), |b| {
                b.iter(|| attention::cached_forward(&last, &k, &v, tokens, config).unwrap());
            });
        }
    }
    group.finish();
}

/// Multiply-adds on registers, on every thread: the rate to compare with.
fn peak(c: &mut Criterion) {
    const STEPS: usize = 100_000;
    let threads = rayon::current_num_threads();
    let mut group = c.benchmark_group("attention");
    let per_thread = STEPS * LANES * 2;
    group.throughput(Throughput::Elements((threads * per_thread) as u64));
    group.bench_function("peak", |b| {
        b.iter(|| (0..threads).into_par_iter().with_max_len(1).for_each(|_| multiply_adds(black_box(STEPS))));
    });
    group.finish();
}

/// Independent chains of multiply-adds.
const LANES: usize = 96;

fn multiply_adds(steps: usize) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: detected.
        return unsafe { with_avx2(steps) };
    }
    chains(steps);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2(steps: usize) {
    chains(steps);
}

#[inline(always)]
fn chains(steps: usize) {
    let (x, y) = (black_box(0.999f32), black_box(0.001f32));
    let mut sums = [1.0f32; LANES];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = sum.mul_add(x, y);
        }
    }
    black_box(sums);
}

criterion_group!(benches, peak, attention);
criterion_main!(benches);
