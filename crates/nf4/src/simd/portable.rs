//! The kernels in plain Rust: the specification of the others, and the path of every other architecture.

use half::{bf16, f16};

use super::Run;
use crate::dynamic::Scale;
use crate::element::Element;
use crate::format::Format;

/// Decodes one run: its table of sixteen results first, then a look-up an element.
#[inline]
pub(super) fn decode_run<T: Element>(format: Format, run: Run<'_>, out: &mut [T]) {
    let table = format.table().map(|level| T::from_f32(level * run.scale));
    let mut out = out;
    let mut packed = run.packed;
    if run.odd
        && let Some((first, rest)) = std::mem::take(&mut out).split_first_mut()
    {
        *first = table[usize::from(packed[0] & 15)];
        (out, packed) = (rest, &packed[1..]);
    }
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(packed) {
        *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
    }
    if let (Some(last), Some(byte)) = (last.first_mut(), packed.last()) {
        *last = table[usize::from(byte >> 4)];
    }
}

/// Encodes one block and returns its absmax, which is not finite if any element is not.
#[inline]
pub(super) fn encode_block<T: Element>(format: Format, x: &[T], packed: &mut [u8]) -> f32 {
    // The bits of magnitudes order as the magnitudes do, with NaN above infinity.
    let absmax = f32::from_bits(x.iter().map(|v| v.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    let scale = Scale::new(absmax);
    encode_scaled(format, x, scale, packed);
    absmax
}

/// Encodes elements (an even number, or the array's last) of a block whose scale is known.
#[inline]
pub(super) fn encode_scaled<T: Element>(format: Format, x: &[T], scale: Scale, packed: &mut [u8]) {
    let code = |v: T| format.encode(scale.apply(v.to_f32()));
    let (pairs, last) = x.as_chunks::<2>();
    for (byte, pair) in packed.iter_mut().zip(pairs) {
        *byte = (code(pair[0]) << 4) | code(pair[1]);
    }
    if let (Some(&v), Some(byte)) = (last.first(), packed.last_mut()) {
        // The unused half byte holds the code of 0, as the reference pads with zeros.
        let padding = if scale.reciprocal().is_finite() { format.encode(0.0) } else { 0 };
        *byte = (code(v) << 4) | padding;
    }
}

/// The bits of `bf16` values, as values.
pub(super) fn as_bf16(bits: &[u16]) -> &[bf16] {
    bytemuck::cast_slice(bits)
}

/// The bits of `f16` values, as values.
pub(super) fn as_f16(bits: &[u16]) -> &[f16] {
    bytemuck::cast_slice(bits)
}
