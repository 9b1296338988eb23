//! `aᵀ b` over many rows, with few columns of `b`: the gradients of low-rank adapters.
//!
//! `a` is read where it lies: packing it would take as long as multiplying it. A tile's rows (six or fourteen neighbouring
//! columns of `a`) are what a packed panel's step holds; pairs of bf16 rows interleave in registers. Each task has a piece of
//! a result of its own, so that nothing is left to do when the last one ends.

use super::kernels::{Kernel, OUTER, Run};
use super::pack::{Packer, Piece};
use super::scratch::{self, Role};
use super::tiles::add;
use super::{Operand, Output, Precision, Segment, Source, each_chunk, gemm};
use half::bf16;

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
    let plain = |product: &Outer| match product.a {
        Source::F32 { .. } => kernel.pair() == 1 && precision == Precision::F32,
        Source::Bf16 { .. } => kernel.pair() == 2,
        _ => false,
    };
    if products.iter().all(|product| narrow(product) && plain(product)) {
        in_place(products, kernel, precision);
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

    /// What tasks read, and their pieces of the result.
    fn split(&mut self, kernel: Kernel, task: usize) -> (Shared<'_>, Vec<Target<'_>>) {
        let Outer { a, b, m, n, k, scale, .. } = *self;
        let (width, steps) = if kernel.pair() == 2 { (OUTER, k.div_ceil(2)) } else { (kernel.nr(), k) };
        let shared = Shared { a, b, m, n, k, scale, width, steps, panels: &[] };
        if !self.transposed {
            return (shared, self.c.chunks_mut(task * n).map(Target::Rows).collect());
        }
        let mut columns: Vec<_> = (0..m.div_ceil(task)).map(|_| Vec::with_capacity(n)).collect();
        for row in self.c.chunks_exact_mut(m) {
            for (columns, piece) in columns.iter_mut().zip(row.chunks_mut(task)) {
                columns.push(piece);
            }
        }
        (shared, columns.into_iter().map(Target::Columns).collect())
    }
}

/// Some rows of a result, or some columns of each of its rows.
enum Target<'c> {
    Rows(&'c mut [f32]),
    Columns(Vec<&'c mut [f32]>),
}

/// What the tasks of a product read.
#[derive(Clone, Copy)]
struct Shared<'a> {
    a: Source<'a>,
    b: Source<'a>,
    m: usize,
    n: usize,
    k: usize,
    scale: f32,
    /// Columns of a panel of `b`, and its words over the rows.
    width: usize,
    steps: usize,
    panels: &'a [f32],
}

impl<'a> Shared<'a> {
    /// Columns of the panels of `b`.
    fn columns(&self) -> usize {
        self.n.next_multiple_of(self.width)
    }

