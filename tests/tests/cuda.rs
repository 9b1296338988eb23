//! What only a GPU does: run with `NIBBLE_TEST_DEVICE=cuda`. With `REQUIRE_CUDA=1` a run without one fails.

use nibble_nf4::{Format, QuantConfig};
use nibble_tensor::{
    Arena, DType, Device, LookAhead, Rng, Tensor, Weight,
    cuda::Graph,
    ops::{
        attention,
        linear::{self, Adapter, Part},
        lm_head_loss, rms_norm,
        rope::RopeTable,
        sample::{self, Text, Texts},
    },
};
use nibble_tests::relative_error;

/// The GPU's arena; nothing where the tests run on the CPU.
fn gpu() -> Option<Arena> {
    let arena = nibble_tests::arena();
    (arena.device() != Device::Cpu).then_some(arena)
}

fn normal(arena: &Arena, shape: [usize; 2], dtype: DType) -> Tensor {
    let rng = Rng::new(5);
    let values: Vec<f32> = (0..(shape[0] * shape[1]) as u64).map(|n| 0.02 * rng.normal(n)).collect();
    Tensor::from_slice(&Arena::new(Device::Cpu), &values, shape).unwrap().to_dtype(dtype).unwrap().to_arena(arena).unwrap()
}

#[test]
fn a_graph_repeats_its_work_until_its_memory_is_taken() {
    let Some(arena) = gpu() else { return };
    let mut out = Tensor::zeros(&arena, DType::F32, [1000]).unwrap();
    let x = normal(&arena, [10, 100], DType::Bf16);
    // Kernels are loaded by a run that is not captured.
    x.reshape([1000]).unwrap().convert_into(&mut out).unwrap();
    let (graph, ()) = Graph::capture(&arena, || {
        let narrow = x.reshape([1000])?.to_dtype(DType::F32)?;
        narrow.convert_into(&mut out)
    })
    .unwrap();
    out.set_zero().unwrap();
    graph.launch().unwrap();
    assert_eq!(out.to_f32_vec().unwrap(), x.to_f32_vec().unwrap());
    let taken: Vec<Tensor> = (0..64).map(|_| Tensor::empty(&arena, DType::F32, [1000]).unwrap()).collect();
    assert!(!graph.is_valid() && graph.launch().is_err());
    drop(taken);
    assert!(graph.is_valid());
}

/// Parts over the same input on an arena: a matrix of normal values in 4 bits, a bias, an adapter, each made from `seed`.
fn parts(arena: &Arena, outputs: &[usize], inputs: usize, config: &QuantConfig, rank: usize, dtype: DType) -> Vec<Part> {
    let host = Arena::new(Device::Cpu);
    let part = |(i, &n): (usize, &usize)| {
        let of = |seed: u64, shape: [usize; 2]| {
            let rng = Rng::new(seed).stream(i as u64);
            let values: Vec<f32> = (0..(shape[0] * shape[1]) as u64).map(|n| 0.1 * rng.normal(n)).collect();
            Tensor::from_slice(&host, &values, shape).unwrap()
        };
        let values = of(1, [n, inputs]).to_f32_vec().unwrap();
        let blocks = nibble_nf4::quantize(&values, config).unwrap();
        let adapter = (rank > 0).then(|| Adapter {
            a: of(2, [rank, inputs]).to_dtype(dtype).unwrap().to_arena(arena).unwrap(),
            b: of(3, [n, rank]).to_dtype(dtype).unwrap().to_arena(arena).unwrap(),
            scale: 2.0,
            dropout: None,
        });
        let bias = (i != 1).then(|| of(4, [1, n]).reshape([n]).unwrap().to_dtype(dtype).unwrap().to_arena(arena).unwrap());
        Part { weight: Weight::from_blocks(arena, &blocks, [n, inputs]).unwrap(), bias, adapter }
    };
    outputs.iter().enumerate().map(part).collect()
}

