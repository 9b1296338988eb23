//! Laws of the formats, against f64 arithmetic on random data, shapes and ranges.

use half::{bf16, f16};
use nibble_nf4::{
    Absmax, BlocksView, DynamicMap, Element, Error, Format, QuantConfig, QuantizedBlocks, dequantize, dequantize_dynamic, int8,
    quantize, quantize_dynamic,
};
use proptest::prelude::*;

fn configs() -> impl Strategy<Value = QuantConfig> {
    (prop_oneof![Just(Format::Nf4), Just(Format::Fp4)], 5..=12u32, any::<bool>())
        .prop_map(|(format, log, double_quant)| QuantConfig { format, block_size: 1 << log, double_quant })
}

/// Values of widely different sizes, zeros and exact fractions of one another among them.
fn values(max: usize) -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        4 => -1.0f32..1.0,
        1 => Just(0.0f32),
        1 => (-24i32..=24).prop_map(|i| i as f32 / 24.0),
        1 => (-1.0f32..1.0, -30i32..4).prop_map(|(v, e)| v * 2f32.powi(e)),
    ];
    prop::collection::vec(value, 0..max)
}

/// The largest distance from any point of [-1, 1] to the nearest level, in f64.
fn half_gap(format: Format) -> f64 {
    let mut levels: Vec<f64> = format.table().iter().map(|&v| f64::from(v)).collect();
    levels.sort_by(f64::total_cmp);
    levels.windows(2).map(|w| (w[1] - w[0]) / 2.0).fold(0.0, f64::max)
}

fn decoded<T: Element>(q: &QuantizedBlocks) -> Vec<T> {
    let mut out = vec![T::from_f32(f32::NAN); q.len()];
    dequantize(q, &mut out).unwrap();
    out
}

