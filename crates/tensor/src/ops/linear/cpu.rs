//! The linear layers on the CPU.

use rayon::prelude::*;

use super::{Adapter, Dropout, Part, PartGrads};
use crate::{
    Error, Float, Result, Tensor, TensorMut,
    dtype::with_float,
    ops::{
        matmul::{self, Input, Operand, Outer, Output, Product, Segment, Term, add_outer, gemm, gemm_rows, gemm_rows_first},
        operand::{dense, output, precision, weight},
    },
};

/// Elements handled by one task of an elementwise pass.
const CHUNK: usize = 1 << 14;

/// Runs all parts as one pass over the rows of x: `h` of each adapter, and from x and `h` each y. Gives (y, h) of each part.
pub(super) fn forward(x: &Tensor, parts: &[Part]) -> Result<Vec<(Tensor, Option<Tensor>)>> {
    let (ys, hs) = run(x, parts, true)?;
    Ok(ys.into_iter().zip(hs).collect())
}

/// `h` of each part that has an adapter, without y.
pub(super) fn adapter_inputs(x: &Tensor, parts: &[Part]) -> Result<Vec<Option<Tensor>>> {
    Ok(run(x, parts, false)?.1)
}

/// (y of each part where wanted, h of each part with an adapter).
fn run(x: &Tensor, parts: &[Part], want_y: bool) -> Result<(Vec<Tensor>, Vec<Option<Tensor>>)> {
    let (rows, inputs) = (x.shape().rows(), x.shape().last());
    let dropped = parts.iter().map(|part| dropped_input(x, part)).collect::<Result<Vec<_>>>()?;
    let biases = parts.iter().map(|part| part.bias.as_ref().map(Tensor::to_f32_vec).transpose()).collect::<Result<Vec<_>>>()?;
    let empty = |n: usize| Tensor::empty(x.arena(), x.dtype(), [rows, n]);
    let mut hs = adapters(parts).map(|(_, adapter)| empty(adapter.a.shape().rows())).collect::<Result<Vec<_>>>()?;
    let mut ys = parts.iter().filter(|_| want_y).map(|part| empty(part.outputs())).collect::<Result<Vec<_>>>()?;
    let hs_count = hs.len();
    // Inputs of the products: x, what dropout left of it, then the results h.
    let mut read = vec![Input::Stored { source: dense(x)?, k: inputs }];
    let mut products = Vec::with_capacity(hs.len() + ys.len());
    for ((i, adapter), h) in adapters(parts).zip(&mut hs) {
        let input = if dropped[i].is_some() { read.len() } else { 0 };
        if let Some(dropped) = &dropped[i] {
            read.push(Input::Stored { source: dense(dropped)?, k: inputs });
        }
        let term = Term { input, b: Operand::transpose(dense(&adapter.a)?), scale: 1.0 };
        products.push(Product { n: adapter.a.shape().rows(), c: output(h)?, terms: vec![term], bias: None });
    }
    let mut places = ys.iter_mut();
    for (part, bias) in parts.iter().zip(&biases) {
        let mut terms = vec![Term { input: 0, b: Operand::transpose(weight(&part.weight)?), scale: 1.0 }];
        if let Some(adapter) = &part.adapter {
            let results = read.iter().filter(|input| matches!(input, Input::Result(_))).count();
            terms.push(Term { input: read.len(), b: Operand::transpose(dense(&adapter.b)?), scale: adapter.scale });
            read.push(Input::Result(results));
        }
        let c = places.next().map_or(Ok(Output::F32(&mut [])), output)?;
        products.push(Product { n: part.outputs(), c, terms, bias: bias.as_deref() });
    }
    // Without y each h is still summed as beside it: so that a pass that runs again gives the same bits.
    let first = if want_y { products.len() } else { hs_count };
    gemm_rows_first(rows, &read, products, first, precision(x.dtype()));
    let mut hs = hs.into_iter();
    Ok((ys, parts.iter().map(|part| part.adapter.as_ref().and_then(|_| hs.next())).collect()))
}

/// The parts with adapters, numbered among all.
fn adapters(parts: &[Part]) -> impl Iterator<Item = (usize, &Adapter)> {
    parts.iter().enumerate().filter_map(|(i, part)| Some((i, part.adapter.as_ref()?)))
}

/// x with the dropout of a part's adapter; nothing without.
fn dropped_input(x: &Tensor, part: &Part) -> Result<Option<Tensor>> {
    part.adapter.as_ref().map_or(Ok(None), |adapter| dropped(x, adapter.dropout))
}

pub(super) fn backward(
    dys: &[Tensor],
    x: &Tensor,
    hs: &[Option<Tensor>],
    parts: &[Part],
    grads: Vec<PartGrads<'_>>,
    want_dx: bool,
) -> Result<Option<Tensor>> {
    let (ts, dx) = input_gradients(dys, x, parts, want_dx)?;
    let mut ts_of_adapters = ts.iter();
    let mut outer = AdapterGradients::default();
    for (((dy, part), h), grads) in dys.iter().zip(parts).zip(hs).zip(grads) {
        if let Some(dweight) = grads.weight {
            add_product("weight", dweight, dy, x, 1.0)?;
        }
        if let Some(dbias) = grads.bias {
            add_columns(dbias, dy)?;
        }
        let Some(adapter) = &part.adapter else { continue };
        let (Some(t), Some(h)) = (ts_of_adapters.next(), h) else { continue };
        if let Some((da, db)) = grads.adapter {
            outer.push(AdapterGradient { da, db, t, h, dy, x: dropped(x, adapter.dropout)?, scale: adapter.scale });
        }
    }
    outer.add(x)?;
    Ok(dx)
}

