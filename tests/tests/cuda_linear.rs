//! Linear layers with adapters on a GPU against the CPU's, at sizes that the GPU's own kernels serve and with what they do not
//! divide: run with `NIBBLE_TEST_DEVICE=cuda`. With `REQUIRE_CUDA=1` a run without one fails.

use nibble_nf4::{QuantConfig, quantize};
use nibble_tensor::{
    Arena, DType, Device, LookAhead, Rng, Tensor, Weight,
    cuda::ComputeCapability,
    ops::{
        Documents, attention, glu,
        linear::{self, Adapter, Part, PartGrads, Saved},
        rms_norm,
        rope::{self, RopeTable},
    },
};

/// Layers over one input.
#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    inputs: usize,
    outputs: &'static [usize],
    rank: usize,
    dtype: DType,
}

/// q, k and v; gate and up with one pass for t and dB; down; parts whose units share blocks, more of them than a launch takes; inputs
/// whose dA takes clusters of four and of two; ranks that need the wider kernel, and none of them; products that fill the device.
const CASES: [Case; 13] = [
    Case { tokens: 1100, inputs: 520, outputs: &[640, 136, 136], rank: 16, dtype: DType::Bf16 },
    Case { tokens: 1027, inputs: 264, outputs: &[4104, 4104], rank: 16, dtype: DType::Bf16 },
    Case { tokens: 4100, inputs: 136, outputs: &[1032], rank: 16, dtype: DType::Bf16 },
    Case { tokens: 2701, inputs: 136, outputs: &[1160, 264, 136], rank: 16, dtype: DType::Bf16 },
    Case { tokens: 4100, inputs: 136, outputs: &[640, 1000, 8, 1032], rank: 8, dtype: DType::F16 },
    Case { tokens: 1200, inputs: 1544, outputs: &[520], rank: 8, dtype: DType::F16 },
    Case { tokens: 1027, inputs: 2184, outputs: &[136], rank: 16, dtype: DType::Bf16 },
    Case { tokens: 1027, inputs: 12_808, outputs: &[136], rank: 16, dtype: DType::Bf16 },
    Case { tokens: 2049, inputs: 328, outputs: &[200, 520], rank: 32, dtype: DType::Bf16 },
    Case { tokens: 1100, inputs: 192, outputs: &[320], rank: 80, dtype: DType::Bf16 },
    Case { tokens: 300, inputs: 192, outputs: &[320, 64], rank: 8, dtype: DType::Bf16 },
    Case { tokens: 1270, inputs: 3320, outputs: &[3320], rank: 16, dtype: DType::Bf16 },
    Case { tokens: 3066, inputs: 2568, outputs: &[2568], rank: 16, dtype: DType::F16 },
];

const SCALE: f32 = 2.0;

fn normal(arena: &Arena, seed: u64, shape: [usize; 2], size: f32, dtype: DType) -> Tensor {
    let rng = Rng::new(seed);
    let values: Vec<f32> = (0..(shape[0] * shape[1]) as u64).map(|n| size * rng.normal(n)).collect();
    Tensor::from_slice(&Arena::new(Device::Cpu), &values, shape).unwrap().to_dtype(dtype).unwrap().to_arena(arena).unwrap()
}

/// The norm of made-up rows; with room behind them, as the ops leave it that linear layers read from, or without.
fn normed(arena: &Arena, seed: u64, shape: [usize; 2], dtype: DType, room: bool) -> Tensor {
    let x = normal(arena, seed, shape, 1.0, dtype);
    let ones = Tensor::tiled(arena, &[1.0f32], [shape[1]]).unwrap();
    let config = rms_norm::Config { eps: 0.0, offset: 0.0 };
    let room = if room { linear::room(&x) } else { 0 };
    rms_norm::forward_with_room(&x, &ones, config, room).unwrap().0
}

