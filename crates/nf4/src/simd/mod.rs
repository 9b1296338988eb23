//! The two inner loops, encoding and decoding of 4-bit blocks, for each instruction set; the CPU is asked once, at run time.
//!
//! All paths give the same bits: the vector ones do the same float operations, a lane an element.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;

use crate::element::{Slice, SliceMut};
use crate::format::Format;
use crate::view::BlocksView;

/// An instruction set with its own kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2 and F16C: made by [`isa`] and `available` alone, after they asked the CPU.
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

/// The best of this CPU. The standard library asks it once.
#[inline]
pub(crate) fn isa() -> Isa {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
        return Isa::Avx2;
    }
    Isa::Portable
}

/// Part of one block: `odd` if it begins in the low nibble of `packed[0]`.
#[derive(Clone, Copy)]
struct Run<'a> {
    format: Format,
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
        decode(Run { format: view.format, scale: view.absmax.get(block), packed, odd: at % 2 == 1 }, head);
        rest = tail;
        at += n;
        block += 1;
    }
}

/// Whether all steps of all runs are written to 16-byte aligned places: blocks hold a multiple of 32 elements.
#[cfg(target_arch = "x86_64")]
fn streamable<T>(stream: bool, start: usize, out: &[T]) -> bool {
    stream && start.is_multiple_of(crate::blocks::MIN_BLOCK) && out.as_ptr().addr().is_multiple_of(16)
}

/// Decodes `start..start + out.len()`; `stream` writes past the caches, for outputs much larger than they are.
pub(crate) fn decode(isa: Isa, view: &BlocksView<'_>, start: usize, out: SliceMut<'_>, stream: bool) {
    match isa {
        Isa::Portable => match out {
            SliceMut::F32(out) => decode_portable(view, start, out),
            SliceMut::Bf16(out) => decode_portable(view, start, bytemuck::cast_slice_mut::<_, half::bf16>(out)),
            SliceMut::F16(out) => decode_portable(view, start, bytemuck::cast_slice_mut::<_, half::f16>(out)),
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the variant exists only where the CPU has AVX2 and F16C.
        Isa::Avx2 => unsafe { avx2::decode(view, start, out, stream) },
    }
}

fn decode_portable<T: crate::Element>(view: &BlocksView<'_>, start: usize, out: &mut [T]) {
    for_each_run(view, start, out, |run, out| portable::decode_run(run.format, run, out));
}

/// Encodes whole blocks (the last of the array may be short) and says whether all elements are finite.
pub(crate) fn encode(isa: Isa, format: Format, block_size: usize, x: Slice<'_>, packed: &mut [u8], absmax: &mut [f32]) -> bool {
    match isa {
        Isa::Portable => match x {
            Slice::F32(x) => encode_portable(format, block_size, x, packed, absmax),
            Slice::Bf16(x) => encode_portable(format, block_size, portable::as_bf16(x), packed, absmax),
            Slice::F16(x) => encode_portable(format, block_size, portable::as_f16(x), packed, absmax),
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the variant exists only where the CPU has AVX2 and F16C.
        Isa::Avx2 => unsafe { avx2::encode(format, block_size, x, packed, absmax) },
    }
}

fn encode_portable<T: crate::Element>(format: Format, block_size: usize, x: &[T], packed: &mut [u8], absmax: &mut [f32]) -> bool {
    encode_blocks(block_size, x, packed, absmax, |x, packed| portable::encode_block(format, x, packed))
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
