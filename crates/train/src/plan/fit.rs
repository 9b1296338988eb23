//! The longest context and the largest batch that fit.

use nibble_model::config::ModelConfig;
use nibble_tensor::cuda::DeviceInfo;

use super::{Gpu, Setup, footprint, footprint::least_footprint};
use crate::Result;

/// Beyond this many tokens nothing is looked for.
pub const MOST_TOKENS: usize = 1 << 20;

/// A device with more memory than any, so that what a step takes is known also where it does not fit.
pub(super) fn boundless(gpu: &Gpu) -> DeviceInfo {
    gpu.device(1 << 44)
}

/// Bytes that a step of `setup` takes on a GPU like `gpu`, however many it has.
///
/// # Errors
/// What is wrong with the adapter's config.
pub fn needed(model: &ModelConfig, gpu: &Gpu, setup: &Setup) -> Result<super::Footprint> {
    footprint(model, &boundless(gpu), setup)
}

/// Bytes that such a step cannot do without.
fn least(model: &ModelConfig, gpu: &Gpu, setup: &Setup) -> Result<usize> {
    Ok(least_footprint(model, &boundless(gpu), setup)?.device)
}

/// The longest document that alone fits into `room` bytes, in tokens; nothing when not even the shortest does. Also beyond the
/// positions that the model was made for.
///
/// # Errors
/// As [`needed`].
pub fn longest(model: &ModelConfig, gpu: &Gpu, setup: &Setup, room: usize) -> Result<Option<usize>> {
    let mut model = model.clone();
    model.max_position_embeddings = MOST_TOKENS;
    let unit = 64;
    let bytes = |n| least(&model, gpu, &setup.with_documents(1, n * unit));
    // Gaps between blocks make the bytes nearly a line only: a few may fit where the shortest just does not.
    Ok(largest(room, MOST_TOKENS / unit, &[1, 8], bytes)?.map(|n| n * unit))
}

/// The most documents of `length` tokens that fit into `room` bytes as a micro-batch; nothing when not one does.
///
/// # Errors
/// As [`needed`].
pub fn largest_batch(model: &ModelConfig, gpu: &Gpu, setup: &Setup, length: usize, room: usize) -> Result<Option<usize>> {
    largest(room, MOST_TOKENS / length.max(1), &[1], |n| least(model, gpu, &setup.with_documents(n, length)))
}

/// The largest n up to `most` with `bytes(n)` within `room`, to one part in 256, from the first of `starts` that fits on; nothing
/// when none does. `bytes` is nearly a line, so that a few points of it are enough.
fn largest(room: usize, most: usize, starts: &[usize], bytes: impl Fn(usize) -> Result<usize>) -> Result<Option<usize>> {
    let mut good = None;
    for &start in starts.iter().filter(|&&start| start <= most) {
        let taken = bytes(start)?;
        if taken <= room {
            good = Some((start, taken));
            break;
        }
        // Far from fitting: more will not.
        if taken - room > room / 50 {
            break;
        }
    }
    let Some(good) = good else { return Ok(None) };
    let mut known = Known { good, bad: None, room, most };
    let mut next = 16.min(most);
    for round in 0.. {
        if next <= known.good.0 {
            break;
        }
        let taken = bytes(next)?;
        let (before, fits) = (known.good, taken <= room);
        if fits {
            known.good = (next, taken);
        } else {
            known.bad = Some((next, taken));
        }
        next = known.next(before, fits, round);
    }
    Ok(Some(known.good.0))
}

/// What is known of a line: the largest n that fits and the smallest that does not, each with its bytes.
struct Known {
    good: (usize, usize),
    bad: Option<(usize, usize)>,
    room: usize,
    most: usize,
}

impl Known {
    /// Where to look next; the largest that fits when that is near enough. `before`: what fitted before the last look, which
    /// fitted or not.
    fn next(&self, before: (usize, usize), fits: bool, round: usize) -> usize {
        let precision = 1.max(self.good.0 / 256);
        let Some(bad) = self.bad else {
            let guess = meets(before, self.good, self.room).max(self.good.0 + precision);
            return guess.min(self.most);
        };
        let (low, high) = (self.good.0, bad.0);
        if high - low <= precision {
            return low;
        }
        let wanted = match round {
            12.. => low + (high - low) / 2,
            // Beside the point just found, on the other side.
            _ if round % 2 == 1 && fits => low + precision,
            _ if round % 2 == 1 => high - precision,
            _ => meets(self.good, bad, self.room),
        };
        wanted.clamp(low + 1, high - 1)
    }
}

/// Where the line through two points meets `room`.
fn meets(a: (usize, usize), b: (usize, usize), room: usize) -> usize {
    let slope = (b.1 as f64 - a.1 as f64) / (b.0 as f64 - a.0 as f64);
    (b.0 as f64 + (room as f64 - b.1 as f64) / slope.max(f64::MIN_POSITIVE)).clamp(0.0, 1e15) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found_on_lines_and_stairs() {
        for room in [0, 1000, 1001, 1010, 1999, 123_456, 10_000_000] {
            for bytes in
                [|n: usize| 1000 + 10 * n, |n: usize| 1000 + 10 * (n / 100) * 100 + 10 * n, |n: usize| 990 + n + n * n / 1000]
            {
                let found = largest(room, 1 << 20, &[1], |n| Ok(bytes(n))).unwrap().unwrap_or(0);
                assert!(found == 0 || bytes(found) <= room, "{found} in {room}");
                let more = found + 1 + found / 128;
                assert!(bytes(more) > room || more > 1 << 20, "{more} fits into {room}, found {found}");
            }
        }
        assert_eq!(largest(100, 10, &[1], |_| Ok(1)).unwrap(), Some(10));
        assert_eq!(largest(100, 0, &[1], |_| Ok(1)).unwrap(), None);
    }

    #[test]
    fn a_few_that_fit_are_found_where_one_is_in_the_way_of_its_gaps() {
        let bytes = |n: usize| if n < 4 { 1010 } else { 900 + 10 * n };
        assert_eq!(largest(1001, 100, &[1, 8], |n| Ok(bytes(n))).unwrap(), Some(10));
        assert_eq!(largest(1001, 100, &[1], |n| Ok(bytes(n))).unwrap(), None);
        assert_eq!(largest(970, 100, &[1, 8], |n| Ok(bytes(n))).unwrap(), None);
    }
}
