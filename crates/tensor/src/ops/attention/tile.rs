//! Small products whose right operand is a strip of [`LANES`] columns: everything attention multiplies.
//!
//! Rows of queries lie in the lanes. Sᵀ = K Qᵀ, Pᵀ and Oᵀ = Vᵀ Pᵀ then read K and V element by element as they lie in
//! memory (a broadcast each), so nothing but the block of queries is ever transposed or packed.

#[cfg(target_arch = "x86_64")]
mod x86;

use crate::ops::simd::{LANES, Level, level};

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

/// Sizes of a product, at least 1: c is m x n, the sum runs over k; n is a multiple of [`LANES`].
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// c (+)= a b with a stored as m x k.
pub(super) fn product(c: &mut [f32], ldc: usize, accumulate: bool, a: View, b: View, size: Size) {
    Product { ldc, accumulate, a: a.data, row: a.ld, step: 1, b, size }.run(level(), c);
}

/// c (+)= aᵀ b with a stored as k x m.
pub(super) fn product_transposed(c: &mut [f32], ldc: usize, accumulate: bool, a: View, b: View, size: Size) {
    Product { ldc, accumulate, a: a.data, row: 1, step: a.ld, b, size }.run(level(), c);
}

/// A product whose left operand has element (i, l) at `i * row + l * step`. Each element of c adds its terms in order of l.
#[derive(Clone, Copy)]
struct Product<'a> {
    ldc: usize,
    accumulate: bool,
    a: &'a [f32],
    row: usize,
    step: usize,
    b: View<'a>,
    size: Size,
}

impl Product<'_> {
    fn run(self, level: Level, c: &mut [f32]) {
        let Size { m, n, k } = self.size;
        // What the unchecked reads and writes of the instruction sets' loops rely on.
        assert!(m > 0 && k > 0 && n.is_multiple_of(LANES), "a product of no size");
        assert!(self.a.len() > (m - 1) * self.row + (k - 1) * self.step, "the left operand is too short");
        assert!(self.b.data.len() >= (k - 1) * self.b.ld + n, "the right operand is too short");
        assert!(c.len() >= (m - 1) * self.ldc + n, "the result is too short");
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => x86::avx512(c, &self),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::avx2(c, &self),
            _ => self.portable(c),
        }
    }

    fn portable(self, c: &mut [f32]) {
        let Size { m, n, k } = self.size;
        for column in (0..n).step_by(LANES) {
            for i in 0..m {
                let mut sums = [0.0; LANES];
                for l in 0..k {
                    let (x, y) = (self.a[i * self.row + l * self.step], &self.b.data[l * self.b.ld + column..][..LANES]);
                    for (sum, y) in sums.iter_mut().zip(y) {
                        *sum += x * y;
                    }
                }
                for (c, sum) in c[i * self.ldc + column..].iter_mut().zip(sums) {
                    *c = if self.accumulate { *c + sum } else { sum };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn products_equal_the_plain_sums() {
        for available in [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter(|l| *l <= level()) {
            products_of(available);
        }
    }

    fn products_of(level: Level) {
        for (m, n, k) in [(1, 16, 1), (2, 16, 5), (5, 32, 3), (7, 16, 64), (13, 48, 17), (22, 16, 3), (29, 16, 2), (64, 64, 64)] {
            let (lda, ldb, ldc) = (m.max(k) + 3, n + 5, n + 2);
            let random =
                |stream, len: usize| -> Vec<f32> { (0..len as u64).map(|i| Rng::new(7).stream(stream).normal(i)).collect() };
            let (a, b, c) = (random(0, m.max(k) * lda), random(1, k * ldb), random(2, m * ldc));
            for (transposed, accumulate) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut out = c.clone();
                let (row, step) = if transposed { (1, lda) } else { (lda, 1) };
                let b_view = View::new(&b, ldb);
                Product { ldc, accumulate, a: &a, row, step, b: b_view, size: Size { m, n, k } }.run(level, &mut out);
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
