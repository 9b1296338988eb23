use nibble_nf4::{Format, QuantConfig};

use super::*;
use crate::{
    DType, Device, Rng, Shape, Weight,
    cuda::{ComputeCapability, DeviceInfo, Span},
    ops::{
        glu::Activation,
        linear::{self, Adapter, Part, PartGrads},
    },
};

/// Hopper, as far as it can be counted: launches are checked against their kernels.
fn gpu(limit: usize) -> Arena {
    let (name, driver, capability) = ("a GPU that looks ahead".to_owned(), 13_000, ComputeCapability::HOPPER);
    let info = DeviceInfo { ordinal: 0, name, capability, memory: 80 << 30, multiprocessors: 132, driver };
    Arena::on(Device::Cuda(CudaDevice::dry(&info)), limit).unwrap()
}

fn weight(arena: &Arena, [n, k]: [usize; 2]) -> Weight {
    Weight::empty(arena, [n, k], &QuantConfig::default()).unwrap()
}

fn plain(weight: Weight) -> Vec<Part> {
    vec![Part { weight, bias: None, adapter: None }]
}

/// Layers that are run one after the other, each with its input: after which of them a weight was begun.
fn pass(arena: &Arena, tokens: usize, layers: &[&Vec<Part>]) -> Vec<bool> {
    let _pass = LookAhead::new(arena, tokens);
    let begun = layers.iter().map(|parts| {
        let x = Tensor::empty(arena, DType::Bf16, [tokens, parts[0].weight.shape().last()]).unwrap();
        linear::forward(&x, parts).unwrap();
        arena.ahead().begun.is_some()
    });
    begun.collect()
}

#[test]
fn weights_are_begun_beside_the_product_before_theirs_from_the_second_pass_on() {
    let arena = gpu(usize::MAX);
    let layers = [[4096, 4096], [1024, 4096], [4096, 4096]].map(|shape| plain(weight(&arena, shape)));
    let layers: Vec<&Vec<Part>> = layers.iter().collect();
    let live = arena.stats().live;
    assert_eq!(pass(&arena, 8192, &layers), [false; 3]);
    let peak = arena.stats().peak;
    for _ in 0..2 {
        assert_eq!(pass(&arena, 8192, &layers), [true, true, false]);
        assert_eq!(arena.stats().live, live);
    }
    // x, y, the weight and the next: of the one before or of the last.
    assert_eq!(arena.stats().peak - peak, 1024 * 4096 * 2);
    // Outside a pass nothing is foreseen.
    let x = Tensor::empty(&arena, DType::Bf16, [8192, 4096]).unwrap();
    linear::forward(&x, layers[0]).unwrap();
    assert!(arena.ahead().begun.is_none());
}

#[test]
fn what_was_begun_and_is_not_asked_for_is_let_go() {
    let arena = gpu(usize::MAX);
    let layers = [[4096, 4096], [4096, 2048], [4096, 3072]].map(|shape| plain(weight(&arena, shape)));
    let [a, b, c] = [&layers[0], &layers[1], &layers[2]];
    let live = arena.stats().live;
    pass(&arena, 8192, &[a, b, c]);
    // b was begun beside a.
    assert_eq!(pass(&arena, 8192, &[a, c, b]), [true, false, false]);
    assert_eq!(pass(&arena, 8192, &[a, c]), [true, true]);
    assert_eq!(arena.stats().live, live);
}

#[test]
fn a_weight_whose_memory_is_gone_is_not_foreseen() {
    let arena = gpu(usize::MAX);
    let (a, b) = (plain(weight(&arena, [4096, 4096])), plain(weight(&arena, [4096, 4096])));
    pass(&arena, 8192, &[&a, &b]);
    assert_eq!(pass(&arena, 8192, &[&a]), [true]);
    drop(b);
    assert_eq!(pass(&arena, 8192, &[&a]), [false]);
}

#[test]
fn a_small_product_widens_the_first_rows_and_the_rest_is_widened_when_it_is_asked_for() {
    let arena = gpu(usize::MAX);
    let (a, b) = (plain(weight(&arena, [1024, 4096])), plain(weight(&arena, [14_336, 4096])));
    pass(&arena, 8192, &[&a, &b]);
    let _pass = LookAhead::new(&arena, 8192);
    let x = Tensor::empty(&arena, DType::Bf16, [8192, 4096]).unwrap();
    linear::forward(&x, &a).unwrap();
    let rows = arena.ahead().begun.as_ref().map(|job| job.rows);
    // 5e-4 of 2 x 8192 x 1024 x 4096, in groups of four rows.
    assert_eq!(rows, Some(8388));
    linear::forward(&x, &b).unwrap();
    assert!(arena.ahead().begun.is_none());
}