/// The layers, their A side by side.
fn parts(arena: &Arena, case: Case) -> Vec<Part> {
    let Case { inputs, outputs, rank, dtype, .. } = case;
    let a = normal(arena, 1, [rank * outputs.len(), inputs], 0.05, dtype);
    let part = |(i, &n): (usize, &usize)| {
        let values = normal(&Arena::new(Device::Cpu), 2 + i as u64, [n, inputs], 0.05, DType::F32).to_f32_vec().unwrap();
        let blocks = quantize(&values, &QuantConfig::default()).unwrap();
        let b = normal(arena, 12 + i as u64, [n, rank], 0.05, dtype);
        let adapter = Adapter { a: a.rows(i * rank, rank).unwrap(), b, scale: SCALE, dropout: None };
        Part { weight: Weight::from_blocks(arena, &blocks, [n, inputs]).unwrap(), bias: None, adapter: Some(adapter) }
    };
    outputs.iter().enumerate().map(part).collect()
}

/// dx, then the dA and the dB of all layers.
fn backward(arena: &Arena, case: Case, room: bool, x: &Tensor, parts: &[Part], saved: &Saved) -> Vec<Vec<f32>> {
    let Case { tokens, outputs, dtype, .. } = case;
    let dys: Vec<Tensor> =
        outputs.iter().enumerate().map(|(i, &n)| normed(arena, 30 + i as u64, [tokens, n], dtype, room)).collect();
    gradients(arena, case, &dys, x, parts, saved)
}

/// The same of given dys.
fn gradients(arena: &Arena, case: Case, dys: &[Tensor], x: &Tensor, parts: &[Part], saved: &Saved) -> Vec<Vec<f32>> {
    let Case { inputs, outputs, rank, .. } = case;
    let a_size = rank * inputs;
    let mut flat = Tensor::zeros(arena, DType::F32, [outputs.len() * a_size + rank * outputs.iter().sum::<usize>()]).unwrap();
    let (mut ranges, mut at) = (Vec::new(), outputs.len() * a_size);
    for (i, &n) in outputs.iter().enumerate() {
        ranges.extend([(i * a_size, [rank, inputs].into()), (at, [n, rank].into())]);
        at += n * rank;
    }
    let mut views = flat.views_mut(&ranges).unwrap().into_iter();
    let grads = std::iter::from_fn(|| Some(PartGrads { adapter: Some((views.next()?, views.next()?)), ..PartGrads::default() }));
    let grads = grads.collect();
    let dx = linear::backward(dys, x.clone(), saved, parts, grads, true).unwrap().unwrap();
    let flat = flat.to_f32_vec().unwrap();
    let (da, db) = flat.split_at(outputs.len() * a_size);
    vec![dx.to_f32_vec().unwrap(), da.to_vec(), db.to_vec()]
}

/// The y of each layer, dx, the dA and the dB of all.
fn run(arena: &Arena, case: Case, room: bool) -> Vec<Vec<f32>> {
    let parts = parts(arena, case);
    let x = normed(arena, 20, [case.tokens, case.inputs], case.dtype, room);
    let (ys, saved) = linear::forward(&x, &parts).unwrap();
    let gradients = backward(arena, case, room, &x, &parts, &saved);
    let again = backward(arena, case, room, &x, &parts, &linear::forward_unread(&x, &parts).unwrap());
    for (i, (again, first)) in again.iter().zip(&gradients).enumerate() {
        let other = again.iter().zip(first).enumerate().filter(|(_, (x, y))| x.to_bits() != y.to_bits());
        let other: Vec<_> = other.take(4).collect();
        assert!(other.is_empty(), "{case:?}: other bits without the outputs, or a second time, in gradient {i}: {other:?}");
    }
    ys.iter().map(|y| y.to_f32_vec().unwrap()).chain(gradients).collect()
}

