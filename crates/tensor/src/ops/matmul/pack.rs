//! Copies of operands in the order in which the register tiles read them.
//!
//! A panel holds `width` lanes (rows of `a`, columns of `b`) over a block of the reduction: `steps` groups of `width`
//! words. Lanes past the end of the matrix are zero. The segments are laid end to end along the reduction, each padded
//! with zeros to whole words, so a block may hold the end of one segment and the start of the next.

use super::kernels::Kernel;
use super::scratch::{self, Role};
use super::{Operand, Precision, Problem, Segment, Source};
use half::{bf16, slice::HalfFloatSliceExt};
use std::ops::Range;

/// Words of a row made at a time on their way into a panel: with 16 rows, 20 KiB.
const RUN: usize = 320;
/// Steps written into a panel at a time.
const ROWS: usize = 8;

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
pub(super) struct Piece<'a> {
    pub(super) operand: Operand<'a>,
    pub(super) scale: f32,
    pub(super) k: Range<usize>,
    pub(super) first: usize,
    pub(super) steps: usize,
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

    /// The packer of one operand that no segment holds: of `lanes` rows, or of columns for the right operand.
    pub(super) fn of_operand(kernel: Kernel, precision: Precision, right: bool, lanes: usize) -> Self {
        let width = if right { kernel.nr() } else { kernel.mr() };
        Self { right, ..Self::of_width(kernel, precision, width, lanes) }
    }

    /// The packer of a right operand in panels of another width.
    pub(super) fn of_width(kernel: Kernel, precision: Precision, width: usize, lanes: usize) -> Self {
        Self { kernel, precision, segments: &[], right: true, scales: true, lanes, width }
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
                self.pack_piece(&piece, lane, block.len(), panels);
            }
            start = end;
        }
    }

    /// Fills the piece's steps of panels that have `block_steps`.
    pub(super) fn pack_piece(&self, piece: &Piece, lane: usize, block_steps: usize, panels: &mut [f32]) {
        if piece.operand.transposed == self.right {
            self.pack_along(piece, lane, block_steps, panels);
        } else {
            self.pack_across(piece, lane, block_steps, panels);
        }
    }

    /// Lanes are stored rows: runs of the reduction are transposed into the panels.
    fn pack_along(&self, piece: &Piece, lane: usize, block_steps: usize, panels: &mut [f32]) {
        let (width, steps) = (self.width, piece.steps);
        for (i, panel) in panels.chunks_mut(width * block_steps).enumerate() {
            let lane = lane + i * width;
            let lanes = width.min(self.lanes - lane);
            let panel = &mut panel[piece.first * width..][..steps * width];
            if let Some((data, ld)) = self.words(piece) {
                let rows = &data[lane * ld + piece.k.start / self.kernel.pair()..];
                self.kernel.transpose(rows, ld, lanes, steps, panel, width);
            } else {
                self.transpose_words(piece, lane, lanes, panel);
            }
            if lanes < width {
                for step in panel.chunks_mut(width) {
                    step[lanes..].fill(0.0);
                }
            }
        }
    }

    /// The words of some stored rows, made a few at a time and transposed while they are in the first-level cache.
    fn transpose_words(&self, piece: &Piece, lane: usize, lanes: usize, panel: &mut [f32]) {
        let (width, pair) = (self.width, self.kernel.pair());
        scratch::with(Role::Run, (width + 2) * RUN, |buffer| {
            for (i, panel) in panel.chunks_mut(width * RUN).enumerate() {
                let steps = panel.len() / width;
                let start = piece.k.start + i * RUN * pair;
                let run = Piece { k: start..piece.k.end.min(start + steps * pair), steps, ..*piece };
                let (words, elements) = buffer.split_at_mut(width * steps);
                for (l, words) in words.chunks_mut(steps).take(lanes).enumerate() {
                    self.read_words(&run, lane + l, words, elements);
                }
                self.kernel.transpose(words, steps, lanes, steps, panel, width);
            }
        });
    }

    /// One lane's words of a piece, from a stored row. `room` is for twice as many elements.
    fn read_words(&self, piece: &Piece, row: usize, words: &mut [f32], room: &mut [f32]) {
        if self.kernel.pair() == 1 {
            self.read(piece, row, piece.k.start, words);
            return;
        }
        let (elements, padding) = bytemuck::cast_slice_mut(words).split_at_mut(piece.k.len());
        self.read_bf16(piece, row, piece.k.start, elements, room);
        padding.fill(bf16::ZERO);
    }

    /// Lanes are stored columns: each stored row is a step of all panels (or half of one). A few steps at a time go into
    /// each panel, since each panel lies on pages of its own.
    fn pack_across(&self, piece: &Piece, lane: usize, block_steps: usize, panels: &mut [f32]) {
        let lanes = (panels.len() / block_steps).min(self.lanes - lane);
        let to = |first: usize| Place { width: self.width, first: piece.first + first, block_steps };
        if let (1, Some((data, ld))) = (self.kernel.pair(), self.plain(piece)) {
            for start in (0..piece.steps).step_by(ROWS) {
                let rows = &data[(piece.k.start + start) * ld + lane..];
                scatter(rows, ld, lanes, ROWS.min(piece.steps - start), panels, to(start));
            }
            return;
        }
        scratch::with(Role::Run, (ROWS + 2) * lanes, |buffer| {
            let (words, elements) = buffer.split_at_mut(ROWS * lanes);
            for start in (0..piece.steps).step_by(ROWS) {
                let steps = ROWS.min(piece.steps - start);
                for (s, words) in words.chunks_mut(lanes).take(steps).enumerate() {
                    self.read_step(piece, start + s, lane, words, elements);
                }
                scatter(words, lanes, lanes, steps, panels, to(start));
            }
        });
    }

    /// One step's words of all lanes, from one stored row or two. `room` is for twice as many elements.
    fn read_step(&self, piece: &Piece, step: usize, lane: usize, words: &mut [f32], room: &mut [f32]) {
        let k = piece.k.start + step * self.kernel.pair();
        if self.kernel.pair() == 1 {
            self.read(piece, k, lane, words);
            return;
        }
        let (pair, room) = room.split_at_mut(words.len());
        let (low, high) = bytemuck::cast_slice_mut(pair).split_at_mut(words.len());
        let low = self.bf16_row(piece, k, lane, low, room);
        let high = if k + 1 < piece.k.end {
            self.bf16_row(piece, k + 1, lane, high, room)
        } else {
            high.fill(bf16::ZERO);
            high
        };
        self.kernel.pair_bf16(low, high, words);
    }

    /// A run of a stored row rounded to bf16: in place where it is that, else read to `out`.
    fn bf16_row<'b>(&self, piece: &Piece<'b>, row: usize, column: usize, out: &'b mut [bf16], room: &mut [f32]) -> &'b [bf16] {
        match piece.operand.source {
            Source::Bf16 { data, ld } if piece.scale == 1.0 => &data[row * ld + column..][..out.len()],
            _ => {
                self.read_bf16(piece, row, column, out, room);
                out
            }
        }
    }

    /// Reads a run of a stored row, scales it, and rounds it to bf16.
    fn read_bf16(&self, piece: &Piece, row: usize, column: usize, out: &mut [bf16], room: &mut [f32]) {
        let len = out.len();
        match piece.operand.source {
            Source::Bf16 { data, ld } if piece.scale == 1.0 => out.copy_from_slice(&data[row * ld + column..][..len]),
            Source::F32 { data, ld } if piece.scale == 1.0 => self.kernel.narrow_bf16(&data[row * ld + column..][..len], out),
            Source::Blocks { view, cols } if piece.scale == 1.0 => view.dequantize_range_as(row * cols + column, out),
            _ => {
                self.read(piece, row, column, &mut room[..len]);
                self.kernel.narrow_bf16(&room[..len], out);
            }
        }
    }

    /// The stored matrix as rows of words, where they need no reading, and the distance between its rows.
    fn words<'b>(&self, piece: &Piece<'b>) -> Option<(&'b [f32], usize)> {
        if self.kernel.pair() == 1 {
            return self.plain(piece);
        }
        match piece.operand.source {
            Source::Bf16 { data, ld } if piece.scale == 1.0 && ld.is_multiple_of(2) && piece.k.len().is_multiple_of(2) => {
                let whole = data.len() / 2 * 2;
                Some((bytemuck::try_cast_slice(&data[..whole]).ok()?, ld / 2))
            }
            _ => None,
        }
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

/// Where steps go in each of consecutive panels.
#[derive(Clone, Copy)]
struct Place {
    width: usize,
    first: usize,
    block_steps: usize,
}

/// Writes some steps of consecutive panels, the lanes past the end of the rows as zeros.
fn scatter(rows: &[f32], ld: usize, lanes: usize, steps: usize, panels: &mut [f32], to: Place) {
    match to.width {
        4 => scatter_width::<4>(rows, ld, lanes, steps, panels, to),
        6 => scatter_width::<6>(rows, ld, lanes, steps, panels, to),
        8 => scatter_width::<8>(rows, ld, lanes, steps, panels, to),
        14 => scatter_width::<14>(rows, ld, lanes, steps, panels, to),
        16 => scatter_width::<16>(rows, ld, lanes, steps, panels, to),
        32 => scatter_width::<32>(rows, ld, lanes, steps, panels, to),
        _ => unreachable!("a tile of another width"),
    }
}

/// [`scatter`] with a width known to the compiler: copies without calls.
fn scatter_width<const W: usize>(rows: &[f32], ld: usize, lanes: usize, steps: usize, panels: &mut [f32], to: Place) {
    for (panel, lane) in panels.chunks_exact_mut(W * to.block_steps).zip((0..lanes).step_by(W)) {
        let (out, _) = panel[to.first * W..][..steps * W].as_chunks_mut::<W>();
        for (s, out) in out.iter_mut().enumerate() {
            let row = &rows[s * ld + lane..];
            if let (true, Some(values)) = (lane + W <= lanes, row.first_chunk::<W>()) {
                *out = *values;
            } else {
                let rest = lanes - lane;
                out[..rest].copy_from_slice(&row[..rest]);
                out[rest..].fill(0.0);
            }
        }
    }
}
