//! Borrowed blocks, and decoding any run of them on one thread.

use crate::blocks::{check_block_size, size_mismatches};
use crate::element::Element;
use crate::error::Error;
use crate::format::Format;
use crate::simd;

/// [`crate::Absmax`], borrowed.
#[derive(Debug, Clone, Copy)]
pub enum AbsmaxView<'a> {
    /// One float a block.
    Plain(&'a [f32]),
    /// Block b has `map[codes[b]] * absmax[b / 256] + offset`.
    Nested {
        /// One 8-bit code a block.
        codes: &'a [u8],
        /// One float for each 256 blocks.
        absmax: &'a [f32],
        /// Added to each.
        offset: f32,
        /// The levels of the codes.
        map: &'a [f32; 256],
    },
}

impl AbsmaxView<'_> {
    /// The absmax of one block; the product is rounded before the offset is added, as in the reference.
    #[must_use]
    #[inline]
    pub fn get(&self, block: usize) -> f32 {
        match *self {
            AbsmaxView::Plain(absmax) => absmax[block],
            AbsmaxView::Nested { codes, absmax, offset, map } => {
                map[usize::from(codes[block])] * absmax[block / crate::blocks::NESTED_BLOCK] + offset
            }
        }
    }
}

/// [`crate::QuantizedBlocks`], borrowed: of an owned one ([`crate::QuantizedBlocks::view`]) or of parts that lie elsewhere ([`BlocksView::new`]).
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct BlocksView<'a> {
    /// The code table.
    pub format: Format,
    /// Elements a block.
    pub block_size: usize,
    /// Elements in all.
    pub len: usize,
    /// The codes, two to a byte, the even element in the high nibble.
    pub packed: &'a [u8],
    /// The scales.
    pub absmax: AbsmaxView<'a>,
}

impl<'a> BlocksView<'a> {
    /// Borrows the parts.
    ///
    /// # Errors
    /// [`Error::BlockSize`], or [`Error::Sizes`] naming every part whose length does not fit `len`.
    pub fn new(format: Format, block_size: usize, len: usize, packed: &'a [u8], absmax: AbsmaxView<'a>) -> Result<Self, Error> {
        let op = "quantized blocks";
        check_block_size(op, block_size)?;
        let mismatches = size_mismatches(len, block_size, packed.len(), absmax);
        if mismatches.is_empty() {
            Ok(Self { format, block_size, len, packed, absmax })
        } else {
            Err(Error::Sizes { op, mismatches })
        }
    }

    /// Decodes elements `start..start + out.len()` on the calling thread; any start and length, odd ones too.
    ///
    /// # Panics
    /// If the range reaches beyond `len`, as indexing a slice does.
    #[inline]
    pub fn dequantize_range(&self, start: usize, out: &mut [f32]) {
        self.dequantize_range_as(start, out);
    }

    /// [`BlocksView::dequantize_range`] to any element type, rounded to nearest, ties to even.
    ///
    /// # Panics
    /// If the range reaches beyond `len`, as indexing a slice does.
    pub fn dequantize_range_as<T: Element>(&self, start: usize, out: &mut [T]) {
        assert!(out.len() <= self.len && start <= self.len - out.len(), "range {start}.. + {} of {}", out.len(), self.len);
        simd::decode(simd::isa(), self, start, T::view_mut(out), false);
    }
}
