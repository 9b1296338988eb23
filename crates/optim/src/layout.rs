//! How the flat buffer is made up: which parameters, and which of them decay.

use std::ops::Range;

use nibble_tensor::{
    Shape,
    ops::{
        adafactor::Matrix,
        dynamic8::{self, MIN_8BIT},
    },
};

/// The parameters of a flat buffer, in its order and without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pieces: Vec<Piece>,
}

/// A parameter, or a part of one that begins at a multiple of 256 of its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) range: Range<usize>,
    pub(crate) decayed: bool,
    /// The whole parameter's.
    pub(crate) shape: Shape,
}

impl Layout {
    /// Parameters by shape, and whether each decays (biases and norms do not in the Trainer).
    #[must_use]
    pub fn new(parameters: impl IntoIterator<Item = (Shape, bool)>) -> Self {
        let mut at = 0;
        let piece = |(shape, decayed): (Shape, bool)| {
            let range = at..at + shape.numel();
            at = range.end;
            Piece { range, decayed, shape }
        };
        Self { pieces: parameters.into_iter().map(piece).collect() }
    }

    /// One parameter of `len` elements that decays.
    #[must_use]
    pub fn one(len: usize) -> Self {
        Self::new([([len].into(), true)])
    }

    /// Elements of the buffer.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.pieces.last().map_or(0, |piece| piece.range.end)
    }

    #[cfg(test)]
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pieces as 8-bit optimizers cut them; without `decay` all are treated alike.
    pub(crate) fn blocks(&self, decay: bool) -> Vec<dynamic8::Piece> {
        let piece = |piece: &Piece| dynamic8::Piece {
            range: piece.range.clone(),
            decayed: piece.decayed && decay,
            quantised: piece.shape.numel() >= MIN_8BIT,
        };
        self.pieces.iter().filter(|piece| !piece.range.is_empty()).map(piece).collect()
    }

    /// Blocks of 8-bit optimizers: with codes, and with f32 states.
    pub(crate) fn block_counts(&self) -> (usize, usize) {
        let count = |quantised| {
            let pieces = self.blocks(true).into_iter().filter(|piece| piece.quantised == quantised);
            pieces.map(|piece| piece.range.len().div_ceil(dynamic8::BLOCK)).sum()
        };
        (count(true), count(false))
    }

    /// The parameters as matrices of their last size; a vector is one row.
    pub(crate) fn matrices(&self, decay: bool) -> Vec<Matrix> {
        let matrix = |piece: &Piece| Matrix {
            rows: if piece.shape.dims().len() < 2 { 1 } else { piece.shape.rows() },
            cols: piece.shape.last(),
            decayed: piece.decayed && decay,
        };
        self.pieces.iter().filter(|piece| !piece.range.is_empty()).map(matrix).collect()
    }

    /// Where there is no decay: starts and ends.
    pub(crate) fn no_decay(&self) -> Vec<Range<usize>> {
        self.pieces.iter().filter(|piece| !piece.decayed).map(|piece| piece.range.clone()).collect()
    }

    /// Consecutive layouts of about `page` elements (a multiple of 256), cut where blocks begin; offsets start at 0 in each.
    pub(crate) fn cut(&self, page: usize) -> Vec<Self> {
        let (mut pages, mut now, mut held) = (Vec::new(), Vec::new(), 0);
        for piece in &self.pieces {
            let mut range = piece.range.clone();
            while !range.is_empty() {
                let room = (page - held).next_multiple_of(dynamic8::BLOCK);
                let len = range.len().min(room);
                now.push(Piece { range: held..held + len, ..piece.clone() });
                held += len;
                range.start += len;
                if held >= page {
                    pages.push(Self { pieces: std::mem::take(&mut now) });
                    held = 0;
                }
            }
        }
        if !now.is_empty() {
            pages.push(Self { pieces: now });
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_each_element_once_and_cut_parameters_where_blocks_begin() {
        let shapes = [[5000], [100], [1], [9000]].map(Shape::from);
        let layout = Layout::new(shapes.into_iter().zip([true, false, true, true]));
        let pages = layout.cut(1024);
        assert_eq!(pages.iter().map(Layout::numel).sum::<usize>(), layout.numel());
        let mut begun = vec![0; layout.numel() + 1];
        let (mut at, mut parameter) = (0, 0);
        for page in &pages {
            assert!((1..1024 + 256).contains(&page.numel()), "{}", page.numel());
            for piece in page.pieces() {
                if at == layout.pieces()[parameter].range.end {
                    parameter += 1;
                }
                let whole = &layout.pieces()[parameter];
                assert_eq!((piece.shape, piece.decayed, (at - whole.range.start) % 256), (whole.shape, whole.decayed, 0));
                begun[at] += 1;
                at += piece.range.len();
            }
        }
        assert!(pages.len() > 10 && begun.iter().all(|&n| n <= 1));
        assert_eq!(layout.cut(1 << 20), [layout]);
    }
}
