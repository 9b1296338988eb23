//! AVX2 with F16C.
//!
//! Decoding multiplies the sixteen levels by the block's scale once; then each element is a table look-up in registers. For f32 the
//! table is two registers of eight (`vpermps` on the low three bits of the code, a blend on the fourth); for 16-bit types
//! it is two byte planes, one `vpshufb` each. Encoding is a binary search whose thresholds come from registers.

#[allow(clippy::wildcard_imports, reason = "seventy intrinsics, all of one family")]
use std::arch::x86_64::*;

use super::{Run, encode_blocks, for_each_run, portable, streamable};
use crate::dynamic::Scale;
use crate::element::{Element, Slice, SliceMut};
use crate::format::{FP4_RANK_TO_CODE, FP4_THRESHOLDS, Format, NF4_THRESHOLDS};
use crate::view::BlocksView;

/// Elements that one step of any kernel here takes; every block but the array's last is made of whole steps.
const STEP: usize = 32;

/// See [`super::decode`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn decode(view: &BlocksView<'_>, start: usize, out: SliceMut<'_>, stream: bool) {
    let format = view.format;
    match out {
        SliceMut::F32(out) if streamable(stream, start, out) => {
            for_each_run(view, start, out, |run, out| decode_f32::<true>(format, run, out));
        }
        SliceMut::F32(out) => for_each_run(view, start, out, |run, out| decode_f32::<false>(format, run, out)),
        SliceMut::Bf16(out) if streamable(stream, start, out) => {
            for_each_run(view, start, out, |run, out| decode_16::<half::bf16, true>(bf16_table(format, run.scale), run, out));
        }
        SliceMut::Bf16(out) => {
            for_each_run(view, start, out, |run, out| decode_16::<half::bf16, false>(bf16_table(format, run.scale), run, out));
        }
        SliceMut::F16(out) if streamable(stream, start, out) => {
            for_each_run(view, start, out, |run, out| decode_16::<half::f16, true>(f16_table(format, run.scale), run, out));
        }
        SliceMut::F16(out) => {
            for_each_run(view, start, out, |run, out| decode_16::<half::f16, false>(f16_table(format, run.scale), run, out));
        }
    }
    if stream {
        // Streaming stores are weakly ordered: they must be visible before another thread is told of them.
        _mm_sfence();
    }
}

/// The sixteen results of a block.
#[inline]
#[target_feature(enable = "avx2")]
fn scaled_table(format: Format, scale: f32) -> [__m256; 2] {
    let (halves, _) = format.table().as_chunks::<8>();
    let scale = _mm256_set1_ps(scale);
    // SAFETY: each half is eight floats.
    unsafe {
        [_mm256_mul_ps(_mm256_loadu_ps(halves[0].as_ptr()), scale), _mm256_mul_ps(_mm256_loadu_ps(halves[1].as_ptr()), scale)]
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn decode_f32<const STREAM: bool>(format: Format, run: Run<'_>, out: &mut [f32]) {
    let (run, out) = portable::even_start(format, run, out);
    let [low, high] = scaled_table(format, run.scale);
    let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    let (steps, tail) = out.as_chunks_mut::<STEP>();
    let (bytes, rest) = run.packed.split_at(steps.len() * STEP / 2);
    let (bytes, _) = bytes.as_chunks::<{ STEP / 2 }>();
    for (step, bytes) in steps.iter_mut().zip(bytes) {
        let (words, _) = bytes.as_chunks::<4>();
        let (eights, _) = step.as_chunks_mut::<8>();
        for (eight, &word) in eights.iter_mut().zip(words) {
            let codes = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(word)), shifts);
            let from_low = _mm256_permutevar8x32_ps(low, codes);
            let from_high = _mm256_permutevar8x32_ps(high, codes);
            let fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let values = _mm256_blendv_ps(from_low, from_high, fourth_bit);
            // SAFETY: `eight` is eight floats; for streaming, `streamable` checked that it is 16-byte aligned.
            unsafe { store::<STREAM>(eight.as_mut_ptr().cast(), _mm256_castps_si256(values)) };
        }
    }
    portable::decode_run(format, Run { packed: rest, ..run }, tail);
}

/// Stores 32 bytes, through the caches or past them.
///
/// # Safety
/// `to` is valid for 32 bytes, and 16-byte aligned for streaming.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<const STREAM: bool>(to: *mut __m128i, value: __m256i) {
    // SAFETY: the caller's promise.
    unsafe {
        if STREAM {
            _mm_stream_si128(to, _mm256_castsi256_si128(value));
            _mm_stream_si128(to.add(1), _mm256_extracti128_si256::<1>(value));
        } else {
            _mm256_storeu_si256(to.cast(), value);
        }
    }
}

/// The sixteen results of a block as bf16: low bytes, high bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn bf16_table(format: Format, scale: f32) -> [__m256i; 2] {
    let [low, high] = scaled_table(format, scale).map(|v| {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
        // Rounding could carry a NaN into the sign; it is made quiet instead.
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
    });
    planes(_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high)))
}