#[test]
fn layers_with_adapters_on_the_device_are_those_of_the_host() {
    let arena = nibble_tests::arena();
    if arena.device() == Device::Cpu {
        assert!(std::env::var_os("REQUIRE_CUDA").is_none(), "NIBBLE_TEST_DEVICE=cuda was not given");
        return;
    }
    for case in CASES {
        let expected = run(&Arena::new(Device::Cpu), case, false);
        for room in [false, true] {
            assert_close(&run(&arena, case, room), &expected, &format!("{case:?}, room {room}"));
        }
    }
}

/// Operands and results of 16 bits: a few units in the last place of the largest.
fn assert_close(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let off = found.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0f32, f32::max);
        assert!(most > 0.0 && off <= most / 64.0, "{what}, result {i}: off by {off} of {most}");
    }
}

/// Gradients of q, k and v behind attention and rope, side by side or each alone; then dx, dA and dB of their layers.
fn behind_attention(arena: &Arena, side_by_side: bool) -> [Vec<Vec<f32>>; 2] {
    // As many that t, dB and dA are made by kernels whose sums have one order.
    let case = Case { tokens: 4200, inputs: 520, outputs: &[512, 256, 256], rank: 16, dtype: DType::Bf16 };
    let (d, tokens, parts) = (64, case.tokens, parts(arena, case));
    let x = normed(arena, 20, [tokens, case.inputs], case.dtype, true);
    let (ys, saved) = linear::forward(&x, &parts).unwrap();
    let qkv: Vec<Tensor> = ys.iter().map(|y| y.reshape([tokens, y.shape().last() / d, d]).unwrap()).collect();
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]];
    let documents = Documents::new(arena, &[0, 500, 1600, 4200]).unwrap();
    let config = attention::Config { scale: 0.125, window: None, softcap: None };
    let (o, lse) = attention::forward(q, k, v, &documents, config).unwrap();
    let (dq, dk, dv) = if side_by_side {
        let saved = attention::Saved { d_o: &o, q, k, v, o: &o, lse: &lse };
        let wanted = attention::Wanted { side_by_side: Some(linear::room(q)), rope: None };
        attention::backward_to(&saved, &documents, config, wanted).unwrap()
    } else {
        attention::backward(&o, q, k, v, &o, &lse, &documents, config).unwrap()
    };
    let table = RopeTable::new(arena, &[1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003], 1.0, tokens).unwrap();
    let turned = [dq, dk].map(|dy| rope::backward(dy, documents.positions(), &table).unwrap());
    let dys: Vec<Tensor> = turned.into_iter().chain([dv]).zip(&ys).map(|(dy, y)| dy.reshape(y.shape()).unwrap()).collect();
    let values = dys.iter().map(|dy| dy.to_f32_vec().unwrap()).collect();
    [values, gradients(arena, case, &dys, &x, &parts, &saved)]
}

#[test]
fn gradients_side_by_side_are_those_alone_and_one_product_makes_their_dx() {
    let arena = nibble_tests::arena();
    let ([alone, of_alone], [beside, of_beside]) = (behind_attention(&arena, false), behind_attention(&arena, true));
    assert!(alone == beside, "dq, dk or dv differ");
    assert!(of_alone[1..] == of_beside[1..], "dA or dB differ");
    assert_close(&of_beside, &of_alone, "behind attention");
    let of_host = behind_attention(&Arena::new(Device::Cpu), true);
    assert_close(&of_beside, &of_host[1], "behind attention, beside the host's");
}

/// dx, dA and dB of a gated unit's layers, whose gradients lie over its operands unless these are `held`.
fn behind_gated_unit(arena: &Arena, held: bool) -> Vec<Vec<f32>> {
    let case = Case { tokens: 2100, inputs: 264, outputs: &[1032, 1032], rank: 16, dtype: DType::Bf16 };
    let (parts, x) = (parts(arena, case), normed(arena, 20, [case.tokens, case.inputs], case.dtype, true));
    let (ys, saved) = linear::forward_with_room(&x, &parts, linear::room(&x)).unwrap();
    let dy = normal(arena, 40, [case.tokens, 1032], 1.0, case.dtype);
    let _others = held.then(|| ys.clone());
    let [gate, up] = <[Tensor; 2]>::try_from(ys).unwrap();
    let (dgate, dup) = glu::backward(&dy, gate, up, glu::Activation::Silu).unwrap();
    gradients(arena, case, &[dgate, dup], &x, &parts, &saved)
}

