//! Small products whose right operand is a strip of [`LANES`] columns: everything attention multiplies.
//!
//! Rows of queries lie in the lanes. Sᵀ = K Qᵀ, Pᵀ and Oᵀ = Vᵀ Pᵀ then read K and V element by element as they lie in
//! memory (a broadcast each), so nothing but the block of queries is ever transposed or packed.
//!
//! Operands are made of 32-bit words: of f32, or of pairs of bf16 that follow each other in the sum ([`Form`]).

#[cfg(target_arch = "x86_64")]
mod x86;

use half::bf16;

use crate::{
    DType,
    ops::simd::{LANES, Level, level, multiplies_pairs},
};

/// What a word of an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// One f32.
    Single,
    /// Two bf16 that follow each other in the sum, the first in the low half. Subnormal ones may count as zero.
    Pair,
}

impl Form {
    /// Pairs for bf16 where the processor multiplies them.
    pub(super) fn of(dtype: DType) -> Self {
        if dtype == DType::Bf16 && multiplies_pairs() { Self::Pair } else { Self::Single }
    }

    /// Words of a sum of `n` products, which may lack the last half.
    pub(super) fn words(self, n: usize) -> usize {
        match self {
            Self::Single => n,
            Self::Pair => n.div_ceil(2),
        }
    }

    /// Products of a word.
    pub(super) fn each(self) -> usize {
        match self {
            Self::Single => 1,
            Self::Pair => 2,
        }
    }

    /// The product of two words.
    fn multiply(self, x: f32, y: f32) -> f32 {
        match self {
            Self::Single => x * y,
            Self::Pair => {
                let halves = |word: f32| [word.to_bits() as u16, (word.to_bits() >> 16) as u16].map(bf16::from_bits);
                let ([x0, x1], [y0, y1]) = (halves(x), halves(y));
                x0.to_f32() * y0.to_f32() + x1.to_f32() * y1.to_f32()
            }
        }
    }
}

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

/// Sizes of a product, at least 1: c is m x n, the sum runs over k words; n is a multiple of [`LANES`].
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// c (+)= a b with a stored as m x k.
pub(super) fn product(form: Form, c: &mut [f32], ldc: usize, accumulate: bool, a: View, b: View, size: Size) {
    Product { form, ldc, accumulate, a: a.data, row: a.ld, step: 1, b, size }.run(level(), c);
}

/// c (+)= aᵀ b with a stored as k x m.
pub(super) fn product_transposed(form: Form, c: &mut [f32], ldc: usize, accumulate: bool, a: View, b: View, size: Size) {
    Product { form, ldc, accumulate, a: a.data, row: 1, step: a.ld, b, size }.run(level(), c);
}

/// A product whose left operand has element (i, l) at `i * row + l * step`. Each element of c adds its terms in order of l.
#[derive(Clone, Copy)]
struct Product<'a> {
    form: Form,
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
            Level::Avx512 if self.form == Form::Pair && multiplies_pairs() => x86::pairs(c, &self),
            _ if self.form == Form::Pair => self.portable(c),
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
                        *sum += self.form.multiply(x, *y);
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

    const FORMS: [Form; 2] = [Form::Single, Form::Pair];

    #[test]
    fn products_equal_the_plain_sums() {
        for available in [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter(|l| *l <= level()) {
            for form in FORMS {
                products_of(available, form);
            }
        }
    }

    /// Random words, and the numbers in them.
    fn words(form: Form, stream: u64, len: usize) -> (Vec<f32>, Vec<f64>) {
        let random: Vec<f32> = (0..(len * form.each()) as u64).map(|i| Rng::new(7).stream(stream).normal(i)).collect();
        if form == Form::Single {
            return (random.clone(), random.into_iter().map(f64::from).collect());
        }
        let halves: Vec<bf16> = random.into_iter().map(bf16::from_f32).collect();
        let word = |pair: &[bf16; 2]| f32::from_bits(u32::from(pair[1].to_bits()) << 16 | u32::from(pair[0].to_bits()));
        (halves.as_chunks().0.iter().map(word).collect(), halves.iter().map(|x| x.to_f64()).collect())
    }

    fn products_of(level: Level, form: Form) {
        for (m, n, k) in [(1, 16, 1), (2, 16, 5), (5, 32, 3), (7, 16, 64), (13, 48, 17), (22, 16, 3), (29, 16, 2), (64, 64, 64)] {
            let (lda, ldb, ldc) = (m.max(k) + 3, n + 5, n + 2);
            let ((a, a_exact), (b, b_exact)) = (words(form, 0, m.max(k) * lda), words(form, 1, k * ldb));
            let (c, _) = words(Form::Single, 2, m * ldc);
            let each = form.each();
            for (transposed, accumulate) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut out = c.clone();
                let (row, step) = if transposed { (1, lda) } else { (lda, 1) };
                let b_view = View::new(&b, ldb);
                Product { form, ldc, accumulate, a: &a, row, step, b: b_view, size: Size { m, n, k } }.run(level, &mut out);
                for i in 0..m {
                    for j in 0..n {
                        let term = |l: usize| {
                            let (a, b) = (if transposed { l / each * lda + i } else { i * lda + l / each }, l / each * ldb + j);
                            a_exact[a * each + l % each] * b_exact[b * each + l % each]
                        };
                        let start = if accumulate { f64::from(c[i * ldc + j]) } else { 0.0 };
                        let exact = start + (0..k * each).map(term).sum::<f64>();
                        let size = start.abs() + (0..k * each).map(|l| term(l).abs()).sum::<f64>();
                        let error = (f64::from(out[i * ldc + j]) - exact).abs();
                        let bound = ((k * each) as f64 + 2.0) * 6e-8 * size;
                        assert!(error <= bound, "{form:?} ({i}, {j}) of {m} x {n} x {k}: off by {error:e}");
                    }
                    assert_eq!(out[i * ldc + n..(i + 1) * ldc], c[i * ldc + n..(i + 1) * ldc], "wrote beyond the row");
                }
            }
        }
    }
}
