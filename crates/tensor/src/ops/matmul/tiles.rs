//! The tiles of a product whose operands lie in panels.

use super::kernels::{Kernel, MAX_TILE, Run};

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

impl Tiles<'_> {
    /// Panels of `b` stay in a near cache while the slivers of `a` pass; each sliver fetches its share of the next panels.
    pub(super) fn run(&self, c: &mut [f32]) {
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
            for row in (0..self.rows).step_by(mr) {
                let c = &mut c[row * self.ldc + column..];
                if row + mr <= self.rows && column + nr <= self.columns {
                    self.kernel.tile(&runs, c, self.ldc, self.add);
                } else {
                    self.edge(&runs, c, usize::min(mr, self.rows - row), usize::min(nr, self.columns - column));
                }
                for (run, &share) in runs.iter_mut().zip(&shares) {
                    run.a = &run.a[mr * run.steps..];
                    run.ahead = run.ahead.get(share..).unwrap_or_default();
                }
            }
        }
    }

    /// A tile of which only some rows and columns exist.
    fn edge(&self, runs: &[Run], c: &mut [f32], rows: usize, columns: usize) {
        let mut tile = [0.0; MAX_TILE];
        let nr = self.kernel.nr();
        self.kernel.tile(runs, &mut tile, nr, false);
        for (c, tile) in c.chunks_mut(self.ldc).zip(tile.chunks(nr)).take(rows) {
            if self.add {
                add(&mut c[..columns], tile);
            } else {
                c[..columns].copy_from_slice(&tile[..columns]);
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
