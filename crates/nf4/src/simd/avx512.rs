//! AVX-512 (F, BW, VL).
//!
//! All sixteen results of a block fit one register, so decoding an element is one lane of `vpermps` or `vpermw`, whose index
//! needs no masking. Encoding is the binary search of the AVX2 path, with ranks built in mask registers.

#[allow(clippy::wildcard_imports, reason = "fifty intrinsics, all of one family")]
use std::arch::x86_64::*;

use super::{Run, encode_blocks, for_each_run, portable, streamable};
use crate::dynamic::Scale;
use crate::element::{Element, Slice, SliceMut};
use crate::format::{FP4_RANK_TO_CODE, FP4_THRESHOLDS, Format, NF4_THRESHOLDS};
use crate::view::BlocksView;

/// Elements that one step of any kernel here takes; every block but the array's last is made of whole steps.
const STEP: usize = 32;

/// See [`super::decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn decode(view: &BlocksView<'_>, start: usize, out: SliceMut<'_>, stream: bool) {
    match out {
        SliceMut::F32(out) if streamable(stream, start, out) => {
            for_each_run(view, start, out, |r, out| decode_f32::<true>(r, out));
        }
        SliceMut::F32(out) => for_each_run(view, start, out, |r, out| decode_f32::<false>(r, out)),
        SliceMut::Bf16(out) if streamable(stream, start, out) => {
            for_each_run(view, start, out, |r, out| decode_16::<half::bf16, true>(bf16_table(r), r, out));
        }
        SliceMut::Bf16(out) => for_each_run(view, start, out, |r, out| decode_16::<half::bf16, false>(bf16_table(r), r, out)),
        SliceMut::F16(out) if streamable(stream, start, out) => {
            for_each_run(view, start, out, |r, out| decode_16::<half::f16, true>(f16_table(r), r, out));
        }
        SliceMut::F16(out) => for_each_run(view, start, out, |r, out| decode_16::<half::f16, false>(f16_table(r), r, out)),
    }
    if stream {
        // Streaming stores are weakly ordered: they must be visible before another thread is told of them.
        _mm_sfence();
    }
}

/// A register of sixteen floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; 16]) -> __m512 {
    // SAFETY: sixteen floats.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// The sixteen results of a block.
#[inline]
#[target_feature(enable = "avx512f")]
fn scaled_table(run: Run<'_>) -> __m512 {
    _mm512_mul_ps(load(run.format.table()), _mm512_set1_ps(run.scale))
}

/// The sixteen results of a block as bf16, twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bf16_table(run: Run<'_>) -> __m512i {
    let table = scaled_table(run);
    let bits = _mm512_castps_si512(table);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    // Rounding could carry a NaN into the sign; it is made quiet instead.
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(table, table);
    let rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
    _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)))
}

/// The sixteen results of a block as f16, twice.
#[inline]
#[target_feature(enable = "avx512f")]
fn f16_table(run: Run<'_>) -> __m512i {
    _mm512_broadcast_i64x4(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(scaled_table(run)))
}

/// Stores 64 bytes, through the caches or past them.
///
/// # Safety
/// `to` is valid for 64 bytes, and 16-byte aligned for streaming.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const STREAM: bool>(to: *mut __m128i, value: __m512i) {
    // SAFETY: the caller's promise.
    unsafe {
        if STREAM {
            // In quarters: allocations are aligned to 16 bytes, seldom to 64.
            _mm_stream_si128(to, _mm512_castsi512_si128(value));
            _mm_stream_si128(to.add(1), _mm512_extracti32x4_epi32::<1>(value));
            _mm_stream_si128(to.add(2), _mm512_extracti32x4_epi32::<2>(value));
            _mm_stream_si128(to.add(3), _mm512_extracti32x4_epi32::<3>(value));
        } else {
            _mm512_storeu_si512(to.cast(), value);
        }
    }
}

