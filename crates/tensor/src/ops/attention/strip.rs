//! What happens to a strip of scores: [`LANES`] rows of queries side by side, keys below each other.

use super::Config;
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

/// How products q · k become probabilities.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    /// Factor of the products.
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    /// Low bits of an f32 that probabilities lose: 16 for bf16, 13 for f16, 0 for f32.
    pub(super) dropped_bits: u32,
}

impl Rule {
    pub(super) fn new(config: Config, dtype: DType) -> Self {
        let dropped_bits = match dtype {
            DType::Bf16 => 16,
            DType::F16 => 13,
            _ => 0,
        };
        Self { scale: config.scale, softcap: config.softcap, dropped_bits }
    }

    /// The score of a product.
    #[inline(always)]
    fn score(self, product: f32) -> f32 {
        let s = product * self.scale;
        self.softcap.map_or(s, |cap| softcap(s, cap))
    }
}

multiversion! {
    /// Takes products q · k into the running softmax and leaves exp(z - max) in their place; returns the factor by which sums taken
    /// under the earlier maximum shrink.
    pub(super) fn online_softmax(scores: Scores, seen: Option<&Seen>, rule: Rule, running: &mut Running) -> Lane<f32> {
        let mut scores = scores;
        scale_and_mask(&mut scores, seen, rule);
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

/// Products become scores, -inf where a key is not seen.
#[inline(always)]
fn scale_and_mask(scores: &mut Scores, seen: Option<&Seen>, rule: Rule) {
    if rule.softcap.is_some() {
        for row in scores.rows() {
            for x in row {
                *x = rule.score(*x);
            }
        }
    } else {
        for row in scores.rows() {
            for x in row {
                *x *= rule.scale;
            }
        }
    }
    if let Some(seen) = seen {
        for (key, row) in scores.rows().enumerate() {
            let key = key as i32;
            for (lane, x) in row.iter_mut().enumerate() {
                let visible = seen.first[lane] <= key && key <= seen.last[lane];
                *x = if visible { *x } else { f32::NEG_INFINITY };
            }
        }
    }
}

multiversion! {
    /// a · b.
    pub(super) fn dot<E: Float>(a: &[E], b: &[E]) -> f32 {
        lane_dot(a, b)
    }
}

/// a · b over fixed lanes: the same bits on each instruction set.
#[inline(always)]
fn lane_dot<A: Float, B: Float>(a: &[A], b: &[B]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane].to_f32() * b[lane].to_f32();
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += a.to_f32() * b.to_f32();
    }
    let half: [f32; 8] = std::array::from_fn(|i| sums[i] + sums[i + 8]);
    let quarter: [f32; 4] = std::array::from_fn(|i| half[i] + half[i + 4]);
    (quarter[0] + quarter[2]) + (quarter[1] + quarter[3])
}

multiversion! {
    /// scores[j] = q · row j of `keys`, whose rows are `ld` apart.
    pub(super) fn dot_rows<E: Float>(q: &[f32], keys: &[E], ld: usize, scores: &mut [f32]) {
        for (key, score) in keys.chunks(ld).zip(scores) {
            *score = lane_dot(q, &key[..q.len()]);
        }
    }
}

multiversion! {
    /// sums += Σ_j p[j] row j of `values`, whose rows are `ld` apart; four rows at a time.
    pub(super) fn add_rows<E: Float>(p: &[f32], values: &[E], ld: usize, sums: &mut [f32]) {
        let size = sums.len();
        let row = |j: usize| &values[j * ld..][..size];
        let (fours, rest) = p.as_chunks::<4>();
        for (i, &[p0, p1, p2, p3]) in fours.iter().enumerate() {
            let (v0, v1, v2, v3) = (row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3));
            for d in 0..size {
                let (x, y) = (p0 * v0[d].to_f32() + p1 * v1[d].to_f32(), p2 * v2[d].to_f32() + p3 * v3[d].to_f32());
                sums[d] += x + y;
            }
        }
        for (j, p) in rest.iter().enumerate() {
            for (sum, v) in sums.iter_mut().zip(row(4 * fours.len() + j)) {
                *sum += p * v.to_f32();
            }
        }
    }
}

multiversion! {
    /// Products of one query become exp(z - max); returns max and the sum.
    pub(super) fn softmax_row(scores: &mut [f32], rule: Rule) -> (f32, f32) {
        for s in scores.iter_mut() {
            *s = rule.score(*s);
        }
        let max = scores.iter().fold(f32::MIN, |a, &b| if b > a { b } else { a });
        for s in scores.iter_mut() {
            *s = exp(*s - max);
        }
        let sum = sum_lanes(scores.len(), |i| scores[i]);
        if rule.dropped_bits > 0 {
            for p in scores.iter_mut() {
                *p = round(*p, rule.dropped_bits);
            }
        }
        (max, sum)
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
    /// Products q · k become probabilities, and `d` (the gradients of the probabilities) becomes the gradients of the uncapped
    /// scores.
    pub(super) fn softmax_backward(scores: Scores, d: Scores, seen: Option<&Seen>, rule: Rule, facts: &RowFacts) {
        let (mut scores, mut d) = (scores, d);
        scale_and_mask(&mut scores, seen, rule);
        for (row, d) in scores.rows().zip(d.rows()) {
            for lane in 0..LANES {
                let z = row[lane];
                let p = exp(z - facts.lse[lane]);
                let ds = p * (d[lane] - facts.delta[lane]);
                row[lane] = p;
                // A hidden score is -inf: its slope would be NaN.
                d[lane] = match rule.softcap {
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
}
