//! The head and its loss on the CPU.

use half::bf16;
use rayon::prelude::*;

use super::{Config, Labels, Output, Result, Shape, Tensor, Trained};
use crate::{
    DType, Error, Float,
    dtype::with_float,
    ops::{
        matmul::{self, Operand, Precision, Segment, Source, gemm},
        operand::{dense, output, precision},
        simd::{LANES, exp, multiversion},
        softcap::{slope, softcap},
    },
};

/// Most rows of a chunk: enough that the weight, read twice a chunk, costs little beside the products.
const MOST_ROWS: usize = 256;
/// Bytes that the logits of a chunk may take, if that leaves a row.
const MOST_BYTES: usize = 64 << 20;

/// Memory for the rows of a chunk.
struct Chunk<'a> {
    h: &'a Tensor,
    weight: &'a Tensor,
    /// [rows, C], as h.
    rows: Tensor,
    /// F32 [rows, V].
    logits: Tensor,
}

/// Rows a chunk holds: even shares of all.
fn chunk_rows(trained: usize, vocab: usize) -> usize {
    let most = (MOST_BYTES / (4 * vocab)).clamp(1, MOST_ROWS);
    trained.div_ceil(trained.div_ceil(most).max(1)).max(1)
}

impl<'a> Chunk<'a> {
    fn new(h: &'a Tensor, weight: &'a Tensor, rows: usize) -> Result<Self> {
        let (vocab, inputs) = (weight.dims()[0], weight.dims()[1]);
        let logits = Tensor::empty(h.arena(), DType::F32, [rows, vocab])?;
        Ok(Self { h, weight, rows: Tensor::empty(h.arena(), h.dtype(), [rows, inputs])?, logits })
    }

    /// Uncapped logits of the trained rows.
    fn compute(&mut self, trained: &[Trained]) -> Result<&mut [f32]> {
        let (vocab, inputs) = (self.weight.dims()[0], self.weight.dims()[1]);
        with_float!(self.h.dtype(), super::OP, "h", E => {
            let from = self.h.as_slice::<E>()?;
            for (to, (row, _)) in self.rows.as_mut_slice::<E>()?.chunks_exact_mut(inputs.max(1)).zip(trained) {
                to.copy_from_slice(&from[row * inputs..(row + 1) * inputs]);
            }
            Ok::<(), Error>(())
        })?;
        let rows = trained.len();
        let logits = &mut self.logits.as_mut_slice()?[..rows * vocab];
        product(logits, (rows, vocab, inputs), &self.rows, self.weight, precision(self.h.dtype()))?;
        Ok(logits)
    }
}

/// logits (m x n) = h weightᵀ.
fn product(
    logits: &mut [f32],
    (m, n, k): (usize, usize, usize),
    h: &Tensor,
    weight: &Tensor,
    precision: Precision,
) -> Result<()> {
    let segment = Segment { a: Operand::new(dense(h)?), b: Operand::transpose(dense(weight)?), k, scale: 1.0 };
    gemm(matmul::Output::F32(logits), false, m, n, &[segment], None, precision);
    Ok(())
}

/// The precision of products with the gradient of the logits: its small values would underflow in f16.
fn gradient_precision(dtype: DType) -> Precision {
    if dtype == DType::F16 { Precision::F32 } else { precision(dtype) }
}

/// What [`rows_loss`] left of the logits: for activations of bf16, rows of it in the first half of their place.
fn gradient(logits: &[f32], vocab: usize, dtype: DType) -> Source<'_> {
    match dtype {
        DType::Bf16 => Source::Bf16 { data: bytemuck::cast_slice(logits), ld: 2 * vocab },
        _ => Source::F32 { data: logits, ld: vocab },
    }
}