#[test]
fn products_of_a_few_rows_are_the_hosts() {
    let Some(arena) = gpu() else { return };
    let host = Arena::new(Device::Cpu);
    let sizes: [(&[usize], usize); 13] = [
        (&[1], 64),
        (&[40, 17, 3], 192),
        (&[40, 17, 3], 1280),
        (&[1000], 4096),
        (&[9000, 10, 2100], 4352),
        (&[33, 16], 320),
        (&[64], 14_336),
        (&[4096, 100], 128),
        (&[16; 3], 96),
        (&[1], 256),
        (&[6990, 10, 2100], 512),
        (&[40_000], 256),
        (&[41_000], 256),
    ];
    for (outputs, inputs) in sizes {
        for (format, block_size, double_quant, rank, dtype) in [
            (Format::Nf4, 64, true, 16, DType::Bf16),
            (Format::Fp4, 64, true, 0, DType::F16),
            (Format::Fp4, 64, false, 0, DType::F16),
            (Format::Nf4, 256, true, 3, DType::F16),
            (Format::Nf4, 32, true, 8, DType::Bf16),
        ] {
            let config = QuantConfig { format, block_size, double_quant };
            let there = parts(&arena, outputs, inputs, &config, rank, dtype);
            let here = parts(&host, outputs, inputs, &config, rank, dtype);
            for rows in [1, 2, 3, 4, 5, 8] {
                let x = normal(&host, [rows, inputs], dtype);
                let expected = linear::forward(&x, &here).unwrap().0;
                let found = linear::forward(&x.to_arena(&arena).unwrap(), &there).unwrap().0;
                for (found, expected) in found.iter().zip(&expected) {
                    let (found, expected) = (found.to_f32_vec().unwrap(), &expected.to_f32_vec().unwrap());
                    let error = relative_error(&found, expected);
                    assert!(error < 6e-3, "{rows} x {outputs:?} x {inputs}, {config:?}, rank {rank}, {dtype}: {error:.1e}");
                    let size = (expected.iter().map(|y| y * y).sum::<f32>() / expected.len() as f32).sqrt();
                    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(
                        worst < 0.06 * size,
                        "{rows} x {outputs:?} x {inputs}, {config:?}, {dtype}: {worst:.1e} of {size:.1e}"
                    );
                }
            }
        }
    }
}

/// Each launch reads what the one before wrote; launches after another kernel and after one of their own; a graph.
#[test]
fn products_of_one_row_read_what_the_launches_before_wrote() {
    let Some(arena) = gpu() else { return };
    let weights = |seed| {
        let make = |outputs, inputs| {
            let weight =
                Weight::random(&arena, [outputs, inputs], &QuantConfig::default(), 0.02, Rng::new(seed + outputs as u64));
            vec![Part { weight: weight.unwrap(), bias: None, adapter: None }]
        };
        [make(4096, 4096), make(512, 4096), make(4096, 512)]
    };
    let (layers, x) = ([1, 2, 3].map(weights), normal(&arena, [1, 4096], DType::Bf16));
    let ones = Tensor::from_slice(&Arena::new(Device::Cpu), &[1.0f32; 4096], [4096]).unwrap().to_arena(&arena).unwrap();
    let chain = || {
        let mut x = x.clone();
        for layer in layers.iter().cycle().take(40) {
            for parts in layer {
                x = linear::forward(&x, parts)?.0.remove(0);
            }
            x = rms_norm::forward(&x, &ones, rms_norm::Config { eps: 1e-5, offset: 0.0 })?.0;
        }
        Ok::<_, nibble_tensor::Error>(x)
    };
    let found = chain().unwrap().to_f32_vec().unwrap();
    let Device::Cuda(device) = arena.device() else { return };
    device.start_profile();
    let alone = chain().unwrap();
    let kernels = device.end_profile().unwrap();
    assert!(found.iter().all(|y| y.is_finite()) && found == alone.to_f32_vec().unwrap());
    let hopper = device.info().capability.major == 9;
    assert!(!hopper || kernels.iter().any(|kernel| kernel.name == "one_row_bf16"), "{kernels:?}");
    let mut last = Tensor::zeros(&arena, DType::Bf16, [1, 4096]).unwrap();
    let (graph, ()) = Graph::capture(&arena, || last.copy_rows(0, &chain()?)).unwrap();
    drop(alone);
    for _ in 0..20 {
        last.set_zero().unwrap();
        graph.launch().unwrap();
        assert!(last.to_f32_vec().unwrap() == found);
    }
}

