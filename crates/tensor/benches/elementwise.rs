//! Memory traffic of the elementwise ops, in bytes read and written a second, next to a plain copy, on shapes of SmolLM2-135M
//! (512 tokens) and of an 8B Llama (128 tokens). Outputs are taken from an arena that already holds their memory.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nibble_tensor::{
    Arena, DType, Device, Rng, Tensor,
    ops::{
        adamw, embedding, global_norm,
        glu::{self, Activation},
        rms_norm,
        rope::{self, RopeTable},
        sgd,
    },
};
use rayon::prelude::*;

struct Model {
    name: &'static str,
    tokens: usize,
    channels: usize,
    hidden: usize,
    heads: usize,
    vocab_size: usize,
}

const MODELS: [Model; 2] = [
    Model { name: "smollm2-135m", tokens: 512, channels: 576, hidden: 1536, heads: 9, vocab_size: 49_152 },
    Model { name: "llama-8b", tokens: 128, channels: 4096, hidden: 14_336, heads: 32, vocab_size: 16_384 },
];

fn normal<const N: usize>(arena: &Arena, seed: u64, dtype: DType, shape: [usize; N]) -> Tensor {
    let rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| rng.uniform(i) - 0.5).collect();
    Tensor::from_slice(arena, &values, shape).unwrap().to_dtype(dtype).unwrap()
}

fn bench(c: &mut Criterion, id: &str, bytes: usize, mut f: impl FnMut()) {
    let mut group = c.benchmark_group("elementwise");
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function(id, |b| b.iter(&mut f));
    group.finish();
}

fn model_ops(c: &mut Criterion) {
    for model in &MODELS {
        for dtype in [DType::F32, DType::Bf16] {
            let id = |op: &str| format!("{op}/{}/{dtype}", model.name);
            norms(c, model, dtype, &id);
            rest(c, model, dtype, &id);
        }
    }
}

fn norms(c: &mut Criterion, model: &Model, dtype: DType, id: &dyn Fn(&str) -> String) {
    let arena = Arena::new(Device::Cpu);
    let config = rms_norm::Config { eps: 1e-5, offset: 0.0 };
    let shape = [model.tokens, model.channels];
    let bytes = model.tokens * model.channels * dtype.size();
    let [x, dy] = [1, 2].map(|seed| normal(&arena, seed, dtype, shape));
    let weight = normal(&arena, 3, DType::F32, [model.channels]);
    bench(c, &id("rms_norm_forward"), 2 * bytes, || drop(black_box(rms_norm::forward(&x, &weight, config).unwrap())));
    let (_, inv) = rms_norm::forward(&x, &weight, config).unwrap();
    bench(c, &id("rms_norm_backward"), 3 * bytes, || {
        drop(black_box(rms_norm::backward(&dy, &x, &weight, &inv, config, None).unwrap()));
    });
    let mut dweight = Tensor::zeros(&arena, DType::F32, [model.channels]).unwrap();
    bench(c, &id("rms_norm_backward_weight"), 3 * bytes, || {
        let dweight = Some(dweight.view_mut().unwrap());
        drop(black_box(rms_norm::backward(&dy, &x, &weight, &inv, config, dweight).unwrap()));
    });
    let mut r = Some(normal(&arena, 4, dtype, shape));
    bench(c, &id("residual_rms_norm_forward"), 4 * bytes, || {
        let (sum, y, inv) = rms_norm::residual_forward(&x, r.take().unwrap(), &weight, config).unwrap();
        black_box((y, inv));
        r = Some(sum);
    });
    let mut dr = Some(normal(&arena, 4, dtype, shape));
    bench(c, &id("residual_rms_norm_backward"), 4 * bytes, || {
        dr = Some(rms_norm::residual_backward(dr.take().unwrap(), &dy, &x, &weight, &inv, config, None).unwrap());
    });
}

