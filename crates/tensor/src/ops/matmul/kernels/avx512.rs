//! AVX-512: a tile of 14 x 32 in twenty-eight of the thirty-two registers; broadcasts of `a` are memory operands.

#![allow(clippy::wildcard_imports)] // the instructions

use super::{Run, elements};
use std::arch::x86_64::*;

pub(super) const MR: usize = 14;
pub(super) const NR: usize = 32;

/// # Safety
/// AVX-512 F; lengths as [`super::Kernel::tile`] checks them.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile(runs: &[Run], c: &mut [f32], ldc: usize, add: bool) {
    // SAFETY: the caller checked that `a` has `mr` words and `b` `nr` words for each step of each run, and that `c` has
    // `mr` rows of `nr` words, `ldc` apart.
    unsafe {
        prefetch(c.as_ptr(), ldc);
        let mut sum = [[_mm512_setzero_ps(); 2]; MR];
        for run in runs {
            sum = add_run(sum, run);
        }
        store(&sum, c.as_mut_ptr(), ldc, add);
    }
}

/// # Safety
/// `MR` rows of `NR` words at `c`, `ldc` apart.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn prefetch(c: *const f32, ldc: usize) {
    for r in 0..MR {
        // SAFETY: the caller's promise.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(c.add(r * ldc).cast());
            _mm_prefetch::<_MM_HINT_T0>(c.add(r * ldc + 16).cast());
        }
    }
}

/// # Safety
/// `MR` rows of `NR` words at `c`, `ldc` apart.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store(sum: &[[__m512; 2]; MR], c: *mut f32, ldc: usize, add: bool) {
    for (r, sum) in sum.iter().enumerate() {
        for (half, &sum) in sum.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let out = c.add(r * ldc + 16 * half);
                let sum = if add { _mm512_add_ps(_mm512_loadu_ps(out), sum) } else { sum };
                _mm512_storeu_ps(out, sum);
            }
        }
    }
}

/// # Safety
/// Each step of the run has `MR` words of `a` and `NR` words of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_run(mut sum: [[__m512; 2]; MR], run: &Run) -> [[__m512; 2]; MR] {
    let (mut a, mut b) = (run.a.as_ptr(), run.b.as_ptr());
    macro_rules! step {
        () => {{
            // SAFETY: the caller's promise: this step of `a` and `b` exists.
            unsafe {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for (r, sum) in sum.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(r));
                    sum[0] = _mm512_fmadd_ps(x, b0, sum[0]);
                    sum[1] = _mm512_fmadd_ps(x, b1, sum[1]);
                }
            }
            a = a.wrapping_add(run.a_step);
            b = b.wrapping_add(NR);
        }};
    }
    for _ in 0..run.steps / 2 {
        step!();
        step!();
    }
    for _ in 0..run.steps % 2 {
        step!();
    }
    sum
}

elements!("avx512f,avx512bw,avx512dq,avx512vl,avx2");
