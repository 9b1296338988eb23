//! Stored elements to f32 or bf16, in parallel over pieces of a tensor.
//!
//! GGUF's quantised types decode as q · d (+ m) in f32 and are rounded to bf16, the element type of the 16-bit model that
//! they stand for: so a quantised GGUF file and a bf16 checkpoint exported from it hold the same weights.

use half::{bf16, f16};
use rayon::prelude::*;

use super::StoredType;

/// What stored elements are decoded to.
pub(crate) trait Element: Copy + Send + 'static {
    fn from_f32(value: f32) -> Self;
    fn from_bf16(value: bf16) -> Self;
}

impl Element for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_bf16(value: bf16) -> Self {
        value.to_f32()
    }
}

impl Element for bf16 {
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn from_bf16(value: bf16) -> Self {
        value
    }
}

/// Elements a task decodes: a whole number of blocks, and enough to outweigh starting the task.
const PIECE: usize = 1 << 14;

/// Decodes `bytes` of type `from` into `out`; their lengths match.
pub(crate) fn decode<T: Element>(from: StoredType, bytes: &[u8], out: &mut [T]) {
    let piece_bytes = PIECE / from.block() * from.block_bytes();
    out.par_chunks_mut(PIECE).zip(bytes.par_chunks(piece_bytes)).for_each(|(out, bytes)| piece(from, bytes, out));
}

/// Decodes rows of `row` elements, `out`'s i-th row from the `source(i)`-th row of `bytes`.
pub(crate) fn decode_rows<T: Element>(
    from: StoredType,
    bytes: &[u8],
    row: usize,
    out: &mut [T],
    source: impl Fn(usize) -> usize + Sync,
) {
    let row_bytes = row / from.block() * from.block_bytes();
    let rows = PIECE.div_ceil(row);
    out.par_chunks_mut(rows * row).enumerate().for_each(|(i, out)| {
        for (j, out) in out.chunks_exact_mut(row).enumerate() {
            let start = source(i * rows + j) * row_bytes;
            piece(from, &bytes[start..start + row_bytes], out);
        }
    });
}

fn piece<T: Element>(from: StoredType, bytes: &[u8], out: &mut [T]) {
    match from {
        StoredType::F64 => each(bytes, out, |b| T::from_f32(f64::from_le_bytes(b) as f32)),
        StoredType::F32 => each(bytes, out, |b| T::from_f32(f32::from_le_bytes(b))),
        StoredType::F16 => each(bytes, out, |b| T::from_f32(f16::from_le_bytes(b).to_f32())),
        StoredType::BF16 => each(bytes, out, |b| T::from_bf16(bf16::from_le_bytes(b))),
        StoredType::Q4_0 => blocks::<T, 18>(bytes, out, q4_0),
        StoredType::Q4_1 => blocks::<T, 20>(bytes, out, q4_1),
        StoredType::Q8_0 => blocks::<T, 34>(bytes, out, q8_0),
        // Callers ask for floats only.
        _ => unreachable!("{from} is no float type"),
    }
}

#[inline(always)]
fn each<T, const N: usize>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (out, bytes) in out.iter_mut().zip(elements) {
        *out = convert(*bytes);
    }
}

#[inline(always)]
fn blocks<T: Element, const N: usize>(bytes: &[u8], out: &mut [T], block: impl Fn(&[u8; N], &mut [f32; 32])) {
    let (stored, _) = bytes.as_chunks::<N>();
    let (decoded, _) = out.as_chunks_mut::<32>();
    let mut values = [0.0; 32];
    for (stored, decoded) in stored.iter().zip(decoded) {
        block(stored, &mut values);
        for (out, value) in decoded.iter_mut().zip(values) {
            *out = T::from_bf16(round(value));
        }
    }
}

/// `bf16::from_f32` without a branch, so that the loop above vectorises: to nearest, ties to even, and NaN stays NaN.
#[inline(always)]
fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded })
}

#[inline(always)]
fn half_at<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Elements 0 to 15 are the low nibbles, 16 to 31 the high ones.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for j in 0..16 {
        let byte = block[2 + j];
        out[j] = (i32::from(byte & 15) - 8) as f32 * d;
        out[j + 16] = (i32::from(byte >> 4) - 8) as f32 * d;
    }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for j in 0..16 {
        let byte = block[4 + j];
        out[j] = i32::from(byte & 15) as f32 * d + m;
        out[j + 16] = i32::from(byte >> 4) as f32 * d + m;
    }
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for j in 0..32 {
        out[j] = i32::from(block[2 + j] as i8) as f32 * d;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The value of one element by the format's definition, in f64: exact up to one rounding to f32 (two with `m`).
    fn by_definition(from: StoredType, block: &[u8], i: usize) -> f32 {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
        let nibble = |at: usize| f64::from(block[at + i % 16] >> (4 * (i / 16)) & 15);
        match from {
            StoredType::Q4_0 => ((nibble(2) - 8.0) * half(0)) as f32,
            StoredType::Q4_1 => (nibble(4) * half(0)) as f32 + half(2) as f32,
            _ => (f64::from(block[2 + i] as i8) * half(0)) as f32,
        }
    }

    fn quantised() -> impl Strategy<Value = (StoredType, Vec<u8>)> {
        const TYPES: [StoredType; 3] = [StoredType::Q4_0, StoredType::Q4_1, StoredType::Q8_0];
        (proptest::sample::select(&TYPES[..]), 1..9usize).prop_flat_map(|(from, blocks)| {
            let bytes = proptest::collection::vec(any::<u8>(), blocks * from.block_bytes());
            (Just(from), bytes)
        })
    }

    proptest! {
        #[test]
        fn quantised_blocks_decode_to_their_definition_rounded_to_bf16((from, bytes) in quantised()) {
            let elements = bytes.len() / from.block_bytes() * 32;
            let (mut wide, mut narrow) = (vec![0f32; elements], vec![bf16::ZERO; elements]);
            decode(from, &bytes, &mut wide);
            decode(from, &bytes, &mut narrow);
            for (b, block) in bytes.chunks_exact(from.block_bytes()).enumerate() {
                for i in 0..32 {
                    let want = bf16::from_f32(by_definition(from, block, i));
                    let (wide, narrow) = (wide[32 * b + i], narrow[32 * b + i]);
                    prop_assert!(want.is_nan() && narrow.is_nan() || want == narrow, "{want} {narrow}");
                    prop_assert!(want.is_nan() && wide.is_nan() || want.to_f32() == wide);
                }
            }
        }

        #[test]
        fn branchless_rounding_is_the_library_rounding(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(round(value).to_bits(), bf16::from_f32(value).to_bits());
        }

        #[test]
        fn rows_in_another_order_are_the_same_rows(rows in 1..40usize, row in 1..7usize, shift in 0..40usize) {
            let bytes: Vec<u8> = (0..rows * row).flat_map(|i| (i as f32).to_le_bytes()).collect();
            let mut out = vec![0f32; rows * row];
            decode_rows(StoredType::F32, &bytes, row, &mut out, |i| (i + shift) % rows);
            for (i, &value) in out.iter().enumerate() {
                prop_assert_eq!(value, ((i / row + shift) % rows * row + i % row) as f32);
            }
        }
    }

    #[test]
    fn pieces_join_without_a_seam() {
        let n = 2 * PIECE + 5;
        let bytes: Vec<u8> = (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let mut out = vec![0f32; n];
        decode(StoredType::F32, &bytes, &mut out);
        assert!(out.iter().enumerate().all(|(i, &x)| x == i as f32));
    }
}
