//! The longest context and the largest batch that fit.

use nibble_model::config::ModelConfig;
use nibble_tensor::cuda::DeviceInfo;

use super::{Setup, footprint};
use crate::Result;

/// Beyond this many tokens nothing is looked for.
const MOST_TOKENS: usize = 1 << 21;

/// Whether a step of `setup` fits into the memory of `gpu`.
///
/// # Errors
/// What is wrong with the adapter's config.
pub fn fits(model: &ModelConfig, gpu: &DeviceInfo, setup: &Setup) -> Result<bool> {
    match footprint(model, gpu, setup) {
        Ok(_) => Ok(true),
        Err(error) if error.is_out_of_memory() => Ok(false),
        Err(error) => Err(error),
    }
}

/// The longest document that fits alone, in tokens; nothing when not even the shortest does. Also beyond the positions that the
/// model was made for.
///
/// # Errors
/// As [`fits`].
pub fn longest(model: &ModelConfig, gpu: &DeviceInfo, setup: &Setup) -> Result<Option<usize>> {
    let mut model = model.clone();
    model.max_position_embeddings = MOST_TOKENS;
    let of = |length| {
        let mut setup = Setup { batch: 1, length, ..setup.clone() };
        setup.load.max_positions = length;
        fits(&model, gpu, &setup)
    };
    largest(64, MOST_TOKENS, of)
}

/// The most documents of `setup.length` tokens that fit into a micro-batch; nothing when not one does.
///
/// # Errors
/// As [`fits`].
pub fn largest_batch(model: &ModelConfig, gpu: &DeviceInfo, setup: &Setup) -> Result<Option<usize>> {
    largest(1, MOST_TOKENS / setup.length.max(1), |batch| fits(model, gpu, &Setup { batch, ..setup.clone() }))
}

/// The largest multiple of `step` up to `most` that `fits`, to one part in 256 of itself.
fn largest(step: usize, most: usize, fits: impl Fn(usize) -> Result<bool>) -> Result<Option<usize>> {
    let (mut good, mut bad) = (0, 1);
    while good < bad && bad * step <= most.max(step) && fits(bad * step)? {
        (good, bad) = (bad, 2 * bad);
    }
    while bad - good > 1.max(good / 256) {
        let middle = good + (bad - good) / 2;
        if middle * step <= most && fits(middle * step)? {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Ok((good > 0).then_some(good * step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found() {
        for limit in [0, 63, 64, 65, 127, 128, 5000, 99_999] {
            let found = largest(64, 1 << 20, |n| Ok(n <= limit)).unwrap().unwrap_or(0);
            assert!(found <= limit && found + 64 + found / 256 > limit, "{found} of {limit}");
        }
        assert_eq!(largest(1, 10, |_| Ok(true)).unwrap(), Some(10));
    }
}