    /// The panels of `b`: `b` itself where its rows are steps.
    fn pack(&self, kernel: Kernel, precision: Precision, panels: &'a mut [f32]) -> &'a [f32] {
        match self.b {
            Source::F32 { data, ld } if kernel.pair() == 1 && ld == self.width && self.n == ld => data,
            source => {
                let piece = Piece { operand: Operand::new(source), scale: 1.0, k: 0..self.k, first: 0, steps: self.steps };
                Packer::of_width(kernel, precision, self.width, self.n).pack_piece(&piece, 0, self.steps, panels);
                panels
            }
        }
    }

    /// The piece of the result that belongs to the columns of `a` from `first` on += scale * their sums.
    fn run(&self, kernel: Kernel, first: usize, target: &mut Target) {
        let (columns, rows) = (self.columns(), target.len(self.n));
        scratch::with(Role::Stage, rows.next_multiple_of(OUTER) * columns, |sums| {
            match self.a {
                Source::Bf16 { data, ld } => self.pair_sums(kernel, (data, ld), first, sums),
                Source::F32 { data, ld } => self.task_sums(kernel, (data, ld), first, &mut sums[..rows * columns]),
                _ => return,
            }
            target.add(sums, columns, self.n, self.scale);
        });
    }

    /// Sums [columns of a, columns of b] of pairs of rows, for columns of `a` from `first` on.
    fn pair_sums(&self, kernel: Kernel, (a, ld): (&[bf16], usize), first: usize, sums: &mut [f32]) {
        let columns = self.columns();
        let mut tile = [0.0; OUTER * OUTER];
        for (i, sums) in sums.chunks_exact_mut(OUTER * columns).enumerate() {
            let column = first + i * OUTER;
            let width = OUTER.min(self.m - column);
            for (panel, b) in self.panels.chunks_exact(OUTER * self.steps).enumerate() {
                kernel.outer(&a[column..], ld, self.k, width, b, &mut tile);
                kernel.transpose(&tile, OUTER, OUTER, OUTER, &mut sums[panel * OUTER..], columns);
            }
        }
    }

    /// The same of f32.
    fn task_sums(&self, kernel: Kernel, (data, ld): (&[f32], usize), first: usize, sums: &mut [f32]) {
        let (mr, nr, columns) = (kernel.mr(), kernel.nr(), self.columns());
        for start in (0..self.k).step_by(ROWS) {
            let steps = usize::min(ROWS, self.k - start);
            for (i, sums) in sums.chunks_mut(mr * columns).enumerate() {
                let column = first + i * mr;
                let a = &data[start * ld + column..];
                for panel in (0..columns).step_by(nr) {
                    let b = &self.panels[panel * self.k + start * nr..][..steps * nr];
                    let size = kernel.fit(mr, usize::min(nr, self.n - panel));
                    if sums.len() == mr * columns {
                        let run = Run { steps, a, a_step: ld, b, ahead: &[] };
                        kernel.tile(&[run], &mut sums[panel..], columns, start > 0, size);
                    } else {
                        self.edge(kernel, (start, steps, column), b, (&mut sums[panel..], columns));
                    }
                }
            }
        }
    }

    /// The last columns of `a`, fewer than a tile has rows.
    fn edge(&self, kernel: Kernel, (start, steps, column): (usize, usize, usize), b: &[f32], (sums, ld): (&mut [f32], usize)) {
        let (mr, nr) = (kernel.mr(), kernel.nr());
        scratch::with(Role::A, mr * steps, |a| {
            let operand = Operand::transpose(self.a);
            let piece = Piece { operand, scale: 1.0, k: start..start + steps, first: 0, steps };
            Packer::of_operand(kernel, Precision::F32, false, self.m).pack_piece(&piece, column, steps, a);
            let mut tile = [0.0; super::kernels::MAX_TILE];
            kernel.tile(&[Run { steps, a, a_step: mr, b, ahead: &[] }], &mut tile, nr, false, (mr, nr));
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
}

impl Target<'_> {
    /// Columns of `a` it belongs to.
    fn len(&self, n: usize) -> usize {
        match self {
            Self::Rows(c) => c.len() / n,
            Self::Columns(c) => c.first().map_or(0, |row| row.len()),
        }
    }

    /// += scale * sums, whose rows are `ld` apart.
    fn add(&mut self, sums: &[f32], ld: usize, n: usize, scale: f32) {
        match self {
            Self::Rows(c) => {
                for (row, sums) in c.chunks_exact_mut(n).zip(sums.chunks_exact(ld)) {
                    for (c, sum) in row.iter_mut().zip(sums) {
                        *c += scale * sum;
                    }
                }
            }
            Self::Columns(rows) => {
                for (j, row) in rows.iter_mut().enumerate() {
                    for (c, sums) in row.iter_mut().zip(sums.chunks_exact(ld)) {
                        *c += scale * sums[j];
                    }
                }
            }
        }
    }
}

/// All products at once: tasks over columns of `a`.
fn in_place(products: &mut [Outer], kernel: Kernel, precision: Precision) {
    let task = TASK.next_multiple_of(if kernel.pair() == 2 { OUTER } else { kernel.mr() });
    let split: Vec<_> = products.iter_mut().map(|product| product.split(kernel, task)).collect();
    let words: usize = split.iter().map(|(shared, _)| shared.columns() * shared.steps).sum();
    scratch::with(Role::B, words, |b| {
        let mut rest = b;
        let mut tasks = Vec::new();
        for (shared, targets) in split {
            let panels = rest.split_off_mut(..shared.columns() * shared.steps).unwrap_or_default();
            let shared = Shared { panels: shared.pack(kernel, precision, panels), ..shared };
            tasks.extend(targets.into_iter().enumerate().map(|(i, target)| (shared, i * task, target)));
        }
        each_chunk(&mut tasks, 1, true, |_, tasks| {
            for (shared, first, target) in tasks {
                shared.run(kernel, *first, target);
            }
        });
    });
}

#[cfg(test)]
mod tests;