pub(super) fn forward(h: &Tensor, weight: &Tensor, labels: &Labels, config: Config, want_dh: bool) -> Result<Output> {
    let trained = &labels.trained;
    let (vocab, inputs) = (weight.dims()[0], weight.dims()[1]);
    let step = chunk_rows(trained.len(), vocab.max(1));
    let mut dh = if want_dh { Some(Tensor::zeros(h.arena(), h.dtype(), h.shape())?) } else { None };
    let mut loss = 0.0;
    let result = |loss: f64, dh| {
        let loss = (loss * f64::from(labels.scale)) as f32;
        Ok(Output { loss: Tensor::from_slice(h.arena(), &[loss], [1])?, rows: trained.len(), dh })
    };
    if trained.is_empty() {
        return result(0.0, dh);
    }
    let mut chunk = Chunk::new(h, weight, step)?;
    let mut d_rows = Tensor::empty(h.arena(), h.dtype(), if want_dh { Shape::from([step, inputs]) } else { [0].into() })?;
    for trained in trained.chunks(step) {
        let logits = chunk.compute(trained)?;
        loss += rows_loss(logits, trained, labels.gradient_scale(), config, want_dh.then_some(h.dtype()));
        let Some(dh) = &mut dh else { continue };
        let gradient = gradient(logits, vocab, h.dtype());
        let segment = Segment { a: Operand::new(gradient), b: Operand::new(dense(weight)?), k: vocab, scale: 1.0 };
        let precision = gradient_precision(h.dtype());
        let to = first_rows(output(&mut d_rows)?, trained.len() * inputs);
        gemm(to, false, trained.len(), inputs, &[segment], None, precision);
        with_float!(h.dtype(), super::OP, "h", E => {
            let to = dh.as_mut_slice::<E>()?;
            for (from, (row, _)) in d_rows.as_slice::<E>()?.chunks_exact(inputs.max(1)).zip(trained) {
                to[row * inputs..(row + 1) * inputs].copy_from_slice(from);
            }
            Ok::<(), Error>(())
        })?;
    }
    result(loss, dh)
}

fn first_rows(output: matmul::Output, len: usize) -> matmul::Output {
    match output {
        matmul::Output::F32(c) => matmul::Output::F32(&mut c[..len]),
        matmul::Output::Bf16(c) => matmul::Output::Bf16(&mut c[..len]),
        matmul::Output::F16(c) => matmul::Output::F16(&mut c[..len]),
    }
}

pub(super) fn backward_weight(h: &Tensor, weight: &Tensor, labels: &Labels, config: Config, dweight: &mut [f32]) -> Result<()> {
    let trained = &labels.trained;
    let (vocab, inputs) = (weight.dims()[0], weight.dims()[1]);
    if trained.is_empty() {
        return Ok(());
    }
    let step = chunk_rows(trained.len(), vocab);
    let mut chunk = Chunk::new(h, weight, step)?;
    for trained in trained.chunks(step) {
        rows_loss(chunk.compute(trained)?, trained, labels.gradient_scale(), config, Some(h.dtype()));
        let gradient = gradient(chunk.logits.as_slice()?, vocab, h.dtype());
        let segment =
            Segment { a: Operand::transpose(gradient), b: Operand::new(dense(&chunk.rows)?), k: trained.len(), scale: 1.0 };
        gemm(matmul::Output::F32(dweight), true, vocab, inputs, &[segment], None, gradient_precision(h.dtype()));
    }
    Ok(())
}

pub(super) fn logits(h: &Tensor, weight: &Tensor, cap: Option<f32>) -> Result<Tensor> {
    let (vocab, inputs) = (weight.dims()[0], weight.dims()[1]);
    let mut logits = Tensor::empty(h.arena(), DType::F32, [h.dims()[0], vocab])?;
    let z = logits.as_mut_slice::<f32>()?;
    product(z, (h.dims()[0], vocab, inputs), h, weight, precision(h.dtype()))?;
    if let Some(cap) = cap {
        z.par_chunks_mut(vocab.max(1)).for_each(|row| cap_row(row, cap));
    }
    Ok(logits)
}

