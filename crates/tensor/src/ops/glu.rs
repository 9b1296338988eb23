//! Gated linear unit: y = act(gate) · up (Shazeer 2020), act one of SiLU and GELU.
//!
//! Backward: dgate = dy · up · act′(gate), dup = dy · act(gate). Saved for backward: gate and up.
//!
//! Shapes: gate, up, y, dgate, dup [T, F] (any, all equal), of one type.

use super::typed;
use crate::{Device, Result, Tensor, dtype::with_float};

const OP: &str = "glu";

/// What the gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// x σ(x), σ the logistic function.
    Silu,
    /// GELU by tanh: ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), `gelu_pytorch_tanh` of the reference stack.
    GeluTanh,
    /// x Φ(x), Φ the distribution function of the standard normal: `gelu` of the reference stack.
    Gelu,
}

/// y, in the type of `gate`.
///
/// # Errors
/// [`crate::Error::Shape`] and [`crate::Error::DType`] when `up` differs from `gate` or they are integers, [`crate::Error::OutOfMemory`].
pub fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    forward_with_room(gate, up, activation, 0)
}

/// [`forward`], y with room for `room` elements behind its rows on a GPU.
///
/// # Errors
/// As [`forward`].
pub fn forward_with_room(gate: &Tensor, up: &Tensor, activation: Activation, room: usize) -> Result<Tensor> {
    check("up", up, gate)?;
    let mut y = Tensor::with_room(gate.arena(), gate.dtype(), gate.shape(), room)?;
    match gate.device() {
        Device::Cpu => with_float!(gate.dtype(), OP, "gate", E => {
            cpu::forward::<E>(gate.as_slice()?, up.as_slice()?, activation, y.as_mut_slice()?);
            Ok(())
        })?,
        Device::Cuda(device) => cuda::forward(device, gate, up, activation, &mut y)?,
    }
    Ok(y)
}

/// (dgate, dup), written over `gate` and `up` on a GPU where those are their only handles.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, gate: Tensor, up: Tensor, activation: Activation) -> Result<(Tensor, Tensor)> {
    check("up", &up, &gate)?;
    check("dy", dy, &gate)?;
    let (dgate, dup, _) = run_backward(dy.clone(), false, gate, up, activation)?;
    Ok((dgate, dup))
}

