//! What is asked for: weights as one matrix.

use nibble_nf4 as nf4;

use crate::{Absmax, Arena, BlockWeight, DType, Result, Shape, Weight, cuda::Widen, tensor::WeakTensor};

/// Weights one below the other, in the corner of a matrix with more rows and columns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) weights: &'a [&'a Weight],
    pub(crate) dtype: DType,
    /// Rows and columns beside them.
    pub(crate) more: [usize; 2],
}

/// What tells a request from others: where the scales of its weights lie, and the matrix's layout.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    scales: Vec<u64>,
    dtype: DType,
    sizes: [usize; 2],
    more: [usize; 2],
}

/// A request, for as long as its weights' memory is held by others.
#[derive(Clone, Debug)]
pub(crate) struct WeakRequest {
    pub(super) identity: Identity,
    weights: Vec<WeakBlocks>,
}

/// A doubly quantised weight.
#[derive(Clone, Debug)]
struct WeakBlocks {
    shape: Shape,
    config: nf4::QuantConfig,
    offset: f32,
    packed: WeakTensor,
    codes: WeakTensor,
    absmax: WeakTensor,
    map: WeakTensor,
}

impl Request<'_> {
    /// What tells it from others, wherever the codes of its weights lie at the time.
    pub(super) fn identity(&self) -> Result<Identity> {
        let address = |weight: &&Weight| match weight {
            Weight::Nf4(blocks) | Weight::Fp4(blocks) => match &blocks.absmax {
                Absmax::Plain(absmax) => absmax.address(),
                Absmax::Nested { codes, .. } => codes.address(),
            },
            Weight::Int8(int8) => int8.scale.address(),
            Weight::Dense(dense) => dense.address(),
        };
        let scales = self.weights.iter().map(address).collect::<Result<_>>()?;
        Ok(Identity { scales, dtype: self.dtype, sizes: self.sizes(), more: self.more })
    }

    /// Rows and columns of the matrix.
    pub(super) fn sizes(&self) -> [usize; 2] {
        let rows: usize = self.weights.iter().map(|weight| weight.shape().dims()[0]).sum();
        [rows + self.more[0], self.weights.first().map_or(0, |weight| weight.shape().last()) + self.more[1]]
    }

    /// Whether the weights are these, in the same memory.
    pub(super) fn are(&self, weights: &[BlockWeight]) -> bool {
        let same = |(asked, weight): (&&Weight, &BlockWeight)| match asked {
            Weight::Nf4(blocks) | Weight::Fp4(blocks) => match (&blocks.absmax, &weight.absmax) {
                (Absmax::Nested { codes, .. }, Absmax::Nested { codes: others, .. }) => {
                    blocks.packed.is_same_memory(&weight.packed) && codes.is_same_memory(others)
                }
                _ => false,
            },
            _ => false,
        };
        self.weights.len() == weights.len() && self.weights.iter().zip(weights).all(same)
    }

    /// To be foreseen and found again; nothing for what a product does not widen.
    pub(super) fn weak(&self, arena: &Arena) -> Option<WeakRequest> {
        let blocks = self.weights.iter().map(|weight| match weight {
            Weight::Nf4(blocks) | Weight::Fp4(blocks) if blocks.packed.arena().is(arena) => Some(blocks),
            _ => None,
        });
        let blocks: Vec<&BlockWeight> = blocks.collect::<Option<_>>()?;
        if !Widen::serves(&blocks, self.dtype, self.more[1]) {
            return None;
        }
        let weights = blocks.into_iter().map(WeakBlocks::new).collect::<Option<_>>()?;
        Some(WeakRequest { identity: self.identity().ok()?, weights })
    }
}

impl WeakRequest {
    /// The weights, if all of their memory is still held.
    pub(super) fn weights(&self) -> Option<Vec<BlockWeight>> {
        self.weights.iter().map(WeakBlocks::get).collect()
    }

    pub(super) fn dtype(&self) -> DType {
        self.identity.dtype
    }

    pub(super) fn more(&self) -> [usize; 2] {
        self.identity.more
    }

    /// Whether all of the weights' memory is still held.
    pub(crate) fn is_whole(&self) -> bool {
        let held = |weight: &WeakBlocks| {
            [&weight.packed, &weight.codes, &weight.absmax, &weight.map].map(WeakTensor::is_held) == [true; 4]
        };
        self.weights.iter().all(held)
    }

    /// Whether it is for the same weights, which are still somebody's, wherever their codes lie; in the same layout.
    pub(super) fn is_of(&self, other: &Self) -> bool {
        let same = |(one, other): (&WeakBlocks, &WeakBlocks)| one.codes.is_held() && one.codes.is_same_memory(&other.codes);
        self.identity == other.identity && self.weights.iter().zip(&other.weights).all(same)
    }
}

impl WeakBlocks {
    fn new(weight: &BlockWeight) -> Option<Self> {
        let Absmax::Nested { codes, absmax, offset, map } = &weight.absmax else { return None };
        Some(Self {
            shape: weight.shape,
            config: weight.config,
            offset: *offset,
            packed: weight.packed.weak()?,
            codes: codes.weak()?,
            absmax: absmax.weak()?,
            map: map.weak()?,
        })
    }

    fn get(&self) -> Option<BlockWeight> {
        let &Self { shape, config, offset, .. } = self;
        let (codes, absmax, map) = (self.codes.get()?, self.absmax.get()?, self.map.get()?);
        Some(BlockWeight { shape, config, packed: self.packed.get()?, absmax: Absmax::Nested { codes, absmax, offset, map } })
    }
}
