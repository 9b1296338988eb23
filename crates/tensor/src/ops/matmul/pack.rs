//! Copies of operands in the order in which the register tiles read them.
//!
//! A panel holds `width` lanes (rows of `a`, columns of `b`) over a block of the reduction: `steps` groups of `width`
//! words. Lanes past the end of the matrix are zero. The segments are laid end to end along the reduction, each padded
//! with zeros to whole words, so a block may hold the end of one segment and the start of the next.

use super::kernels::Kernel;
use super::scratch::{self, Role};
use super::{Operand, Precision, Problem, Segment, Source};
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Packs one side of a problem.
#[derive(Clone, Copy)]
pub(super) struct Packer<'a> {
    kernel: Kernel,
    precision: Precision,
    segments: &'a [Segment<'a>],
    right: bool,
    scales: bool,
    /// Rows of `a` or columns of `b`.
    lanes: usize,
    /// Lanes of a panel.
    pub(super) width: usize,
}

/// The part of a segment that lies in a block: elements `k` of its reduction, `steps` words from word `first` on.
struct Piece<'a> {
    operand: Operand<'a>,
    scale: f32,
    k: Range<usize>,
    first: usize,
    steps: usize,
}

impl<'a> Packer<'a> {
    /// The packer of `a`.
    pub(super) fn left(problem: &Problem<'a>) -> Self {
        Self {
            kernel: problem.kernel,
            precision: problem.precision,
            segments: problem.segments,
            right: false,
            scales: !problem.scales_b(),
            lanes: problem.m,
            width: problem.kernel.mr(),
        }
    }

    /// The packer of `b`.
    pub(super) fn right(problem: &Problem<'a>) -> Self {
        Self { right: true, scales: problem.scales_b(), lanes: problem.n, width: problem.kernel.nr(), ..Self::left(problem) }
    }

    /// Words that the panels of `lanes` lanes over `steps` steps take.
    pub(super) fn len(&self, lanes: usize, steps: usize) -> usize {
        lanes.next_multiple_of(self.width) * steps
    }

    /// Fills `panels` with the lanes from `lane` on over the words `block` of the reduction.
    pub(super) fn pack(&self, lane: usize, block: Range<usize>, panels: &mut [f32]) {
        let mut start = 0;
        for segment in self.segments {
            let end = start + segment.k.div_ceil(self.kernel.pair());
            let words = block.start.max(start)..block.end.min(end);
            if words.start < words.end {
                let pair = self.kernel.pair();
                let piece = Piece {
                    operand: if self.right { segment.b } else { segment.a },
                    scale: if self.scales { segment.scale } else { 1.0 },
                    k: (words.start - start) * pair..((words.end - start) * pair).min(segment.k),
                    first: words.start - block.start,
                    steps: words.len(),
                };
                if piece.operand.transposed == self.right {
                    self.pack_along(&piece, lane, block.len(), panels);
                } else {
                    self.pack_across(&piece, lane, block.len(), panels);
                }
            }
            start = end;
        }
    }

    /// Lanes are stored rows: runs of the reduction are transposed into the panels.
    fn pack_along(&self, piece: &Piece, lane: usize, block_steps: usize, panels: &mut [f32]) {
        let (width, steps) = (self.width, piece.steps);
        for (i, panel) in panels.chunks_mut(width * block_steps).enumerate() {
            let lane = lane + i * width;
            let lanes = width.min(self.lanes - lane);
            let panel = &mut panel[piece.first * width..][..steps * width];
            if let Some((data, ld)) = self.plain(piece) {
                let rows = &data[lane * ld + piece.k.start..];
                self.kernel.transpose(rows, ld, lanes, steps, panel, width);
            } else {
                scratch::with(Role::Run, (width + 2) * steps, |words| {
                    let (words, run) = words.split_at_mut(width * steps);
                    for (l, words) in words.chunks_mut(steps).take(lanes).enumerate() {
                        self.read_words(piece, lane + l, words, run);
                    }
                    self.kernel.transpose(words, steps, lanes, steps, panel, width);
                });
            }
            if lanes < width {
                for step in panel.chunks_mut(width) {
                    step[lanes..].fill(0.0);
                }
            }
        }
    }

    /// One lane's words of a piece, from a stored row. `run` is room for the row's elements.
    fn read_words(&self, piece: &Piece, row: usize, words: &mut [f32], run: &mut [f32]) {
        if self.kernel.pair() == 1 {
            self.read(piece, row, piece.k.start, words);
            return;
        }
        let run = &mut run[..2 * words.len()];
        let (run_k, padding) = run.split_at_mut(piece.k.len());
        self.read(piece, row, piece.k.start, run_k);
        padding.fill(0.0);
        self.kernel.narrow_bf16(run, bytemuck::cast_slice_mut(words));
    }