/// [`backward`], and y made again on the way, bit for bit; on a GPU over `dy` where that is its only handle, for one more writing.
///
/// # Errors
/// As [`forward`].
pub fn backward_and_forward(dy: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> Result<(Tensor, Tensor, Tensor)> {
    check("up", &up, &gate)?;
    check("dy", &dy, &gate)?;
    run_backward(dy, true, gate, up, activation)
}

/// (dgate, dup, y); y is dy where it is not asked for `again`.
fn run_backward(dy: Tensor, again: bool, gate: Tensor, up: Tensor, activation: Activation) -> Result<(Tensor, Tensor, Tensor)> {
    match gate.device() {
        Device::Cpu => with_float!(gate.dtype(), OP, "gate", E => {
            let mut dgate = Tensor::empty(gate.arena(), gate.dtype(), gate.shape())?;
            let mut dup = Tensor::empty(gate.arena(), gate.dtype(), gate.shape())?;
            let slices = (gate.as_slice()?, up.as_slice()?);
            cpu::backward::<E>(dy.as_slice()?, slices.0, slices.1, activation, dgate.as_mut_slice()?, dup.as_mut_slice()?);
            Ok((dgate, dup, if again { forward(&gate, &up, activation)? } else { dy }))
        }),
        Device::Cuda(device) => cuda::backward(device, dy, again, gate, up, activation),
    }
}

fn check(name: &'static str, tensor: &Tensor, gate: &Tensor) -> Result<()> {
    tensor.expect_shape(OP, name, gate.shape())?;
    typed::expect_dtype(OP, name, tensor, gate.dtype())
}

mod cpu {
    use rayon::prelude::*;

    use super::Activation;
    use crate::{
        Float,
        ops::simd::{exp, multiversion},
    };

    /// Elements of a task.
    const TASK: usize = 8192;

    pub(super) fn forward<E: Float>(gate: &[E], up: &[E], activation: Activation, y: &mut [E]) {
        let body = match activation {
            Activation::Silu => forward_silu::<E>,
            Activation::GeluTanh => forward_gelu_tanh::<E>,
            Activation::Gelu => forward_gelu::<E>,
        };
        (y.par_chunks_mut(TASK), gate.par_chunks(TASK), up.par_chunks(TASK))
            .into_par_iter()
            .for_each(|(y, gate, up)| body(gate, up, y));
    }

    pub(super) fn backward<E: Float>(dy: &[E], gate: &[E], up: &[E], activation: Activation, dgate: &mut [E], dup: &mut [E]) {
        let body = match activation {
            Activation::Silu => backward_silu::<E>,
            Activation::GeluTanh => backward_gelu_tanh::<E>,
            Activation::Gelu => backward_gelu::<E>,
        };
        (dgate.par_chunks_mut(TASK), dup.par_chunks_mut(TASK), dy.par_chunks(TASK), gate.par_chunks(TASK), up.par_chunks(TASK))
            .into_par_iter()
            .for_each(|(dgate, dup, dy, gate, up)| body(dy, gate, up, dgate, dup));
    }

    /// The loops of one activation, from its function of (act(x), act′(x)).
    macro_rules! loops {
        ($forward:ident, $backward:ident, $act:ident) => {
            multiversion! {
                fn $forward<E: Float>(gate: &[E], up: &[E], y: &mut [E]) {
                    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                        *y = E::from_f32($act(gate.to_f32()).0 * up.to_f32());
                    }
                }
            }
            multiversion! {
                fn $backward<E: Float>(dy: &[E], gate: &[E], up: &[E], dgate: &mut [E], dup: &mut [E]) {
                    for ((((dgate, dup), dy), gate), up) in dgate.iter_mut().zip(dup).zip(dy).zip(gate).zip(up) {
                        let (act, slope) = $act(gate.to_f32());
                        let dy = dy.to_f32();
                        *dgate = E::from_f32(dy * up.to_f32() * slope);
                        *dup = E::from_f32(dy * act);
                    }
                }
            }
        };
    }
    loops!(forward_silu, backward_silu, silu);
    loops!(forward_gelu_tanh, backward_gelu_tanh, gelu_tanh);
    loops!(forward_gelu, backward_gelu, gelu);

    #[inline(always)]
    fn silu(x: f32) -> (f32, f32) {
        let s = 1.0 / (1.0 + exp(-x));
        (x * s, s + x * s * (1.0 - s))
    }

    /// ½ (1 + tanh z) = σ(2z): no cancellation where x is negative.
    #[inline(always)]
    fn gelu_tanh(x: f32) -> (f32, f32) {
        const TWICE_ROOT: f32 = 1.595_769; // 2 √(2/π)
        let square = x * x;
        let s = 1.0 / (1.0 + exp(-TWICE_ROOT * x * (1.0 + 0.044_715 * square)));
        (x * s, s + x * s * (1.0 - s) * (TWICE_ROOT * (1.0 + 0.134_145 * square)))
    }

    #[inline(always)]
    fn gelu(x: f32) -> (f32, f32) {
        const ROOT: f32 = 0.398_942_3; // 1/√(2π)
        let cdf = normal_cdf(x);
        (x * cdf, cdf + x * (ROOT * exp(-0.5 * x * x)))
    }

    /// Φ(x) by ½ erfc(z), z = |x|/√2: erfc(z) = t exp(−z² + p(t)), t = 1/(1 + z/2), with p of degree 9 through the Chebyshev
    /// nodes of 0.16 ≤ t ≤ 1 (5e-8 off at most; erfc is below f32's smallest number beyond).
    #[inline(always)]
    fn normal_cdf(x: f32) -> f32 {
        const P: [f32; 10] = [
            -1.265_459_5,
            9.988_684e-1,
            3.846_063_7e-1,
            4.436_234_3e-2,
            -2.751_209e-2,
            -2.599_468_3e-2,
            -7.619_841_9e-1,
            1.206_169_5,
            -7.018_472_7e-1,
            1.487_911_6e-1,
        ];
        let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1.0 / (1.0 + 0.5 * z);
        let mut p = P[9];
        for c in P[..9].iter().rev() {
            p = p * t + c;
        }
        let tail = 0.5 * (t * exp(p - z * z));
        if x < 0.0 { tail } else { 1.0 - tail }
    }
}

