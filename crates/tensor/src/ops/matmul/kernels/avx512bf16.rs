//! AVX-512 BF16: the tile of [`super::avx512`] over words of two bf16, with `vdpbf16ps`.
//!
//! The instruction adds the products of the odd, then of the even elements to the sum, rounds to nearest even and
//! takes subnormal numbers as zero, whatever the mode of the thread.

#![allow(clippy::wildcard_imports)] // the instructions

use super::Run;
use super::avx512::{self, MR, NR};
use std::arch::x86_64::*;

/// # Safety
/// AVX-512 F and BF16; lengths as [`super::Kernel::tile`] checks them.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn tile(runs: &[Run], c: &mut [f32], ldc: usize, add: bool) {
    // SAFETY: the caller checked the lengths of the panels and of the tile.
    unsafe {
        avx512::prefetch(c.as_ptr(), ldc);
        let mut sum = [[_mm512_setzero_ps(); 2]; MR];
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
unsafe fn add_run(mut sum: [[__m512; 2]; MR], run: &Run) -> [[__m512; 2]; MR] {
    let (mut a, mut b) = (run.a.as_ptr().cast::<i32>(), run.b.as_ptr().cast::<i32>());
    for _ in 0..run.steps {
        // SAFETY: the caller's promise: this step of `a` and `b` exists. Casts between vectors keep the bits, and
        // every pattern of bits is a vector of bf16.
        unsafe {
            let b0 = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.cast()));
            let b1 = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(16).cast()));
            for (r, sum) in sum.iter_mut().enumerate() {
                let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*a.add(r)));
                sum[0] = _mm512_dpbf16_ps(sum[0], x, b0);
                sum[1] = _mm512_dpbf16_ps(sum[1], x, b1);
            }
        }
        a = a.wrapping_add(run.a_step);
        b = b.wrapping_add(NR);
    }
    sum
}
