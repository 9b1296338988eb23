//! Tensor by tensor: read, quantise and back where asked, add the update, round, write, and measure what that did.

use std::ops::Range;

use half::{bf16, f16};
use nibble_autograd::Param;
use nibble_lora::Linear;
use nibble_model::files::{Checkpoint, SafetensorsWriter, StoredType};
use nibble_nf4::{QuantConfig, QuantizedBlocks};

use super::{MergeError, Output, layers::Layers};
use crate::{args::MergeBase, error::Result};

/// Elements that are rounded and written at a time.
const CHUNK: usize = 1 << 18;

/// Sums of squares over the model, in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Measured {
    /// Layers that an update was added to.
    pub(super) layers: usize,
    /// Σ W² of them.
    weight: f64,
    /// Σ Δ² of them, Δ = s B A.
    update: f64,
    /// Σ Δ (round(W + Δ) − W).
    written: f64,
    /// Σ (round(W + Δ) − (W + Δ))².
    rounding: f64,
    /// Σ W² of every linear.
    all: f64,
    /// Σ (W − dequant(quant(W)))² of every linear.
    quantization: f64,
    /// Elements of adapted layers that have another value after rounding than without an update.
    pub(super) changed: usize,
    /// Elements of adapted layers whose update is not zero.
    pub(super) updated: usize,
}

impl Measured {
    /// ‖Δ‖ / ‖W‖ over the adapted layers.
    pub(super) fn relative_update(&self) -> f64 {
        root_ratio(self.update, self.weight)
    }

    /// ⟨Δ, round(W + Δ) − W⟩ / ‖Δ‖²: the part of the update that is in the file. 1 when nothing is rounded away, 0 when all is.
    pub(super) fn surviving(&self) -> Option<f64> {
        (self.update > 0.0).then(|| self.written / self.update)
    }

    /// ‖round(W + Δ) − (W + Δ)‖ / ‖Δ‖.
    pub(super) fn relative_rounding(&self) -> f64 {
        root_ratio(self.rounding, self.update)
    }

    /// ‖W − dequant(quant(W))‖ / ‖W‖ over all linears.
    pub(super) fn relative_quantization(&self) -> f64 {
        root_ratio(self.quantization, self.all)
    }
}

fn root_ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole).sqrt() } else { 0.0 }
}

/// Writes the tensors of a merged model. One tensor at most is in memory, in f32 and, where asked, in 4 bits beside it.
#[derive(Debug)]
pub(super) struct Merger<'a> {
    checkpoint: &'a Checkpoint,
    layers: &'a Layers,
    quant: Option<QuantConfig>,
    base: MergeBase,
    writer: SafetensorsWriter,
    measured: Measured,
}

