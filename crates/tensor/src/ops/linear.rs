//! Linear layers over one input: frozen bases in any format, low-rank adapters beside them.
//!
//! For each part i (q, k and v of an attention, gate and up of an MLP, or one alone), with x [T, K], W [N, K], bias `[N]`,
//! A [R, K], B [N, R] and s the adapter's scaling:
//!
//! ```text
//! h  = dropout(x) Aᵀ                          [T, R]
//! y  = x Wᵀ + bias + s h Bᵀ = [x | h] [W | s B]ᵀ + bias
//!
//! t  = s dy B                                 [T, R]
//! dx = Σ dy W + dropout'(t A) = Σ [dy | t] [W ; A]   (the second form without dropout)
//! dA += tᵀ dropout(x),  dB += s dyᵀ h,  dW += dyᵀ x,  dbias += Σ dy
//! ```
//!
//! A frozen weight's gradient is never computed. Saved for backward: x and h. The dropout mask is a function of a seed and
//! the element's index ([`Rng`]), so that it is made again instead of stored.

mod cuda;

use crate::{Device, Error, Result, Rng, Shape, Tensor, TensorMut, Weight};

const OP: &str = "linear";

/// Inverted dropout: each element is kept with probability 1 - p and divided by it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping, in [0, 1).
    pub p: f32,
    /// Stream of the mask: element n is dropped when its n-th number is below p.
    pub rng: Rng,
}

/// A low-rank update beside a weight.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// [R, K].
    pub a: Tensor,
    /// [N, R].
    pub b: Tensor,
    /// s.
    pub scale: f32,
    /// On the adapter's input.
    pub dropout: Option<Dropout>,
}

/// One linear layer of those that share an input.
#[derive(Clone, Debug)]
pub struct Part {
    /// [N, K].
    pub weight: Weight,
    /// `[N]`.
    pub bias: Option<Tensor>,
    /// The trained update.
    pub adapter: Option<Adapter>,
}

/// What [`forward`] keeps for [`backward`]: h of each part that has an adapter, or of all parts side by side.
#[derive(Clone, Debug)]
pub struct Saved(Vec<Option<Tensor>>);

/// Where the gradients of one part's trained values are added; nothing where frozen.
#[derive(Debug, Default)]
pub struct PartGrads<'a> {
    /// [N, K].
    pub weight: Option<TensorMut<'a>>,
    /// `[N]`.
    pub bias: Option<TensorMut<'a>>,
    /// [R, K] and [N, R].
    pub adapter: Option<(TensorMut<'a>, TensorMut<'a>)>,
}

/// y of each part. Products of f32 activations are in f32; of 16-bit activations, both operands are rounded to that type and
/// summed in f32.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::OutOfMemory`].
pub fn forward(x: &Tensor, parts: &[Part]) -> Result<(Vec<Tensor>, Saved)> {
    let inputs = x.shape().last();
    for part in parts {
        check(inputs, part)?;
    }
    match x.device() {
        Device::Cpu => {
            let outputs = parts.iter().map(|part| cpu::forward(x, part)).collect::<Result<Vec<_>>>()?;
            let (ys, hs) = outputs.into_iter().unzip();
            Ok((ys, Saved(hs)))
        }
        Device::Cuda(device) => cuda::forward(device, x, parts),
    }
}

/// Adds to the gradients of what trains, and returns dx when it is wanted. `saved` is what the forward pass kept;
/// `x` is let go where it is not needed any more.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::OutOfMemory`].
pub fn backward(
    dys: &[Tensor],
    x: Tensor,
    saved: &Saved,
    parts: &[Part],
    grads: Vec<PartGrads<'_>>,
    want_dx: bool,
) -> Result<Option<Tensor>> {
    let (rows, inputs) = (x.shape().rows(), x.shape().last());
    for (name, found) in [("dys", dys.len()), ("grads", grads.len())] {
        if found != parts.len() {
            return Err(Error::Argument { op: "linear", argument: name, expected: "as many as parts", found });
        }
    }
    for (part, dy) in parts.iter().zip(dys) {
        check(inputs, part)?;
        dy.expect_shape("linear", "dy", [rows, part.outputs()])?;
    }
    match x.device() {
        Device::Cpu => cpu::backward(dys, &x, &saved.0, parts, grads, want_dx),
        Device::Cuda(device) => cuda::backward(device, dys, x, saved, parts, grads, want_dx),
    }
}

impl Part {
    /// N.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.weight.shape().dims()[0]
    }
}

