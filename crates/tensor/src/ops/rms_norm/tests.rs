use nibble_testkit::{UNIT_F32, assert_within, central_difference, reference, relative_error, sizes, weighted_sum};
use proptest::prelude::*;

use super::*;
use crate::ops::samples::{arena, float, normal, place, rounding, wide};

const LLAMA: Config = Config { eps: 1e-5, offset: 0.0 };
const GEMMA: Config = Config { eps: 1e-6, offset: 1.0 };

fn config() -> impl Strategy<Value = Config> {
    prop_oneof![Just(LLAMA), Just(GEMMA)]
}

fn expected(x: &[f64], w: &[f64], config: Config) -> Vec<f64> {
    reference::rms_norm(x, w, f64::from(config.eps), f64::from(config.offset))
}

/// Relative error of inv: a sum of n squares over 16 lanes, halved by the root, and a few roundings.
fn inv_error(n: usize) -> f64 {
    (n as f64 / 32.0 + 12.0) * UNIT_F32
}

struct Gradients {
    dx: Vec<f64>,
    /// Sum of the absolute terms of each dx.
    dx_size: Vec<f64>,
    dw: Vec<f64>,
    dw_size: Vec<f64>,
}

/// The formulas of the file's head in f64.
fn gradients(dy: &[f64], x: &[f64], w: &[f64], config: Config) -> Gradients {
    let n = w.len();
    let mut out = Gradients { dx: vec![], dx_size: vec![], dw: vec![0.0; n], dw_size: vec![0.0; n] };
    for (dy, x) in dy.chunks(n).zip(x.chunks(n)) {
        let inv = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n as f64 + f64::from(config.eps)).sqrt();
        let terms: Vec<f64> = (0..n).map(|i| dy[i] * (f64::from(config.offset) + w[i])).collect();
        let mean: f64 = (0..n).map(|i| terms[i] * x[i]).sum::<f64>() / n as f64;
        let mean_size: f64 = (0..n).map(|i| (terms[i] * x[i]).abs()).sum::<f64>() / n as f64;
        for i in 0..n {
            out.dx.push(inv * (terms[i] - x[i] * inv * inv * mean));
            out.dx_size.push(inv * (terms[i].abs() + x[i].abs() * inv * inv * mean_size));
            out.dw[i] += dy[i] * x[i] * inv;
            out.dw_size[i] += (dy[i] * x[i] * inv).abs();
        }
    }
    out
}

proptest! {
    #[test]
    fn forward_is_the_formula([t, c] in sizes([5, 130]), x_type in float(), w_type in float(), config in config(), seed in 0..1000u64) {
        let (x, w) = (normal(seed, x_type, [t, c]), normal(seed + 1, w_type, [c]));
        let (y, inv) = forward(&x, &w, config).unwrap();
        prop_assert_eq!(y.dtype(), x_type);
        let reference = expected(&wide(&x), &wide(&w), config);
        // One rounding at the end, and one before the product with w.
        assert_within("y", &y.to_f32_vec().unwrap(), &reference, |i| {
            reference[i].abs() * inv_error(c) + 2.1 * rounding(x_type, reference[i]) + rounding(x_type, 0.0) * wide(&w)[i % c].abs()
        });
        let one = expected(&wide(&x), &vec![1.0 - f64::from(config.offset); c], config);
        for (row, inv) in inv.to_f32_vec().unwrap().iter().enumerate() {
            let at = row * c;
            prop_assert!((wide(&x)[at] * f64::from(*inv) - one[at]).abs() <= one[at].abs() * inv_error(c));
        }
    }

    #[test]
    fn backward_is_the_formula([t, c] in sizes([70, 130]), dtype in float(), config in config(), seed in 0..1000u64) {
        let (x, dy, w) = (normal(seed, dtype, [t, c]), normal(seed + 1, dtype, [t, c]), normal(seed + 2, DType::F32, [c]));
        let (_, inv) = forward(&x, &w, config).unwrap();
        let mut dw = Tensor::from_slice(&arena(), &vec![2.0f32; c], [c]).unwrap();
        let dx = backward(&dy, &x, &w, &inv, config, Some(dw.view_mut().unwrap())).unwrap();
        let want = gradients(&wide(&dy), &wide(&x), &wide(&w), config);
        assert_within("dx", &dx.to_f32_vec().unwrap(), &want.dx, |i| {
            want.dx_size[i] * (4.0 * inv_error(c) + (c as f64 / 16.0) * UNIT_F32) + rounding(dtype, want.dx[i])
        });
        let added: Vec<f64> = want.dw.iter().map(|dw| 2.0 + dw).collect();
        assert_within("dw", &dw.to_f32_vec().unwrap(), &added, |i| (want.dw_size[i] + 2.0) * (inv_error(c) + t as f64 * UNIT_F32));
        let frozen = backward(&dy, &x, &w, &inv, config, None).unwrap();
        prop_assert_eq!(frozen.to_f32_vec().unwrap(), dx.to_f32_vec().unwrap());
    }

    #[test]
    fn the_residual_form_is_a_sum_and_a_norm([t, c] in sizes([9, 70]), dtype in float(), config in config(), seed in 0..1000u64) {
        let (x, a, w) = (normal(seed, dtype, [t, c]), normal(seed + 1, dtype, [t, c]), normal(seed + 2, dtype, [c]));
        let sum: Vec<f64> = wide(&x).iter().zip(wide(&a)).map(|(x, a)| x + a).collect();
        let (r, y, inv) = residual_forward(&x, a, &w, config).unwrap();
        assert_within("r", &r.to_f32_vec().unwrap(), &sum, |i| rounding(dtype, sum[i]) + UNIT_F32 * sum[i].abs());
        let (alone, alone_inv) = forward(&r, &w, config).unwrap();
        prop_assert_eq!(alone.to_f32_vec().unwrap(), y.to_f32_vec().unwrap());
        prop_assert_eq!(alone_inv.to_f32_vec().unwrap(), inv.to_f32_vec().unwrap());

        let (dr, dy) = (normal(seed + 3, dtype, [t, c]), normal(seed + 4, dtype, [t, c]));
        let want = gradients(&wide(&dy), &wide(&r), &wide(&w), config);
        let total: Vec<f64> = want.dx.iter().zip(wide(&dr)).map(|(dx, dr)| dx + dr).collect();
        let dr_size = wide(&dr);
        let dx = residual_backward(dr, &dy, &r, &w, &inv, config, None).unwrap();
        assert_within("dx", &dx.to_f32_vec().unwrap(), &total, |i| {
            (want.dx_size[i] + dr_size[i].abs()) * (4.0 * inv_error(c) + (c as f64 / 16.0) * UNIT_F32) + rounding(dtype, total[i])
        });
    }
}