/// Sixteen packed bytes, in the low quarter of a register.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_bytes(bytes: &[u8; STEP / 2]) -> __m512i {
    // SAFETY: sixteen bytes.
    _mm512_castsi128_si512(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn decode_f32<const STREAM: bool>(run: Run<'_>, out: &mut [f32]) {
    let (run, out) = portable::even_start(run.format, run, out);
    let table = scaled_table(run);
    let first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    let shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    let (steps, tail) = out.as_chunks_mut::<STEP>();
    let (bytes, rest) = run.packed.split_at(steps.len() * STEP / 2);
    let (bytes, _) = bytes.as_chunks::<{ STEP / 2 }>();
    for (step, bytes) in steps.iter_mut().zip(bytes) {
        let bytes = load_bytes(bytes);
        let (halves, _) = step.as_chunks_mut::<16>();
        for (half, spread) in halves.iter_mut().zip([first, second]) {
            let codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(spread, bytes), shifts);
            let values = _mm512_castps_si512(_mm512_permutexvar_ps(codes, table));
            // SAFETY: `half` is sixteen floats; for streaming, `streamable` checked that it is 16-byte aligned.
            unsafe { store::<STREAM>(half.as_mut_ptr().cast(), values) };
        }
    }
    if !tail.is_empty() {
        portable::decode_run(run.format, Run { packed: rest, ..run }, tail);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn decode_16<T: Element + bytemuck::Pod, const STREAM: bool>(table: __m512i, run: Run<'_>, out: &mut [u16]) {
    let (run, out) = portable::even_start(run.format, run, bytemuck::cast_slice_mut::<u16, T>(out));
    // Each word of two bytes, four times, shifted to each of its four nibbles.
    let words: [u16; STEP] = std::array::from_fn(|i| i as u16 / 4);
    let nibbles: [u16; STEP] = std::array::from_fn(|i| [4, 0, 12, 8][i % 4]);
    // SAFETY: 32 words each.
    let (spread, shifts) = unsafe { (_mm512_loadu_si512(words.as_ptr().cast()), _mm512_loadu_si512(nibbles.as_ptr().cast())) };
    let (steps, tail) = out.as_chunks_mut::<STEP>();
    let (bytes, rest) = run.packed.split_at(steps.len() * STEP / 2);
    let (bytes, _) = bytes.as_chunks::<{ STEP / 2 }>();
    for (step, bytes) in steps.iter_mut().zip(bytes) {
        let codes = _mm512_srlv_epi16(_mm512_permutexvar_epi16(spread, load_bytes(bytes)), shifts);
        // SAFETY: `step` is 64 bytes; for streaming, `streamable` checked that it is 16-byte aligned.
        unsafe { store::<STREAM>(step.as_mut_ptr().cast(), _mm512_permutexvar_epi16(codes, table)) };
    }
    if !tail.is_empty() {
        portable::decode_run(run.format, Run { packed: rest, ..run }, tail);
    }
}

/// See [`super::encode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn encode(format: Format, block_size: usize, x: Slice<'_>, packed: &mut [u8], absmax: &mut [f32]) -> bool {
    match x {
        Slice::F32(x) => encode_as(format, block_size, x, packed, absmax, |x| load(x)),
        Slice::Bf16(x) => {
            let load = |x: &[half::bf16; 16]| {
                // SAFETY: sixteen words.
                let words = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
            };
            encode_as(format, block_size, portable::as_bf16(x), packed, absmax, load)
        }
        Slice::F16(x) => {
            // SAFETY: sixteen words.
            let load = |x: &[half::f16; 16]| _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.as_ptr().cast()) });
            encode_as(format, block_size, portable::as_f16(x), packed, absmax, load)
        }
    }
}

/// Encodes with the element type's way to load sixteen values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn encode_as<T: Element>(
    format: Format,
    block_size: usize,
    x: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
    load: impl Fn(&[T; 16]) -> __m512 + Copy,
) -> bool {
    match format {
        Format::Nf4 => {
            let search = Nf4Search::new();
            encode_blocks(block_size, x, packed, absmax, |x, packed| encode_block(format, x, packed, load, |y| search.codes(y)))
        }
        Format::Fp4 => {
            let search = Fp4Search::new();
            encode_blocks(block_size, x, packed, absmax, |x, packed| encode_block(format, x, packed, load, |y| search.codes(y)))
        }
    }
}

