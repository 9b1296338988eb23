//! The two inner loops, encoding and decoding of 4-bit blocks, for each instruction set; the CPU is asked once, at run time.
//!
//! All paths give the same bits: the vector ones do the same float operations, a lane an element.

mod portable;

use crate::element::{Slice, SliceMut};
use crate::format::Format;
use crate::view::BlocksView;

/// An instruction set with its own kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Plain Rust.
    Portable,
}

/// The best of this CPU.
#[inline]
pub(crate) fn isa() -> Isa {
    Isa::Portable
}

/// Every instruction set of this CPU, for tests that compare them.
#[cfg(test)]
pub(crate) fn available() -> Vec<Isa> {
    vec![Isa::Portable]
}

/// Part of one block: `odd` if it begins in the low nibble of `packed[0]`.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    scale: f32,
    packed: &'a [u8],
    odd: bool,
}

/// Cuts `start..start + out.len()` at the blocks' borders.
#[inline(always)]
fn for_each_run<T>(view: &BlocksView<'_>, start: usize, out: &mut [T], mut decode: impl FnMut(Run<'_>, &mut [T])) {
    let mut rest = out;
    let mut at = start;
    let mut block = start / view.block_size;
    while !rest.is_empty() {
        let n = ((block + 1) * view.block_size - at).min(rest.len());
        let (head, tail) = rest.split_at_mut(n);
        let packed = &view.packed[at / 2..(at + n).div_ceil(2)];
        decode(Run { scale: view.absmax.get(block), packed, odd: at % 2 == 1 }, head);
        rest = tail;
        at += n;
        block += 1;
    }
}

/// Decodes `start..start + out.len()`; `stream` writes past the caches, for outputs much larger than they are.
pub(crate) fn decode(isa: Isa, view: &BlocksView<'_>, start: usize, out: SliceMut<'_>, stream: bool) {
    let _ = stream;
    match isa {
        Isa::Portable => match out {
            SliceMut::F32(out) => for_each_run(view, start, out, |run, out| portable::decode_run(view.format, run, out)),
            SliceMut::Bf16(out) => {
                let out: &mut [half::bf16] = bytemuck::cast_slice_mut(out);
                for_each_run(view, start, out, |run, out| portable::decode_run(view.format, run, out));
            }
            SliceMut::F16(out) => {
                let out: &mut [half::f16] = bytemuck::cast_slice_mut(out);
                for_each_run(view, start, out, |run, out| portable::decode_run(view.format, run, out));
            }
        },
    }
}

/// Encodes whole blocks (the last of the array may be short) and says whether all elements are finite.
pub(crate) fn encode(isa: Isa, format: Format, block_size: usize, x: Slice<'_>, packed: &mut [u8], absmax: &mut [f32]) -> bool {
    match isa {
        Isa::Portable => match x {
            Slice::F32(x) => encode_blocks(block_size, x, packed, absmax, |x, packed| portable::encode_block(format, x, packed)),
            Slice::Bf16(x) => encode_blocks(block_size, portable::as_bf16(x), packed, absmax, |x, packed| {
                portable::encode_block(format, x, packed)
            }),
            Slice::F16(x) => encode_blocks(block_size, portable::as_f16(x), packed, absmax, |x, packed| {
                portable::encode_block(format, x, packed)
            }),
        },
    }
}

/// Calls `encode_block` for each block, and collects the absmax it returns.
#[inline(always)]
fn encode_blocks<T>(
    block_size: usize,
    x: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
    mut encode_block: impl FnMut(&[T], &mut [u8]) -> f32,
) -> bool {
    let mut finite = true;
    for ((x, packed), absmax) in x.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax) {
        *absmax = encode_block(x, packed);
        finite &= absmax.is_finite();
    }
    finite
}