#[test]
fn a_pass_that_fits_once_fits_again() {
    let shapes = [[4096, 4096], [8192, 4096], [2048, 4096]];
    let run = |limit: usize| {
        let arena = gpu(limit);
        let layers = shapes.map(|shape| plain(weight(&arena, shape)));
        let layers: Vec<&Vec<Part>> = layers.iter().collect();
        pass(&arena, 8192, &layers);
        let peak = arena.stats().peak;
        (peak, pass(&arena, 8192, &layers))
    };
    let (peak, begun) = run(usize::MAX);
    assert_eq!(begun, [true, true, false]);
    let (again, begun) = run(peak);
    // There is room for the second weight beside the first product, and none for the third beside the second.
    assert_eq!((again, begun), (peak, vec![true, false, false]));
}

#[test]
fn what_was_begun_makes_room_for_what_is_needed() {
    let arena = gpu(1 << 30);
    let layers = [[4096, 4096], [14_336, 4096]].map(|shape| plain(weight(&arena, shape)));
    pass(&arena, 8192, &[&layers[0], &layers[1]]);
    let _pass = LookAhead::new(&arena, 8192);
    let x = Tensor::empty(&arena, DType::Bf16, [8192, 4096]).unwrap();
    linear::forward(&x, &layers[0]).unwrap();
    assert!(arena.ahead().begun.is_some());
    let room = (1 << 30) - arena.stats().live;
    drop(Tensor::empty(&arena, DType::U8, [room]).unwrap());
    assert!(arena.ahead().begun.is_some());
    drop(Tensor::empty(&arena, DType::U8, [room + 1]).unwrap());
    assert!(arena.ahead().begun.is_none());
    // There is still an end to it.
    assert!(Tensor::empty(&arena, DType::U8, [1 << 30]).is_err());
}

#[test]
fn products_of_few_rows_and_weights_that_are_not_doubly_quantised_are_left_alone() {
    for tokens in [1024, 4096] {
        let arena = gpu(usize::MAX);
        let (a, b) = (plain(weight(&arena, [16_384, 4096])), plain(weight(&arena, [4096, 4096])));
        pass(&arena, tokens, &[&a, &b]);
        assert_eq!(pass(&arena, tokens, &[&a, &b]), [tokens == 4096, false]);
    }
    let once = QuantConfig { double_quant: false, ..QuantConfig::default() };
    for (shape, config) in [([4096, 4096], once), ([4096, 128], QuantConfig::default())] {
        let arena = gpu(usize::MAX);
        let (a, b) = (plain(weight(&arena, [16_384, 4096])), plain(weight(&arena, [4096, 4096])));
        let other = plain(Weight::empty(&arena, shape, &config).unwrap());
        pass(&arena, 8192, &[&a, &other, &b]);
        assert_eq!(pass(&arena, 8192, &[&a, &other, &b]), [false, true, false]);
    }
}

/// Layers with adapters over one input.
fn adapted(arena: &Arena, outputs: &[usize], inputs: usize) -> Vec<Part> {
    let a = Tensor::empty(arena, DType::Bf16, [16 * outputs.len(), inputs]).unwrap();
    let part = |(i, &n): (usize, &usize)| {
        let b = Tensor::empty(arena, DType::Bf16, [n, 16]).unwrap();
        let adapter = Adapter { a: a.rows(16 * i, 16).unwrap(), b, scale: 2.0, dropout: None };
        Part { weight: weight(arena, [n, inputs]), bias: None, adapter: Some(adapter) }
    };
    outputs.iter().enumerate().map(part).collect()
}

#[test]
fn products_with_a_gated_unit_in_their_ends_widen_too() {
    let (arena, tokens) = (gpu(usize::MAX), 8192);
    let (both, down) = (adapted(&arena, &[14_336, 14_336], 4096), adapted(&arena, &[4096], 14_336));
    let run = || {
        let _pass = LookAhead::new(&arena, 8192);
        let begun = || arena.ahead().begun.is_some();
        let x = Tensor::with_room(&arena, DType::Bf16, [tokens, 4096], 64).unwrap();
        let (gated, _) = linear::forward_gated(&x, &both, Activation::Silu).unwrap();
        let forward = begun();
        let (_, saved) = linear::forward(&gated.y, &down).unwrap();
        let dy = Tensor::with_room(&arena, DType::Bf16, [tokens, 4096], 64).unwrap();
        let (operands, grads) = ([gated.gate, gated.up], PartGrads::default());
        let grads = linear::backward_gated(&dy, operands, None, Activation::Silu, &saved, &down[0], grads).unwrap();
        let backward = begun();
        linear::backward(&[grads.0, grads.1], x, &saved, &both, vec![PartGrads::default(), PartGrads::default()], true).unwrap();
        [forward, backward]
    };
    assert_eq!(run(), [false; 2]);
    assert_eq!(run(), [true; 2]);
}

