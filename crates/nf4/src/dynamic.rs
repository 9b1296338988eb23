//! Dynamic 8-bit blockwise quantisation (8-bit Optimizers via Block-wise Quantization, Dettmers et al. 2021).
//!
//! A value is `map[code] * absmax` of its block. The map spends codes on exponents: seven decades, the higher ones finer.
//! It holds the absmax of double quantisation (signed map, blocks of 256) and the states of 8-bit optimizers.

use std::sync::OnceLock;

use rayon::prelude::*;

use crate::element::Element;
use crate::error::{Error, check_sizes};

/// The two maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DynamicMap {
    /// Levels from -0.993 to 1, 0 at code 127: any values.
    #[default]
    Signed,
    /// Levels from 0 to 1, 0 at code 0: values that are never negative, with twice the resolution.
    Unsigned,
}

impl DynamicMap {
    /// The map's levels and nearest-code search, built once.
    #[must_use]
    pub fn codebook(self) -> &'static Codebook {
        static SIGNED: OnceLock<Codebook> = OnceLock::new();
        static UNSIGNED: OnceLock<Codebook> = OnceLock::new();
        match self {
            Self::Signed => SIGNED.get_or_init(|| Codebook::new(&levels(true))),
            Self::Unsigned => UNSIGNED.get_or_init(|| Codebook::new(&levels(false))),
        }
    }
}

/// The signed dynamic map: 127 negative levels, 0 at code 127, 128 positive levels, ascending. -1 is not a level.
#[must_use]
pub fn dynamic_map_signed() -> &'static [f32; 256] {
    DynamicMap::Signed.codebook().levels()
}

/// The unsigned dynamic map: 0 at code 0, then 255 positive levels, ascending.
#[must_use]
pub fn dynamic_map_unsigned() -> &'static [f32; 256] {
    DynamicMap::Unsigned.codebook().levels()
}

/// The code of `map` nearest to `y` (already divided by its absmax); [`Codebook::nearest`] has the tie rule.
#[must_use]
#[inline]
pub fn nearest_code(map: DynamicMap, y: f32) -> u8 {
    map.codebook().nearest(y)
}