pub(super) mod cuda {
    use super::{Activation, OP};
    use crate::{
        DType, Result, Tensor,
        cuda::{Arg, CudaDevice, Grid, suffix},
    };

    /// As `glu.cu` counts them.
    fn number(activation: Activation) -> Arg {
        Arg::U32(match activation {
            Activation::Silu => 0,
            Activation::GeluTanh => 1,
            Activation::Gelu => 2,
        })
    }

    /// Blocks of 256 threads with `packs` times 16 bytes each.
    fn grid(x: &Tensor, packs: usize) -> Grid {
        Grid::over(x.numel() * x.dtype().size(), 16 * 256 * packs, 256)
    }

    fn pitch(x: &Tensor) -> Result<usize> {
        Ok(x.rows_address()?.1)
    }

    /// Rows and columns, and where an operand begins with the pitch of its rows.
    fn sizes(x: &Tensor) -> Result<([Arg; 2], Arg, Arg)> {
        let (address, pitch) = x.rows_address()?;
        let (cols, ld) = if x.is_dense() { (x.shape().last(), x.shape().last()) } else { (x.numel() / x.dims()[0], pitch) };
        Ok(([x.numel() / cols.max(1), cols].map(Arg::size), Arg::Pointer(address), Arg::size(ld)))
    }

    /// y and h = y Aᵀ [1, R] of one row, for the A [R, F] at that address; nothing where the kernel does not serve.
    pub(in crate::ops) fn forward_with_h(
        device: CudaDevice,
        [gate, up]: [&Tensor; 2],
        activation: Activation,
        (lora_a, ranks): (u64, usize),
    ) -> Result<Option<[Tensor; 2]>> {
        super::check("up", up, gate)?;
        let cols = gate.shape().last();
        let aligned = [gate.address()?, up.address()?, lora_a].iter().all(|address| address.is_multiple_of(16));
        // Each block makes all of y: with a second turn of them a launch of its own for h costs less.
        let fits = cols.is_multiple_of(8) && ranks <= device.info().multiprocessors;
        if gate.dtype() == DType::F32 || gate.shape().rows() != 1 || !aligned || !fits {
            return Ok(None);
        }
        let empty = |cols: usize| Tensor::empty(gate.arena(), gate.dtype(), [1, cols]);
        let (mut y, mut h) = (empty(cols)?, empty(ranks)?);
        let outputs = [Arg::write(&mut y)?, Arg::write(&mut h)?];
        let inputs = [Arg::read(gate)?, Arg::read(up)?, Arg::Pointer(lora_a), number(activation), Arg::size(cols)];
        let name = format!("glu_h_{}", suffix(OP, gate.dtype())?);
        device.launch_early(&name, Grid::new(ranks, 512), &[&outputs[..], &inputs].concat())?;
        Ok(Some([y, h]))
    }

    pub(super) fn forward(device: CudaDevice, gate: &Tensor, up: &Tensor, activation: Activation, y: &mut Tensor) -> Result<()> {
        if pitch(gate)? != pitch(up)? {
            return forward(device, &gate.dense()?, &up.dense()?, activation, y);
        }
        let (rows_cols, gate_at, ld_in) = sizes(gate)?;
        let (_, y_at, ld) = sizes(y)?;
        let front = [y_at, gate_at, sizes(up)?.1, number(activation)];
        let (name, grid) = (format!("glu_fwd_{}", suffix(OP, gate.dtype())?), grid(gate, 1));
        // Where all blocks begin at once, as in generation, it pays that they begin early.
        let early = grid.blocks[0] as usize <= 8 * device.info().multiprocessors;
        let args = [&front[..], &rows_cols, &[ld, ld_in, Arg::U32(early.into())]].concat();
        if early { device.launch_early(&name, grid, &args) } else { device.launch(&name, grid, &args) }
    }