fn check(inputs: usize, part: &Part) -> Result<()> {
    let outputs = part.outputs();
    let expect = |operand, expected: Shape, found: Shape| {
        if expected == found { Ok(()) } else { Err(Error::Shape { op: "linear", operand, expected, found }) }
    };
    expect("weight", [outputs, inputs].into(), part.weight.shape())?;
    if let Some(bias) = &part.bias {
        expect("bias", [outputs].into(), bias.shape())?;
    }
    if let Some(adapter) = &part.adapter {
        let rank = adapter.a.shape().rows();
        expect("lora_A", [rank, inputs].into(), adapter.a.shape())?;
        expect("lora_B", [outputs, rank].into(), adapter.b.shape())?;
    }
    Ok(())
}

mod cpu {
    use rayon::prelude::*;

    use super::{Adapter, Dropout, Part, PartGrads};
    use crate::{
        Error, Float, Result, Tensor, TensorMut,
        dtype::with_float,
        ops::{
            matmul::{self, Operand, Segment, gemm},
            operand::{dense, output, precision, weight},
        },
    };

    /// Elements handled by one task of an elementwise pass.
    const CHUNK: usize = 1 << 14;

    /// (y, h).
    pub(super) fn forward(x: &Tensor, part: &Part) -> Result<(Tensor, Option<Tensor>)> {
        let (rows, inputs) = (x.shape().rows(), x.shape().last());
        let precision = precision(x.dtype());
        let h = part.adapter.as_ref().map(|adapter| adapter_input(x, adapter)).transpose()?;
        let mut y = Tensor::empty(x.arena(), x.dtype(), [rows, part.outputs()])?;
        let base = Segment { a: Operand::new(dense(x)?), b: Operand::transpose(weight(&part.weight)?), k: inputs, scale: 1.0 };
        let bias = part.bias.as_ref().map(Tensor::to_f32_vec).transpose()?;
        let mut segments = vec![base];
        if let (Some(h), Some(adapter)) = (&h, &part.adapter) {
            let (a, b) = (Operand::new(dense(h)?), Operand::transpose(dense(&adapter.b)?));
            segments.push(Segment { a, b, k: h.shape().last(), scale: adapter.scale });
        }
        gemm(output(&mut y)?, false, rows, part.outputs(), &segments, bias.as_deref(), precision);
        Ok((y, h))
    }

    /// h = dropout(x) Aᵀ.
    fn adapter_input(x: &Tensor, adapter: &Adapter) -> Result<Tensor> {
        let (rows, inputs, rank) = (x.shape().rows(), x.shape().last(), adapter.a.shape().rows());
        let mut h = Tensor::empty(x.arena(), x.dtype(), [rows, rank])?;
        let dropped = dropped(x, adapter.dropout)?;
        let a = Operand::new(dense(dropped.as_ref().unwrap_or(x))?);
        let segment = Segment { a, b: Operand::transpose(dense(&adapter.a)?), k: inputs, scale: 1.0 };
        gemm(output(&mut h)?, false, rows, rank, &[segment], None, precision(x.dtype()));
        Ok(h)
    }

    pub(super) fn backward(
        dys: &[Tensor],
        x: &Tensor,
        hs: &[Option<Tensor>],
        parts: &[Part],
        grads: Vec<PartGrads<'_>>,
        want_dx: bool,
    ) -> Result<Option<Tensor>> {
        let mut ts = Vec::with_capacity(parts.len());
        for (((dy, part), h), grads) in dys.iter().zip(parts).zip(hs).zip(grads) {
            ts.push(part_gradients(dy, x, h.as_ref(), part, grads)?);
        }
        want_dx.then(|| input_gradient(dys, x, &ts, parts)).transpose()
    }

    /// Adds to the gradients of one part's trained values; returns t = s dy B.
    fn part_gradients(dy: &Tensor, x: &Tensor, h: Option<&Tensor>, part: &Part, grads: PartGrads<'_>) -> Result<Option<Tensor>> {
        if let Some(dweight) = grads.weight {
            add_product("weight", dweight, dy, x, 1.0)?;
        }
        if let Some(dbias) = grads.bias {
            add_columns(dbias, dy)?;
        }
        let (Some(adapter), Some(h)) = (&part.adapter, h) else { return Ok(None) };
        let (rows, rank) = (dy.shape().rows(), adapter.a.shape().rows());
        let mut t = Tensor::empty(dy.arena(), dy.dtype(), [rows, rank])?;
        let segment =
            Segment { a: Operand::new(dense(dy)?), b: Operand::new(dense(&adapter.b)?), k: part.outputs(), scale: adapter.scale };
        gemm(output(&mut t)?, false, rows, rank, &[segment], None, precision(dy.dtype()));
        if let Some((da, db)) = grads.adapter {
            let dropped = dropped(x, adapter.dropout)?;
            add_product("lora_A", da, &t, dropped.as_ref().unwrap_or(x), 1.0)?;
            add_product("lora_B", db, dy, h, adapter.scale)?;
        }
        Ok(Some(t))
    }

