//! Layers together with what comes before them, where nothing is kept for a backward pass: behind a norm, and around a gated unit.
//!
//! One token on a GPU is a launch for each op, most of which take longer to begin than to run. So the h = y Aᵀ of the layers' adapters
//! comes from the kernel that makes their input y, where their A are one matrix in the activations' 16-bit type, of no more rows than gain
//! by it (two a multiprocessor behind a norm, one behind a gated unit), and y fits the kernel. r, y and what is made of them have the same
//! bits as by the ops one after another, but that h is summed in another order.

use super::{Gated, Part, check, cuda, forward, forward_gated, room};
use crate::{
    Device, Error, Result, Tensor,
    ops::{
        glu::{self, Activation},
        rms_norm, typed,
    },
};

const OP: &str = "linear behind a norm";

/// (r [T, K], y [T, N] of each part) from x and a [T, K] and the norm's weight `[K]`: r = x + a rounded to their type, y = h Wᵀ + bias + s (h Aᵀ)
/// Bᵀ over h = RMSNorm(r).
///
/// # Errors
/// As [`rms_norm::residual_forward`] and [`forward`].
pub fn behind_norm(
    x: Tensor,
    a: Tensor,
    weight: &Tensor,
    config: rms_norm::Config,
    parts: &[Part],
) -> Result<(Tensor, Vec<Tensor>)> {
    if let Device::Cuda(device) = x.device() {
        a.expect_shape(OP, "a", x.shape())?;
        typed::expect_dtype(OP, "a", &a, x.dtype())?;
        weight.expect_shape(OP, "weight", [x.shape().last()])?;
        parts.iter().try_for_each(|part| check(x.shape().last(), part))?;
        if let Some(found) = cuda::behind_norm(device, [&x, &a], weight, config, parts)? {
            return Ok(found);
        }
    }
    let (r, h, _) = rms_norm::residual_forward_with_room(&x, a, weight, config, room(&x))?;
    drop(x);
    Ok((r, forward(&h, parts)?.0))
}

/// (r [T, K], y [T, N]): [`behind_norm`] for the layers gate and up [F, K] of `before`, the unit act(gate) · up [T, F] over them, and y of the
/// layer `behind` it, [N, F].
///
/// # Errors
/// As [`behind_norm`] and [`forward_gated`]; [`Error::Argument`] for other numbers of layers.
pub fn gated_behind_norm(
    x: Tensor,
    a: Tensor,
    weight: &Tensor,
    config: rms_norm::Config,
    before: &[Part],
    activation: Activation,
    behind: &[Part],
) -> Result<(Tensor, Tensor)> {
    let (r, ys) = if let (Device::Cuda(_), 1) = (x.device(), x.shape().rows()) {
        let (r, ys) = behind_norm(x, a, weight, config, before)?;
        let [gate, up] = outputs(ys)?;
        (r, behind_gate(&gate, &up, activation, behind)?)
    } else {
        let (r, h, _) = rms_norm::residual_forward_with_room(&x, a, weight, config, room(&x))?;
        drop(x);
        let Gated { y, .. } = forward_gated(&h, before, activation)?.0;
        drop(h);
        (r, forward(&y, behind)?.0)
    };
    let [y] = outputs(ys)?;
    Ok((r, y))
}

/// ys of layers behind act(gate) · up.
fn behind_gate(gate: &Tensor, up: &Tensor, activation: Activation, parts: &[Part]) -> Result<Vec<Tensor>> {
    if let Device::Cuda(device) = gate.device() {
        parts.iter().try_for_each(|part| check(gate.shape().last(), part))?;
        if let Some(ys) = cuda::behind_gate(device, [gate, up], activation, parts)? {
            return Ok(ys);
        }
    }
    Ok(forward(&glu::forward(gate, up, activation)?, parts)?.0)
}

fn outputs<const N: usize>(ys: Vec<Tensor>) -> Result<[Tensor; N]> {
    ys.try_into().map_err(|ys: Vec<Tensor>| Error::Argument {
        op: "gated unit",
        argument: "parts",
        expected: "gate and up before it, and one layer behind it",
        found: ys.len(),
    })
}

#[cfg(test)]
mod tests {
    use nibble_nf4::{QuantConfig, quantize};

    use super::*;
    use crate::{
        DType, Weight,
        ops::{
            linear::Adapter,
            samples::{arena, normal, unit, wide},
        },
    };

    const CONFIG: rms_norm::Config = rms_norm::Config { eps: 1e-5, offset: 0.0 };