impl<'a> Merger<'a> {
    /// Nothing is read yet.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        layers: &'a Layers,
        quant: Option<QuantConfig>,
        base: MergeBase,
        writer: SafetensorsWriter,
    ) -> Self {
        Self { checkpoint, layers, quant, base, writer, measured: Measured::default() }
    }

    /// Puts the files into their places.
    pub(super) fn finish(self) -> Result<Measured> {
        self.writer.finish()?;
        Ok(self.measured)
    }

    /// Writes one tensor.
    pub(super) fn tensor(&mut self, output: &Output) -> Result<()> {
        if let Some(param) = self.layers.replacement(&output.plan.name) {
            return self.replaced(output, param);
        }
        if output.is_linear { self.linear(output) } else { self.copied(output) }
    }

    /// A tensor that was trained whole.
    fn replaced(&mut self, output: &Output, param: &Param) -> Result<()> {
        let values = self.layers.params().get(param)?;
        for values in values.as_slice::<f32>()?.chunks(CHUNK) {
            self.put(output, values, "the adapter")?;
        }
        Ok(())
    }

    /// A tensor that stays.
    fn copied(&mut self, output: &Output) -> Result<()> {
        let mut buffer = Vec::new();
        for rows in chunks(&output.plan.shape) {
            self.read(output, rows, &mut buffer)?;
            self.put(output, &buffer, "the model")?;
        }
        Ok(())
    }

    /// A linear of a block.
    fn linear(&mut self, output: &Output) -> Result<()> {
        let mut weight = vec![0.0; output.plan.shape.iter().product()];
        self.checkpoint.read_f32(&output.from, &mut weight)?;
        expect_finite(output, &weight, "the model")?;
        let blocks = self.quant.map(|quant| self.quantized(output, &mut weight, &quant)).transpose()?;
        match self.layers.adapted(&output.plan.name) {
            Some(layer) => self.adapted(output, &mut weight, blocks.as_ref(), layer),
            None => weight.chunks(CHUNK).try_for_each(|values| self.put(output, values, "the model")),
        }
    }

    /// Quantises, measures the difference, and leaves in `weight` what the update is to be added to.
    fn quantized(&mut self, output: &Output, weight: &mut [f32], quant: &QuantConfig) -> Result<QuantizedBlocks> {
        let name = output.plan.name.clone();
        let blocks = nibble_nf4::quantize(weight, quant).map_err(|source| MergeError::Quantize { name, source })?;
        let mut decoded = vec![0.0; CHUNK.min(weight.len())];
        for (i, values) in weight.chunks_mut(CHUNK).enumerate() {
            let decoded = &mut decoded[..values.len()];
            blocks.view().dequantize_range(i * CHUNK, decoded);
            for (&w, &q) in values.iter().zip(&*decoded) {
                self.measured.all += f64::from(w).powi(2);
                self.measured.quantization += (f64::from(w) - f64::from(q)).powi(2);
            }
            if self.base == MergeBase::Dequantized {
                values.copy_from_slice(decoded);
            }
        }
        Ok(blocks)
    }

    fn adapted(&mut self, output: &Output, weight: &mut [f32], blocks: Option<&QuantizedBlocks>, layer: &Linear) -> Result<()> {
        nibble_lora::merge(layer, self.layers.params(), weight)?;
        expect_finite(output, weight, "the adapter")?;
        self.measured.layers += 1;
        let row = output.plan.shape[1];
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for rows in chunks(&output.plan.shape) {
            let start = rows.start * row;
            // The weights without the update: made again, rather than kept beside it.
            match blocks.filter(|_| self.base == MergeBase::Dequantized) {
                Some(blocks) => {
                    before.resize(rows.len() * row, 0.0);
                    blocks.view().dequantize_range(start, &mut before);
                }
                None => self.read(output, rows, &mut before)?,
            }
            let merged = &weight[start..start + before.len()];
            let bytes = encode(output.plan.dtype, merged, &mut after);
            self.measured.add(&before, merged, &after, output.plan.dtype);
            expect_in_range(output, merged, &after)?;
            self.writer.write(&output.plan.name, &bytes)?;
        }
        Ok(())
    }

    fn read(&self, output: &Output, rows: Range<usize>, buffer: &mut Vec<f32>) -> Result<()> {
        buffer.resize(rows.len() * output.plan.shape.iter().skip(1).product::<usize>(), 0.0);
        Ok(self.checkpoint.read_rows_f32(&output.from, rows, buffer)?)
    }

    fn put(&mut self, output: &Output, values: &[f32], file: &'static str) -> Result<()> {
        expect_finite(output, values, file)?;
        let mut rounded = Vec::new();
        let bytes = encode(output.plan.dtype, values, &mut rounded);
        expect_in_range(output, values, &rounded)?;
        Ok(self.writer.write(&output.plan.name, &bytes)?)
    }
}

impl Measured {
    fn add(&mut self, before: &[f32], merged: &[f32], after: &[f32], dtype: StoredType) {
        for ((&w, &m), &r) in before.iter().zip(merged).zip(after) {
            let (unchanged, w, m, r) = (round(dtype, w), f64::from(w), f64::from(m), f64::from(r));
            let delta = m - w;
            self.weight += w * w;
            self.update += delta * delta;
            self.written += delta * (r - w);
            self.rounding += (r - m) * (r - m);
            self.updated += usize::from(delta != 0.0);
            self.changed += usize::from(delta != 0.0 && r != f64::from(unchanged));
        }
    }
}

