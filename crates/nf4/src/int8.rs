//! LLM.int8 (Dettmers et al. 2022): row-wise int8 weights, and a matmul that keeps outlier columns in half precision.
//!
//! Names follow bitsandbytes: `CB` the int8 codes of a weight, `SCB` its row scales, both stored in checkpoints as
//! `<name>` (int8) and `SCB` (float32).

use half::f16;
use rayon::prelude::*;

use crate::dynamic::first_non_finite;
use crate::element::Element;
use crate::error::{Error, check_sizes};

/// Columns in which any input reaches this magnitude are computed in half precision.
pub const OUTLIER_THRESHOLD: f32 = 6.0;

/// 1 / 127 as the reference rounds it.
const DEQUANT: f32 = 1.0 / 127.0;
/// 1 / 127² as the reference's kernel has it, rounded to fewer digits.
const MATMUL_DEQUANT: f32 = 6.200012e-05;

/// A matrix in int8, each row with its own scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Rows {
    /// Rows and columns: for a weight, output and input features.
    pub shape: [usize; 2],
    /// `round(w * 127 / absmax of the row)`, row-major.
    pub cb: Vec<i8>,
    /// The absmax of each row.
    pub scb: Vec<f32>,
}

impl Int8Rows {
    fn check(&self, op: &'static str) -> Result<(), Error> {
        let [rows, cols] = self.shape;
        check_sizes(op, &[("CB", rows.saturating_mul(cols), self.cb.len()), ("SCB", rows, self.scb.len())])
    }

    fn row(&self, row: usize) -> &[i8] {
        &self.cb[row * self.shape[1]..][..self.shape[1]]
    }
}

/// Quantises each row of `w` ([rows, cols], row-major): `SCB[r] = max |w[r]|`, `CB = round_ties_even(w * (127 * (1 / SCB[r])))`.
///
/// # Errors
/// [`Error::Sizes`]; [`Error::NonFinite`] with the first NaN or infinity.
pub fn quantize_rows<T: Element>(w: &[T], shape: [usize; 2]) -> Result<Int8Rows, Error> {
    let op = "int8 quantize_rows";
    let [rows, cols] = shape;
    check_sizes(op, &[("w", rows.saturating_mul(cols), w.len())])?;
    let mut cb = vec![0i8; w.len()];
    let scb = if cols == 0 {
        vec![0.0; rows]
    } else {
        cb.par_chunks_mut(cols).zip(w.par_chunks(cols)).map(|(cb, w)| quantize_row(w, f32::INFINITY, cb)).collect()
    };
    if w.iter().all(|v| v.to_f32().is_finite()) { Ok(Int8Rows { shape, cb, scb }) } else { Err(first_non_finite(op, w)) }
}

/// Codes of one row, with 0 for magnitudes from `threshold` on, which the absmax that it returns leaves out.
fn quantize_row<T: Element>(w: &[T], threshold: f32, codes: &mut [i8]) -> f32 {
    let kept = |v: &T| Some(v.to_f32()).filter(|v| v.abs() < threshold);
    let absmax = w.iter().filter_map(kept).fold(0.0f32, |a, v| a.max(v.abs()));
    // Times the reciprocal, as the reference's fast division: it decides which way exact halves fall.
    // A row of zeros: 0 * (127 * (1 / 0)) is NaN, which converts to 0.
    let scale = 127.0 * (1.0 / absmax);
    for (code, v) in codes.iter_mut().zip(w) {
        *code = kept(v).map_or(0, |v| (v * scale).round_ties_even() as i8);
    }
    absmax
}

/// Decodes into `out` ([rows, cols]): `CB * SCB[row] / 127`.
///
/// # Errors
/// [`Error::Sizes`].
pub fn dequantize_rows<T: Element>(w: &Int8Rows, out: &mut [T]) -> Result<(), Error> {
    let op = "int8 dequantize_rows";
    w.check(op)?;
    check_sizes(op, &[("out", w.cb.len(), out.len())])?;
    if w.shape[1] == 0 {
        return Ok(());
    }
    out.par_chunks_mut(w.shape[1]).enumerate().for_each(|(row, out)| {
        for (out, &code) in out.iter_mut().zip(w.row(row)) {
            *out = T::from_f32(decode(code, w.scb[row]));
        }
    });
    Ok(())
}

fn decode(code: i8, scale: f32) -> f32 {
    f32::from(code) * scale * DEQUANT
}

/// `y = x Wᵀ`: `x` [n, k], `w` [m, k], `y` [n, m], row-major.
///
/// Columns of `x` with any magnitude from `threshold` on ([`OUTLIER_THRESHOLD`]) meet their weights, decoded to f16, in half precision
/// with f32 sums; the rest is int8 by int8 in i32, `x` quantised row by row, scaled back by both absmax. The int8 part is rounded to
/// f16 before the outliers are added, as in the reference. A threshold of 0 means no outlier columns.
///
/// # Errors
/// [`Error::Sizes`]; [`Error::NonFinite`] with the first NaN or infinity of `x`.
pub fn matmul(x: &[f16], x_shape: [usize; 2], w: &Int8Rows, threshold: f32) -> Result<Vec<f16>, Error> {
    let op = "int8 matmul";
    let [n, k] = x_shape;
    let [m, _] = w.shape;
    check_sizes(op, &[("x", n.saturating_mul(k), x.len()), ("columns of w", k, w.shape[1])])?;
    w.check(op)?;
    if x.iter().any(|v| !v.is_finite()) {
        return Err(first_non_finite(op, x));
    }
    let mut y = vec![f16::ZERO; n * m];
    if k == 0 || m == 0 {
        return Ok(y);
    }
    let threshold = if threshold > 0.0 { threshold } else { f32::INFINITY };
    let outliers: Vec<usize> = (0..k).filter(|&c| x.iter().skip(c).step_by(k).any(|v| v.to_f32().abs() >= threshold)).collect();
    y.par_chunks_mut(m).zip(x.par_chunks(k)).for_each(|(y, x)| {
        let mut codes = vec![0i8; k];
        let scale = quantize_row(x, threshold, &mut codes);
        for &c in &outliers {
            codes[c] = 0;
        }
        for (r, y) in y.iter_mut().enumerate() {
            let w_row = w.row(r);
            let sum = dot(&codes, w_row);
            *y = f16::from_f32(sum as f32 * scale * w.scb[r] * MATMUL_DEQUANT);
            if !outliers.is_empty() {
                let half = outliers
                    .iter()
                    .fold(0.0f32, |sum, &c| x[c].to_f32().mul_add(f16::from_f32(decode(w_row[c], w.scb[r])).to_f32(), sum));
                *y = f16::from_f32(y.to_f32() + half);
            }
        }
    });
    Ok(y)
}

/// i8 by i8 in i32, which no row shorter than 2^31 / 127² overflows.
fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}