#[test]
fn a_gated_units_layers_have_the_hosts_gradients() {
    let arena = nibble_tests::arena();
    let found = behind_gated_unit(&arena, false);
    assert_close(&found, &behind_gated_unit(&Arena::new(Device::Cpu), false), "behind a gated unit");
    assert_close(&behind_gated_unit(&arena, true), &found, "with gradients apart from the operands");
}

#[test]
fn what_an_adapter_adds_below_the_last_place_is_rounded_with_the_sum_and_not_lost() {
    // A quarter of the last place of y at most: added to a y that is rounded already it would vanish.
    let arena = nibble_tests::arena();
    let case = Case { tokens: 64, inputs: 256, outputs: &[512], rank: 4, dtype: DType::Bf16 };
    let mut parts = parts(&arena, case);
    let x = normed(&arena, 20, [case.tokens, case.inputs], case.dtype, false);
    let b = normal(&arena, 12, [512, case.rank], 2e-4, case.dtype);
    let a = parts[0].adapter.as_ref().unwrap().a.clone();
    parts[0].adapter = Some(Adapter { a, b, scale: SCALE, dropout: None });
    let values = |parts: &[Part]| linear::forward(&x, parts).unwrap().0[0].to_f32_vec().unwrap();
    let with = values(&parts);
    let Adapter { a, b, scale, .. } = parts[0].adapter.take().unwrap();
    let without = values(&parts);
    let [x, a, b] = [&x, &a, &b].map(|tensor| tensor.to_f32_vec().unwrap());
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let (mut found, mut size) = (0.0, 0.0);
    for (t, x) in x.chunks(case.inputs).enumerate() {
        let h: Vec<f32> = a.chunks(case.inputs).map(|a| dot(x, a) as f32).collect();
        for (n, b) in b.chunks(case.rank).enumerate() {
            let added = f64::from(scale) * dot(&h, b);
            found += added * f64::from(with[t * 512 + n] - without[t * 512 + n]);
            size += added * added;
        }
    }
    assert!((found / size - 1.0).abs() < 0.1, "{} of what the adapter adds is found", found / size);
}

/// What a gated unit between its layers gives: gate, up, y and a forward; dgate, dup, dA and dB backward.
struct GatedMlp {
    rank: usize,
    dtype: DType,
    parts: Vec<Part>,
    down: Part,
    x: Tensor,
    dy: Tensor,
}

/// Where dA and dB are among the results.
const ADAPTERS: usize = 6;

const GATED: Case = Case { tokens: 2800, inputs: 136, outputs: &[1352, 1352], rank: 0, dtype: DType::Bf16 };

impl GatedMlp {
    fn new(arena: &Arena, rank: usize, dtype: DType) -> Self {
        let Case { tokens, inputs, outputs, .. } = GATED;
        let [mut down] = <[Part; 1]>::try_from(parts(arena, Self::down(rank, dtype))).unwrap();
        if let Some(adapter) = &mut down.adapter {
            adapter.a = normal(arena, 50, [rank, outputs[0]], 0.05, dtype);
        }
        let x = normed(arena, 20, [tokens, inputs], dtype, true);
        let parts = parts(arena, Case { rank, dtype, ..GATED });
        Self { rank, dtype, parts, down, x, dy: normed(arena, 30, [tokens, inputs], dtype, true) }
    }

    fn down(rank: usize, dtype: DType) -> Case {
        Case { inputs: GATED.outputs[0], outputs: &[136], rank, dtype, ..GATED }
    }

