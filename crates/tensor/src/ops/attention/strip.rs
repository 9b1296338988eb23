//! What happens to a strip of scores: [`LANES`] rows of queries side by side, keys below each other.

use crate::{
    DType, Float,
    ops::{
        simd::{LANES, exp, multiversion, sum_lanes},
        softcap::{slope, softcap},
    },
};

/// One value for each row of queries in a strip.
pub(super) type Lane<T> = [T; LANES];

/// Scores of a strip: keys x [`LANES`], `ld` floats between keys.
pub(super) struct Scores<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) ld: usize,
}

impl Scores<'_> {
    #[inline(always)]
    fn rows(&mut self) -> impl Iterator<Item = &mut Lane<f32>> {
        self.data.chunks_mut(self.ld).filter_map(|row| row.first_chunk_mut())
    }
}

/// Which keys each row of queries sees: `first ..= last`, relative to the strip's first key.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub(super) first: Lane<i32>,
    pub(super) last: Lane<i32>,
}

/// Softmax so far of each row of queries in a strip.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Running {
    /// Largest score.
    pub(super) max: Lane<f32>,
    /// Σ exp(z - max).
    pub(super) sum: Lane<f32>,
}

impl Running {
    /// Nothing seen. The maximum is finite, so that exp(-inf - max) is 0 and not NaN where a tile is masked altogether.
    pub(super) const START: Self = Self { max: [f32::MIN; LANES], sum: [0.0; LANES] };
}

/// How scores become probabilities.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    pub(super) softcap: Option<f32>,
    /// Low bits of an f32 that probabilities lose: 16 for bf16, 13 for f16, 0 for f32.
    pub(super) dropped_bits: u32,
}

impl Rule {
    pub(super) fn new(softcap: Option<f32>, dtype: DType) -> Self {
        let dropped_bits = match dtype {
            DType::Bf16 => 16,
            DType::F16 => 13,
            _ => 0,
        };
        Self { softcap, dropped_bits }
    }
}

multiversion! {
    /// Takes scores into the running softmax and leaves exp(z - max) in their place; returns the factor by which sums taken
    /// under the earlier maximum shrink.
    pub(super) fn online_softmax(scores: Scores, seen: Option<&Seen>, rule: Rule, running: &mut Running) -> Lane<f32> {
        let mut scores = scores;
        cap_and_mask(&mut scores, seen, rule.softcap, f32::NEG_INFINITY);
        let mut max = running.max;
        for row in scores.rows() {
            for lane in 0..LANES {
                max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
            }
        }
        let mut sum = [0.0; LANES];
        for row in scores.rows() {
            for lane in 0..LANES {
                row[lane] = exp(row[lane] - max[lane]);
            }
            for lane in 0..LANES {
                sum[lane] += row[lane];
            }
        }
        if rule.dropped_bits > 0 {
            for row in scores.rows() {
                for x in row {
                    *x = round(*x, rule.dropped_bits);
                }
            }
        }
        let mut shrink = [0.0; LANES];
        for lane in 0..LANES {
            shrink[lane] = exp(running.max[lane] - max[lane]);
            running.sum[lane] = running.sum[lane] * shrink[lane] + sum[lane];
        }
        running.max = max;
        shrink
    }
}

/// Caps the scores and writes `hidden` where a key is not seen.
#[inline(always)]
fn cap_and_mask(scores: &mut Scores, seen: Option<&Seen>, cap: Option<f32>, hidden: f32) {
    if let Some(cap) = cap {
        for row in scores.rows() {
            for x in row {
                *x = softcap(*x, cap);
            }
        }
    }
    if let Some(seen) = seen {
        for (key, row) in scores.rows().enumerate() {
            let key = key as i32;
            for lane in 0..LANES {
                let visible = (seen.first[lane] <= key) & (key <= seen.last[lane]);
                row[lane] = if visible { row[lane] } else { hidden };
            }
        }
    }
}

multiversion! {
    /// a · b.
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        let (a, b) = (&a[..n], &b[..n]);
        sum_lanes(n, |i| a[i] * b[i])
    }
}

/// What the backward pass knows of each row of queries in a strip.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct RowFacts {
    /// ln Σ exp z; +inf for lanes without a query, whose probabilities are then 0.
    pub(super) lse: Lane<f32>,
    /// do · o.
    pub(super) delta: Lane<f32>,
}