#[test]
fn weights_of_several_layers_are_begun_as_one_forward_and_backward() {
    let (arena, tokens) = (gpu(usize::MAX), 8192);
    let all = [adapted(&arena, &[4096], 4096), adapted(&arena, &[14_336, 14_336], 4096), adapted(&arena, &[4096], 14_336)];
    let run = || {
        let _pass = LookAhead::new(&arena, 8192);
        let mut begun = Vec::new();
        let mut made = Vec::new();
        for parts in &all {
            let x = Tensor::with_room(&arena, DType::Bf16, [tokens, parts[0].weight.shape().last()], 64).unwrap();
            let (ys, saved) = linear::forward(&x, parts).unwrap();
            begun.push(arena.ahead().begun.is_some());
            made.push((x, ys, saved));
        }
        for (parts, (x, ys, saved)) in all.iter().zip(made).rev() {
            let shapes: Vec<Shape> = ys.iter().map(Tensor::shape).collect();
            let dys: Vec<Tensor> = match shapes[..] {
                [gate, up] => Tensor::side_by_side(&arena, DType::Bf16, [gate, up], 64).unwrap().into(),
                _ => shapes.iter().map(|&shape| Tensor::with_room(&arena, DType::Bf16, shape, 64).unwrap()).collect(),
            };
            let grads = parts.iter().map(|_| PartGrads::default()).collect();
            linear::backward(&dys, x, &saved, parts, grads, true).unwrap();
            begun.push(arena.ahead().begun.is_some());
        }
        begun
    };
    assert_eq!(run(), [false; 6]);
    // The last is asked for twice in turn, and found the second time.
    assert_eq!(run(), [true, true, false, true, true, false]);
}

#[test]
fn a_request_is_that_of_the_same_weights_in_the_same_layout() {
    let arena = gpu(usize::MAX);
    let [a, b] = [[512, 256], [512, 256]].map(|shape| weight(&arena, shape));
    let fp4 = QuantConfig { format: Format::Fp4, ..QuantConfig::default() };
    let other = Weight::random(&arena, [512, 256], &fp4, 1.0, Rng::new(1)).unwrap();
    let request = |weights, more| Request { weights, dtype: DType::Bf16, more };
    let (both, turned, mixed) = ([&a, &b], [&b, &a], [&a, &other]);
    let held = request(&both, [0, 64]).weak(&arena).unwrap().weights().unwrap();
    assert!(
        request(&both, [0, 64]).are(&held) && !request(&turned, [0, 64]).are(&held) && !request(&both[..1], [0, 64]).are(&held)
    );
    let identity = |weights, more| request(weights, more).identity().unwrap();
    assert_eq!(identity(&both, [0, 64]), identity(&both, [0, 64]));
    assert!(identity(&both, [0, 64]) != identity(&both, [64, 0]) && identity(&both, [0, 64]) != identity(&turned, [0, 64]));
    // Formats of two kinds, a gap that is no multiple of 16 bytes, another arena.
    assert!(request(&mixed, [0, 64]).weak(&arena).is_none() && request(&both, [0, 4]).weak(&arena).is_none());
    assert!(request(&both, [0, 64]).weak(&gpu(usize::MAX)).is_none());
}

/// Layers enough for a forward pass to take far more memory than what is kept for it.
fn many(arena: &Arena) -> Vec<Vec<Part>> {
    (0..20).map(|i| adapted(arena, &[[4096, 2048, 3072][i % 3]], 4096)).collect()
}

/// What is asked for to multiply with a layer.
fn asked(arena: &Arena, layer: &[Part]) -> WeakRequest {
    Request { weights: &[&layer[0].weight], dtype: DType::Bf16, more: [16, 64] }.weak(arena).unwrap()
}

