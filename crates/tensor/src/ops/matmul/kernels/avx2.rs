//! AVX2 and FMA: a tile of 6 x 16 in twelve of the sixteen registers.
//!
//! A step is two loads of `b`, six broadcasts of `a` and twelve multiply-adds: the two multiply-add units are the limit.

#![allow(clippy::wildcard_imports)] // the instructions

use super::{Run, elements, portable};
use std::arch::x86_64::*;

pub(super) const MR: usize = 6;
pub(super) const NR: usize = 16;

/// The sums of a tile, kept in registers over all runs, then written.
///
/// # Safety
/// AVX2 and FMA; lengths as [`super::Kernel::tile`] checks them.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile(runs: &[Run], c: &mut [f32], ldc: usize, add: bool) {
    // SAFETY: the caller checked that `mr` rows of `nr` words, `ldc` apart, lie in `c`; prefetching reads nothing.
    unsafe {
        for r in 0..MR {
            _mm_prefetch::<_MM_HINT_T0>(c.as_ptr().add(r * ldc).cast());
            _mm_prefetch::<_MM_HINT_T0>(c.as_ptr().add(r * ldc + NR - 1).cast());
        }
    }
    let mut sum = [[_mm256_setzero_ps(); 2]; MR];
    for run in runs {
        let (mut a, a_step) = (run.a.as_ptr(), run.a_step);
        let (mut b, mut ahead) = (run.b.as_ptr(), run.ahead.as_ptr());
        macro_rules! step {
            ($s:expr) => {{
                // SAFETY: the caller checked that this step of `a`, `mr` words, and of `b`, `nr` words, exists.
                unsafe {
                    let (b0, b1) = (_mm256_loadu_ps(b.add($s * NR)), _mm256_loadu_ps(b.add($s * NR + 8)));
                    for (r, sum) in sum.iter_mut().enumerate() {
                        let x = _mm256_broadcast_ss(&*a.add(r));
                        sum[0] = _mm256_fmadd_ps(x, b0, sum[0]);
                        sum[1] = _mm256_fmadd_ps(x, b1, sum[1]);
                    }
                }
                a = a.wrapping_add(a_step);
            }};
        }
        for _ in 0..run.steps / 8 {
            _mm_prefetch::<_MM_HINT_T1>(ahead.cast()); // reads nothing, wherever it points
            ahead = ahead.wrapping_add(16);
            step!(0);
            step!(1);
            step!(2);
            step!(3);
            step!(4);
            step!(5);
            step!(6);
            step!(7);
            b = b.wrapping_add(8 * NR);
        }
        for _ in 0..run.steps % 8 {
            step!(0);
            b = b.wrapping_add(NR);
        }
    }
    for (r, sum) in sum.iter().enumerate() {
        for (half, &sum) in sum.iter().enumerate() {
            // SAFETY: row `r`, words `8 half .. 8 half + 8` of the tile, which the caller checked.
            unsafe {
                let out = c.as_mut_ptr().add(r * ldc + 8 * half);
                let sum = if add { _mm256_add_ps(_mm256_loadu_ps(out), sum) } else { sum };
                _mm256_storeu_ps(out, sum);
            }
        }
    }
}

/// # Safety
/// AVX2; lengths as [`super::Kernel::transpose`] checks them.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transpose(src: &[f32], ld: usize, lanes: usize, steps: usize, dst: &mut [f32], width: usize) {
    let blocks = steps / 8 * 8;
    let mut lane = 0;
    while lane < lanes {
        let count = match lanes - lane {
            8.. => 8,
            6.. => 6,
            4.. => 4,
            _ => break,
        };
        for s in (0..blocks).step_by(8) {
            // SAFETY: rows `lane .. lane + count` have words `s .. s + 8`, and the panel has these lanes in 8 steps.
            unsafe {
                let (from, to) = (src.as_ptr().add(lane * ld + s), dst.as_mut_ptr().add(s * width + lane));
                match count {
                    8 => block::<8>(from, ld, to, width),
                    6 => block::<6>(from, ld, to, width),
                    _ => block::<4>(from, ld, to, width),
                }
            }
        }
        lane += count;
    }
    portable::transpose(src, ld, lane..lanes, 0..blocks, dst, width);
    portable::transpose(src, ld, 0..lanes, blocks..steps, dst, width);
}

/// Eight words of `N` (4, 6 or 8) rows become `N` words of eight steps.
///
/// # Safety
/// `N` rows of eight words at `from`, eight steps of `N` words at `to`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn block<const N: usize>(from: *const f32, ld: usize, to: *mut f32, width: usize) {
    let mut rows = [_mm256_setzero_ps(); 8];
    for (i, row) in rows.iter_mut().enumerate().take(N) {
        // SAFETY: the caller's promise.
        *row = unsafe { _mm256_loadu_ps(from.add(i * ld)) };
    }
    let mut pairs = rows;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for high in 0..2 {
        let p = 4 * high;
        rows[p] = _mm256_shuffle_ps::<0x44>(pairs[p], pairs[p + 2]);
        rows[p + 1] = _mm256_shuffle_ps::<0xee>(pairs[p], pairs[p + 2]);
        rows[p + 2] = _mm256_shuffle_ps::<0x44>(pairs[p + 1], pairs[p + 3]);
        rows[p + 3] = _mm256_shuffle_ps::<0xee>(pairs[p + 1], pairs[p + 3]);
    }
    for s in 0..4 {
        let first = _mm256_permute2f128_ps::<0x20>(rows[s], rows[s + 4]);
        let second = _mm256_permute2f128_ps::<0x31>(rows[s], rows[s + 4]);
        // SAFETY: the caller's promise.
        unsafe {
            store::<N>(to.add(s * width), first);
            store::<N>(to.add((s + 4) * width), second);
        }
    }
}

/// Stores the first `N` (4, 6 or 8) words.
///
/// # Safety
/// `N` words at `to`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<const N: usize>(to: *mut f32, values: __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        if N == 8 {
            _mm256_storeu_ps(to, values);
        } else {
            _mm_storeu_ps(to, _mm256_castps256_ps128(values));
            if N == 6 {
                let high = _mm_castps_pd(_mm256_extractf128_ps::<1>(values));
                _mm_store_sd(to.add(4).cast(), high);
            }
        }
    }
}

/// # Safety
/// AVX2 and FMA; slices of one length.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sum = [_mm256_setzero_ps(); 4];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<32>(), y.as_chunks::<32>());
    for (x, y) in x.iter().zip(y) {
        for (i, sum) in sum.iter_mut().enumerate() {
            // SAFETY: eight of the chunk's 32 words, from word `8 i` on.
            unsafe {
                let x = _mm256_loadu_ps(x.as_ptr().add(8 * i));
                let y = _mm256_loadu_ps(y.as_ptr().add(8 * i));
                *sum = _mm256_fmadd_ps(x, y, *sum);
            }
        }
    }
    let sum = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
    let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    let sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
    let rest: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
    _mm_cvtss_f32(sum) + rest
}

elements!("avx2");