impl RowFacts {
    /// No queries.
    pub(super) const NONE: Self = Self { lse: [f32::INFINITY; LANES], delta: [0.0; LANES] };
}

multiversion! {
    /// Scores become probabilities, and `d` (the gradients of the probabilities) becomes the gradients of the uncapped scores.
    pub(super) fn softmax_backward(scores: Scores, d: Scores, seen: Option<&Seen>, cap: Option<f32>, facts: &RowFacts) {
        let (mut scores, mut d) = (scores, d);
        cap_and_mask(&mut scores, seen, cap, f32::NEG_INFINITY);
        for (row, d) in scores.rows().zip(d.rows()) {
            for lane in 0..LANES {
                let z = row[lane];
                let p = exp(z - facts.lse[lane]);
                let ds = p * (d[lane] - facts.delta[lane]);
                row[lane] = p;
                // A hidden score is -inf: its slope would be NaN.
                d[lane] = match cap {
                    Some(cap) => if p > 0.0 { ds * slope(z, cap) } else { ds },
                    None => ds,
                };
            }
        }
    }
}

/// Rounds to nearest even, keeping all but the low `bits`.
#[inline(always)]
fn round(x: f32, bits: u32) -> f32 {
    let raw = x.to_bits();
    let rounded = raw.wrapping_add((1 << (bits - 1)) - 1 + ((raw >> bits) & 1)) >> bits << bits;
    if x.is_nan() { x } else { f32::from_bits(rounded) }
}

multiversion! {
    /// Widens rows of `size` elements, `from_ld` apart, to rows `to_ld` apart, times `scale`; fills up with zeros.
    pub(super) fn widen<E: Float>(from: &[E], from_ld: usize, size: usize, scale: f32, to: &mut [f32], to_ld: usize) {
        for (from, to) in from.chunks(from_ld).zip(to.chunks_exact_mut(to_ld)) {
            let (to, rest) = to.split_at_mut(size);
            for (y, x) in to.iter_mut().zip(&from[..size]) {
                *y = x.to_f32() * scale;
            }
            rest.fill(0.0);
        }
    }
}

multiversion! {
    /// Rows (a multiple of [`LANES`]) into panels: row r, column d to `[r / LANES][d][r % LANES]`.
    pub(super) fn to_panels(rows: &[f32], ld: usize, size: usize, panels: &mut [f32]) {
        for (rows, panel) in rows.chunks_exact(LANES * ld).zip(panels.chunks_exact_mut(LANES * size)) {
            for (d, out) in panel.chunks_exact_mut(LANES).enumerate() {
                for lane in 0..LANES {
                    out[lane] = rows[lane * ld + d];
                }
            }
        }
    }
}

multiversion! {
    /// One panel (`[d][lane]`) times a factor a lane, to rows of `size` elements; `rows` may hold fewer than [`LANES`].
    pub(super) fn from_panel<E: Float>(panel: &[f32], size: usize, factor: &Lane<f32>, rows: &mut [E]) {
        for (lane, row) in rows.chunks_exact_mut(size).enumerate() {
            for (d, y) in row.iter_mut().enumerate() {
                *y = E::from_f32(panel[d * LANES + lane] * factor[lane]);
            }
        }
    }
}

multiversion! {
    /// Each row of a panel times a factor a lane.
    pub(super) fn scale_panel(panel: &mut [f32], factor: &Lane<f32>) {
        for row in panel.chunks_exact_mut(LANES) {
            for lane in 0..LANES {
                row[lane] *= factor[lane];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::Rng;

    #[test]
    fn probabilities_round_as_the_type_does() {
        for i in 0..10_000 {
            let x = Rng::new(1).uniform(i);
            assert_eq!(round(x, 16), bf16::from_f32(x).to_f32());
            let y = 0.01 + x;
            assert_eq!(round(y, 13), half::f16::from_f32(y).to_f32());
        }
    }

    #[test]
    fn panels_go_there_and_back() {
        let (size, ld) = (5, 8);
        let rows: Vec<f32> = (0..2 * LANES * ld).map(|i| i as f32).collect();
        let mut panels = vec![0.0; 2 * LANES * size];
        to_panels(&rows, ld, size, &mut panels);
        let mut back = vec![0.0f32; 3 * size];
        from_panel(&panels[LANES * size..], size, &[2.0; LANES], &mut back);
        for r in 0..3 {
            for d in 0..size {
                assert_eq!(back[r * size + d], 2.0 * rows[(LANES + r) * ld + d]);
            }
        }
    }
}
