//! The kernels in plain Rust: the specification of the others, and the path of every other architecture.

use half::{bf16, f16};

use super::Run;
use crate::dynamic::Scale;
use crate::element::Element;
use crate::format::Format;

/// Elements from which a table of the sixteen results is worth making.
const TABLE_FROM: usize = 16;

/// Decodes one run.
#[inline]
pub(super) fn decode_run<T: Element>(format: Format, run: Run<'_>, out: &mut [T]) {
    let (run, out) = even_start(format, run, out);
    if out.len() < TABLE_FROM {
        decode_pairs(run.packed, out, |code| T::from_f32(format.table()[code] * run.scale));
    } else {
        let table = format.table().map(|level| T::from_f32(level * run.scale));
        decode_pairs(run.packed, out, |code| table[code]);
    }
}

/// Decodes the first element of a run that begins in a low nibble, and gives what is left.
#[inline]
pub(super) fn even_start<'a, 'b, T: Element>(format: Format, run: Run<'a>, out: &'b mut [T]) -> (Run<'a>, &'b mut [T]) {
    match (run.odd, run.packed, out) {
        (true, [byte, packed @ ..], [first, out @ ..]) => {
            *first = T::from_f32(format.table()[usize::from(byte & 15)] * run.scale);
            (Run { packed, odd: false, ..run }, out)
        }
        (_, _, out) => (run, out),
    }
}

#[inline]
fn decode_pairs<T: Copy>(packed: &[u8], out: &mut [T], decode: impl Fn(usize) -> T) {
    let (pairs, last) = out.as_chunks_mut::<2>();
    if let (Some(last), Some(byte)) = (last.first_mut(), packed.get(pairs.len())) {
        *last = decode(usize::from(byte >> 4));
    }
    for (pair, byte) in pairs.iter_mut().zip(packed) {
        *pair = [decode(usize::from(byte >> 4)), decode(usize::from(byte & 15))];
    }
}

/// Encodes one block and returns its absmax, which is not finite if any element is not.
#[inline]
pub(super) fn encode_block<T: Element>(format: Format, x: &[T], packed: &mut [u8]) -> f32 {
    // The bits of magnitudes order as the magnitudes do, with NaN above infinity.
    let absmax = f32::from_bits(x.iter().map(|v| v.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    encode_scaled(format, x, Scale::new(absmax), packed);
    absmax
}

/// Encodes a block whose scale is known.
#[inline]
pub(super) fn encode_scaled<T: Element>(format: Format, x: &[T], scale: Scale, packed: &mut [u8]) {
    let code = |v: f32| format.encode(scale.apply(v));
    let (pairs, last) = x.as_chunks::<2>();
    // The unused half byte of an odd length holds the code of 0, as the reference pads with zeros.
    if let (Some(v), Some(byte)) = (last.first(), packed.last_mut()) {
        *byte = (code(v.to_f32()) << 4) | code(0.0);
    }
    for (byte, pair) in packed.iter_mut().zip(pairs) {
        *byte = (code(pair[0].to_f32()) << 4) | code(pair[1].to_f32());
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