/// t = s dy B of each adapter, and dx if it is wanted, in one pass over the rows.
fn input_gradients(dys: &[Tensor], x: &Tensor, parts: &[Part], want_dx: bool) -> Result<(Vec<Tensor>, Option<Tensor>)> {
    let (rows, inputs) = (x.shape().rows(), x.shape().last());
    let empty = |n: usize| Tensor::empty(x.arena(), x.dtype(), [rows, n]);
    let mut ts = adapters(parts).map(|(_, adapter)| empty(adapter.a.shape().rows())).collect::<Result<Vec<_>>>()?;
    let mut dx = want_dx.then(|| Tensor::empty(x.arena(), x.dtype(), x.shape())).transpose()?;
    let (mut read, mut through) = (Vec::new(), Vec::new());
    for (i, (dy, part)) in dys.iter().zip(parts).enumerate() {
        read.push(Input::Stored { source: dense(dy)?, k: part.outputs() });
        through.push(Term { input: i, b: Operand::new(weight(&part.weight)?), scale: 1.0 });
    }
    let mut products = Vec::with_capacity(ts.len() + 1);
    for (j, ((i, adapter), t)) in adapters(parts).zip(&mut ts).enumerate() {
        let term = Term { input: i, b: Operand::new(dense(&adapter.b)?), scale: adapter.scale };
        products.push(Product { n: adapter.a.shape().rows(), c: output(t)?, terms: vec![term], bias: None });
        if adapter.dropout.is_none() {
            through.push(Term { input: read.len(), b: Operand::new(dense(&adapter.a)?), scale: 1.0 });
            read.push(Input::Result(j));
        }
    }
    if let Some(dx) = &mut dx {
        products.push(Product { n: inputs, c: output(dx)?, terms: through, bias: None });
    }
    gemm_rows(rows, &read, products, precision(x.dtype()));
    if let Some(dx) = &mut dx {
        add_through_dropout(dx, x, parts, &ts)?;
    }
    Ok((ts, dx))
}

/// dx += dropout'(t A) of each adapter with dropout.
fn add_through_dropout(dx: &mut Tensor, x: &Tensor, parts: &[Part], ts: &[Tensor]) -> Result<()> {
    let (rows, inputs) = (x.shape().rows(), x.shape().last());
    for ((_, adapter), t) in adapters(parts).zip(ts) {
        if let Some(dropout) = adapter.dropout {
            let mut through = Tensor::empty(x.arena(), x.dtype(), x.shape())?;
            let segment =
                Segment { a: Operand::new(dense(t)?), b: Operand::new(dense(&adapter.a)?), k: t.shape().last(), scale: 1.0 };
            gemm(output(&mut through)?, false, rows, inputs, &[segment], None, precision(x.dtype()));
            add_dropped(dx, &through, dropout)?;
        }
    }
    Ok(())
}

/// What one adapter's gradients are made of: dA += tᵀ x, dB += s dyᵀ h.
struct AdapterGradient<'a, 'g> {
    da: TensorMut<'g>,
    db: TensorMut<'g>,
    t: &'a Tensor,
    h: &'a Tensor,
    dy: &'a Tensor,
    /// The adapter's input, where dropout changed it.
    x: Option<Tensor>,
    scale: f32,
}

/// Those of all parts, added together.
#[derive(Default)]
struct AdapterGradients<'a, 'g>(Vec<AdapterGradient<'a, 'g>>);

impl<'a, 'g> AdapterGradients<'a, 'g> {
    fn push(&mut self, gradient: AdapterGradient<'a, 'g>) {
        self.0.push(gradient);
    }

    fn add(&mut self, x: &Tensor) -> Result<()> {
        let (k, precision) = (x.shape().rows(), precision(x.dtype()));
        let mut products = Vec::with_capacity(2 * self.0.len());
        for AdapterGradient { da, db, t, h, dy, x: dropped, scale } in &mut self.0 {
            let x = dropped.as_ref().unwrap_or(x);
            let (rank, inputs, outputs) = (t.shape().last(), x.shape().last(), dy.shape().last());
            da.expect_shape("linear", "lora_A", [rank, inputs])?;
            db.expect_shape("linear", "lora_B", [outputs, rank])?;
            let (a, b) = (da.as_mut_slice()?, db.as_mut_slice()?);
            products.push(Outer { c: a, a: dense(x)?, b: dense(t)?, m: inputs, n: rank, k, scale: 1.0, transposed: true });
            products.push(Outer { c: b, a: dense(dy)?, b: dense(h)?, m: outputs, n: rank, k, scale: *scale, transposed: false });
        }
        add_outer(&mut products, precision);
        Ok(())
    }
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