/// Encodes one block and returns its absmax.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn encode_block<T: Element>(
    format: Format,
    x: &[T],
    packed: &mut [u8],
    load: impl Fn(&[T; 16]) -> __m512 + Copy,
    codes: impl Fn(__m512) -> __m512i + Copy,
) -> f32 {
    let (steps, tail) = x.as_chunks::<STEP>();
    let mut padded = [T::from_f32(0.0); STEP];
    padded[..tail.len()].copy_from_slice(tail);
    let absmax = largest(steps, &padded, load);
    let scale = Scale::new(absmax);
    if scale.subnormal() {
        portable::encode_scaled(format, x, scale, packed);
        return absmax;
    }
    let reciprocal = _mm512_set1_ps(scale.reciprocal());
    let encode_step = |step: &[T; STEP], to: &mut [u8; STEP / 2]| {
        let (halves, _) = step.as_chunks::<16>();
        let low = codes(_mm512_mul_ps(load(&halves[0]), reciprocal));
        let high = codes(_mm512_mul_ps(load(&halves[1]), reciprocal));
        let bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
        // 16 times the even code plus the odd one.
        let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
        // SAFETY: `to` is sixteen bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtepi16_epi8(pairs)) };
    };
    let (bytes, rest) = packed.split_at_mut(steps.len() * STEP / 2);
    let (bytes, _) = bytes.as_chunks_mut::<{ STEP / 2 }>();
    for (step, bytes) in steps.iter().zip(bytes) {
        encode_step(step, bytes);
    }
    if !tail.is_empty() {
        let mut bytes = [0; STEP / 2];
        encode_step(&padded, &mut bytes);
        rest.copy_from_slice(&bytes[..rest.len()]);
    }
    absmax
}

/// The largest magnitude; NaN or infinite if any element is, since bits of magnitudes order as they do.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest<T>(steps: &[[T; STEP]], padded: &[T; STEP], load: impl Fn(&[T; 16]) -> __m512 + Copy) -> f32 {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let mut most = [_mm512_setzero_si512(); 2];
    for step in steps.iter().chain(std::iter::once(padded)) {
        let (halves, _) = step.as_chunks::<16>();
        for (most, half) in most.iter_mut().zip(halves) {
            *most = _mm512_max_epi32(*most, _mm512_and_si512(_mm512_castps_si512(load(half)), magnitude));
        }
    }
    f32::from_bits(_mm512_reduce_max_epi32(_mm512_max_epi32(most[0], most[1])) as u32)
}

/// `rank | bit` where `y > threshold`.
#[inline]
#[target_feature(enable = "avx512f")]
fn descend(rank: __m512i, bit: i32, y: __m512, threshold: __m512) -> __m512i {
    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, threshold);
    _mm512_mask_or_epi32(rank, above, rank, _mm512_set1_epi32(bit))
}

/// The registers of the search through NF4's fifteen thresholds: which comes next, by the rank found so far.
#[derive(Clone, Copy)]
struct Nf4Search {
    first: __m512,
    second: __m512,
    third: __m512,
    fourth: __m512,
}

impl Nf4Search {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        let t = &NF4_THRESHOLDS;
        let by_rank = |next: usize| load(&std::array::from_fn(|rank| t[(rank + next).min(14)]));
        Self { first: _mm512_set1_ps(t[7]), second: by_rank(3), third: by_rank(1), fourth: by_rank(0) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn codes(&self, y: __m512) -> __m512i {
        let rank = descend(_mm512_setzero_si512(), 8, y, self.first);
        let rank = descend(rank, 4, y, _mm512_permutexvar_ps(rank, self.second));
        let rank = descend(rank, 2, y, _mm512_permutexvar_ps(rank, self.third));
        descend(rank, 1, y, _mm512_permutexvar_ps(rank, self.fourth))
    }
}

/// The registers of the search through FP4's seven thresholds, and the code of each rank.
#[derive(Clone, Copy)]
struct Fp4Search {
    first: __m512,
    second: __m512,
    third: __m512,
    code: __m512i,
}

impl Fp4Search {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        let t = &FP4_THRESHOLDS;
        let by_rank = |next: usize| load(&std::array::from_fn(|rank| t[(rank + next).min(6)]));
        let code = load(&std::array::from_fn(|rank| f32::from(FP4_RANK_TO_CODE[rank % 8])));
        Self { first: _mm512_set1_ps(t[3]), second: by_rank(1), third: by_rank(0), code: _mm512_cvtps_epi32(code) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn codes(&self, y: __m512) -> __m512i {
        let size = _mm512_abs_ps(y);
        let rank = descend(_mm512_setzero_si512(), 4, size, self.first);
        let rank = descend(rank, 2, size, _mm512_permutexvar_ps(rank, self.second));
        let rank = descend(rank, 1, size, _mm512_permutexvar_ps(rank, self.third));
        let code = _mm512_permutexvar_epi32(rank, self.code);
        let below_zero = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(y, _mm512_setzero_ps());
        _mm512_mask_or_epi32(code, below_zero, code, _mm512_set1_epi32(8))
    }
}