/// Σ (ln Σ exp z - z[label]) in order of the rows; with `gradient`, the logits become the gradient of the loss, for
/// activations of that type.
fn rows_loss(logits: &mut [f32], trained: &[Trained], scale: f32, config: Config, gradient: Option<DType>) -> f64 {
    let vocab = logits.len() / trained.len();
    let mut losses = [0.0; MOST_ROWS];
    let rows = logits.par_chunks_exact_mut(vocab).zip(trained).zip(&mut losses[..trained.len()]);
    rows.for_each(|((row, &(_, label)), loss)| {
        if let Some(cap) = config.softcap {
            cap_row(row, cap);
        }
        let (max, sum) = sum_exp(row);
        *loss = f64::from(max) + sum.ln() - f64::from(row[label]);
        let at_label = row[label];
        let slope = config.softcap.map_or(1.0, |cap| slope(at_label, cap));
        let p = f64::from(exp(at_label - max)) / sum;
        let of_label = (f64::from(scale) * (p - 1.0)) as f32 * slope;
        let factor = (f64::from(scale) / sum) as f32;
        match gradient {
            Some(DType::Bf16) => {
                narrow_softmax_gradient(row, max, factor, config.softcap);
                bytemuck::cast_slice_mut(row)[label] = bf16::from_f32(of_label);
            }
            Some(_) => {
                softmax_gradient(row, max, factor, config.softcap);
                row[label] = of_label;
            }
            None => {}
        }
    });
    losses[..trained.len()].iter().sum()
}

multiversion! {
    fn cap_row(row: &mut [f32], cap: f32) {
        for z in row {
            *z = softcap(*z, cap);
        }
    }
}

/// Logits whose exponentials are summed in f32, over fixed lanes; such sums are added in f64.
const BLOCK: usize = 1024;

multiversion! {
    /// (max z, Σ exp(z - max)), in one pass over blocks that stay in the cache.
    fn sum_exp(row: &[f32]) -> (f32, f64) {
        // Finite, so that a row of -inf gives 0 and not NaN.
        let (mut max, mut sum) = (f32::MIN, 0.0f64);
        for block in row.chunks(BLOCK) {
            let block_max = max_of(block).max(max);
            if block_max > max {
                sum *= f64::from(max - block_max).exp();
                max = block_max;
            }
            sum += f64::from(sum_of(block, max));
        }
        (max, sum)
    }
}

/// Σ exp(z - max) over fixed lanes.
#[inline(always)]
fn sum_of(values: &[f32], max: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    for row in rows {
        for lane in 0..LANES {
            lanes[lane] += exp(row[lane] - max);
        }
    }
    for (lane, z) in lanes.iter_mut().zip(rest) {
        *lane += exp(z - max);
    }
    lanes.iter().sum()
}

#[inline(always)]
fn max_of(values: &[f32]) -> f32 {
    let mut lanes = [f32::MIN; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    for row in rows {
        for lane in 0..LANES {
            lanes[lane] = if row[lane] > lanes[lane] { row[lane] } else { lanes[lane] };
        }
    }
    rest.iter().chain(&lanes).fold(f32::MIN, |a, &b| if b > a { b } else { a })
}

multiversion! {
    /// z becomes exp(z - max) factor, times the slope of the cap.
    fn softmax_gradient(row: &mut [f32], max: f32, factor: f32, cap: Option<f32>) {
        gradients(row, max, factor, cap);
    }
}

multiversion! {
    /// The same rounded to bf16, into the first half of the row.
    fn narrow_softmax_gradient(row: &mut [f32], max: f32, factor: f32, cap: Option<f32>) {
        const STEP: usize = 2 * LANES;
        let whole = row.len() / STEP * STEP;
        for start in (0..whole).step_by(STEP) {
            // What is written lies before what is read next.
            let mut values = [0.0; STEP];
            values.copy_from_slice(&row[start..][..STEP]);
            gradients(&mut values, max, factor, cap);
            let to = &mut bytemuck::cast_slice_mut::<f32, bf16>(row)[start..][..STEP];
            for i in 0..STEP {
                to[i] = Float::from_f32(values[i]);
            }
        }
        for at in whole..row.len() {
            let mut value = [row[at]];
            gradients(&mut value, max, factor, cap);
            bytemuck::cast_slice_mut::<f32, bf16>(row)[at] = Float::from_f32(value[0]);
        }
    }
}

#[inline(always)]
fn gradients(row: &mut [f32], max: f32, factor: f32, cap: Option<f32>) {
    if let Some(cap) = cap {
        for z in row {
            *z = exp(*z - max) * factor * slope(*z, cap);
        }
    } else {
        for z in row {
            *z = exp(*z - max) * factor;
        }
    }
}
