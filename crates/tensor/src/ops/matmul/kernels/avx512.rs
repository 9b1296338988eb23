//! AVX-512: a tile of 14 x 32 (or of its first `R` rows and `16 W` columns) in twenty-eight of the thirty-two registers; broadcasts of `a` are memory operands.

#![allow(clippy::wildcard_imports)] // the instructions

use super::{Run, elements, portable};
use std::arch::x86_64::*;

pub(super) const MR: usize = 14;
pub(super) const NR: usize = 32;
/// Rows of the lower tile: enough sums to hide the latency of two multiply-add units.
pub(super) const FEW: usize = 8;

/// # Safety
/// AVX-512 F; lengths as [`super::Kernel::tile`] checks them.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile<const R: usize, const W: usize>(runs: &[Run], c: &mut [f32], ldc: usize, add: bool) {
    // SAFETY: the caller checked that `a` has `mr` words and `b` `nr` words for each step of each run, and that `c` has
    // `R` rows of `16 W` words, `ldc` apart.
    unsafe {
        prefetch::<R, W>(c.as_ptr(), ldc);
        let mut sum = [[_mm512_setzero_ps(); W]; R];
        for run in runs {
            sum = add_run(sum, run);
        }
        store(&sum, c.as_mut_ptr(), ldc, add);
    }
}

/// # Safety
/// `R` rows of `16 W` words at `c`, `ldc` apart.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn prefetch<const R: usize, const W: usize>(c: *const f32, ldc: usize) {
    for r in 0..R {
        for half in 0..W {
            // SAFETY: the caller's promise.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(c.add(r * ldc + 16 * half).cast()) };
        }
    }
}

/// # Safety
/// `R` rows of `16 W` words at `c`, `ldc` apart.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store<const R: usize, const W: usize>(sum: &[[__m512; W]; R], c: *mut f32, ldc: usize, add: bool) {
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
unsafe fn add_run<const R: usize, const W: usize>(mut sum: [[__m512; W]; R], run: &Run) -> [[__m512; W]; R] {
    let (mut a, mut b) = (run.a.as_ptr(), run.b.as_ptr());
    macro_rules! step {
        () => {{
            // SAFETY: the caller's promise: this step of `a` and `b` exists.
            unsafe {
                let y: [__m512; W] = std::array::from_fn(|half| _mm512_loadu_ps(b.add(16 * half)));
                for (r, sum) in sum.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(r));
                    for (sum, y) in sum.iter_mut().zip(y) {
                        *sum = _mm512_fmadd_ps(x, y, *sum);
                    }
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

/// # Safety
/// AVX-512 F; lengths as [`super::Kernel::transpose`] checks them.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose(src: &[f32], ld: usize, lanes: usize, steps: usize, dst: &mut [f32], width: usize) {
    let blocks = steps / 16 * 16;
    for lane in (0..lanes).step_by(16) {
        let count = usize::min(16, lanes - lane);
        if count != 16 && count != MR {
            portable::transpose(src, ld, lane..lanes, 0..blocks, dst, width);
            break;
        }
        for step in (0..blocks).step_by(16) {
            // SAFETY: `count` rows from `lane` on have words `step .. step + 16`, and the panel these lanes of 16 steps.
            unsafe {
                let (from, to) = (src.as_ptr().add(lane * ld + step), dst.as_mut_ptr().add(step * width + lane));
                if count == 16 { block::<16>(from, ld, to, width) } else { block::<MR>(from, ld, to, width) }
            }
        }
    }
    portable::transpose(src, ld, 0..lanes, blocks..steps, dst, width);
}

/// Sixteen words of `N` rows.
///
/// # Safety
/// `N` rows of sixteen words at `from`, sixteen steps of `N` words at `to`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn block<const N: usize>(from: *const f32, ld: usize, to: *mut f32, width: usize) {
    let mut x = [_mm512_setzero_ps(); 16];
    for (i, x) in x.iter_mut().enumerate() {
        if i < N {
            // SAFETY: the caller's promise.
            *x = unsafe { _mm512_loadu_ps(from.add(i * ld)) };
        }
    }
    // Transposed in groups of two, then four rows, in each quarter of the registers; then the quarters.
    let mut y = x;
    for i in 0..8 {
        (y[2 * i], y[2 * i + 1]) = (_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
    for i in 0..4 {
        for high in 0..2 {
            let (a, b) = (_mm512_castps_pd(y[4 * i + high]), _mm512_castps_pd(y[4 * i + 2 + high]));
            x[4 * i + 2 * high] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[4 * i + 2 * high + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for i in 0..4 {
        let [a, b, c, d] = [x[i], x[4 + i], x[8 + i], x[12 + i]];
        let (low, high) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (low_2, high_2) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
        y[i] = _mm512_shuffle_f32x4::<0x88>(low, low_2);
        y[4 + i] = _mm512_shuffle_f32x4::<0x88>(high, high_2);
        y[8 + i] = _mm512_shuffle_f32x4::<0xdd>(low, low_2);
        y[12 + i] = _mm512_shuffle_f32x4::<0xdd>(high, high_2);
    }
    for (s, y) in y.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.add(s * width);
            if N == 16 { _mm512_storeu_ps(to, y) } else { _mm512_mask_storeu_ps(to, ((1u32 << N) - 1) as u16, y) }
        }
    }
}

elements!("avx512f,avx512bw,avx512dq,avx512vl,avx2");
