//! AVX-512 BF16: the tile of [`super::avx512`] over words of two bf16, with `vdpbf16ps`.
//!
//! The instruction adds the products of the odd, then of the even elements to the sum, rounds to nearest even and
//! takes subnormal numbers as zero, whatever the mode of the thread.

#![allow(clippy::wildcard_imports)] // the instructions

use super::avx512::{self, NR};
use super::{OUTER, Run};
use half::bf16;
use std::arch::x86_64::*;

/// # Safety
/// AVX-512 F and BF16; lengths as [`super::Kernel::tile`] checks them.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn tile<const R: usize, const W: usize>(runs: &[Run], c: &mut [f32], ldc: usize, add: bool) {
    // SAFETY: the caller checked the lengths of the panels and of the tile.
    unsafe {
        avx512::prefetch::<R, W>(c.as_ptr(), ldc);
        let mut sum = [[_mm512_setzero_ps(); W]; R];
        for run in runs {
            sum = add_run(sum, run);
        }
        avx512::store(&sum, c.as_mut_ptr(), ldc, add);
    }
}

/// # Safety
/// Each step of the run has `MR` words of `a` and `NR` words of `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_run<const R: usize, const W: usize>(mut sum: [[__m512; W]; R], run: &Run) -> [[__m512; W]; R] {
    let (mut a, mut b) = (run.a.as_ptr().cast::<i32>(), run.b.as_ptr().cast::<i32>());
    for _ in 0..run.steps {
        // SAFETY: the caller's promise: this step of `a` and `b` exists.
        unsafe {
            let y: [__m512bh; W] = std::array::from_fn(|half| words(_mm512_loadu_si512(b.add(16 * half).cast())));
            for (r, sum) in sum.iter_mut().enumerate() {
                let x = words(_mm512_set1_epi32(*a.add(r)));
                for (sum, &y) in sum.iter_mut().zip(&y) {
                    *sum = _mm512_dpbf16_ps(*sum, x, y);
                }
            }
        }
        a = a.wrapping_add(run.a_step);
        b = b.wrapping_add(NR);
    }
    sum
}

/// A vector of sixteen words as one of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn words(bits: __m512i) -> __m512bh {
    // SAFETY: vectors of one size, and every pattern of bits is a vector of bf16.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

/// # Safety
/// AVX-512 F, BW, VL and BF16; lengths as [`super::Kernel::outer`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn outer(a: &[bf16], lda: usize, k: usize, width: usize, b: &[f32], c: &mut [f32; OUTER * OUTER]) {
    let mask = ((1u32 << width) - 1) as u16;
    let zip: [i16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 32) as i16);
    let mut sum = [_mm512_setzero_ps(); OUTER];
    // SAFETY: rows `0 .. k` of `a` have `width` elements, to which the loads are masked; `b` has `OUTER` words for each pair
    // of rows; `c` has `OUTER` rows.
    unsafe {
        let zip = _mm512_loadu_si512(zip.as_ptr().cast());
        let (mut row, mut y) = (a.as_ptr().cast::<i16>(), b.as_ptr().cast::<i32>());
        for pair in 0..k.div_ceil(2) {
            let low = _mm256_maskz_loadu_epi16(mask, row);
            let high = _mm256_maskz_loadu_epi16(if 2 * pair + 1 < k { mask } else { 0 }, row.wrapping_add(lda));
            let x = words(_mm512_permutex2var_epi16(_mm512_castsi256_si512(low), zip, _mm512_castsi256_si512(high)));
            for (j, sum) in sum.iter_mut().enumerate() {
                *sum = _mm512_dpbf16_ps(*sum, words(_mm512_set1_epi32(*y.add(j))), x);
            }
            row = row.wrapping_add(2 * lda);
            y = y.wrapping_add(OUTER);
        }
        for (sum, c) in sum.into_iter().zip(c.chunks_exact_mut(OUTER)) {
            _mm512_storeu_ps(c.as_mut_ptr(), sum);
        }
    }
}