proptest! {
    #[test]
    fn plain_error_is_at_most_half_the_widest_gap(x in values(3000), config in configs()) {
        let config = QuantConfig { double_quant: false, ..config };
        let back: Vec<f32> = decoded(&quantize(&x, &config).unwrap());
        for (x, back) in x.chunks(config.block_size).zip(back.chunks(config.block_size)) {
            let absmax = x.iter().fold(0.0f64, |a, v| a.max(f64::from(v.abs())));
            // The reciprocal, the product and the decoded product are each rounded once, to 2^-24; the thresholds to six digits.
            let bound = absmax * (half_gap(config.format) + 3.0 * 2f64.powi(-24) + 1e-6);
            for (x, back) in x.iter().zip(back) {
                prop_assert!((f64::from(*x) - f64::from(*back)).abs() <= bound);
            }
        }
    }

    #[test]
    fn codes_are_the_nearest_level_in_f64(x in values(600)) {
        let config = QuantConfig { format: Format::Nf4, block_size: 64, double_quant: false };
        let q = quantize(&x, &config).unwrap();
        for (i, v) in x.iter().enumerate() {
            let block = &x[i / 64 * 64..x.len().min(i / 64 * 64 + 64)];
            let absmax = block.iter().fold(0.0f64, |a, v| a.max(f64::from(v.abs())));
            if absmax == 0.0 {
                continue;
            }
            let code = usize::from(if i % 2 == 0 { q.packed()[i / 2] >> 4 } else { q.packed()[i / 2] & 15 });
            let distance = |level: f32| (f64::from(*v) / absmax - f64::from(level)).abs();
            let least = Format::Nf4.table().iter().map(|&l| distance(l)).fold(f64::MAX, f64::min);
            prop_assert!(distance(Format::Nf4.table()[code]) <= least + 3.0 * 2f64.powi(-24));
        }
    }

    #[test]
    fn plain_absmax_is_exact_and_levels_survive(x in values(3000), config in configs()) {
        let config = QuantConfig { double_quant: false, ..config };
        let q = quantize(&x, &config).unwrap();
        let Absmax::Plain(absmax) = q.absmax() else { panic!("{:?}", q.absmax()) };
        let expected: Vec<f32> = x.chunks(config.block_size).map(|b| b.iter().fold(0.0f32, |a, v| a.max(v.abs()))).collect();
        prop_assert_eq!(absmax, &expected);
        let back: Vec<f32> = decoded(&q);
        for (x, back) in x.chunks(config.block_size).zip(back.chunks(config.block_size)) {
            let top = x.iter().fold(0.0f32, |a, v| a.max(v.abs()));
            for (x, back) in x.iter().zip(back) {
                prop_assert!(x.abs() < top || (*back == *x));
            }
        }
    }

    #[test]
    fn any_range_is_that_part_of_the_whole(x in values(2000), config in configs(), cut in any::<[prop::sample::Index; 2]>()) {
        let q = quantize(&x, &config).unwrap();
        let whole: Vec<f32> = decoded(&q);
        let (a, b) = (cut[0].index(x.len() + 1), cut[1].index(x.len() + 1));
        let (start, end) = (a.min(b), a.max(b));
        let mut out = vec![f32::NAN; end - start];
        q.view().dequantize_range(start, &mut out);
        prop_assert!(out.iter().zip(&whole[start..end]).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn half_outputs_are_the_f32_ones_rounded_once(x in values(2000), config in configs()) {
        let q = quantize(&x, &config).unwrap();
        let exact: Vec<f32> = decoded(&q);
        prop_assert!(decoded::<bf16>(&q).iter().zip(&exact).all(|(h, x)| h.to_bits() == bf16::from_f32(*x).to_bits()));
        prop_assert!(decoded::<f16>(&q).iter().zip(&exact).all(|(h, x)| h.to_bits() == f16::from_f32(*x).to_bits()));
    }

    #[test]
    fn half_inputs_quantise_as_their_f32_values(x in values(2000), config in configs()) {
        let short: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
        let wide: Vec<f32> = short.iter().map(|v| v.to_f32()).collect();
        prop_assert_eq!(quantize(&short, &config).unwrap(), quantize(&wide, &config).unwrap());
        let short: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
        let wide: Vec<f32> = short.iter().map(|v| v.to_f32()).collect();
        prop_assert_eq!(quantize(&short, &config).unwrap(), quantize(&wide, &config).unwrap());
    }

    #[test]
    fn first_non_finite_element_is_named(n in 1usize..500, at in any::<[prop::sample::Index; 2]>(), bad in prop::sample::select(vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY])) {
        let mut x = vec![0.5f32; n];
        let first = at[0].index(n).min(at[1].index(n));
        x[at[0].index(n)] = bad;
        x[at[1].index(n)] = bad;
        let is_first = |e: Error| matches!(e, Error::NonFinite { index, value, .. } if index == first && value.to_bits() == bad.to_bits());
        prop_assert!(is_first(quantize(&x, &QuantConfig::default()).unwrap_err()));
        prop_assert!(is_first(quantize_dynamic(&x, DynamicMap::Signed, 7).unwrap_err()));
        prop_assert!(is_first(int8::quantize_rows(&x, [1, n]).unwrap_err()));
        let half: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
        let Err(Error::NonFinite { index, .. }) = quantize(&half, &QuantConfig::default()) else { panic!("accepted") };
        prop_assert_eq!(index, first);
    }

    #[test]
    fn dynamic_error_is_at_most_half_a_gap(x in values(3000), block_size in 1usize..600) {
        let q = quantize_dynamic(&x, DynamicMap::Signed, block_size).unwrap();
        let mut back = vec![f32::NAN; x.len()];
        dequantize_dynamic(&q, &mut back).unwrap();
        for ((x, back), absmax) in x.chunks(block_size).zip(back.chunks(block_size)).zip(&q.absmax) {
            for (x, back) in x.iter().zip(back) {
                // The widest gap, 0.9 / 64, and half of it beyond the lowest level.
                prop_assert!((f64::from(*x) - f64::from(*back)).abs() <= f64::from(*absmax) * (0.9 / 128.0 + 1e-6));
            }
        }
    }

    #[test]
    fn int8_matmul_is_near_the_f64_product(n in 1usize..5, k in 1usize..70, m in 1usize..9, seed in prop::collection::vec(-1.0f32..1.0, 1000), outlier in any::<prop::sample::Index>()) {
        let w: Vec<f32> = seed.iter().cycle().take(m * k).copied().collect();
        let mut x: Vec<f16> = seed.iter().rev().cycle().take(n * k).map(|&v| f16::from_f32(v)).collect();
        x[outlier.index(n * k)] = f16::from_f32(40.0);
        let rows = int8::quantize_rows(&w, [m, k]).unwrap();
        let y = int8::matmul(&x, [n, k], &rows, int8::OUTLIER_THRESHOLD).unwrap();
        for (i, y) in y.iter().enumerate() {
            let (x, w) = (&x[i / m * k..][..k], &w[i % m * k..][..k]);
            let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(x.to_f32()) * f64::from(*w)).sum();
            // Codes of both sides are off by half a step of absmax / 127 at most, absmax below 1; the outlier's weight by half a
            // step and an f16 rounding; each result by two f16 roundings.
            let step = 0.5 / 127.0;
            let bound = k as f64 * (2.0 * step + step * step) + 40.0 * (step + 2f64.powi(-11)) + (exact.abs() + 41.0) * 2f64.powi(-10);
            prop_assert!((y.to_f64() - exact).abs() <= bound, "{y} {exact}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn double_quantised_scales_are_near_the_plain_ones(x in values(600), n in 1usize..20_000) {
        let x: Vec<f32> = x.iter().chain(&[0.3]).cycle().take(n).copied().collect();
        let plain = QuantConfig { double_quant: false, block_size: 32, ..QuantConfig::default() };
        let (p, n) = (quantize(&x, &plain).unwrap(), quantize(&x, &QuantConfig { double_quant: true, ..plain }).unwrap());
        prop_assert_eq!(p.packed(), n.packed());
        let Absmax::Plain(absmax) = p.absmax() else { panic!() };
        let Absmax::Nested { offset, .. } = n.absmax() else { panic!() };
        let count = absmax.len().max(1) as f64;
        let mean = absmax.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        prop_assert!((f64::from(*offset) - mean).abs() <= 2f64.powi(-24) * (count + 2.0) * mean);
        for (block, a) in absmax.iter().enumerate() {
            let group = &absmax[block / 256 * 256..absmax.len().min(block / 256 * 256 + 256)];
            let spread = group.iter().fold(0.0f32, |m, v| m.max((v - offset).abs()));
            // The widest gap of the signed map below 1 is 0.9 / 64; the last level, 1, lies half of that from its neighbour; -1 has none.
            let bound = spread * (0.9 / 64.0 / 2.0 + 1e-5) + 2f32.powi(-23) * (a + offset);
            prop_assert!((n.view().absmax.get(block) - a).abs() <= bound, "{} {} {}", n.view().absmax.get(block), a, bound);
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let x: Vec<f32> = (0..700_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let q = quantize(&x, &QuantConfig::default()).unwrap();
            let back: Vec<bf16> = decoded(&q);
            (q, back, quantize_dynamic(&x, DynamicMap::Signed, 256).unwrap())
        })
    };
    assert_eq!(run(1), run(5));
}

#[test]
fn large_outputs_are_decoded_as_small_ones_are() {
    // Over the size from which stores go past the caches, at both alignments.
    let x: Vec<f32> = (0..(2 << 20) + 77u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8).collect();
    let q = quantize(&x, &QuantConfig { block_size: 32, ..QuantConfig::default() }).unwrap();
    let mut small = vec![f32::NAN; x.len()];
    for (i, out) in small.chunks_mut(1000).enumerate() {
        q.view().dequantize_range(i * 1000, out);
    }
    let mut large = vec![f32::NAN; x.len() + 1];
    for shift in [0, 1] {
        dequantize(&q, &mut large[shift..][..x.len()]).unwrap();
        assert!(large[shift..][..x.len()] == small);
    }
}

#[test]
fn zero_and_subnormal_blocks_decode_within_their_absmax() {
    let mut x = vec![0f32; 160];
    x[64] = 1e-40;
    x[70] = -5e-41;
    for format in [Format::Nf4, Format::Fp4] {
        for double_quant in [false, true] {
            let q = quantize(&x, &QuantConfig { format, block_size: 64, double_quant }).unwrap();
            let back: Vec<f32> = decoded(&q);
            assert!(x.iter().zip(&back).all(|(x, b)| (x - b).abs() <= 2e-41), "{format:?} {double_quant}");
        }
    }
}

#[test]
fn empty_arrays_have_no_blocks() {
    for double_quant in [false, true] {
        let q = quantize::<f32>(&[], &QuantConfig { double_quant, ..QuantConfig::default() }).unwrap();
        assert!(q.is_empty() && q.packed().is_empty());
        assert!(decoded::<f32>(&q).is_empty());
        q.view().dequantize_range(0, &mut []);
    }
    assert!(int8::matmul(&[], [0, 4], &int8::quantize_rows(&[1.0f32; 8], [2, 4]).unwrap(), 6.0).unwrap().is_empty());
}

#[test]
fn double_quantised_nf4_takes_four_and_an_eighth_bits() {
    let q = quantize(&vec![0.1f32; 1 << 20], &QuantConfig::default()).unwrap();
    assert_eq!(q.bytes(), (1 << 19) + (1 << 14) + 4 * (1 << 6) + 4);
}

#[test]
fn block_sizes_outside_the_format_are_refused() {
    for block_size in [0, 1, 16, 48, 63, 8192] {
        let error = quantize(&[1.0f32], &QuantConfig { block_size, ..QuantConfig::default() }).unwrap_err();
        assert_eq!(error, Error::BlockSize { op: "quantize", min: 32, max: 4096, found: block_size });
    }
    assert!(matches!(quantize_dynamic(&[1.0f32], DynamicMap::Signed, 0), Err(Error::BlockSize { found: 0, .. })));
}

#[test]
fn parts_of_wrong_lengths_are_refused_all_at_once() {
    let q = quantize(&[0.5f32; 100], &QuantConfig::default()).unwrap();
    let error = BlocksView::new(Format::Nf4, 64, 300, q.packed(), q.view().absmax).unwrap_err();
    assert_eq!(error.to_string(), "quantized blocks: `packed`: expected 150, found 50; `absmax`: expected 5, found 2");
    let error = dequantize(&q, &mut [0f32; 99]).unwrap_err();
    assert_eq!(error.to_string(), "dequantize: `out`: expected 100, found 99");
}
