//! Base weights of some blocks on the host: how few must be there, and what that costs.

use nibble_model::config::{ModelConfig, Role};

use super::{Gpu, Setup, speed::link_rate};
use crate::Result;

/// Blocks whose 4-bit weights wait in host memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Streamed {
    /// So many,
    pub blocks: usize,
    /// of so many.
    pub of: usize,
    /// Bytes of host memory that their codes take.
    pub host_bytes: usize,
    /// Bytes that cross the link in a step of one micro-batch: the codes, once forward and once backward.
    pub step_bytes: usize,
    /// Seconds that the link needs for them, beside the kernels; nothing where its rate is not known.
    pub link_seconds: Option<f64>,
}

impl Streamed {
    /// Of a run; nothing when all weights are on the device.
    #[must_use]
    pub fn of(model: &ModelConfig, gpu: &Gpu, setup: &Setup) -> Option<Self> {
        let of = model.num_hidden_layers;
        let blocks = setup.load.blocks_on_host.min(of);
        if blocks == 0 || !can_stream(setup) {
            return None;
        }
        let host_bytes = blocks * block_codes(model);
        let link_seconds = link_rate(gpu).map(|rate| 2.0 * host_bytes as f64 / rate);
        Some(Self { blocks, of, host_bytes, step_bytes: 2 * host_bytes, link_seconds })
    }
}

/// Whether weights of a run can wait on the host: only those in 4 bits do.
#[must_use]
pub fn can_stream(setup: &Setup) -> bool {
    setup.load.quant.is_some()
}

/// The fewest of `blocks` blocks, but more than none, that must be on the host for a run to fit, where `fits` says whether one with so
/// many does; nothing when not even all of them are enough.
///
/// # Errors
/// What `fits` returns.
pub fn fewest_on_host(blocks: usize, mut fits: impl FnMut(usize) -> Result<bool>) -> Result<Option<usize>> {
    if blocks == 0 || !fits(blocks)? {
        return Ok(None);
    }
    let (mut short, mut enough) = (0, blocks);
    while enough - short > 1 {
        let middle = usize::midpoint(short, enough);
        if fits(middle)? { enough = middle } else { short = middle }
    }
    Ok(Some(enough))
}

/// Bytes of the codes of one block.
fn block_codes(model: &ModelConfig) -> usize {
    let specs = model.tensors();
    let linears = specs.iter().filter(|spec| spec.role == Role::Linear).map(|spec| spec.shape.iter().product::<usize>());
    linears.sum::<usize>() / 2 / model.num_hidden_layers.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_are_found_and_none_where_all_are_not_enough() {
        for wanted in 1..=9 {
            assert_eq!(fewest_on_host(9, |n| Ok(n >= wanted)).unwrap(), Some(wanted));
        }
        assert_eq!(fewest_on_host(9, |_| Ok(false)).unwrap(), None);
        assert_eq!(fewest_on_host(0, |_| Ok(true)).unwrap(), None);
    }
}