/// Runs of whole rows of about [`CHUNK`] elements; a multiple of 32 rows, since a vector of blocks is read in whole blocks.
fn chunks(shape: &[usize]) -> impl Iterator<Item = Range<usize>> + use<> {
    let rows = shape.first().copied().unwrap_or(1);
    let row = shape.iter().skip(1).product::<usize>().max(1);
    let step = (CHUNK / row).next_multiple_of(32).max(32);
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

fn round(dtype: StoredType, value: f32) -> f32 {
    match dtype {
        StoredType::BF16 => bf16::from_f32(value).to_f32(),
        StoredType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The bytes of `values` in `dtype`, and in `rounded` what they stand for.
fn encode(dtype: StoredType, values: &[f32], rounded: &mut Vec<f32>) -> Vec<u8> {
    rounded.clear();
    rounded.extend(values.iter().map(|&value| round(dtype, value)));
    match dtype {
        StoredType::BF16 => rounded.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        StoredType::F16 => rounded.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        _ => rounded.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn expect_finite(output: &Output, values: &[f32], file: &'static str) -> Result<()> {
    match values.iter().find(|value| !value.is_finite()) {
        Some(&found) => Err(MergeError::NonFinite { name: output.plan.name.clone(), found, file }.into()),
        None => Ok(()),
    }
}

fn expect_in_range(output: &Output, values: &[f32], rounded: &[f32]) -> Result<()> {
    match values.iter().zip(rounded).find(|(_, rounded)| !rounded.is_finite()) {
        Some((&found, _)) => Err(MergeError::Range { name: output.plan.name.clone(), found, dtype: output.plan.dtype }.into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(w: f32, delta: f32, dtype: StoredType) -> Measured {
        let mut measured = Measured::default();
        measured.add(&[w], &[w + delta], &[round(dtype, w + delta)], dtype);
        measured
    }

    #[test]
    fn an_update_below_half_a_unit_of_bf16_is_rounded_away_and_one_in_f32_is_not() {
        // 1 and its neighbour in bf16 are 2⁻⁷ apart.
        let lost = measured(1.0, 0.0039, StoredType::BF16);
        assert_eq!((lost.surviving(), lost.updated, lost.changed), (Some(0.0), 1, 0));
        assert_eq!(lost.relative_rounding(), 1.0);
        let kept = measured(1.0, 0.0078125, StoredType::BF16);
        assert_eq!((kept.surviving(), kept.changed), (Some(1.0), 1));
        assert_eq!(measured(1.0, 0.0039, StoredType::F32).surviving(), Some(1.0));
        assert_eq!(measured(1.0, 0.0, StoredType::F32).surviving(), None);
    }

    #[test]
    fn chunks_cover_every_row_once_in_whole_blocks() {
        for shape in [&[1][..], &[33], &[100, 7], &[70_000, 9], &[3, 1 << 20]] {
            let mut next = 0;
            for rows in chunks(shape) {
                assert_eq!(rows.start, next);
                assert!(rows.start.is_multiple_of(32) && rows.end > rows.start);
                next = rows.end;
            }
            assert_eq!(next, shape[0]);
        }
    }

    #[test]
    fn bytes_are_the_rounded_values() {
        let mut rounded = Vec::new();
        let values = [1.0f32, -2.7182817, 3e-8, 70_000.0];
        let bytes = encode(StoredType::F16, &values, &mut rounded);
        let back: Vec<f32> = bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect();
        assert_eq!(back, rounded);
        assert!(rounded[3].is_infinite());
        assert_eq!(encode(StoredType::F32, &values, &mut rounded).len(), 16);
        assert_eq!(rounded, values);
    }
}
