//! The tiles of a product whose operands lie in panels.

use super::kernels::{Kernel, MAX_TILE, Run};
use half::bf16;

/// A stretch of the reduction, packed: slivers of `mr` rows of `a`, panels of `nr` columns of `b`, `steps` words each.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) steps: usize,
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
}

/// `c (+)= Σ a b` over stretches of the reduction.
pub(super) struct Tiles<'a> {
    pub(super) kernel: Kernel,
    pub(super) panels: &'a [Panels<'a>],
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Distance between rows of `c`.
    pub(super) ldc: usize,
    pub(super) add: bool,
}

/// A tile's place in the result, of which so many rows and columns exist.
struct Place {
    row: usize,
    column: usize,
    rows: usize,
    columns: usize,
}

impl Tiles<'_> {
    /// The sums themselves.
    pub(super) fn run(&self, c: &mut [f32]) {
        let mut tile = [0.0; MAX_TILE];
        self.each(|runs, place| {
            let c = &mut c[place.row * self.ldc + place.column..];
            let size = self.kernel.fit(place.rows, place.columns);
            if size == (place.rows, place.columns) {
                self.kernel.tile(runs, c, self.ldc, self.add, size);
                return;
            }
            self.kernel.tile(runs, &mut tile, size.1, false, size);
            for (c, tile) in c.chunks_mut(self.ldc).zip(tile.chunks(size.1)).take(place.rows) {
                if self.add {
                    add(&mut c[..place.columns], tile);
                } else {
                    c[..place.columns].copy_from_slice(&tile[..place.columns]);
                }
            }
        });
    }

    /// The sums and the bias, rounded: what there was is not added to.
    pub(super) fn run_narrow(&self, c: &mut [bf16], bias: Option<&[f32]>) {
        let mut tile = [0.0; MAX_TILE];
        self.each(|runs, place| {
            let size = self.kernel.fit(place.rows, place.columns);
            self.kernel.tile(runs, &mut tile, size.1, false, size);
            let c = &mut c[place.row * self.ldc + place.column..];
            for (c, tile) in c.chunks_mut(self.ldc).zip(tile.chunks_mut(size.1)).take(place.rows) {
                if let Some(bias) = bias {
                    add(tile, &bias[place.column..][..place.columns]);
                }
                self.kernel.narrow_bf16(&tile[..place.columns], &mut c[..place.columns]);
            }
        });
    }

    /// Calls `tile` for each. Panels of `b` stay in a near cache while the slivers of `a` pass; each sliver fetches its share
    /// of the next panels.
    fn each(&self, mut tile: impl FnMut(&[Run], Place)) {
        let (mr, nr) = (self.kernel.mr(), self.kernel.nr());
        let slivers = self.rows.div_ceil(mr);
        // A line of a panel for each of a share of its steps.
        let shares: Vec<usize> = self.panels.iter().map(|panels| panels.steps.div_ceil(slivers) * nr).collect();
        let mut runs = Vec::with_capacity(self.panels.len());
        for column in (0..self.columns).step_by(nr) {
            runs.clear();
            runs.extend(self.panels.iter().map(|panels| {
                let (b, ahead) = panels.b[column * panels.steps..].split_at(nr * panels.steps);
                Run { steps: panels.steps, a: panels.a, a_step: mr, b, ahead }
            }));
            let columns = usize::min(nr, self.columns - column);
            for row in (0..self.rows).step_by(mr) {
                tile(&runs, Place { row, column, rows: usize::min(mr, self.rows - row), columns });
                for (run, &share) in runs.iter_mut().zip(&shares) {
                    run.a = &run.a[mr * run.steps..];
                    run.ahead = run.ahead.get(share..).unwrap_or_default();
                }
            }
        }
    }
}

/// values += terms, as far as both reach.
pub(super) fn add(values: &mut [f32], terms: &[f32]) {
    for (value, term) in values.iter_mut().zip(terms) {
        *value += term;
    }
}