#[test]
fn dense_products_of_a_few_rows_are_the_hosts() {
    let Some(arena) = gpu() else { return };
    let host = Arena::new(Device::Cpu);
    for (rows, outputs, inputs, dtype) in [(1, 50, 64, DType::Bf16), (4, 9000, 328, DType::F16), (1, 700, 4096, DType::Bf16)] {
        let (h, w) = (normal(&host, [rows, inputs], dtype), normal(&host, [outputs, inputs], dtype));
        let expected = lm_head_loss::logits(&h, &w, None).unwrap().to_f32_vec().unwrap();
        let found = lm_head_loss::logits(&h.to_arena(&arena).unwrap(), &w.to_arena(&arena).unwrap(), None).unwrap();
        let error = relative_error(&found.to_f32_vec().unwrap(), &expected);
        assert!(error < 1e-4, "{rows} x {outputs} x {inputs} {dtype}: {error:.1e}");
    }
}

#[test]
fn tokens_drawn_on_the_device_are_the_hosts() {
    let Some(arena) = gpu() else { return };
    let host = Arena::new(Device::Cpu);
    let (count, vocab) = (6, 9001);
    let rng = Rng::new(11);
    let values: Vec<f32> = (0..(count * vocab) as u64).map(|n| (4.0 * rng.normal(n) * 8.0).round() / 8.0).collect();
    let logits = Tensor::from_slice(&host, &values, [count, vocab]).unwrap();
    let seen: Vec<u32> = (0..500).map(|i| i * 17).collect();
    let list: Vec<Text<'_>> = (0..count).map(|chosen| Text { before: 3, tokens: &seen, chosen, slot: chosen }).collect();
    for (temperature, top_k, top_p, repetition_penalty) in [
        (0.0, 0, 1.0, 1.0),
        (0.0, 0, 1.0, 1.5),
        (1.0, 0, 1.0, 1.0),
        (0.7, 50, 1.0, 1.3),
        (1.3, 0, 0.8, 1.0),
        (9.0, 700, 0.95, 1.1),
        (1.0, 100_000, 1e-6, 1.0),
        (0.01, 1, 0.5, 0.5),
    ] {
        let config = sample::Config { temperature, top_k, top_p, repetition_penalty, rng: Rng::new(5) };
        let mut here = Texts::new(&host, &list, vocab, 600).unwrap();
        let mut there = Texts::new(&arena, &list, vocab, 600).unwrap();
        let on_device = logits.to_arena(&arena).unwrap();
        for step in 0..40 {
            sample::next(&logits, &mut here, &config).unwrap();
            sample::next(&on_device, &mut there, &config).unwrap();
            let of = |texts: &Texts| (texts.tokens.to_vec::<u32>().unwrap(), texts.lens.to_vec::<u32>().unwrap());
            assert_eq!(of(&there), of(&here), "{config:?} {step}");
        }
    }
}