    /// By the layers and the unit in turn, or as one; with y made again in the backward pass, or kept.
    fn run(&self, arena: &Arena, as_one: bool, again: bool, activation: glu::Activation) -> Vec<Vec<f32>> {
        let down = std::slice::from_ref(&self.down);
        let ([gate, up], y) = if as_one {
            let (gated, _) = linear::forward_gated(&self.x, &self.parts, activation).unwrap();
            ([gated.gate, gated.up], gated.y)
        } else {
            let (ys, _) = linear::forward_with_room(&self.x, &self.parts, linear::room(&self.x)).unwrap();
            let [gate, up] = <[Tensor; 2]>::try_from(ys).unwrap();
            let y = glu::forward_with_room(&gate, &up, activation, linear::room(&gate)).unwrap();
            ([gate, up], y)
        };
        let (a, saved) = linear::forward(&y, down).unwrap();
        let mut values: Vec<Vec<f32>> = [&gate, &up, &y, &a[0]].map(|x| x.to_f32_vec().unwrap()).into();
        if !as_one {
            let all = gradients(arena, Self::down(self.rank, self.dtype), std::slice::from_ref(&self.dy), &y, down, &saved);
            let dx = Tensor::from_slice(&Arena::new(Device::Cpu), &all[0], gate.shape()).unwrap();
            let dx = dx.to_dtype(self.dtype).unwrap().to_arena(arena).unwrap();
            let (dgate, dup) = glu::backward(&dx, gate, up, activation).unwrap();
            values.extend([dgate.to_f32_vec().unwrap(), dup.to_f32_vec().unwrap()]);
            values.extend(all.into_iter().skip(1));
            return values;
        }
        let [a_size, b_size] = [GATED.outputs[0], GATED.inputs].map(|n| self.rank * n);
        let mut flat = Tensor::zeros(arena, DType::F32, [a_size + b_size]).unwrap();
        let ranges = [(0, [self.rank, GATED.outputs[0]].into()), (a_size, [GATED.inputs, self.rank].into())];
        let mut views = flat.views_mut(&ranges).unwrap().into_iter();
        let grads = PartGrads { adapter: views.next().zip(views.next()), ..PartGrads::default() };
        let y = (!again).then_some(y);
        let (dgate, dup) = linear::backward_gated(&self.dy, [gate, up], y, activation, &saved, &self.down, grads).unwrap();
        values.extend([dgate.to_f32_vec().unwrap(), dup.to_f32_vec().unwrap()]);
        let flat = flat.to_f32_vec().unwrap();
        values.extend([flat[..a_size].to_vec(), flat[a_size..].to_vec()]);
        values
    }
}