fn rest(c: &mut Criterion, model: &Model, dtype: DType, id: &dyn Fn(&str) -> String) {
    let arena = Arena::new(Device::Cpu);
    let &Model { tokens, channels, hidden, heads, vocab_size, .. } = model;
    let size = channels / heads;
    let frequencies: Vec<f32> = (0..size / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / size as f32)).collect();
    let table = RopeTable::new(&arena, &frequencies, 1.0, tokens).unwrap();
    let at: Vec<u32> = (0..tokens as u32).collect();
    let at = Tensor::from_slice(&arena, &at, [tokens]).unwrap();
    let mut q = Some(normal(&arena, 1, dtype, [tokens, heads, size]));
    bench(c, &id("rope"), 2 * tokens * channels * dtype.size(), || {
        q = Some(rope::forward(q.take().unwrap(), &at, &table).unwrap());
    });

    let bytes = tokens * hidden * dtype.size();
    let [gate, up, dy] = [1, 2, 3].map(|seed| normal(&arena, seed, dtype, [tokens, hidden]));
    for (name, act) in [("silu", Activation::Silu), ("gelu_tanh", Activation::GeluTanh), ("gelu", Activation::Gelu)] {
        let forward = id(&format!("glu_{name}_forward"));
        bench(c, &forward, 3 * bytes, || drop(black_box(glu::forward(&gate, &up, act).unwrap())));
        let backward = id(&format!("glu_{name}_backward"));
        bench(c, &backward, 5 * bytes, || drop(black_box(glu::backward(&dy, gate.clone(), up.clone(), act).unwrap())));
    }

    let table = normal(&arena, 4, dtype, [vocab_size, channels]);
    let ids: Vec<u32> = (0..tokens as u64).map(|i| (Rng::new(5).bits(i) % vocab_size as u64) as u32).collect();
    let ids = Tensor::from_slice(&arena, &ids, [tokens]).unwrap();
    bench(c, &id("embedding_forward"), 2 * tokens * channels * dtype.size(), || {
        drop(black_box(embedding::forward(&table, &ids, 1.0, dtype).unwrap()));
    });
}

/// Flat buffers of a rank-16 adapter on all linears of SmolLM2-135M, and four times that.
fn flat_ops(c: &mut Criterion) {
    for n in [4_884_480usize, 4 * 4_884_480] {
        let arena = Arena::new(Device::Cpu);
        let [mut p, g, mut m] = [1, 2, 3].map(|seed| normal(&arena, seed, DType::F32, [n]));
        let mut v = Tensor::zeros(&arena, DType::F32, [n]).unwrap();
        let (source, target) = (g.as_slice::<f32>().unwrap(), p.as_mut_slice::<f32>().unwrap());
        bench(c, &format!("copy/{n}"), 8 * n, || {
            target.par_chunks_mut(65_536).zip(source.par_chunks(65_536)).for_each(|(y, x)| y.copy_from_slice(x));
            black_box(&mut *target);
        });
        bench(c, &format!("global_norm/{n}"), 4 * n, || {
            black_box(global_norm::forward(&g).unwrap());
        });
        let decay = adamw::DecayOrder::Before;
        let hyper = adamw::Hyper { lr: 1e-6, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 10, decay };
        bench(c, &format!("adamw/{n}"), 28 * n, || {
            adamw::step(p.view_mut().unwrap(), &g, m.view_mut().unwrap(), v.view_mut().unwrap(), 1.0, &hyper).unwrap();
        });
        let hyper = sgd::Hyper { lr: 1e-6, momentum: 0.9, nesterov: false, weight_decay: 0.01 };
        bench(c, &format!("sgd_momentum/{n}"), 20 * n, || {
            sgd::step(p.view_mut().unwrap(), &g, Some(m.view_mut().unwrap()), 1.0, &hyper).unwrap();
        });
    }
}

criterion_group!(benches, flat_ops, model_ops);
criterion_main!(benches);