#[test]
fn backward_is_the_central_difference() {
    for config in [LLAMA, GEMMA] {
        let (t, c) = (3, 7);
        let (x, dy, w) = (normal(1, DType::F32, [t, c]), normal(2, DType::F32, [t, c]), normal(3, DType::F32, [c]));
        let (_, inv) = forward(&x, &w, config).unwrap();
        let mut dw = Tensor::zeros(x.arena(), DType::F32, [c]).unwrap();
        let dx = backward(&dy, &x, &w, &inv, config, Some(dw.view_mut().unwrap())).unwrap();
        let (x, dy, w) = (wide(&x), wide(&dy), wide(&w));
        let numeric = central_difference(|x| weighted_sum(&dy, &expected(x, &w, config)), &x);
        assert!(relative_error(&wide(&dx), &numeric) < 1e-6);
        let numeric = central_difference(|w| weighted_sum(&dy, &expected(&x, w, config)), &w);
        assert!(relative_error(&wide(&dw), &numeric) < 1e-6);
    }
}

#[test]
fn heads_are_rows() {
    let (x, w) = (normal(1, DType::Bf16, [3, 2, 8]), normal(2, DType::Bf16, [8]));
    let (y, inv) = forward(&x, &w, LLAMA).unwrap();
    assert_eq!((y.shape(), inv.shape()), (x.shape(), [6].into()));
    let (flat, _) = forward(&x.reshape([6, 8]).unwrap(), &w, LLAMA).unwrap();
    assert_eq!(y.to_f32_vec().unwrap(), flat.to_f32_vec().unwrap());
}

#[test]
fn low_precision_rounds_where_the_family_does() {
    let (x, w) = (normal(5, DType::Bf16, [4, 64]), normal(6, DType::Bf16, [64]));
    let (x_wide, w_wide) = (x.to_f32_vec().unwrap(), w.to_f32_vec().unwrap());
    let bf16 = |x: f32| half::bf16::from_f32(x).to_f32();
    let (y, inv) = forward(&x, &w, LLAMA).unwrap();
    let inv = inv.to_f32_vec().unwrap();
    for (i, y) in y.to_f32_vec().unwrap().into_iter().enumerate() {
        assert_eq!(y, bf16(bf16(x_wide[i] * inv[i / 64]) * w_wide[i % 64]));
    }
    let (y, inv) = forward(&x, &w, GEMMA).unwrap();
    let inv = inv.to_f32_vec().unwrap();
    for (i, y) in y.to_f32_vec().unwrap().into_iter().enumerate() {
        assert_eq!(y, bf16(x_wide[i] * inv[i / 64] * (1.0 + w_wide[i % 64])));
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (x, dy, w) = (normal(1, DType::F32, [700, 65]), normal(2, DType::F32, [700, 65]), normal(3, DType::F32, [65]));
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let (y, inv) = forward(&x, &w, LLAMA).unwrap();
            let mut dw = Tensor::zeros(x.arena(), DType::F32, [65]).unwrap();
            let dx = backward(&dy, &x, &w, &inv, LLAMA, Some(dw.view_mut().unwrap())).unwrap();
            [y, dx, dw].map(|t| t.to_f32_vec().unwrap())
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn memory_is_reused_only_when_nobody_else_holds_it() {
    let (x, a, w) = (normal(1, DType::F32, [2, 4]), normal(2, DType::F32, [2, 4]), normal(3, DType::F32, [4]));
    let (held, before, address) = (a.clone(), a.to_f32_vec().unwrap(), place(&a));
    let (r, ..) = residual_forward(&x, a, &w, LLAMA).unwrap();
    assert_ne!(place(&r), address);
    assert_eq!(held.to_f32_vec().unwrap(), before);
    let (again, ..) = residual_forward(&x, held, &w, LLAMA).unwrap();
    assert_eq!(place(&again), address);
    assert_eq!(again.to_f32_vec().unwrap(), r.to_f32_vec().unwrap());
}

#[test]
fn operands_that_do_not_fit_are_named() {
    let (x, w) = (normal(1, DType::F32, [2, 4]), normal(2, DType::F32, [3]));
    assert_eq!(
        forward(&x, &w, LLAMA).unwrap_err().to_string(),
        "rms_norm: `weight` has the wrong shape: expected (4,), found (3,)"
    );
    let (w, half) = (normal(2, DType::F32, [4]), normal(3, DType::Bf16, [2, 4]));
    assert_eq!(
        residual_forward(&x, half, &w, LLAMA).unwrap_err().to_string(),
        "rms_norm: `a` has the wrong dtype: expected float32, found bfloat16"
    );
    assert!(forward(&normal(1, DType::F32, [0, 4]), &w, LLAMA).unwrap().0.to_f32_vec().unwrap().is_empty());
}
