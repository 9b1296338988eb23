//! The products on AVX2 and AVX-512: sums of a few rows by 16 columns stay in registers.
#![allow(unsafe_code)] // pointers into slices whose lengths `Product::run` has checked, and detected instructions
#![allow(clippy::wildcard_imports)] // the instructions

use std::arch::x86_64::*;

use super::{LANES, Product};

/// Rows of sums, of two 256-bit registers each: 12 of 16 registers.
const AVX2_ROWS: usize = 6;

/// Rows of sums, of one 512-bit register each: enough to hide the latency of two multiply-add units.
const AVX512_ROWS: usize = 12;

/// The same for pairs of bf16: a power of two, as the sizes of heads and tiles mostly are.
const PAIRS_ROWS: usize = 16;

macro_rules! product {
    ($(#[$meta:meta])* $name:ident, $features:literal, $inner:ident, $rows:ident, $micro:ident, [$($rest:literal)*]) => {
        $(#[$meta])*
        pub(super) fn $name(c: &mut [f32], product: &Product) {
            // SAFETY: `Product::run` calls this at a level that has these instructions, and has checked the lengths.
            unsafe { $inner(c.as_mut_ptr(), product) }
        }

        #[target_feature(enable = $features)]
        unsafe fn $inner(c: *mut f32, product: &Product) {
            for column in (0..product.size.n).step_by(LANES) {
                let mut row = 0;
                // SAFETY: rows `row .. row + ROWS` of c and a, and the column of b, exist.
                unsafe {
                    while row + $rows <= product.size.m {
                        $micro::<$rows>(c, product, row, column);
                        row += $rows;
                    }
                    match product.size.m - row {
                        $($rest => $micro::<$rest>(c, product, row, column),)*
                        _ => {}
                    }
                }
            }
        }
    };
}
product!(
    /// c (+)= a b with 256-bit registers.
    avx2, "avx2,fma", avx2_panels, AVX2_ROWS, avx2_micro, [1 2 3 4 5]
);
product!(
    /// c (+)= a b with 512-bit registers.
    avx512, "avx512f,avx2,fma", avx512_panels, AVX512_ROWS, avx512_micro, [1 2 3 4 5 6 7 8 9 10 11]
);

product!(
    /// c (+)= a b over pairs of bf16.
    pairs, "avx512f,avx512bf16,avx2,fma", pairs_panels, PAIRS_ROWS, pairs_micro, [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]
);

/// # Safety
/// Rows `row .. row + ROWS` and columns `column .. column + 16` of the product exist in its operands and in `c`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_micro<const ROWS: usize>(c: *mut f32, product: &Product, row: usize, column: usize) {
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        let a = product.a.as_ptr().add(row * product.row);
        let rows: [*const f32; ROWS] = std::array::from_fn(|r| a.add(r * product.row));
        let mut b = product.b.data.as_ptr().add(column);
        let mut at = 0;
        for _ in 0..product.size.k {
            let (low, high) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
            for (sum, row) in sums.iter_mut().zip(rows) {
                let x = _mm256_broadcast_ss(&*row.add(at));
                sum[0] = _mm256_fmadd_ps(x, low, sum[0]);
                sum[1] = _mm256_fmadd_ps(x, high, sum[1]);
            }
            at += product.step;
            b = b.wrapping_add(product.b.ld);
        }
        for (r, sum) in sums.into_iter().enumerate() {
            let out = c.add((row + r) * product.ldc + column);
            for (half, sum) in sum.into_iter().enumerate() {
                let out = out.add(8 * half);
                let sum = if product.accumulate { _mm256_add_ps(_mm256_loadu_ps(out), sum) } else { sum };
                _mm256_storeu_ps(out, sum);
            }
        }
    }
}

/// # Safety
/// As [`avx2_micro`].
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn avx512_micro<const ROWS: usize>(c: *mut f32, product: &Product, row: usize, column: usize) {
    let mut sums = [_mm512_setzero_ps(); ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        let a = product.a.as_ptr().add(row * product.row);
        let mut b = product.b.data.as_ptr().add(column);
        let mut at = 0;
        for _ in 0..product.size.k {
            let y = _mm512_loadu_ps(b);
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(r * product.row + at)), y, *sum);
            }
            at += product.step;
            b = b.wrapping_add(product.b.ld);
        }
        for (r, sum) in sums.into_iter().enumerate() {
            let out = c.add((row + r) * product.ldc + column);
            let sum = if product.accumulate { _mm512_add_ps(_mm512_loadu_ps(out), sum) } else { sum };
            _mm512_storeu_ps(out, sum);
        }
    }
}

/// # Safety
/// As [`avx2_micro`].
#[inline]
#[target_feature(enable = "avx512f,avx512bf16,avx2,fma")]
unsafe fn pairs_micro<const ROWS: usize>(c: *mut f32, product: &Product, row: usize, column: usize) {
    let mut sums = [_mm512_setzero_ps(); ROWS];
    // SAFETY: the caller's promise. Casts between vectors keep the bits, and every pattern of bits is a vector of bf16.
    unsafe {
        let a = product.a.as_ptr().add(row * product.row).cast::<i32>();
        let mut b = product.b.data.as_ptr().add(column);
        let mut at = 0;
        for _ in 0..product.size.k {
            let y = std::mem::transmute::<__m512, __m512bh>(_mm512_loadu_ps(b));
            for (r, sum) in sums.iter_mut().enumerate() {
                let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*a.add(r * product.row + at)));
                *sum = _mm512_dpbf16_ps(*sum, x, y);
            }
            at += product.step;
            b = b.wrapping_add(product.b.ld);
        }
        for (r, sum) in sums.into_iter().enumerate() {
            let out = c.add((row + r) * product.ldc + column);
            let sum = if product.accumulate { _mm512_add_ps(_mm512_loadu_ps(out), sum) } else { sum };
            _mm512_storeu_ps(out, sum);
        }
    }
}