#[test]
fn a_step_of_attention_is_the_hosts() {
    let Some(arena) = gpu() else { return };
    let host = Arena::new(Device::Cpu);
    let capacity = 300;
    // Rope turns the first `turned` of each head's elements; one head of keys may have more queries than a block takes.
    for (heads, kv_heads, size, turned, dtype, tolerance) in [
        (4, 2, 64, 64, DType::F32, 1e-5),
        (32, 8, 128, 128, DType::Bf16, 6e-3),
        (6, 1, 96, 96, DType::F16, 2e-3),
        (3, 3, 256, 256, DType::F32, 1e-5),
        (20, 1, 64, 32, DType::Bf16, 6e-3),
        (4, 2, 256, 64, DType::Bf16, 6e-3),
        (4, 2, 64, 24, DType::F16, 2e-3),
    ] {
        let inv_freq: Vec<f32> = (0..turned / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / turned as f32)).collect();
        let ids = [1u32; 300];
        let list = [(1, 0), (300, 2), (77, 1)].map(|(len, slot)| Text { before: 0, tokens: &ids[..len], chosen: 0, slot });
        let config = attention::Config { scale: (size as f32).powf(-0.5), window: None, softcap: None };
        let run = |arena: &Arena| {
            let of = |seed, rows, heads| {
                let rng = Rng::new(seed);
                let values: Vec<f32> = (0..(rows * heads * size) as u64).map(|n| rng.normal(n)).collect();
                let tensor = Tensor::from_slice(&host, &values, [rows, heads, size]).unwrap();
                tensor.to_dtype(dtype).unwrap().to_arena(arena).unwrap()
            };
            let (mut keys, mut values) = (of(1, 3 * capacity, kv_heads), of(2, 3 * capacity, kv_heads));
            let texts = Texts::new(arena, &list, 10, capacity).unwrap();
            let table = RopeTable::new(arena, &inv_freq, 1.0, capacity).unwrap();
            let new = [of(3, 3, heads), of(4, 3, kv_heads), of(5, 3, kv_heads)];
            let o = attention::step(new, [&mut keys, &mut values], &texts, &table, config).unwrap();
            [o, keys, values].map(|tensor| tensor.to_f32_vec().unwrap())
        };
        for (what, (found, expected)) in ["o", "keys", "values"].iter().zip(run(&arena).iter().zip(&run(&host))) {
            let error = relative_error(found, expected);
            assert!(error < tolerance, "{heads} / {kv_heads} x {size}, {turned}, {dtype}: {what} off by {error:.1e}");
        }
    }
}

#[test]
fn a_captured_pass_finds_widened_weights_and_widens_again_what_was_lost() {
    let Some(arena) = gpu() else { return };
    let tokens = 2816;
    let layers = [16, 8].map(|rank| parts(&arena, &[1536], 1536, &QuantConfig::default(), rank, DType::Bf16));
    let x = normal(&arena, [tokens, 1536], DType::Bf16);
    let mut results = Tensor::zeros(&arena, DType::Bf16, [2 * tokens, 1536]).unwrap();
    // Memory enough for the weights to have places.
    drop(Tensor::empty(&arena, DType::U8, [1 << 26]).unwrap());
    let mut pass = || {
        let _pass = LookAhead::new(&arena, tokens);
        for (i, parts) in layers.iter().enumerate() {
            results.copy_rows(i * tokens, &linear::forward(&x, parts)?.0[0])?;
        }
        Ok::<_, nibble_tensor::Error>(())
    };
    for _ in 0..2 {
        pass().unwrap();
    }
    if let Device::Cuda(device) = arena.device() {
        device.start_profile();
        pass().unwrap();
        let kernels = device.end_profile().unwrap();
        assert!(!kernels.iter().any(|kernel| kernel.name.starts_with("dequantize")), "{kernels:?}");
    }
    let graph = Graph::capture(&arena, &mut pass).unwrap().0;
    assert!(graph.is_settled() && graph.is_valid());
    let (expected, others) = (results.to_f32_vec().unwrap(), vec![0xffu8; 1 << 20]);
    for _ in 0..3 {
        results.set_zero().unwrap();
        graph.launch().unwrap();
        assert!(results.to_f32_vec().unwrap() == expected);
        // All that was free holds something else.
        let free = arena.device_bytes().unwrap() - arena.stats().live;
        let all: Vec<Tensor> = (0..free >> 20).map(|_| Tensor::from_slice(&arena, &others, [1 << 20]).unwrap()).collect();
        assert!(!graph.is_valid() && graph.launch().is_err());
        drop(all);
    }
}