/// Sorted levels: for i in 0..7, the midpoints of 2^i + 1 points (unsigned: 2^(i+1) + 1) from 0.1 to 1, times 10^(i-6); signed, also their negatives; 0 and 1.
fn levels(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for i in 0..7 {
        let points = linspace((1 << (i + usize::from(!signed))) + 1);
        // The reference's factor is a Python float, a double, rounded to f32 when it meets the tensor.
        let scale = 10f64.powi(i as i32 - 6) as f32;
        for pair in points.windows(2) {
            let value = scale * f32::midpoint(pair[0], pair[1]);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}

/// `n` points from 0.1 to 1 in f32, filled from both ends as PyTorch's `linspace` does.
fn linspace(n: usize) -> Vec<f32> {
    let (start, end) = (0.1f32, 1.0f32);
    let step = (end - start) / (n - 1) as f32;
    (0..n).map(|i| if i < n / 2 { step.mul_add(i as f32, start) } else { step.mul_add(-((n - 1 - i) as f32), end) }).collect()
}

/// Levels with, between each two, the largest value that still belongs to the lower one.
#[derive(Debug)]
pub struct Codebook {
    levels: [f32; 256],
    /// The code of y is the number of thresholds that y is strictly above; the last is infinite.
    thresholds: [f32; 256],
    /// For the top 16 bits of each |y| in range: how many thresholds lie below all such y, for positive and negative y.
    start: Vec<[u8; 2]>,
}

/// The top 16 bits of 2^-23: everything smaller in magnitude is nearest to 0.
const KEY_MIN: u32 = (127 - 23) << 7;
/// The top 16 bits of 1.
const KEY_MAX: u32 = 127 << 7;

impl Codebook {
    fn new(levels: &[f32; 256]) -> Self {
        let thresholds: [f32; 256] = std::array::from_fn(|i| match levels.get(i + 1) {
            None => f32::INFINITY,
            Some(upper) => {
                let middle = (levels[i] + upper) * 0.5;
                // The reference's search ends on an even pivot, and a tie stays there: up from odd codes, down to even ones.
                if i % 2 == 0 { middle } else { middle.next_down() }
            }
        });
        let below = |y: f32| thresholds.partition_point(|&t| t < y) as u8;
        let start = (KEY_MIN..=KEY_MAX)
            .map(|key| {
                // The smallest y of each bucket: the magnitude's lower end, or minus its upper end.
                let upper_end = if key == KEY_MAX { f32::from_bits(key << 16) } else { f32::from_bits((key << 16) | 0xffff) };
                let lower_end = if key == KEY_MIN { 0.0 } else { f32::from_bits(key << 16) };
                [below(lower_end), below(-upper_end)]
            })
            .collect();
        Self { levels: *levels, thresholds, start }
    }

    /// The 256 levels, ascending.
    #[must_use]
    pub fn levels(&self) -> &[f32; 256] {
        &self.levels
    }

    /// The code of the level nearest to `y`, as bitsandbytes' search finds it: a value midway between two levels goes to the even code.
    /// Values beyond the ends go to the ends; NaN, which arises only in all-zero blocks, to code 0 as on CUDA.
    #[must_use]
    #[inline]
    pub fn nearest(&self, y: f32) -> u8 {
        let key = ((y.to_bits() & 0x7fff_ffff) >> 16).clamp(KEY_MIN, KEY_MAX) - KEY_MIN;
        let code = self.start[key as usize][usize::from(y.is_sign_negative())];
        // No bucket holds two thresholds: a test goes through them all.
        let code = code + u8::from(y > self.thresholds[usize::from(code)]);
        if y.is_nan() { 0 } else { code }
    }
}

/// 8-bit codes and the absmax of each block.
#[derive(Debug, Clone, PartialEq)]
pub struct DynamicBlocks {
    /// The map of the codes.
    pub map: DynamicMap,
    /// Elements a block; the last may be shorter.
    pub block_size: usize,
    /// One code an element.
    pub codes: Vec<u8>,
    /// One a block.
    pub absmax: Vec<f32>,
}

/// Elements that one task of the thread pool handles, at least.
const TASK: usize = 1 << 15;

/// Quantises each block of `block_size` elements (any size from 1; 256 in bitsandbytes) to 8 bits: `code = nearest(x * (1 / absmax))`.
///
/// # Errors
/// [`Error::BlockSize`] for 0, [`Error::NonFinite`] with the first NaN or infinity.
pub fn quantize_dynamic<T: Element>(x: &[T], map: DynamicMap, block_size: usize) -> Result<DynamicBlocks, Error> {
    let op = "quantize_dynamic";
    if block_size == 0 {
        return Err(Error::BlockSize { op, min: 1, max: usize::MAX, found: 0 });
    }
    let book = map.codebook();
    let blocks = x.len().div_ceil(block_size);
    let mut codes = vec![0u8; x.len()];
    let mut absmax = vec![0f32; blocks];
    let per_task = (TASK / block_size).max(1);
    let finite = codes
        .par_chunks_mut(per_task * block_size)
        .zip(x.par_chunks(per_task * block_size))
        .zip(absmax.par_chunks_mut(per_task))
        .map(|((codes, x), absmax)| {
            let blocks = codes.chunks_mut(block_size).zip(x.chunks(block_size)).zip(absmax);
            blocks.fold(true, |finite, ((codes, x), absmax)| {
                *absmax = quantize_block(book, x, codes);
                finite & absmax.is_finite()
            })
        })
        .reduce(|| true, |a, b| a & b);
    if finite { Ok(DynamicBlocks { map, block_size, codes, absmax }) } else { Err(first_non_finite(op, x)) }
}

/// Writes the codes of one block and returns its absmax, NaN if any element is NaN.
fn quantize_block<T: Element>(book: &Codebook, x: &[T], codes: &mut [u8]) -> f32 {
    // The bits of magnitudes order as the magnitudes do, with NaN above infinity.
    let absmax = f32::from_bits(x.iter().map(|v| v.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    let scale = Scale::new(absmax);
    for (code, v) in codes.iter_mut().zip(x) {
        *code = book.nearest(scale.apply(v.to_f32()));
    }
    absmax
}

/// Division by a block's absmax, as the reference does it.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    absmax: f32,
    reciprocal: f32,
}

impl Scale {
    pub(crate) fn new(absmax: f32) -> Self {
        Self { absmax, reciprocal: 1.0 / absmax }
    }

    /// 1 / absmax is infinite though absmax is not 0.
    pub(crate) fn subnormal(self) -> bool {
        self.reciprocal == f32::INFINITY && self.absmax > 0.0
    }

    pub(crate) fn reciprocal(self) -> f32 {
        self.reciprocal
    }

    /// `x * (1 / absmax)`; a true division where the reciprocal of a subnormal absmax overflows.
    #[inline]
    pub(crate) fn apply(self, x: f32) -> f32 {
        if self.subnormal() { x / self.absmax } else { x * self.reciprocal }
    }
}

/// The error that names the first NaN or infinity of `x`.
pub(crate) fn first_non_finite<T: Element>(op: &'static str, x: &[T]) -> Error {
    let index = x.iter().position(|v| !v.to_f32().is_finite()).unwrap_or(0);
    Error::NonFinite { op, index, value: x.get(index).map_or(f32::NAN, |v| v.to_f32()) }
}

/// Decodes into `out`: `out[i] = map[codes[i]] * absmax[i / block_size]`.
///
/// # Errors
/// [`Error::Sizes`] if `out` and `blocks` do not have the lengths that belong together, [`Error::BlockSize`] for a block size of 0.
pub fn dequantize_dynamic<T: Element>(blocks: &DynamicBlocks, out: &mut [T]) -> Result<(), Error> {
    let op = "dequantize_dynamic";
    let size = blocks.block_size;
    if size == 0 {
        return Err(Error::BlockSize { op, min: 1, max: usize::MAX, found: 0 });
    }
    let n = blocks.codes.len();
    check_sizes(op, &[("out", n, out.len()), ("absmax", n.div_ceil(size), blocks.absmax.len())])?;
    let levels = blocks.map.codebook().levels();
    let per_task = (TASK / size).max(1);
    out.par_chunks_mut(per_task * size)
        .zip(blocks.codes.par_chunks(per_task * size))
        .zip(blocks.absmax.par_chunks(per_task))
        .for_each(|((out, codes), absmax)| {
            for ((out, codes), absmax) in out.chunks_mut(size).zip(codes.chunks(size)).zip(absmax) {
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = T::from_f32(levels[usize::from(code)] * absmax);
                }
            }
        });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// bitsandbytes' search, step by step: seven halvings from pivot 127, then the midpoint to the neighbour on the value's side.
    fn reference(levels: &[f32; 256], y: f32) -> u8 {
        let (mut pivot, mut lower, mut upper) = (127usize, 0usize, 255usize);
        for step in [64, 32, 16, 8, 4, 2, 1] {
            if y > levels[pivot] {
                lower = pivot;
                pivot += step;
            } else {
                upper = pivot;
                pivot -= step;
            }
        }
        let middle = |neighbour: usize| (levels[neighbour] + levels[pivot]) * 0.5;
        let code = if y > levels[pivot] {
            if y > middle(upper) { upper } else { pivot }
        } else if y < middle(lower) {
            lower
        } else {
            pivot
        };
        code as u8
    }

    #[test]
    fn nearest_is_the_reference_search_around_every_threshold_level_and_bucket() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let book = map.codebook();
            let mut points: Vec<f32> = book.levels.iter().chain(&book.thresholds[..255]).copied().collect();
            points.extend((KEY_MIN - 2..=KEY_MAX + 2).map(|key| f32::from_bits(key << 16)));
            points.extend([0.0, f32::MIN_POSITIVE, 1.5, 100.0]);
            for point in points {
                for near in [point.next_down(), point, point.next_up()] {
                    for y in [near, -near] {
                        assert_eq!(book.nearest(y), reference(&book.levels, y), "{map:?} {y:e}");
                    }
                }
            }
            assert_eq!(book.nearest(f32::NAN), 0);
            assert_eq!((book.nearest(f32::INFINITY), book.nearest(f32::NEG_INFINITY)), (255, 0));
        }
    }

    #[test]
    fn no_bucket_holds_two_thresholds() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let book = map.codebook();
            let mut keys: Vec<_> = book.thresholds[..255]
                .iter()
                .map(|t| (t.is_sign_negative(), (t.abs().to_bits() >> 16).clamp(KEY_MIN, KEY_MAX)))
                .collect();
            keys.dedup();
            assert_eq!(keys.len(), 255);
        }
    }
}
