//! What only a GPU does: run with `NIBBLE_TEST_DEVICE=cuda`. With `REQUIRE_CUDA=1` a run without one fails.

use nibble_nf4::{Format, QuantConfig};
use nibble_tensor::{Absmax, Arena, DType, Device, Rng, Tensor, Weight, cuda::Graph, ops::quantize};

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
fn quantisation_on_the_device_is_that_of_the_host_bit_for_bit() {
    let Some(arena) = gpu() else { return };
    for (shape, block_size) in [([96, 320], 64), ([33, 47], 32), ([1000, 4096], 64), ([7, 5000], 4096)] {
        for (format, double_quant) in [(Format::Nf4, true), (Format::Nf4, false), (Format::Fp4, true)] {
            let config = QuantConfig { format, block_size, double_quant };
            for dtype in [DType::F32, DType::Bf16, DType::F16] {
                let x = normal(&arena, shape, dtype);
                let found = quantize::forward(&x, &config).unwrap();
                let blocks = nibble_nf4::quantize(&x.to_f32_vec().unwrap(), &config).unwrap();
                let expected = Weight::from_blocks(&Arena::new(Device::Cpu), &blocks, shape).unwrap();
                let label = format!("{shape:?} {config:?} {dtype}");
                let (Weight::Nf4(a) | Weight::Fp4(a), Weight::Nf4(b) | Weight::Fp4(b)) = (&found, &expected) else {
                    panic!("{label}")
                };
                assert_eq!(a.packed.to_vec::<u8>().unwrap(), b.packed.to_vec::<u8>().unwrap(), "{label}: codes");
                match (&a.absmax, &b.absmax) {
                    (Absmax::Plain(a), Absmax::Plain(b)) => {
                        assert_eq!(a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap(), "{label}: absmax");
                    }
                    (
                        Absmax::Nested { codes: a, absmax: x, offset: m, .. },
                        Absmax::Nested { codes: b, absmax: y, offset: n, .. },
                    ) => {
                        assert_eq!(m, n, "{label}: offset");
                        assert_eq!(a.to_vec::<u8>().unwrap(), b.to_vec::<u8>().unwrap(), "{label}: scales' codes");
                        assert_eq!(x.to_vec::<f32>().unwrap(), y.to_vec::<f32>().unwrap(), "{label}: scales' absmax");
                    }
                    _ => panic!("{label}"),
                }
                assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap(), "{label}: values");
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_is_named() {
    let Some(arena) = gpu() else { return };
    let mut values = vec![0.5f32; 640];
    values[333] = f32::NAN;
    let x = Tensor::from_slice(&arena, &values, [10, 64]).unwrap();
    let error = quantize::forward(&x, &QuantConfig::default()).unwrap_err().to_string();
    assert!(error.contains("333"), "{error}");
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
