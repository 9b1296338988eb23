//! `aᵀ b` over many rows, with few columns of `b`: the gradients of low-rank adapters.
//!
//! Six (a tile's rows) neighbouring columns of `a` are what a packed panel's step holds, so `a` is read where it lies; `b`
//! with as many columns as a tile is a panel already. Packing `a` would take as long as multiplying it.

use super::kernels::{Kernel, Run};
use super::pack::{Packer, Piece};
use super::scratch::{self, Role};
use super::tiles::add;
use super::{Operand, Output, Precision, Segment, Source, each_chunk, gemm};

/// Rows of `a` and `b` taken at a time: their part of a panel stays in the first-level cache.
const ROWS: usize = 128;
/// Columns of `a` of one task, about.
const TASK: usize = 96;
/// Most columns of `b`.
const MOST_COLUMNS: usize = 64;

/// `c += scale aᵀ b`, with `a` [k, m] and `b` [k, n]; or its transpose, `c` [n, m].
pub(crate) struct Outer<'a> {
    pub(crate) c: &'a mut [f32],
    pub(crate) a: Source<'a>,
    pub(crate) b: Source<'a>,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) scale: f32,
    pub(crate) transposed: bool,
}

/// Adds each of the products.
pub(crate) fn add_outer(products: &mut [Outer], precision: Precision) {
    add_outer_with(Kernel::best(precision), products, precision);
}

/// [`add_outer`] on a given instruction set, where `a` is read in place.
fn add_outer_with(kernel: Kernel, products: &mut [Outer], precision: Precision) {
    let narrow = |product: &Outer| product.n <= MOST_COLUMNS && product.k > 0;
    let plain = |product: &Outer| matches!(product.a, Source::F32 { .. });
    if kernel.pair() == 1 && precision == Precision::F32 && products.iter().all(|p| narrow(p) && plain(p)) {
        in_place(products, kernel);
    } else {
        for product in products {
            product.by_gemm(precision);
        }
    }
}

impl Outer<'_> {
    fn by_gemm(&mut self, precision: Precision) {
        let (left, right) = (Operand::transpose(self.a), Operand::new(self.b));
        let (m, n, a, b) = if self.transposed {
            (self.n, self.m, Operand::transpose(self.b), Operand::new(self.a))
        } else {
            (self.m, self.n, left, right)
        };
        gemm(Output::F32(self.c), true, m, n, &[Segment { a, b, k: self.k, scale: self.scale }], None, precision);
    }

    /// Columns of the panels of `b`.
    fn columns(&self, kernel: Kernel) -> usize {
        self.n.next_multiple_of(kernel.nr())
    }

    /// c += scale * sums [m, columns], or its transpose.
    fn add(&mut self, sums: &[f32], columns: usize) {
        if self.transposed {
            // A few columns at a time: their sums stay in the first-level cache.
            for (i, sums) in sums.chunks(64 * columns).enumerate() {
                for (j, row) in self.c.chunks_exact_mut(self.m).enumerate() {
                    for (c, sums) in row[64 * i..].iter_mut().zip(sums.chunks_exact(columns)) {
                        *c += self.scale * sums[j];
                    }
                }
            }
        } else {
            for (row, sums) in self.c.chunks_exact_mut(self.n).zip(sums.chunks_exact(columns)) {
                for (c, sum) in row.iter_mut().zip(sums) {
                    *c += self.scale * sum;
                }
            }
        }
    }
}

/// Sums of all products into one buffer, tasks over columns of `a`; then added to their results.
fn in_place(products: &mut [Outer], kernel: Kernel) {
    let b_words: usize = products.iter().map(|product| product.columns(kernel) * product.k).sum();
    let sum_words: usize = products.iter().map(|product| product.columns(kernel) * product.m).sum();
    scratch::with(Role::B, b_words, |b| {
        scratch::with(Role::Stage, sum_words, |sums| {
            let (mut b_rest, mut rest) = (&mut *b, &mut *sums);
            let mut tasks = Vec::new();
            for product in products.iter() {
                let columns = product.columns(kernel);
                let b = b_rest.split_off_mut(..columns * product.k).unwrap_or_default();
                let sums = rest.split_off_mut(..columns * product.m).unwrap_or_default();
                let b = pack(product, kernel, b);
                let task = TASK.next_multiple_of(kernel.mr());
                for (i, sums) in sums.chunks_mut(task * columns).enumerate() {
                    tasks.push((product, b, i * task, sums));
                }
            }
            each_chunk(&mut tasks, 1, true, |_, task| {
                let [(product, b, first, sums)] = task else { return };
                task_sums(product, kernel, b, *first, sums);
            });
            let mut rest = &*sums;
            for product in products.iter_mut() {
                let columns = product.columns(kernel);
                let sums = rest.split_off(..columns * product.m).unwrap_or_default();
                product.add(sums, columns);
            }
        });
    });
}

/// The panels of `b`: `b` itself where its rows are steps.
fn pack<'b>(product: &'b Outer, kernel: Kernel, panels: &'b mut [f32]) -> &'b [f32] {
    match product.b {
        Source::F32 { data, ld } if ld == kernel.nr() && product.n == ld => data,
        source => {
            let piece = Piece { operand: Operand::new(source), scale: 1.0, k: 0..product.k, first: 0, steps: product.k };
            Packer::of_operand(kernel, Precision::F32, true, product.n).pack_piece(&piece, 0, product.k, panels);
            panels
        }
    }
}

/// Sums [columns of a, columns of b] for columns of `a` from `first` on.
fn task_sums(product: &Outer, kernel: Kernel, b: &[f32], first: usize, sums: &mut [f32]) {
    let Source::F32 { data, ld } = product.a else { return };
    let (mr, nr, columns) = (kernel.mr(), kernel.nr(), product.columns(kernel));
    for start in (0..product.k).step_by(ROWS) {
        let steps = usize::min(ROWS, product.k - start);
        for (i, sums) in sums.chunks_mut(mr * columns).enumerate() {
            let column = first + i * mr;
            let a = &data[start * ld + column..];
            for panel in (0..columns).step_by(nr) {
                let b = &b[panel * product.k + start * nr..][..steps * nr];
                if sums.len() == mr * columns {
                    kernel.tile(&[Run { steps, a, a_step: ld, b, ahead: &[] }], &mut sums[panel..], columns, start > 0);
                } else {
                    edge(product, kernel, (start, steps, column), b, (&mut sums[panel..], columns));
                }
            }
        }
    }
}

/// The last columns of `a`, fewer than a tile has rows.
fn edge(
    product: &Outer,
    kernel: Kernel,
    (start, steps, column): (usize, usize, usize),
    b: &[f32],
    (sums, ld): (&mut [f32], usize),
) {
    let (mr, nr) = (kernel.mr(), kernel.nr());
    scratch::with(Role::A, mr * steps, |a| {
        let operand = Operand::transpose(product.a);
        let piece = Piece { operand, scale: 1.0, k: start..start + steps, first: 0, steps };
        Packer::of_operand(kernel, Precision::F32, false, product.m).pack_piece(&piece, column, steps, a);
        let mut tile = [0.0; super::kernels::MAX_TILE];
        kernel.tile(&[Run { steps, a, a_step: mr, b, ahead: &[] }], &mut tile, nr, false);
        for (sums, tile) in sums.chunks_mut(ld).zip(tile.chunks(nr)) {
            let width = usize::min(nr, sums.len());
            if start > 0 {
                add(&mut sums[..width], tile);
            } else {
                sums[..width].copy_from_slice(&tile[..width]);
            }
        }
    });
}

#[cfg(test)]
mod tests;
