//! Whole arrays to 4-bit blocks and back, on all threads of rayon's pool. The results do not depend on their number.

use rayon::prelude::*;

use crate::blocks::{Absmax, NESTED_BLOCK, QuantConfig, QuantizedBlocks};
use crate::dynamic::{DynamicMap, first_non_finite, quantize_dynamic};
use crate::element::Element;
use crate::error::{Error, check_sizes};
use crate::mean::mean;
use crate::simd;

/// Elements a task of the pool handles: a multiple of every block size, well inside a core's cache.
const TASK: usize = 1 << 16;
/// Outputs of this many bytes and more are written past the caches, which they would only flush.
const STREAM_FROM: usize = 8 << 20;

/// Quantises `x`, row-major, in blocks of `config.block_size` consecutive elements.
///
/// `absmax[b] = max |x|` of block b, `code[i]` = the level of the format nearest to `x[i] * (1 / absmax)`, a tie to the lower
/// level. With `double_quant` the absmax less their mean go through the signed dynamic 8-bit map in blocks of 256.
/// Bit-equal to bitsandbytes on CUDA, in all-zero blocks too (codes 0). The one exception is the mean of more than
/// 130,560 absmax, whose last bit depends on the GPU there: ours is the exact sum rounded, theirs differs by at most about n⁰·⁵ ulp.
///
/// # Errors
/// [`Error::BlockSize`]; [`Error::NonFinite`] with the first NaN or infinity.
pub fn quantize<T: Element>(x: &[T], config: &QuantConfig) -> Result<QuantizedBlocks, Error> {
    config.check()?;
    let size = config.block_size;
    let mut packed = vec![0u8; x.len().div_ceil(2)];
    let mut absmax = vec![0f32; x.len().div_ceil(size)];
    let isa = simd::isa();
    let finite = x
        .par_chunks(TASK)
        .zip(packed.par_chunks_mut(TASK / 2))
        .zip(absmax.par_chunks_mut(TASK / size))
        .map(|((x, packed), absmax)| simd::encode(isa, config.format, size, T::view(x), packed, absmax))
        .reduce(|| true, |a, b| a & b);
    if !finite {
        return Err(first_non_finite("quantize", x));
    }
    let absmax = if config.double_quant { nest(absmax)? } else { Absmax::Plain(absmax) };
    Ok(QuantizedBlocks { config: *config, len: x.len(), packed, absmax })
}

/// Double quantisation of the scales.
fn nest(mut absmax: Vec<f32>) -> Result<Absmax, Error> {
    let offset = mean(&absmax);
    for v in &mut absmax {
        *v -= offset;
    }
    let nested = quantize_dynamic(&absmax, DynamicMap::Signed, NESTED_BLOCK)?;
    let map = Box::new(*DynamicMap::Signed.codebook().levels());
    Ok(Absmax::Nested { codes: nested.codes, absmax: nested.absmax, offset, map })
}

/// Decodes all of `q`: `out[i] = table[code i] * absmax[i / block_size]` in f32, rounded to nearest-even once.
///
/// # Errors
/// [`Error::Sizes`] if `out` is not `q.len()` long.
pub fn dequantize<T: Element>(q: &QuantizedBlocks, out: &mut [T]) -> Result<(), Error> {
    check_sizes("dequantize", &[("out", q.len, out.len())])?;
    let stream = size_of_val(out) >= STREAM_FROM;
    let (isa, view) = (simd::isa(), q.view());
    out.par_chunks_mut(TASK).enumerate().for_each(|(i, out)| simd::decode(isa, &view, i * TASK, T::view_mut(out), stream));
    Ok(())
}