    fn input_gradient(dys: &[Tensor], x: &Tensor, ts: &[Option<Tensor>], parts: &[Part]) -> Result<Tensor> {
        let (rows, inputs) = (x.shape().rows(), x.shape().last());
        let mut segments = Vec::with_capacity(2 * parts.len());
        for ((dy, part), t) in dys.iter().zip(parts).zip(ts) {
            segments.push(Segment {
                a: Operand::new(dense(dy)?),
                b: Operand::new(weight(&part.weight)?),
                k: part.outputs(),
                scale: 1.0,
            });
            if let (Some(t), Some(Adapter { a, dropout: None, .. })) = (t, &part.adapter) {
                segments.push(Segment {
                    a: Operand::new(dense(t)?),
                    b: Operand::new(dense(a)?),
                    k: t.shape().last(),
                    scale: 1.0,
                });
            }
        }
        let mut dx = Tensor::empty(x.arena(), x.dtype(), x.shape())?;
        gemm(output(&mut dx)?, false, rows, inputs, &segments, None, precision(x.dtype()));
        for (part, t) in parts.iter().zip(ts) {
            if let (Some(t), Some(Adapter { a, dropout: Some(dropout), .. })) = (t, &part.adapter) {
                let mut through = Tensor::empty(x.arena(), x.dtype(), x.shape())?;
                let segment = Segment { a: Operand::new(dense(t)?), b: Operand::new(dense(a)?), k: t.shape().last(), scale: 1.0 };
                gemm(output(&mut through)?, false, rows, inputs, &[segment], None, precision(x.dtype()));
                add_dropped(&mut dx, &through, *dropout)?;
            }
        }
        Ok(dx)
    }

    /// out += scale * aᵀ b over the rows of both.
    fn add_product(name: &'static str, mut out: TensorMut<'_>, a: &Tensor, b: &Tensor, scale: f32) -> Result<()> {
        let (m, n, k) = (a.shape().last(), b.shape().last(), a.shape().rows());
        out.expect_shape("linear", name, [m, n])?;
        let segment = Segment { a: Operand::transpose(dense(a)?), b: Operand::new(dense(b)?), k, scale };
        gemm(matmul::Output::F32(out.as_mut_slice::<f32>()?), true, m, n, &[segment], None, precision(a.dtype()));
        Ok(())
    }

    /// dbias += Σ over rows of dy.
    fn add_columns(mut dbias: TensorMut<'_>, dy: &Tensor) -> Result<()> {
        let n = dy.shape().last();
        dbias.expect_shape("linear", "bias", [n])?;
        with_float!(dy.dtype(), "linear", "dy", E => {
            let (dbias, dy) = (dbias.as_mut_slice::<f32>()?, dy.as_slice::<E>()?);
            for row in dy.chunks_exact(n) {
                for (sum, &g) in dbias.iter_mut().zip(row) {
                    *sum += Float::to_f32(g);
                }
            }
            Ok::<(), Error>(())
        })
    }

    /// x with its dropped elements zero and the others divided by 1 - p; nothing without dropout.
    fn dropped(x: &Tensor, dropout: Option<Dropout>) -> Result<Option<Tensor>> {
        let Some(dropout) = dropout else { return Ok(None) };
        let mut out = Tensor::empty(x.arena(), x.dtype(), x.shape())?;
        with_float!(x.dtype(), "linear", "x", E => {
            let x = x.as_slice::<E>()?;
            out.as_mut_slice::<E>()?.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (out, x))| {
                for (i, (y, &x)) in out.iter_mut().zip(x).enumerate() {
                    *y = E::from_f32(Float::to_f32(x) * dropout.factor(chunk * CHUNK + i));
                }
            });
            Ok::<(), Error>(())
        })?;
        Ok(Some(out))
    }

    /// dx += through, where the mask kept it.
    fn add_dropped(dx: &mut Tensor, through: &Tensor, dropout: Dropout) -> Result<()> {
        with_float!(through.dtype(), "linear", "dx", E => {
            let through = through.as_slice::<E>()?;
            dx.as_mut_slice::<E>()?.par_chunks_mut(CHUNK).zip(through.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (dx, g))| {
                for (i, (dx, &g)) in dx.iter_mut().zip(g).enumerate() {
                    *dx = E::from_f32(Float::to_f32(*dx) + Float::to_f32(g) * dropout.factor(chunk * CHUNK + i));
                }
            });
            Ok(())
        })
    }
}

impl Dropout {
    /// What element `n` is multiplied by: 0 or 1 / (1 - p).
    fn factor(&self, n: usize) -> f32 {
        if self.rng.uniform(n as u64) < self.p { 0.0 } else { 1.0 / (1.0 - self.p) }
    }
}

#[cfg(test)]
mod tests;
