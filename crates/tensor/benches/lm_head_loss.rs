//! The head and its loss in FLOP/s (criterion's "elem/s"): 2 T C V for the loss, twice that with the gradient of h.
#![allow(missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nibble_tensor::{
    Arena, DType, Device, Rng, Tensor,
    ops::lm_head_loss::{self, Config, Labels},
};

fn random(arena: &Arena, seed: u64, dtype: DType, shape: [usize; 2]) -> Tensor {
    let rng = Rng::new(seed);
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| 0.1 * (rng.uniform(i) - 0.5)).collect();
    Tensor::from_slice(arena, &values, shape).unwrap().to_dtype(dtype).unwrap()
}

fn lm_head_loss(c: &mut Criterion) {
    let (tokens, channels, vocab) = (512, 576, 49_152);
    let mut group = c.benchmark_group("lm_head_loss");
    group.sample_size(10);
    for dtype in [DType::F32, DType::Bf16] {
        let arena = Arena::new(Device::Cpu);
        let (h, weight) = (random(&arena, 1, dtype, [tokens, channels]), random(&arena, 2, DType::Bf16, [vocab, channels]));
        let labels: Vec<i32> = (0..tokens as i32).map(|t| t * 7919 % vocab as i32).collect();
        let labels = Labels::new(&arena, &labels, 1.0 / tokens as f32).unwrap();
        let config = Config { softcap: None };
        for (name, want_dh, products) in [("loss", false, 1), ("loss-and-dh", true, 2)] {
            group.throughput(Throughput::Elements((2 * products * tokens * channels * vocab) as u64));
            group.bench_function(format!("{name}/smollm2-135m/{dtype}"), |b| {
                b.iter(|| lm_head_loss::forward(&h, &weight, &labels, config, want_dh).unwrap());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, lm_head_loss);
criterion_main!(benches);