/// The sixteen results of a block as f16: low bytes, high bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn f16_table(format: Format, scale: f32) -> [__m256i; 2] {
    let [low, high] = scaled_table(format, scale).map(|v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
    planes(_mm256_set_m128i(high, low))
}

/// Splits sixteen words into their low and their high bytes, each sixteen in both lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn planes(words: __m256i) -> [__m256i; 2] {
    let low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
    let high = _mm256_srli_epi16::<8>(words);
    let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(low, high));
    [_mm256_permute2x128_si256::<0x00>(both, both), _mm256_permute2x128_si256::<0x11>(both, both)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn decode_16<T: Element + bytemuck::Pod, const STREAM: bool>(table: [__m256i; 2], run: Run<'_>, out: &mut [u16]) {
    let (run, out) = portable::even_start(run.format, run, bytemuck::cast_slice_mut::<u16, T>(out));
    let (steps, tail) = out.as_chunks_mut::<STEP>();
    let (bytes, rest) = run.packed.split_at(steps.len() * STEP / 2);
    let (bytes, _) = bytes.as_chunks::<{ STEP / 2 }>();
    for (step, bytes) in steps.iter_mut().zip(bytes) {
        // SAFETY: `bytes` is sixteen bytes.
        let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        // Dwords 0, 2 into the low lane and 1, 3 into the high one, so that unpacking within lanes gives neighbours.
        let words = _mm256_cvtepu8_epi16(_mm_shuffle_epi32::<0b11_01_10_00>(bytes));
        let nibbles = _mm256_or_si256(_mm256_srli_epi16::<4>(words), _mm256_slli_epi16::<8>(words));
        let codes = _mm256_and_si256(nibbles, _mm256_set1_epi16(0x0f0f));
        let low = _mm256_shuffle_epi8(table[0], codes);
        let high = _mm256_shuffle_epi8(table[1], codes);
        let to = step.as_mut_ptr().cast::<__m128i>();
        // SAFETY: `step` is 64 bytes; for streaming, `streamable` checked that it is 16-byte aligned.
        unsafe {
            store::<STREAM>(to, _mm256_unpacklo_epi8(low, high));
            store::<STREAM>(to.add(2), _mm256_unpackhi_epi8(low, high));
        }
    }
    portable::decode_run(run.format, Run { packed: rest, ..run }, tail);
}

/// See [`super::encode`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn encode(format: Format, block_size: usize, x: Slice<'_>, packed: &mut [u8], absmax: &mut [f32]) -> bool {
    match x {
        Slice::F32(x) => {
            // SAFETY: eight floats.
            let load = |x: &[f32; 8]| unsafe { _mm256_loadu_ps(x.as_ptr()) };
            encode_as(format, block_size, x, packed, absmax, load)
        }
        Slice::Bf16(x) => {
            let load = |x: &[half::bf16; 8]| {
                // SAFETY: eight words.
                let words = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
            };
            encode_as(format, block_size, portable::as_bf16(x), packed, absmax, load)
        }
        Slice::F16(x) => {
            // SAFETY: eight words.
            let load = |x: &[half::f16; 8]| _mm256_cvtph_ps(unsafe { _mm_loadu_si128(x.as_ptr().cast()) });
            encode_as(format, block_size, portable::as_f16(x), packed, absmax, load)
        }
    }
}

/// Encodes with the element type's way to load eight values.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn encode_as<T: Element>(
    format: Format,
    block_size: usize,
    x: &[T],
    packed: &mut [u8],
    absmax: &mut [f32],
    load: impl Fn(&[T; 8]) -> __m256 + Copy,
) -> bool {
    match format {
        Format::Nf4 => {
            let search = Nf4Search::new();
            encode_blocks(block_size, x, packed, absmax, |x, packed| {
                encode_block(format, x, packed, load, |y| search.negative_codes(y))
            })
        }
        Format::Fp4 => {
            let search = Fp4Search::new();
            encode_blocks(block_size, x, packed, absmax, |x, packed| {
                encode_block(format, x, packed, load, |y| search.negative_codes(y))
            })
        }
    }
}

