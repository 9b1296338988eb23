//! What a kernel is told of weights to widen (`common/widen.cuh`).

use super::context::CudaDevice;
use crate::{Absmax, BlockWeight, DType, Error, Result, Tensor, ops::dequantize::cuda::levels};

/// Elements that a warp widens at once.
const UNIT: usize = 1024;
/// The most weights of a job.
const PARTS: usize = 3;

/// A weight of a job.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Part {
    packed: u64,
    codes: u64,
    absmax: u64,
    map: u64,
    offset: f32,
    first: u32,
}

/// Weights one below the other, as a kernel takes them.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Widen {
    levels: u64,
    units: u32,
    cols: u32,
    gap: u32,
    shift: u32,
    parts: [Part; PARTS],
}

/// What a product does beside its own work.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WidenBeside {
    /// Where to; 0: nothing.
    pub(crate) out: u64,
    pub(crate) widen: Widen,
}

impl Widen {
    /// Whether a kernel widens weights of a device into rows with `gap` elements between them.
    pub(crate) fn serves(weights: &[&BlockWeight], dtype: DType, gap: usize) -> bool {
        let Some(first) = weights.first().filter(|_| weights.len() <= PARTS) else { return false };
        let (cols, block, format) = (first.shape.last(), first.config.block_size, first.config.format);
        let alike = |weight: &&BlockWeight| {
            let count = weight.shape.numel();
            let aligned = weight.packed.address().is_ok_and(|address| address.is_multiple_of(4));
            (weight.shape.last(), weight.config.block_size, weight.config.format) == (cols, block, format)
                && matches!(weight.absmax, Absmax::Nested { .. })
                && count.is_multiple_of(UNIT)
                && count.is_multiple_of(block)
                && aligned
        };
        matches!(dtype, DType::Bf16 | DType::F16)
            && cols >= 256
            && cols.is_multiple_of(8)
            && gap.is_multiple_of(8)
            && weights.iter().all(alike)
            && weights.iter().map(|weight| weight.shape.numel()).sum::<usize>() < u32::MAX as usize
    }

    /// Of weights that [`Widen::serves`], at most about as many `elements`; with the number of their rows, which are whole groups of 256
    /// blocks of a weight.
    pub(crate) fn new(device: CudaDevice, weights: &[BlockWeight], gap: usize, elements: usize) -> Result<(Self, usize)> {
        let Some(weight) = weights.first() else { return Ok((Self::default(), 0)) };
        let (config, cols) = (weight.config, weight.shape.last());
        // Rows of a whole number of groups, of which each is a power of two.
        let group = 256 * config.block_size;
        let step = group >> cols.trailing_zeros().min(group.trailing_zeros());
        let mut rows = 0;
        // What no unit reaches.
        let mut parts = [Part { first: u32::MAX, ..Part::default() }; PARTS];
        let mut first = 0;
        for (part, weight) in parts.iter_mut().zip(weights) {
            let Absmax::Nested { codes, absmax, offset, map } = &weight.absmax else {
                return Err(Error::Argument { op: "widen", argument: "absmax", expected: "double quantisation", found: 1 });
            };
            let [packed, codes, absmax, map] = [&weight.packed, codes, absmax, map].map(Tensor::address);
            *part = Part { packed: packed?, codes: codes?, absmax: absmax?, map: map?, offset: *offset, first: first as u32 };
            let most = elements.saturating_sub(first) / cols;
            rows += if most < weight.shape.dims()[0] { most / step * step } else { weight.shape.dims()[0] };
            first += weight.shape.numel();
        }
        let widen = Self {
            levels: levels(device, config.format)?,
            units: (rows * cols / UNIT) as u32,
            cols: cols as u32,
            gap: gap as u32,
            shift: config.block_size.ilog2(),
            parts,
        };
        Ok((widen, rows))
    }
}

#[cfg(test)]
mod tests {
    use nibble_nf4::QuantConfig;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        Arena, Device, Weight,
        cuda::{ComputeCapability, DeviceInfo},
    };

    proptest! {
        #[test]
        fn a_part_of_the_rows_begins_nothing_in_the_middle(
            cols in 16..200usize, rows in proptest::collection::vec(1..40usize, 1..=PARTS), log in 5..9u32, share in 0.0..1.2,
        ) {
            let (name, driver, capability) = ("a GPU that widens".to_owned(), 13_000, ComputeCapability::HOPPER);
            let info = DeviceInfo { ordinal: 0, name, capability, memory: 1 << 40, multiprocessors: 132, driver };
            let device = CudaDevice::dry(&info);
            let arena = Arena::on(Device::Cuda(device), usize::MAX).unwrap();
            let (cols, config) = (32 * cols, QuantConfig { block_size: 1 << log, ..QuantConfig::default() });
            let weights = rows.iter().map(|rows| match Weight::empty(&arena, [32 * rows, cols], &config).unwrap() {
                Weight::Nf4(blocks) => blocks,
                other => panic!("{other:?}"),
            });
            let weights: Vec<BlockWeight> = weights.collect();
            prop_assert_eq!(Widen::serves(&weights.iter().collect::<Vec<_>>(), DType::Bf16, 8), cols >= 256);
            let elements = (share * 32.0 * (rows.iter().sum::<usize>() * cols) as f64) as usize;
            let (widen, done) = Widen::new(device, &weights, 8, elements).unwrap();
            let group = 256 * config.block_size;
            let step = group >> cols.trailing_zeros().min(group.trailing_zeros());
            let mut first = 0;
            for (part, rows) in widen.parts.iter().zip(&rows) {
                prop_assert_eq!(part.first as usize, first * cols);
                let inside = done.clamp(first, first + 32 * rows) - first;
                prop_assert!(inside == 32 * rows || (inside * cols).is_multiple_of(group));
                first += 32 * rows;
            }
            prop_assert_eq!(widen.units as usize * UNIT, done * cols);
            prop_assert!(done * cols <= elements && elements.min(first * cols) - done * cols < (step + 1) * cols);
        }
    }
}
