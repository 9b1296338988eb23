//! Small products whose right operand is a strip of [`LANES`] columns: everything attention multiplies.
//!
//! Rows of queries lie in the lanes. Sᵀ = K Qᵀ, Pᵀ and Oᵀ = Vᵀ Pᵀ then read K and V element by element as they lie in
//! memory (a broadcast each), so nothing but the block of queries is ever transposed or packed.

use crate::ops::simd::{LANES, Level, level, multiversion};

/// A matrix inside a slice: element (i, j) at `i * ld + j`.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) ld: usize,
}

impl<'a> View<'a> {
    pub(super) fn new(data: &'a [f32], ld: usize) -> Self {
        Self { data, ld }
    }
}

/// Sizes of a product: c is m x n, the sum runs over k; n is a multiple of [`LANES`].
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// c (+)= a b with a stored as m x k.
pub(super) fn product(c: &mut [f32], ldc: usize, accumulate: bool, a: View, b: View, size: Size) {
    let target = Target { ld: ldc, accumulate };
    match level() {
        Level::Avx512 => wide(c, target, a, b, size),
        Level::Avx2 => narrow(c, target, a, b, size),
        Level::Portable => portable(c, target, a, b, size),
    }
}

/// c (+)= aᵀ b with a stored as k x m.
pub(super) fn product_transposed(c: &mut [f32], ldc: usize, accumulate: bool, a: View, b: View, size: Size) {
    let target = Target { ld: ldc, accumulate };
    match level() {
        Level::Avx512 => wide_transposed(c, target, a, b, size),
        Level::Avx2 => narrow_transposed(c, target, a, b, size),
        Level::Portable => portable_transposed(c, target, a, b, size),
    }
}

#[derive(Clone, Copy)]
struct Target {
    ld: usize,
    accumulate: bool,
}

// Rows of accumulators: 12 of one 512-bit register each, or 6 of two 256-bit registers; both fill the multipliers' latency.
multiversion! { fn wide(c: &mut [f32], target: Target, a: View, b: View, size: Size) { panels::<12, true, false>(c, target, a, b, size); } }
multiversion! { fn narrow(c: &mut [f32], target: Target, a: View, b: View, size: Size) { panels::<6, true, false>(c, target, a, b, size); } }
multiversion! { fn wide_transposed(c: &mut [f32], target: Target, a: View, b: View, size: Size) { panels::<12, true, true>(c, target, a, b, size); } }
multiversion! { fn narrow_transposed(c: &mut [f32], target: Target, a: View, b: View, size: Size) { panels::<6, true, true>(c, target, a, b, size); } }

fn portable(c: &mut [f32], target: Target, a: View, b: View, size: Size) {
    panels::<2, false, false>(c, target, a, b, size);
}

fn portable_transposed(c: &mut [f32], target: Target, a: View, b: View, size: Size) {
    panels::<2, false, true>(c, target, a, b, size);
}

#[inline(always)]
fn panels<const ROWS: usize, const FMA: bool, const TRANSPOSED: bool>(
    c: &mut [f32],
    target: Target,
    a: View,
    b: View,
    size: Size,
) {
    for column in (0..size.n).step_by(LANES) {
        let b = View::new(&b.data[column..], b.ld);
        let mut row = 0;
        while row + ROWS <= size.m {
            micro::<ROWS, FMA, TRANSPOSED>(&mut c[row * target.ld + column..], target, a, row, b, size.k);
            row += ROWS;
        }
        if row + 4 <= size.m {
            micro::<4, FMA, TRANSPOSED>(&mut c[row * target.ld + column..], target, a, row, b, size.k);
            row += 4;
        }
        if row + 4 <= size.m {
            micro::<4, FMA, TRANSPOSED>(&mut c[row * target.ld + column..], target, a, row, b, size.k);
            row += 4;
        }
        if row + 2 <= size.m {
            micro::<2, FMA, TRANSPOSED>(&mut c[row * target.ld + column..], target, a, row, b, size.k);
            row += 2;
        }
        if row < size.m {
            micro::<1, FMA, TRANSPOSED>(&mut c[row * target.ld + column..], target, a, row, b, size.k);
        }
    }
}

