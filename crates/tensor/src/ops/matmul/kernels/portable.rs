//! Plain Rust for every machine, and the specification of the other modules.

use super::Run;
use half::bf16;
use std::ops::Range;

pub(super) const MR: usize = 4;
pub(super) const NR: usize = 8;

pub(super) fn tile(runs: &[Run], c: &mut [f32], ldc: usize, add: bool) {
    let mut sum = [[0.0f32; NR]; MR];
    for run in runs {
        for (s, b) in run.b.as_chunks::<NR>().0.iter().take(run.steps).enumerate() {
            for (sum, &x) in sum.iter_mut().zip(&run.a[s * run.a_step..][..MR]) {
                for (sum, &y) in sum.iter_mut().zip(b) {
                    *sum += x * y;
                }
            }
        }
    }
    for (c, sum) in c.chunks_mut(ldc).zip(&sum) {
        for (c, &sum) in c.iter_mut().zip(sum) {
            *c = if add { *c + sum } else { sum };
        }
    }
}

pub(super) fn transpose(src: &[f32], ld: usize, lanes: Range<usize>, steps: Range<usize>, dst: &mut [f32], width: usize) {
    if steps.is_empty() {
        return; // the step behind the last need not exist
    }
    for lane in lanes {
        let row = &src[lane * ld..][steps.clone()];
        let column = dst[steps.start * width + lane..].iter_mut().step_by(width);
        for (out, &x) in column.zip(row) {
            *out = x;
        }
    }
}

pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sum = [0.0f32; LANES];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x.iter().zip(y) {
        for i in 0..LANES {
            sum[i] += x[i] * y[i];
        }
    }
    let rest: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
    sum.iter().sum::<f32>() + rest
}

#[inline(always)]
pub(super) fn widen_bf16(src: &[bf16], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(src) {
        *out = f32::from_bits(u32::from(x.to_bits()) << 16);
    }
}

#[inline(always)]
pub(super) fn narrow_bf16(src: &[f32], out: &mut [bf16]) {
    for (out, &x) in out.iter_mut().zip(src) {
        *out = bf16::from_bits(bf16_bits(x));
    }
}

#[inline(always)]
pub(super) fn round_bf16(values: &mut [f32]) {
    for x in values {
        *x = f32::from_bits(u32::from(bf16_bits(*x)) << 16);
    }
}

#[inline(always)]
pub(super) fn pair_bf16(low: &[bf16], high: &[bf16], out: &mut [f32]) {
    for ((word, l), h) in out.iter_mut().zip(low).zip(high) {
        *word = f32::from_bits(u32::from(h.to_bits()) << 16 | u32::from(l.to_bits()));
    }
}

/// The bits of the nearest bf16, ties to even; a NaN stays one. Without branches, so that loops over it vectorise.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    ((if x.is_nan() { quiet } else { rounded }) >> 16) as u16
}