    /// Layers of these outputs and ranks (0: no adapter), their A rows of one matrix.
    fn parts(seed: u64, dtype: DType, inputs: usize, sizes: &[(usize, usize)], scale: f32) -> Vec<Part> {
        let ranks: usize = sizes.iter().map(|size| size.1).sum();
        let all = (ranks > 0).then(|| normal(seed, dtype, [ranks, inputs]));
        let mut first = 0;
        let mut part = |(i, &(outputs, rank)): (u64, &(usize, usize))| {
            let values = normal(seed + 10 + i, DType::F32, [outputs, inputs]).to_f32_vec().unwrap();
            // Small enough that products of three layers fit 16 bits.
            let values: Vec<f32> = values.iter().map(|value| 0.05 * value).collect();
            let blocks = quantize(&values, &QuantConfig::default()).unwrap();
            let adapter = (rank > 0).then(|| Adapter {
                a: all.as_ref().unwrap().rows(first, rank).unwrap(),
                b: normal(seed + 20 + i, dtype, [outputs, rank]),
                scale,
                dropout: None,
            });
            first += rank;
            Part { weight: Weight::from_blocks(&arena(), &blocks, [outputs, inputs]).unwrap(), bias: None, adapter }
        };
        (0..).zip(sizes).map(&mut part).collect()
    }

    /// Within what h in another order of summation may change: some of its last places.
    fn assert_close(dtype: DType, found: &Tensor, expected: &Tensor, label: &str) {
        assert_eq!(found.shape(), expected.shape(), "{label}");
        let (found, expected) = (wide(found), wide(expected));
        let size = expected.iter().fold(0.0f64, |size, y| size.max(y.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!((found - expected).abs() <= 4.0 * unit(dtype) * size, "{label}: {i}: expected {expected}, found {found}");
        }
    }

    /// x and a, the norm's weight, and layers before and behind a gated unit.
    struct Case {
        x: Tensor,
        a: Tensor,
        weight: Tensor,
        before: Vec<Part>,
        behind: Vec<Part>,
    }

    fn case(dtype: DType, tokens: usize, [inputs, inner]: [usize; 2], ranks: [usize; 3], scale: f32) -> Case {
        Case {
            x: normal(1, dtype, [tokens, inputs]),
            a: normal(2, dtype, [tokens, inputs]),
            weight: normal(3, DType::F32, [inputs]),
            before: parts(7, dtype, inputs, &[(inner, ranks[0]), (inner, ranks[1])], scale),
            behind: parts(40, dtype, inner, &[(inputs, ranks[2])], scale),
        }
    }

    /// Both ops beside the ops that they are made of: the same bits where adapters count for nothing.
    fn check_case(dtype: DType, case: Case, scale: f32, activation: Activation, label: &str) {
        let Case { x, a, weight, before, behind } = case;
        let assert_right = |found: &Tensor, expected: &Tensor| {
            if scale == 0.0 {
                assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap(), "{label}");
            } else {
                assert_close(dtype, found, expected, label);
            }
        };
        let (r, h, _) = rms_norm::residual_forward(&x, a.clone(), &weight, CONFIG).unwrap();
        let (expected, _) = forward(&h, &before).unwrap();
        let (found_r, found) = behind_norm(x.clone(), a.clone(), &weight, CONFIG, &before).unwrap();
        assert_eq!(found_r.to_f32_vec().unwrap(), r.to_f32_vec().unwrap(), "{label}");
        found.iter().zip(&expected).for_each(|(found, expected)| assert_right(found, expected));
        let y = glu::forward(&expected[0], &expected[1], activation).unwrap();
        let (expected, _) = forward(&y, &behind).unwrap();
        let (found_r, found) = gated_behind_norm(x, a, &weight, CONFIG, &before, activation, &behind).unwrap();
        assert_eq!(found_r.to_f32_vec().unwrap(), r.to_f32_vec().unwrap(), "{label}");
        assert_right(&found, &expected[0]);
    }

    #[test]
    fn layers_behind_a_norm_are_those_of_the_ops_one_after_another() {
        // The widths take each way of the norm (rows that share a warp, a thread's registers, what does not fit there) and of the unit
        // (less than a pack a thread, several, more than a thread has on its way).
        let sizes = [
            ([64, 128], [4, 4, 4], Activation::Silu),
            ([512, 320], [8, 3, 16], Activation::GeluTanh),
            ([576, 1536], [0, 4, 0], Activation::Silu),
            ([9216, 64], [2, 2, 2], Activation::Silu),
            ([320, 4160], [1, 2, 3], Activation::Gelu),
            ([64, 17_024], [2, 2, 3], Activation::Silu),
        ];
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for (tokens, scale) in [(1, 0.05), (1, 0.0), (3, 0.05)] {
                for (widths, ranks, activation) in sizes {
                    let label = format!("{dtype} {tokens} {widths:?} {scale}");
                    check_case(dtype, case(dtype, tokens, widths, ranks, scale), scale, activation, &label);
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for dtype in [DType::F32, DType::Bf16] {
            let Case { x, a, weight, before, behind } = case(dtype, 1, [512, 128], [4, 4, 4], 1.0);
            let narrow = normal(4, dtype, [1, 64]);
            assert!(behind_norm(x.clone(), narrow, &weight, CONFIG, &before).is_err());
            let gated = |before: &[Part], behind: &[Part]| {
                gated_behind_norm(x.clone(), a.clone(), &weight, CONFIG, before, Activation::Silu, behind).is_err()
            };
            assert!(!gated(&before, &behind) && gated(&behind, &before) && gated(&before[..1], &behind));
            let narrow_up = parts(9, dtype, 512, &[(128, 4), (64, 4)], 1.0);
            assert!(gated(&narrow_up, &behind));
        }
    }
}