/// `ROWS` x [`LANES`] of the product, kept in registers over the whole sum: each element adds its terms in order of k.
#[inline(always)]
fn micro<const ROWS: usize, const FMA: bool, const TRANSPOSED: bool>(
    c: &mut [f32],
    target: Target,
    a: View,
    row: usize,
    b: View,
    k: usize,
) {
    let mut sums = [[0.0f32; LANES]; ROWS];
    if TRANSPOSED {
        for i in 0..k {
            let x: &[f32; ROWS] = first(&a.data[i * a.ld + row..]);
            step::<ROWS, FMA>(&mut sums, *x, first(&b.data[i * b.ld..]));
        }
    } else {
        let rows: [&[f32]; ROWS] = std::array::from_fn(|r| &a.data[(row + r) * a.ld..][..k]);
        for i in 0..k {
            step::<ROWS, FMA>(&mut sums, std::array::from_fn(|r| rows[r][i]), first(&b.data[i * b.ld..]));
        }
    }
    for (r, sum) in sums.iter().enumerate() {
        let c: &mut [f32] = &mut c[r * target.ld..][..LANES];
        if target.accumulate {
            for lane in 0..LANES {
                c[lane] += sum[lane];
            }
        } else {
            c.copy_from_slice(sum);
        }
    }
}

#[inline(always)]
fn step<const ROWS: usize, const FMA: bool>(sums: &mut [[f32; LANES]; ROWS], x: [f32; ROWS], y: &[f32; LANES]) {
    for r in 0..ROWS {
        for lane in 0..LANES {
            sums[r][lane] = if FMA { x[r].mul_add(y[lane], sums[r][lane]) } else { x[r] * y[lane] + sums[r][lane] };
        }
    }
}

/// The first `N` elements; a slice that is too short is a bug of the caller.
#[inline(always)]
fn first<const N: usize>(slice: &[f32]) -> &[f32; N] {
    match slice.first_chunk() {
        Some(chunk) => chunk,
        None => unreachable!("a panel of a product reaches beyond its slice"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn products_equal_the_plain_sums() {
        for (m, n, k) in [(1, 16, 1), (2, 16, 5), (5, 32, 3), (7, 16, 64), (13, 48, 17), (29, 16, 2), (64, 64, 64)] {
            let (lda, ldb, ldc) = (m.max(k) + 3, n + 5, n + 2);
            let random =
                |stream, len: usize| -> Vec<f32> { (0..len as u64).map(|i| Rng::new(7).stream(stream).normal(i)).collect() };
            let (a, b, c) = (random(0, m.max(k) * lda), random(1, k * ldb), random(2, m * ldc));
            for (transposed, accumulate) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut out = c.clone();
                let run = if transposed { product_transposed } else { product };
                run(&mut out, ldc, accumulate, View::new(&a, lda), View::new(&b, ldb), Size { m, n, k });
                for i in 0..m {
                    for j in 0..n {
                        let term = |l: usize| {
                            f64::from(if transposed { a[l * lda + i] } else { a[i * lda + l] }) * f64::from(b[l * ldb + j])
                        };
                        let start = if accumulate { f64::from(c[i * ldc + j]) } else { 0.0 };
                        let exact = start + (0..k).map(term).sum::<f64>();
                        let size = start.abs() + (0..k).map(|l| term(l).abs()).sum::<f64>();
                        let error = (f64::from(out[i * ldc + j]) - exact).abs();
                        assert!(error <= (k as f64 + 2.0) * 6e-8 * size, "({i}, {j}) of {m} x {n} x {k}: off by {error:e}");
                    }
                    assert_eq!(out[i * ldc + n..(i + 1) * ldc], c[i * ldc + n..(i + 1) * ldc], "wrote beyond the row");
                }
            }
        }
    }
}
