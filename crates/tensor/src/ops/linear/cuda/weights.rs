//! Weights as the matrices that products read, with the adapters' beside and below.

use std::ops::Range;

use super::{
    super::{OP, Part, ROOM},
    call::{Call, columns, rows},
};
use crate::{
    Result, Tensor, Weight,
    cuda::{Arg, Grid, Matrix, suffix},
    ops::dequantize::cuda::{matrix, widened},
};

impl Call<'_, '_> {
    /// The parts whose weights are widened as one matrix: all, as for the input gradient (`riders`), or each alone.
    pub(super) fn widened_together(&self) -> Vec<Range<usize>> {
        let all = 0..self.parts.len();
        if self.tokens >= self.inputs { vec![all] } else { all.map(|i| i..i + 1).collect() }
    }

    /// [W | 0 s B 0] of some parts, one below the other.
    pub(super) fn weights_beside(&self, parts: Range<usize>) -> Result<Tensor> {
        let weight = self.widened(parts.clone())?;
        let (ld, mut outputs) = (weight.shape().last(), 0);
        for i in parts {
            let place = columns(rows(&weight)?, outputs * ld + self.inputs, self.dtype);
            self.place_adapter(i, place)?;
            outputs += self.parts[i].outputs();
        }
        Ok(weight)
    }

    /// The weights of some parts, one below the other. Where adapters ride there is room for s B beside and for A below, in one matrix, so
    /// that forward and backward find what the other has widened.
    pub(super) fn widened(&self, parts: Range<usize>) -> Result<Tensor> {
        if let [Part { weight: weight @ Weight::Dense(_), .. }] = &self.parts[parts.clone()] {
            return matrix(self.device, weight, self.dtype, &self.arena);
        }
        let rides = self.parts[parts.clone()].iter().all(|part| self.rides(part));
        // Rows begin with a line of memory, as those of x with room do.
        let more = if rides { [self.ranks, self.ranks.next_multiple_of(ROOM)] } else { [0, 0] };
        let weights: Vec<&Weight> = self.parts[parts].iter().map(|part| &part.weight).collect();
        widened(self.device, &weights, self.dtype, &self.arena, more)
    }

    /// The columns 0 s B 0 of one part.
    fn place_adapter(&self, i: usize, place: Matrix) -> Result<()> {
        let (part, b) = (&self.parts[i], self.pairs[i].as_ref().map(|(_, b)| b));
        let args = [
            Arg::Pointer(place.address),
            Arg::read_or_none(b)?,
            Arg::F32(part.adapter.as_ref().map_or(0.0, |adapter| adapter.scale)),
            Arg::size(part.outputs()),
            Arg::size(b.map_or(0, |b| b.shape().last())),
            Arg::size(self.offsets[i]),
            Arg::size(self.ranks),
            Arg::size(place.ld),
        ];
        let grid = Grid::over(part.outputs() * self.ranks, 2048, 256);
        self.device.launch_early(&format!("place_columns_{}", suffix(OP, self.dtype)?), grid, &args)
    }
}