    /// A thread reads all its values before it writes one, so that the results may lie over the operands.
    pub(super) fn backward(
        device: CudaDevice,
        dy: Tensor,
        again: bool,
        gate: Tensor,
        up: Tensor,
        activation: Activation,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        if pitch(&gate)? != pitch(&up)? || !may_be_written_over(&gate, &up) {
            return backward(device, dy, again, gate.dense()?, up.dense()?, activation);
        }
        let (rows_cols, gate_at, ld) = sizes(&gate)?;
        let mut y = (again && !dy.is_unique()).then(|| Tensor::empty(dy.arena(), dy.dtype(), dy.shape())).transpose()?;
        let y_at = match &mut y {
            Some(y) => Arg::write(y)?,
            None if again => Arg::read(&dy)?,
            None => Arg::NONE,
        };
        let inputs = [Arg::read(&dy)?, gate_at, sizes(&up)?.1, number(activation)];
        let (name, grid) = (format!("glu_bwd_{}", suffix(OP, gate.dtype())?), grid(&gate, 2));
        let apart = memory_apart(&gate, &up)?;
        let [to_gate, to_up] = apart.as_ref().map_or([&gate, &up], |[dgate, dup]| [dgate, dup]);
        let outputs = [sizes(to_gate)?.1, sizes(to_up)?.1, y_at];
        device.launch(&name, grid, &[&outputs[..], &inputs, &rows_cols, &[ld]].concat())?;
        let [dgate, dup] = apart.unwrap_or([gate, up]);
        Ok((dgate, dup, y.unwrap_or(dy)))
    }

    /// Whether gradients may lie where gate and up do: side by side, or each without others' rows between its own.
    pub(in crate::ops) fn may_be_written_over(gate: &Tensor, up: &Tensor) -> bool {
        up.continues(gate) || (gate.expect_alone(OP).is_ok() && up.expect_alone(OP).is_ok())
    }

