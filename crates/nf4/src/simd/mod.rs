//! The two inner loops, encoding and decoding of 4-bit blocks, for each instruction set; the CPU is asked once, at run time.
//!
//! All paths give the same bits: the vector ones do the same float operations, a lane an element.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::element::{Slice, SliceMut};
use crate::format::Format;
use crate::view::BlocksView;

/// An instruction set with its own kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2 and F16C. This and the next are made by [`isa`] and [`has_avx2`]'s callers alone, after they asked the CPU.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The best of this CPU. The standard library asks it once.
#[inline]
pub(crate) fn isa() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            return Isa::Avx512;
        }
        if has_avx2() {
            return Isa::Avx2;
        }
    }
    Isa::Portable
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl")
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
    // Block sizes are powers of two, and a division would be the dearest part of a short run.
    let mut block = start >> view.block_size.trailing_zeros();
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
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the variant exists only where the CPU has AVX-512 F, BW and VL.
        Isa::Avx512 => unsafe { avx512::decode(view, start, out, stream) },
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
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the variant exists only where the CPU has AVX-512 F, BW and VL.
        Isa::Avx512 => unsafe { avx512::encode(format, block_size, x, packed, absmax) },
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

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::{Absmax, Element, QuantizedBlocks};

    /// Every instruction set of this CPU but the plain one.
    fn vector_sets() -> Vec<Isa> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            sets.extend(has_avx2().then_some(Isa::Avx2));
            sets.extend(has_avx512().then_some(Isa::Avx512));
        }
        sets
    }

    /// Values on, and one step beside, every threshold of both formats, then pseudo-random ones; a zero and a subnormal block in front.
    fn values(n: usize) -> Vec<f32> {
        let mut x = vec![0.0; 32];
        x.extend((0..32).map(|i| i as f32 * 1e-41));
        for t in crate::format::NF4_THRESHOLDS.iter().chain(&crate::format::FP4_THRESHOLDS) {
            x.extend([*t, t.next_up(), t.next_down(), -t, -t.next_up(), -t.next_down(), 1.0, -0.0]);
        }
        let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        x.extend((0..n as u32).map(|i| noise(i) * noise(i.wrapping_mul(7)).powi(3)));
        x.truncate(n);
        x
    }

    fn encoded<T: Element>(isa: Isa, format: Format, block_size: usize, x: &[T]) -> (Vec<u8>, Vec<u32>, bool) {
        let mut packed = vec![0xAA; x.len().div_ceil(2)];
        let mut absmax = vec![-1.0f32; x.len().div_ceil(block_size)];
        let finite = encode(isa, format, block_size, T::view(x), &mut packed, &mut absmax);
        (packed, absmax.into_iter().map(f32::to_bits).collect(), finite)
    }

    fn decoded<T: Element>(isa: Isa, q: &QuantizedBlocks, start: usize, n: usize, stream: bool) -> Vec<u32> {
        let mut out = vec![T::from_f32(7.0); n];
        decode(isa, &q.view(), start, T::view_mut(&mut out), stream);
        out.into_iter().map(|v| v.to_f32().to_bits()).collect()
    }

    fn agree<T: Element>() {
        for format in [Format::Nf4, Format::Fp4] {
            for (n, block_size) in [(1, 32), (31, 32), (63, 64), (500, 32), (1000, 64), (5000, 4096), (4097, 128)] {
                let x: Vec<T> = values(n).into_iter().map(T::from_f32).collect();
                let expected = encoded(Isa::Portable, format, block_size, &x);
                assert!(expected.2);
                let scales = expected.1.iter().map(|&bits| f32::from_bits(bits)).collect();
                let q = QuantizedBlocks::from_parts(format, block_size, n, expected.0.clone(), Absmax::Plain(scales)).unwrap();
                for isa in vector_sets() {
                    assert_eq!(encoded(isa, format, block_size, &x), expected, "{isa:?} {format:?} {n} {block_size}");
                    for start in [0, 1, 32, 33, 64, 250].into_iter().filter(|&s| s < n) {
                        for len in [1, 17, 64, n - start].into_iter().filter(|&l| l <= n - start) {
                            let plain = decoded::<T>(Isa::Portable, &q, start, len, false);
                            for stream in [false, true] {
                                assert_eq!(decoded::<T>(isa, &q, start, len, stream), plain, "{isa:?} {format:?} {start} {len}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn all_instruction_sets_give_the_same_bits() {
        agree::<f32>();
        agree::<bf16>();
        agree::<f16>();
    }

    #[test]
    fn all_instruction_sets_find_non_finite_elements_anywhere() {
        for isa in vector_sets().into_iter().chain([Isa::Portable]) {
            for at in 0..77 {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut x = vec![0.25f32; 77];
                    assert!(encoded(isa, Format::Nf4, 32, &x).2);
                    x[at] = bad;
                    assert!(!encoded(isa, Format::Nf4, 32, &x).2, "{isa:?} {at}");
                    let half: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
                    assert!(!encoded(isa, Format::Nf4, 32, &half).2, "{isa:?} {at}");
                }
            }
        }
    }

    #[test]
    fn scales_beyond_the_half_types_overflow_alike() {
        for scale in [f32::NAN, f32::INFINITY, f32::MAX, 65520.0, 65519.0, 1e-30] {
            let packed = (0..32).map(|i| (i * 16 + i) as u8).collect();
            let q = QuantizedBlocks::from_parts(Format::Nf4, 64, 64, packed, Absmax::Plain(vec![scale])).unwrap();
            for isa in vector_sets() {
                let same = |a: Vec<u32>, b: Vec<u32>| {
                    a.iter().zip(&b).all(|(a, b)| a == b || (f32::from_bits(*a).is_nan() && f32::from_bits(*b).is_nan()))
                };
                assert!(same(decoded::<f16>(isa, &q, 0, 64, false), decoded::<f16>(Isa::Portable, &q, 0, 64, false)));
                assert!(same(decoded::<bf16>(isa, &q, 0, 64, false), decoded::<bf16>(Isa::Portable, &q, 0, 64, false)));
            }
        }
    }
}