/// Encodes one block and returns its absmax.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn encode_block<T: Element>(
    format: Format,
    x: &[T],
    packed: &mut [u8],
    load: impl Fn(&[T; 8]) -> __m256 + Copy,
    negative_codes: impl Fn(__m256) -> __m256i + Copy,
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
    let reciprocal = _mm256_set1_ps(scale.reciprocal());
    let encode_step = |step: &[T; STEP], to: &mut [u8; STEP / 2]| {
        let (eights, _) = step.as_chunks::<8>();
        let codes = |i: usize| negative_codes(_mm256_mul_ps(load(&eights[i]), reciprocal));
        let bytes = pack([codes(0), codes(1), codes(2), codes(3)]);
        // SAFETY: `to` is sixteen bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), bytes) };
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
#[target_feature(enable = "avx2,f16c")]
fn largest<T>(steps: &[[T; STEP]], padded: &[T; STEP], load: impl Fn(&[T; 8]) -> __m256 + Copy) -> f32 {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut most = [_mm256_setzero_si256(); 2];
    for step in steps.iter().chain(std::iter::once(padded)) {
        let (eights, _) = step.as_chunks::<8>();
        for (i, eight) in eights.iter().enumerate() {
            let bits = _mm256_and_si256(_mm256_castps_si256(load(eight)), magnitude);
            most[i % 2] = _mm256_max_epi32(most[i % 2], bits);
        }
    }
    let most = _mm256_max_epi32(most[0], most[1]);
    let most = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
    let most = _mm_max_epi32(most, _mm_shuffle_epi32::<0b01_00_11_10>(most));
    let most = _mm_max_epi32(most, _mm_shuffle_epi32::<0b00_00_00_01>(most));
    f32::from_bits(_mm_cvtsi128_si32(most) as u32)
}

/// 32 negated codes, in dwords, to sixteen bytes, the even element in the high nibble.
#[inline]
#[target_feature(enable = "avx2")]
fn pack(negative: [__m256i; 4]) -> __m128i {
    let words = [_mm256_packs_epi32(negative[0], negative[1]), _mm256_packs_epi32(negative[2], negative[3])];
    let bytes = _mm256_packs_epi16(words[0], words[1]);
    // 16 times the even code plus the odd one; each lane has four elements of each register by turns.
    let pairs = _mm256_maddubs_epi16(_mm256_set1_epi16(0x0110), bytes);
    let pairs = _mm256_sub_epi16(_mm256_setzero_si256(), pairs);
    let pairs = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
    _mm_unpacklo_epi16(pairs, _mm_unpackhi_epi64(pairs, pairs))
}

/// The registers of the search through NF4's fifteen thresholds.
///
/// Comparisons give 0 or -1, so the rank is built negative, and the tables are laid out for the low three bits of a
/// negative rank: entry `(8 - rank) % 8`.
#[derive(Clone, Copy)]
struct Nf4Search {
    first: __m256,
    second: [__m256; 2],
    third: __m256,
    fourth: __m256,
}

/// A register whose entry `(8 - rank) % 8` is `of(rank)`.
#[inline]
#[target_feature(enable = "avx2")]
fn by_negative_rank(of: impl Fn(usize) -> f32) -> __m256 {
    let table: [f32; 8] = std::array::from_fn(|i| of((8 - i) % 8));
    // SAFETY: eight floats.
    unsafe { _mm256_loadu_ps(table.as_ptr()) }
}

/// `2 * rank + (y > threshold)`, negated.
#[inline]
#[target_feature(enable = "avx2")]
fn descend(negative_rank: __m256i, y: __m256, threshold: __m256) -> __m256i {
    let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(y, threshold));
    _mm256_add_epi32(_mm256_add_epi32(negative_rank, negative_rank), above)
}

impl Nf4Search {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        let t = &NF4_THRESHOLDS;
        Self {
            first: _mm256_set1_ps(t[7]),
            second: [_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])],
            third: by_negative_rank(|rank| t[4 * (rank % 4) + 1]),
            fourth: by_negative_rank(|rank| t[2 * rank]),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn negative_codes(&self, y: __m256) -> __m256i {
        let first = _mm256_cmp_ps::<_CMP_GT_OQ>(y, self.first);
        let rank = _mm256_castps_si256(first);
        let rank = descend(rank, y, _mm256_blendv_ps(self.second[0], self.second[1], first));
        let rank = descend(rank, y, _mm256_permutevar8x32_ps(self.third, rank));
        descend(rank, y, _mm256_permutevar8x32_ps(self.fourth, rank))
    }
}

/// The registers of the search through FP4's seven thresholds, and the code of each rank.
#[derive(Clone, Copy)]
struct Fp4Search {
    first: __m256,
    second: [__m256; 2],
    third: __m256,
    negative_code: __m256i,
}

impl Fp4Search {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        let t = &FP4_THRESHOLDS;
        let code = by_negative_rank(|rank| -f32::from(FP4_RANK_TO_CODE[rank]));
        Self {
            first: _mm256_set1_ps(t[3]),
            second: [_mm256_set1_ps(t[1]), _mm256_set1_ps(t[5])],
            third: by_negative_rank(|rank| t[2 * (rank % 4)]),
            negative_code: _mm256_cvtps_epi32(code),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn negative_codes(&self, y: __m256) -> __m256i {
        let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), y);
        let first = _mm256_cmp_ps::<_CMP_GT_OQ>(size, self.first);
        let rank = _mm256_castps_si256(first);
        let rank = descend(rank, size, _mm256_blendv_ps(self.second[0], self.second[1], first));
        let rank = descend(rank, size, _mm256_permutevar8x32_ps(self.third, rank));
        let below_zero = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(y, _mm256_setzero_ps()));
        let sign = _mm256_and_si256(below_zero, _mm256_set1_epi32(-8));
        _mm256_add_epi32(_mm256_permutevar8x32_epi32(self.negative_code, rank), sign)
    }
}
