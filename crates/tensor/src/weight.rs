//! Frozen matrices in the formats a linear layer may be stored in.

use nibble_nf4 as nf4;

use crate::{Arena, DType, Device, Result, Rng, Shape, Tensor, ops::dequantize};

/// A frozen matrix [out, in] (rows are output features) in one of the formats a base model is kept in.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Weight {
    /// 4-bit NormalFloat, blockwise.
    Nf4(BlockWeight),
    /// 4-bit float, blockwise.
    Fp4(BlockWeight),
    /// 8-bit integers with a scale a row (LLM.int8's weight format).
    Int8(Int8Weight),
    /// f32, bf16 or f16.
    Dense(Tensor),
}

/// A matrix in a blockwise 4-bit format: two codes a byte and one absolute maximum a block.
#[derive(Clone, Debug)]
pub struct BlockWeight {
    /// (out, in).
    pub shape: Shape,
    /// NF4 or FP4, block size, double quantisation.
    pub config: nf4::QuantConfig,
    /// U8 [ceil(out * in / 2)]: the even element in the high nibble.
    pub packed: Tensor,
    /// Scale of each block.
    pub absmax: Absmax,
}

/// The blocks' absolute maxima.
#[derive(Clone, Debug)]
pub enum Absmax {
    /// F32 `[blocks]`.
    Plain(Tensor),
    /// Double quantisation: `absmax[i] = map[codes[i]] * absmax2[i / 256] + offset`.
    Nested {
        /// U8 `[blocks]`.
        codes: Tensor,
        /// F32 [ceil(blocks / 256)].
        absmax: Tensor,
        /// Mean of the absolute maxima.
        offset: f32,
        /// F32 `[256]`, the signed dynamic map.
        map: Tensor,
    },
}

/// A matrix as 8-bit integers: `w[o, i] = codes[o, i] * scale[o] / 127`.
#[derive(Clone, Debug)]
pub struct Int8Weight {
    /// I8 [out, in].
    pub codes: Tensor,
    /// F32 `[out]`: the row's absolute maximum.
    pub scale: Tensor,
}

impl Weight {
    /// (out, in).
    #[must_use]
    pub fn shape(&self) -> Shape {
        match self {
            Self::Nf4(w) | Self::Fp4(w) => w.shape,
            Self::Int8(w) => w.codes.shape(),
            Self::Dense(w) => w.shape(),
        }
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> (Device, &Arena) {
        let arena = match self {
            Self::Nf4(w) | Self::Fp4(w) => w.packed.arena(),
            Self::Int8(w) => w.codes.arena(),
            Self::Dense(w) => w.arena(),
        };
        (arena.device(), arena)
    }

    /// Bytes the matrix takes, scales included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.numel() * t.dtype().size();
        match self {
            Self::Nf4(w) | Self::Fp4(w) => size(&w.packed) + w.absmax.bytes(),
            Self::Int8(w) => size(&w.codes) + size(&w.scale),
            Self::Dense(w) => size(w),
        }
    }