/// Forward and backward through layers with adapters: of how many the forward pass finds the weights in free memory.
fn there_and_back(arena: &Arena, layers: &[Vec<Part>]) -> usize {
    let (_pass, tokens) = (LookAhead::new(arena, 8192), 8192);
    let (mut found, mut made) = (0, Vec::new());
    for parts in layers {
        found += usize::from(arena.warm().has(&asked(arena, parts)));
        let x = Tensor::with_room(arena, DType::Bf16, [tokens, parts[0].weight.shape().last()], 64).unwrap();
        let (_, saved) = linear::forward(&x, parts).unwrap();
        made.push((x, saved));
    }
    for (parts, (x, saved)) in layers.iter().zip(made).rev() {
        let dys = parts.iter().map(|part| Tensor::with_room(arena, DType::Bf16, [tokens, part.outputs()], 64).unwrap());
        let (dys, grads): (Vec<_>, _) = (dys.collect(), parts.iter().map(|_| PartGrads::default()).collect());
        linear::backward(&dys, x, &saved, parts, grads, true).unwrap();
    }
    found
}

#[test]
fn what_backward_widened_is_found_forward_and_comes_to_lie_in_the_same_places() {
    let arena = gpu(usize::MAX);
    let layers = many(&arena);
    let live = arena.stats().live;
    // What comes next is known after the first pass, and kept after the second.
    assert_eq!(there_and_back(&arena, &layers), 0);
    assert!(arena.warm().spans().is_empty());
    assert_eq!(there_and_back(&arena, &layers), 0);
    there_and_back(&arena, &layers);
    let (places, stats) = (arena.warm().spans(), arena.stats());
    assert!(places.len() > layers.len() / 2 && stats.live == live, "{places:?}");
    for _ in 0..3 {
        assert_eq!(there_and_back(&arena, &layers), places.len());
        assert_eq!((arena.warm().spans(), arena.stats()), (places.clone(), stats));
    }
    // What is free is free for others.
    let other = Tensor::empty(&arena, DType::U8, [arena.device_heap().unwrap().free() / 10 * 9]).unwrap();
    assert!(arena.stats().system_allocations == stats.system_allocations && arena.warm().spans().len() < places.len() / 2);
    drop(other);
    there_and_back(&arena, &layers);
    assert_eq!((arena.warm().spans(), arena.stats()), (places, stats));
    // Of a longer pass nothing is known.
    drop(LookAhead::new(&arena, 8193));
    there_and_back(&arena, &layers);
    assert!(arena.warm().spans().is_empty());
}

#[test]
fn weights_that_are_gone_are_not_found() {
    let arena = gpu(usize::MAX);
    let layers = many(&arena);
    for _ in 0..3 {
        there_and_back(&arena, &layers);
    }
    let gone = asked(&arena, &layers[0]);
    assert!(arena.warm().has(&gone));
    drop(layers);
    assert!(!arena.warm().has(&gone));
    // Others in their memory, at the same addresses, and larger.
    let others = many(&arena);
    assert_eq!(asked(&arena, &others[0]).identity, gone.identity);
    assert_eq!(there_and_back(&arena, &others), 0);
}

#[test]
fn a_captured_step_leaves_what_it_found_until_it_runs() {
    let arena = gpu(usize::MAX);
    let (layers, heap) = (many(&arena), arena.device_heap().unwrap());
    let capture = || {
        heap.record();
        arena.warm().record();
        there_and_back(&arena, &layers);
        let written = heap.recorded();
        (written, arena.warm().recorded(heap))
    };
    there_and_back(&arena, &layers);
    // Captured with nothing there: it leaves more than it finds, once it runs.
    let (written, first) = capture();
    assert!(first.found.is_empty() && arena.warm().spans().is_empty() && !first.is_settled());
    arena.warm().ran(&written, &first);
    assert!(arena.warm().spans().len() > layers.len() / 2);
    // Until what it leaves is what it finds.
    arena.warm().forget(&written);
    for _ in 0..3 {
        there_and_back(&arena, &layers);
    }
    let places = arena.warm().spans();
    let (written, captured) = capture();
    assert!(captured.found.len() == places.len() && captured.is_settled());
    let all_there = || captured.found.iter().all(|found| arena.warm().is_there(found));
    assert!(all_there() && arena.warm().spans() == places);
    let covers =
        |span: &Span| written.iter().any(|part| part.offset <= span.offset && span.offset + span.len <= part.offset + part.len);
    assert!(places.iter().all(covers), "what is found is the step's memory");
    // What others write over is not there any more.
    assert!(heap.all_free(&written));
    let other = Tensor::empty(&arena, DType::U8, [heap.free() / 10 * 9]).unwrap();
    assert!(!heap.all_free(&written));
    drop(other);
    assert!(heap.all_free(&written) && !all_there());
    arena.warm().ran(&written, &captured);
    assert!(all_there() && arena.warm().spans() == places);
}
