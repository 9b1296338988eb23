//! Layers together with what comes before them, where nothing is kept for a backward pass: behind a norm, and around a gated unit.
//!
//! One token on a GPU is a launch for each op, most of which take longer to begin than to run. So the h = y Aᵀ of the layers' adapters
//! comes from the kernel that makes their input y, where their A are one matrix in the activations' 16-bit type. r, y and what is
//! made of them have the same bits as by the ops one after another, but that h is summed in another order.

use super::{Gated, Part, check, cuda, forward, forward_gated, room};
use crate::{
    Device, Error, Result, Tensor,
    ops::{
        glu::{self, Activation},
        rms_norm, typed,
    },
};

const OP: &str = "linear behind a norm";

/// (r, y of each part): r = x + a rounded to their type, y = h Wᵀ + … over h = RMSNorm(r).
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
        if let Some(found) = cuda::behind_norm(device, &x, &a, weight, config, parts)? {
            return Ok(found);
        }
    }
    let (r, h, _) = rms_norm::residual_forward_with_room(&x, a, weight, config, room(&x))?;
    drop(x);
    Ok((r, forward(&h, parts)?.0))
}

/// (r, y): [`behind_norm`] for the layers `gate` and `up`, the unit act(gate) · up over them, and y of the layer `down` behind it.
///
/// # Errors
/// As [`behind_norm`] and [`forward_gated`].
pub fn gated_behind_norm(
    x: Tensor,
    a: Tensor,
    weight: &Tensor,
    config: rms_norm::Config,
    parts: &[Part; 2],
    activation: Activation,
    down: &Part,
) -> Result<(Tensor, Tensor)> {
    if let (Device::Cuda(_), 1) = (x.device(), x.shape().rows()) {
        let (r, ys) = behind_norm(x, a, weight, config, parts)?;
        let [gate, up] = <[Tensor; 2]>::try_from(ys).map_err(|ys| outputs(ys.len()))?;
        return Ok((r, behind_gate(&gate, &up, activation, down)?));
    }
    let (r, h, _) = rms_norm::residual_forward_with_room(&x, a, weight, config, room(&x))?;
    drop(x);
    let Gated { y, .. } = forward_gated(&h, parts, activation)?.0;
    drop(h);
    Ok((r, only(forward(&y, std::slice::from_ref(down))?.0)?))
}

/// y of the layer behind act(gate) · up.
fn behind_gate(gate: &Tensor, up: &Tensor, activation: Activation, down: &Part) -> Result<Tensor> {
    check(gate.shape().last(), down)?;
    let parts = std::slice::from_ref(down);
    if let Device::Cuda(device) = gate.device()
        && let Some(ys) = cuda::behind_gate(device, gate, up, activation, parts)?
    {
        return only(ys);
    }
    only(forward(&glu::forward(gate, up, activation)?, parts)?.0)
}

fn only(mut ys: Vec<Tensor>) -> Result<Tensor> {
    let count = ys.len();
    ys.pop().filter(|_| count == 1).ok_or(outputs(count))
}

fn outputs(found: usize) -> Error {
    Error::Argument { op: OP, argument: "outputs", expected: "one a part", found }
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
    fn parts(seed: u64, dtype: DType, inputs: usize, sizes: &[(usize, usize)]) -> Vec<Part> {
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
                scale: 0.05,
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
        before: [Part; 2],
        down: Part,
    }

    fn case(dtype: DType, tokens: usize, [inputs, inner]: [usize; 2], ranks: [usize; 3]) -> Case {
        let before = parts(7, dtype, inputs, &[(inner, ranks[0]), (inner, ranks[1])]);
        Case {
            x: normal(1, dtype, [tokens, inputs]),
            a: normal(2, dtype, [tokens, inputs]),
            weight: normal(3, DType::F32, [inputs]),
            before: before.try_into().unwrap(),
            down: parts(40, dtype, inner, &[(inputs, ranks[2])]).pop().unwrap(),
        }
    }

    #[test]
    fn layers_behind_a_norm_are_those_of_the_ops_one_after_another() {
        // The widths take each way of the norm: rows that share a warp, a thread's registers, and what does not fit there.
        let sizes = [([64, 128], [4, 4, 4]), ([512, 320], [8, 3, 16]), ([576, 1536], [0, 4, 0]), ([9216, 64], [2, 2, 2])];
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for tokens in [1, 3] {
                for (widths, ranks) in sizes {
                    let Case { x, a, weight, before, down } = case(dtype, tokens, widths, ranks);
                    let label = format!("{dtype} {tokens} {widths:?}");
                    let (r, h, _) = rms_norm::residual_forward(&x, a.clone(), &weight, CONFIG).unwrap();
                    let (expected, _) = forward(&h, &before).unwrap();
                    let (found_r, found) = behind_norm(x.clone(), a.clone(), &weight, CONFIG, &before).unwrap();
                    assert_eq!(found_r.to_f32_vec().unwrap(), r.to_f32_vec().unwrap(), "{label}");
                    for (found, expected) in found.iter().zip(&expected) {
                        assert_close(dtype, found, expected, &label);
                    }
                    let act = Activation::Silu;
                    let y = glu::forward(&expected[0], &expected[1], act).unwrap();
                    let (expected, _) = forward(&y, std::slice::from_ref(&down)).unwrap();
                    let (found_r, found) = gated_behind_norm(x, a, &weight, CONFIG, &before, act, &down).unwrap();
                    assert_eq!(found_r.to_f32_vec().unwrap(), r.to_f32_vec().unwrap(), "{label}");
                    assert_close(dtype, &found, &expected[0], &label);
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let Case { x, a, weight, before, down } = case(DType::F32, 1, [64, 128], [4, 4, 4]);
        let narrow = normal(4, DType::F32, [1, 32]);
        assert!(behind_norm(x.clone(), narrow, &weight, CONFIG, &before).is_err());
        let swapped = [before[0].clone(), down];
        assert!(gated_behind_norm(x, a, &weight, CONFIG, &swapped, Activation::Silu, &before[1]).is_err());
    }
}