    /// Puts blocks quantised on the host onto the arena's device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn from_blocks(arena: &Arena, blocks: &nf4::QuantizedBlocks, shape: impl Into<Shape>) -> Result<Self> {
        let absmax = match blocks.absmax() {
            nf4::Absmax::Plain(absmax) => Absmax::Plain(Tensor::from_slice(arena, absmax, [absmax.len()])?),
            nf4::Absmax::Nested { codes, absmax, offset, map } => Absmax::Nested {
                codes: Tensor::from_slice(arena, codes, [codes.len()])?,
                absmax: Tensor::from_slice(arena, absmax, [absmax.len()])?,
                offset: *offset,
                map: Tensor::from_slice(arena, &map[..], [256])?,
            },
        };
        let packed = Tensor::from_slice(arena, blocks.packed(), [blocks.packed().len()])?;
        let config = *blocks.config();
        Ok(Self::from_parts(BlockWeight { shape: shape.into(), config, packed, absmax }))
    }

    /// A made-up matrix of normal numbers times `std`, quantised: one block of them, repeated.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn random(arena: &Arena, shape: impl Into<Shape>, config: &nf4::QuantConfig, std: f32, rng: Rng) -> Result<Self> {
        let shape = shape.into();
        // A whole number of the blocks of both levels of scales.
        let pattern = (shape.numel()).min(config.block_size * 256 * 8);
        let values: Vec<f32> = (0..pattern as u64).map(|n| std * rng.normal(n)).collect();
        let blocks = nf4::quantize(&values, config)?;
        let count = shape.numel().div_ceil(config.block_size);
        let absmax = match blocks.absmax() {
            nf4::Absmax::Plain(absmax) => Absmax::Plain(Tensor::tiled(arena, absmax, [count])?),
            nf4::Absmax::Nested { codes, absmax, offset, map } => Absmax::Nested {
                codes: Tensor::tiled(arena, codes, [count])?,
                absmax: Tensor::tiled(arena, absmax, [count.div_ceil(256)])?,
                offset: *offset,
                map: Tensor::from_slice(arena, &map[..], [256])?,
            },
        };
        let packed = Tensor::tiled(arena, blocks.packed(), [shape.numel().div_ceil(2)])?;
        Ok(Self::from_parts(BlockWeight { shape, config: *config, packed, absmax }))
    }

    /// A matrix of unspecified content, in memory as if it were quantised.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn empty(arena: &Arena, shape: impl Into<Shape>, config: &nf4::QuantConfig) -> Result<Self> {
        let shape = shape.into();
        let count = shape.numel().div_ceil(config.block_size);
        let absmax = if config.double_quant {
            Absmax::Nested {
                codes: Tensor::empty(arena, DType::U8, [count])?,
                absmax: Tensor::empty(arena, DType::F32, [count.div_ceil(256)])?,
                offset: 0.0,
                map: Tensor::empty(arena, DType::F32, [256])?,
            }
        } else {
            Absmax::Plain(Tensor::empty(arena, DType::F32, [count])?)
        };
        let packed = Tensor::empty(arena, DType::U8, [shape.numel().div_ceil(2)])?;
        Ok(Self::from_parts(BlockWeight { shape, config: *config, packed, absmax }))
    }

    pub(crate) fn from_parts(weight: BlockWeight) -> Self {
        match weight.config.format {
            nf4::Format::Nf4 => Self::Nf4(weight),
            nf4::Format::Fp4 => Self::Fp4(weight),
        }
    }

    /// The matrix in f32, on the host.
    ///
    /// # Errors
    /// As the format's decoder.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        if let (Device::Cuda(device), arena) = self.place() {
            return dequantize::cuda::matrix(device, self, DType::F32, arena)?.to_f32_vec();
        }
        match self {
            Self::Nf4(w) | Self::Fp4(w) => {
                let mut out = vec![0.0; w.shape.numel()];
                w.view()?.dequantize_range(0, &mut out);
                Ok(out)
            }
            Self::Int8(w) => {
                let (codes, scale) = (w.codes.as_slice::<i8>()?, w.scale.as_slice::<f32>()?);
                let cols = w.codes.shape().last().max(1);
                Ok(codes.iter().enumerate().map(|(i, &c)| f32::from(c) * (scale[i / cols] / 127.0)).collect())
            }
            Self::Dense(w) => w.to_f32_vec(),
        }
    }
}

impl Absmax {
    /// Bytes of the scales.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.numel() * t.dtype().size();
        match self {
            Self::Plain(absmax) => size(absmax),
            Self::Nested { codes, absmax, map, .. } => size(codes) + size(absmax) + size(map),
        }
    }
}

impl BlockWeight {
    /// The CPU's view of the blocks.
    ///
    /// # Errors
    /// When the parts' lengths do not fit each other.
    pub fn view(&self) -> Result<nf4::BlocksView<'_>> {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => nf4::AbsmaxView::Plain(absmax.as_slice()?),
            Absmax::Nested { codes, absmax, offset, map } => nf4::AbsmaxView::Nested {
                codes: codes.as_slice()?,
                absmax: absmax.as_slice()?,
                offset: *offset,
                map: map.as_slice::<f32>()?.try_into().map_err(|_| crate::Error::Shape {
                    op: "view",
                    operand: "map",
                    expected: [256].into(),
                    found: map.shape(),
                })?,
            },
        };
        Ok(nf4::BlocksView::new(self.config.format, self.config.block_size, self.shape.numel(), self.packed.as_slice()?, absmax)?)
    }
}

impl From<Tensor> for Weight {
    fn from(dense: Tensor) -> Self {
        debug_assert!(dense.dtype() != DType::U8);
        Self::Dense(dense)
    }
}