    /// Memory for the gradients of gate and up that lies as they do; nothing where these are their only handles, to be written over.
    pub(in crate::ops) fn memory_apart(gate: &Tensor, up: &Tensor) -> Result<Option<[Tensor; 2]>> {
        let like = |x: &Tensor| Tensor::with_room(x.arena(), x.dtype(), x.shape(), x.room());
        if gate.is_unique() && up.is_unique() {
            return Ok(None);
        }
        if up.continues(gate) {
            return Tensor::side_by_side(gate.arena(), gate.dtype(), [gate.shape(), up.shape()], up.room()).map(Some);
        }
        Ok(Some([like(gate)?, like(up)?]))
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, assert_within, central_difference, reference, sizes};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        DType,
        ops::samples::{arena, float, normal, rounding, wide},
    };

    const ALL: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];

    fn act(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => reference::silu(x),
            Activation::GeluTanh => reference::gelu_tanh(x),
            Activation::Gelu => reference::gelu(x),
        }
    }

    fn slope(activation: Activation, x: f64) -> f64 {
        central_difference(|x| act(activation, x[0]), &[x])[0]
    }

    /// A few roundings of σ or Φ, whose exponent is rounded relative to its size.
    fn error(x: f64) -> f64 {
        (24.0 + 4.0 * x * x) * UNIT_F32
    }

    proptest! {
        #[test]
        fn forward_is_the_formula([t, f] in sizes([5, 130]), dtype in float(), which in 0..3usize, seed in 0..1000u64) {
            let (gate, up) = (normal(seed, dtype, [t, f]), normal(seed + 1, dtype, [t, f]));
            let y = forward(&gate, &up, ALL[which]).unwrap();
            let (gate, up) = (wide(&gate), wide(&up));
            let want: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| act(ALL[which], *g) * u).collect();
            assert_within("y", &y.to_f32_vec().unwrap(), &want, |i| want[i].abs() * error(gate[i]) + rounding(dtype, want[i]));
        }

        #[test]
        fn backward_is_the_central_difference([t, f] in sizes([5, 70]), dtype in float(), which in 0..3usize, seed in 0..1000u64) {
            let [gate, up, dy] = [0, 1, 2].map(|s| normal(seed + s, dtype, [t, f]));
            let (dgate, dup) = backward(&dy, gate.clone(), up.clone(), ALL[which]).unwrap();
            let [gate, up, dy] = [gate, up, dy].map(|t| wide(&t));
            let want: Vec<f64> = (0..t * f).map(|i| dy[i] * up[i] * slope(ALL[which], gate[i])).collect();
            let size = |i: usize| (dy[i] * up[i]).abs() * (1.0 + gate[i].abs());
            assert_within("dgate", &dgate.to_f32_vec().unwrap(), &want, |i| {
                size(i) * (error(gate[i]) + 1e-9) + rounding(dtype, want[i])
            });
            let want: Vec<f64> = (0..t * f).map(|i| dy[i] * act(ALL[which], gate[i])).collect();
            assert_within("dup", &dup.to_f32_vec().unwrap(), &want, |i| want[i].abs() * error(gate[i]) + rounding(dtype, want[i]));
        }
    }

    #[test]
    fn activations_hold_over_the_whole_range() {
        let x: Vec<f32> = (-1300..=1300).map(|i| i as f32 * 0.01).collect();
        let gate = Tensor::from_slice(&arena(), &x, [x.len()]).unwrap();
        let one = Tensor::from_slice(gate.arena(), &vec![1.0f32; x.len()], [x.len()]).unwrap();
        for activation in ALL {
            let want: Vec<f64> = x.iter().map(|&x| act(activation, f64::from(x))).collect();
            let y = forward(&gate, &one, activation).unwrap();
            // GELU by tanh is x (1 + tanh z)/2 to f64's rounding only while the tail is above 1e-16.
            assert_within("y", &y.to_f32_vec().unwrap(), &want, |i| {
                want[i].abs() * error(f64::from(x[i])) * f64::from(x[i].abs()).max(1.0) + 1e-14
            });
        }
    }

    #[test]
    fn large_gates_saturate_without_nan() {
        let gate = Tensor::from_slice(&arena(), &[-1e4f32, -200.0, 200.0, 1e4], [4]).unwrap();
        for activation in ALL {
            let y = forward(&gate, &gate, activation).unwrap();
            assert_eq!(y.to_f32_vec().unwrap(), [0.0, 0.0, 4e4, 1e8], "{activation:?}");
            let (dgate, dup) = backward(&gate, gate.clone(), gate.clone(), activation).unwrap();
            assert_eq!(dgate.to_f32_vec().unwrap(), [0.0, 0.0, 4e4, 1e8], "{activation:?}");
            assert_eq!(dup.to_f32_vec().unwrap(), [0.0, 0.0, 4e4, 1e8], "{activation:?}");
        }
    }

    #[test]
    fn made_again_beside_the_gradients_it_is_the_same() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let [gate, up, dy] = [0, 1, 2].map(|seed| normal(seed, dtype, [5, 72]));
            for activation in ALL {
                let (y, plain) =
                    (forward(&gate, &up, activation).unwrap(), backward(&dy, gate.clone(), up.clone(), activation).unwrap());
                for alone in [false, true] {
                    let dy = if alone { normal(2, dtype, [5, 72]) } else { dy.clone() };
                    let (dgate, dup, again) = backward_and_forward(dy, gate.clone(), up.clone(), activation).unwrap();
                    for (found, expected) in [(again, &y), (dgate, &plain.0), (dup, &plain.1)] {
                        assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap(), "{activation:?} {dtype} {alone}");
                    }
                }
            }
        }
    }

    #[test]
    fn operands_that_differ_are_named() {
        let (gate, up) = (normal(1, DType::F32, [2, 3]), normal(1, DType::F32, [3, 2]));
        let error = forward(&gate, &up, Activation::Silu).unwrap_err().to_string();
        assert_eq!(error, "glu: `up` has the wrong shape: expected (2, 3), found (3, 2)");
        let error = backward(&normal(1, DType::F16, [2, 3]), gate.clone(), gate, Activation::Silu).unwrap_err().to_string();
        assert_eq!(error, "glu: `dy` has the wrong dtype: expected float32, found float16");
    }
}
