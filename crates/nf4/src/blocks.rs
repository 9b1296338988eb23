//! Blocks of 4-bit codes: the owned form, its configuration and its sizes.

use crate::error::{Error, Mismatch};
use crate::format::Format;
use crate::view::{AbsmaxView, BlocksView};

/// Blocks of absmax that share one nested absmax. bitsandbytes' kernels know no other.
pub const NESTED_BLOCK: usize = 256;
/// The smallest block.
pub const MIN_BLOCK: usize = 32;
/// The largest block.
pub const MAX_BLOCK: usize = 4096;

/// How to quantise to 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct QuantConfig {
    /// The code table.
    pub format: Format,
    /// Elements that share one absmax: a power of two from [`MIN_BLOCK`] to [`MAX_BLOCK`].
    pub block_size: usize,
    /// Whether the absmax are themselves quantised, to 8 bits ([`Absmax::Nested`]).
    pub double_quant: bool,
}

impl Default for QuantConfig {
    /// QLoRA's: NF4, blocks of 64, double quantisation (4.127 bits an element).
    fn default() -> Self {
        Self { format: Format::Nf4, block_size: 64, double_quant: true }
    }
}

impl QuantConfig {
    /// Checks the block size.
    ///
    /// # Errors
    /// [`Error::BlockSize`].
    pub fn check(&self) -> Result<(), Error> {
        check_block_size("quantize", self.block_size)
    }
}

pub(crate) fn check_block_size(op: &'static str, found: usize) -> Result<(), Error> {
    if found.is_power_of_two() && (MIN_BLOCK..=MAX_BLOCK).contains(&found) {
        Ok(())
    } else {
        Err(Error::BlockSize { op, min: MIN_BLOCK, max: MAX_BLOCK, found })
    }
}

/// The largest magnitude of each block.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One float a block.
    Plain(Vec<f32>),
    /// Double quantisation: block b has `map[codes[b]] * absmax[b / 256] + offset`.
    Nested {
        /// One 8-bit code a block.
        codes: Vec<u8>,
        /// One float for each 256 blocks.
        absmax: Vec<f32>,
        /// The mean of the absmax, subtracted before they were quantised.
        offset: f32,
        /// The levels of the codes: [`crate::dynamic_map_signed`] unless a file says otherwise.
        map: Box<[f32; 256]>,
    },
}

/// A flat array in 4-bit blocks: element i is `table[code i] * absmax[i / block_size]`.
///
/// Codes lie two to a byte, the even element in the high nibble. The last block may be short, and with an odd length the
/// last low nibble is unused.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedBlocks {
    pub(crate) config: QuantConfig,
    pub(crate) len: usize,
    pub(crate) packed: Vec<u8>,
    pub(crate) absmax: Absmax,
}

impl QuantizedBlocks {
    /// Puts the parts together; `config.double_quant` is taken from `absmax`.
    ///
    /// # Errors
    /// [`Error::BlockSize`], or [`Error::Sizes`] naming every part whose length does not fit `len`.
    pub fn from_parts(format: Format, block_size: usize, len: usize, packed: Vec<u8>, absmax: Absmax) -> Result<Self, Error> {
        let double_quant = matches!(absmax, Absmax::Nested { .. });
        let blocks = Self { config: QuantConfig { format, block_size, double_quant }, len, packed, absmax };
        BlocksView::new(format, block_size, len, &blocks.packed, blocks.absmax.view())?;
        Ok(blocks)
    }

    /// How it was quantised.
    #[must_use]
    pub fn config(&self) -> &QuantConfig {
        &self.config
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The codes, two to a byte: ceil(len / 2) bytes.
    #[must_use]
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scales.
    #[must_use]
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Bytes that codes and scales take (the 8-bit map, shared by all, not counted).
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.packed.len()
            + match &self.absmax {
                Absmax::Plain(absmax) => 4 * absmax.len(),
                Absmax::Nested { codes, absmax, .. } => codes.len() + 4 * absmax.len() + 4,
            }
    }

    /// Gives the parts back.
    #[must_use]
    pub fn into_parts(self) -> (QuantConfig, usize, Vec<u8>, Absmax) {
        (self.config, self.len, self.packed, self.absmax)
    }

    /// The same blocks, borrowed.
    #[must_use]
    pub fn view(&self) -> BlocksView<'_> {
        BlocksView {
            format: self.config.format,
            block_size: self.config.block_size,
            len: self.len,
            packed: &self.packed,
            absmax: self.absmax.view(),
        }
    }
}

impl Absmax {
    /// The same scales, borrowed.
    #[must_use]
    pub fn view(&self) -> AbsmaxView<'_> {
        match self {
            Self::Plain(absmax) => AbsmaxView::Plain(absmax),
            Self::Nested { codes, absmax, offset, map } => AbsmaxView::Nested { codes, absmax, offset: *offset, map },
        }
    }
}

/// Every length that does not belong to `len` elements in blocks of `block_size`.
pub(crate) fn size_mismatches(len: usize, block_size: usize, packed: usize, absmax: AbsmaxView<'_>) -> Vec<Mismatch> {
    let blocks = len.div_ceil(block_size);
    let mut pairs = vec![("packed", len.div_ceil(2), packed)];
    match absmax {
        AbsmaxView::Plain(absmax) => pairs.push(("absmax", blocks, absmax.len())),
        AbsmaxView::Nested { codes, absmax, .. } => {
            pairs.push(("absmax", blocks, codes.len()));
            pairs.push(("nested_absmax", blocks.div_ceil(NESTED_BLOCK), absmax.len()));
        }
    }
    pairs.into_iter().filter(|(_, e, f)| e != f).map(|(w, e, f)| Mismatch::new(w, e, f)).collect()
}