    /// Lanes are stored columns: each stored row is a step of all panels (or half of one).
    fn pack_across(&self, piece: &Piece, lane: usize, block_steps: usize, panels: &mut [f32]) {
        let width = self.width;
        let lanes = (panels.len() / block_steps).min(self.lanes - lane);
        if let Some((data, ld)) = self.plain(piece) {
            for (s, k) in piece.k.clone().enumerate() {
                let run = &data[k * ld + lane..][..lanes];
                scatter(run, panels, width, piece.first + s, block_steps);
            }
            return;
        }
        scratch::with(Role::Run, 3 * lanes, |buffer| {
            let (low, rest) = buffer.split_at_mut(lanes);
            let (high, words) = rest.split_at_mut(lanes);
            for s in 0..piece.steps {
                let k = piece.k.start + s * self.kernel.pair();
                self.read(piece, k, lane, low);
                if self.kernel.pair() == 1 {
                    scatter(low, panels, width, piece.first + s, block_steps);
                    continue;
                }
                if k + 1 < piece.k.end {
                    self.read(piece, k + 1, lane, high);
                } else {
                    high.fill(0.0);
                }
                self.kernel.pair_bf16(low, high, words);
                scatter(words, panels, width, piece.first + s, block_steps);
            }
        });
    }

    /// The stored matrix, where its elements are the words.
    fn plain<'b>(&self, piece: &Piece<'b>) -> Option<(&'b [f32], usize)> {
        match piece.operand.source {
            Source::F32 { data, ld } if piece.scale == 1.0 && self.precision == Precision::F32 => Some((data, ld)),
            _ => None,
        }
    }

    /// Reads a run of a stored row, scales it, and rounds it unless words of bf16 are made of it.
    fn read(&self, piece: &Piece, row: usize, column: usize, out: &mut [f32]) {
        let source = &piece.operand.source;
        read_run(source, row, column, out, self.kernel);
        if piece.scale != 1.0 {
            for x in out.iter_mut() {
                *x *= piece.scale;
            }
        }
        let rounded = match source {
            Source::Bf16 { .. } => self.precision == Precision::Bf16 && piece.scale == 1.0,
            Source::F16 { .. } => self.precision == Precision::F16 && piece.scale == 1.0,
            _ => false,
        };
        if !rounded && self.kernel.pair() == 1 {
            round(out, self.precision, self.kernel);
        }
    }
}

/// Reads `out.len()` elements of a stored row as f32.
pub(super) fn read_run(source: &Source, row: usize, column: usize, out: &mut [f32], kernel: Kernel) {
    let len = out.len();
    match *source {
        Source::F32 { data, ld } => out.copy_from_slice(&data[row * ld + column..][..len]),
        Source::Bf16 { data, ld } => kernel.widen_bf16(&data[row * ld + column..][..len], out),
        Source::F16 { data, ld } => data[row * ld + column..][..len].convert_to_f32_slice(out),
        Source::Blocks { view, cols } => view.dequantize_range(row * cols + column, out),
        Source::Int8 { codes, row_scale, ld } => {
            let scale = row_scale[row] / 127.0;
            for (out, &code) in out.iter_mut().zip(&codes[row * ld + column..][..len]) {
                *out = f32::from(code) * scale;
            }
        }
    }
}

/// Rounds to the precision in place.
pub(super) fn round(values: &mut [f32], precision: Precision, kernel: Kernel) {
    match precision {
        Precision::F32 => {}
        Precision::Bf16 => kernel.round_bf16(values),
        Precision::F16 => {
            let mut half = [half::f16::ZERO; 64];
            for values in values.chunks_mut(64) {
                let half = &mut half[..values.len()];
                half.convert_from_f32_slice(values);
                half.convert_to_f32_slice(values);
            }
        }
    }
}

/// Writes one step of consecutive panels, the lanes past the end of `run` as zeros.
fn scatter(run: &[f32], panels: &mut [f32], width: usize, step: usize, block_steps: usize) {
    match width {
        4 => scatter_width::<4>(run, panels, step, block_steps),
        6 => scatter_width::<6>(run, panels, step, block_steps),
        8 => scatter_width::<8>(run, panels, step, block_steps),
        14 => scatter_width::<14>(run, panels, step, block_steps),
        16 => scatter_width::<16>(run, panels, step, block_steps),
        32 => scatter_width::<32>(run, panels, step, block_steps),
        _ => unreachable!("a tile of another width"),
    }
}

/// [`scatter`] with a width known to the compiler: copies without calls.
fn scatter_width<const W: usize>(run: &[f32], panels: &mut [f32], step: usize, block_steps: usize) {
    let (whole, rest) = run.as_chunks::<W>();
    let mut panels = panels.chunks_exact_mut(W * block_steps);
    for (values, panel) in whole.iter().zip(&mut panels) {
        panel[step * W..][..W].copy_from_slice(values);
    }
    if let (false, Some(panel)) = (rest.is_empty(), panels.next()) {
        let out = &mut panel[step * W..][..W];
        out[..rest.len()].copy_from_slice(rest);
        out[rest.len()..].fill(0.0);
    }
}