#[test]
fn a_gated_unit_in_the_ends_of_its_products_is_the_unit_by_itself() {
    let arena = nibble_tests::arena();
    if let Device::Cuda(device) = arena.device() {
        // The sizes are for that many: one round of tiles and two, shared out by tokens and by columns.
        let made_for = (device.info().capability, device.info().multiprocessors) == (ComputeCapability::HOPPER, 132);
        let sizes = [GATED.tokens, GATED.outputs[0], GATED.inputs];
        let served = linear::makes_gated_again(arena.device(), GATED.dtype, sizes, 16, glu::Activation::Silu);
        assert!(served || !made_for, "the kernels serve it");
        device.start_profile();
        GatedMlp::new(&arena, 16, GATED.dtype).run(&arena, true, true, glu::Activation::Silu);
        let kernels = device.end_profile().unwrap();
        for shared in ["product_gated_oct_sm90", "product_gated_bwd_oct_sm90"] {
            let found = kernels.iter().any(|kernel| kernel.name.starts_with(shared));
            assert!(found || !made_for, "{shared} is not among {kernels:?}");
        }
    }
    for (rank, dtype) in [(8, DType::Bf16), (16, DType::Bf16), (32, DType::Bf16), (16, DType::F16)] {
        let mlp = GatedMlp::new(&arena, rank, dtype);
        for activation in [glu::Activation::Silu, glu::Activation::GeluTanh, glu::Activation::Gelu] {
            let (apart, what) = (mlp.run(&arena, false, false, activation), format!("rank {rank}, {dtype:?}, {activation:?}"));
            // Products whose tiles are others sum them in another order.
            let [found, again] = [false, true].map(|again| mlp.run(&arena, true, again, activation));
            assert_close(&found, &apart, &what);
            // The library's sums for the adapters of higher ranks have no one order.
            let (exact, close) = again.split_at(if rank <= 16 { again.len() } else { ADAPTERS });
            for (i, (again, found)) in exact.iter().zip(&found).enumerate() {
                assert!(again == found, "{what}, y made again, result {i}");
            }
            assert_close(close, &found[exact.len()..], &what);
        }
        let (found, host) = (mlp.run(&arena, true, true, glu::Activation::Silu), Arena::new(Device::Cpu));
        let expected = GatedMlp::new(&host, rank, dtype).run(&host, true, true, glu::Activation::Silu);
        assert_close(&found, &expected, "a gated unit, beside the host's");
    }
}

/// Layers with their input and the gradients of their outputs.
struct Layers {
    case: Case,
    parts: Vec<Part>,
    x: Tensor,
    dys: Vec<Tensor>,
}

/// All layers one after the other, and back: what they give.
fn through<'a>(arena: &Arena, order: impl Iterator<Item = &'a Layers>) -> Vec<Vec<f32>> {
    let made = order.map(|layers| (layers, linear::forward(&layers.x, &layers.parts).unwrap())).collect::<Vec<_>>();
    let mut results: Vec<Vec<f32>> = made.iter().flat_map(|(_, (ys, _))| ys).map(|y| y.to_f32_vec().unwrap()).collect();
    for (Layers { case, parts, x, dys }, (_, saved)) in made.iter().rev() {
        results.extend(gradients(arena, *case, dys, x, parts, saved));
    }
    results
}

#[test]
fn weights_widened_beside_the_product_before_theirs_give_the_same_bits() {
    let arena = nibble_tests::arena();
    if arena.device() == Device::Cpu {
        assert!(std::env::var_os("REQUIRE_CUDA").is_none(), "NIBBLE_TEST_DEVICE=cuda was not given");
        return;
    }
    // 66 tiles of 256 x 256, or a multiple: q, k and v, gate and up, of which v widens a part, down.
    for (tokens, dtype) in [(2816, DType::Bf16), (2816, DType::F16)] {
        let case = |inputs, outputs| Case { tokens, inputs, outputs, rank: 16, dtype };
        let cases = [case(1536, &[1536, 1536, 1536][..]), case(1536, &[3072, 3072][..]), case(3072, &[1536][..])];
        let layers = cases.map(|case| {
            let dy = |(i, &n): (usize, &usize)| normed(&arena, 30 + i as u64, [tokens, n], dtype, true);
            let dys = case.outputs.iter().enumerate().map(dy).collect();
            Layers { case, parts: parts(&arena, case), x: normed(&arena, 20, [tokens, case.inputs], dtype, true), dys }
        });
        let run = |reversed| {
            let (first, last) = (layers.iter(), layers.iter().rev());
            if reversed { through(&arena, last) } else { through(&arena, first) }
        };
        let (live, expected) = (arena.stats().live, [run(false), run(true)]);
        // Learned, foreseen, found in free memory, asked for in another order, and found again.
        for reversed in [false, false, false, true, false] {
            let pass = LookAhead::new(&arena, tokens);
            let found = run(reversed);
            drop(pass);
            assert!(found == expected[usize::from(reversed)], "{dtype:?}, reversed {reversed}");
            assert_eq!(arena.stats().live, live);
        }
    }
}
