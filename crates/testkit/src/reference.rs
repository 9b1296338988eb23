//! The formulas in f64, on plain slices in row-major order, written for reading and not for speed.

/// Root-mean-square norm of each row of `n`: x · (mean(x²) + eps)^(−½) · (offset + w).
#[must_use]
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64, offset: f64) -> Vec<f64> {
    let n = w.len();
    x.chunks(n)
        .flat_map(|row| {
            let inv = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / n as f64 + eps).sqrt();
            row.iter().zip(w).map(move |(x, w)| x * inv * (offset + w)).collect::<Vec<_>>()
        })
        .collect()
}

/// Half-split rotary embedding of [T, H, D]: dimension i of the first half of the first 2·`inv_freq.len()` dimensions
/// is rotated with its partner in the second half by position · inv_freq\[i\].
#[must_use]
pub fn rope(x: &[f64], heads: usize, size: usize, positions: &[u32], inv_freq: &[f64]) -> Vec<f64> {
    let half = inv_freq.len();
    let mut y = x.to_vec();
    for (row, head) in y.chunks_mut(size).enumerate() {
        let position = f64::from(positions[row / heads]);
        for i in 0..half {
            let (sin, cos) = (position * inv_freq[i]).sin_cos();
            let (a, b) = (head[i], head[half + i]);
            head[i] = a * cos - b * sin;
            head[half + i] = b * cos + a * sin;
        }
    }
    y
}

/// x / (1 + e^−x).
#[must_use]
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).
#[must_use]
pub fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

/// x Φ(x), Φ the distribution function of the standard normal.
#[must_use]
pub fn gelu(x: f64) -> f64 {
    x * normal_cdf(x)
}

/// Φ(x): ½ + φ(x) (x + x³/3 + x⁵/15 + …) near zero, the continued fraction φ(x) / (x + 1/(x + 2/(x + …))) of 1 − Φ in
/// the tails.
#[must_use]
pub fn normal_cdf(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    if x.abs() < 4.0 {
        let (mut term, mut sum, mut k) = (x, x, 1.0);
        while term.abs() > 1e-18 {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        return 0.5 + density * sum;
    }
    let fraction = (1..200).rev().fold(x.abs(), |below, k| x.abs() + f64::from(k) / below);
    if x < 0.0 { density / fraction } else { 1.0 - density / fraction }
}

/// C = A B for A [m, k] and B [k, n].
#[must_use]
pub fn matmul(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for l in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + l] * b[l * n + j];
            }
        }
    }
    c
}

/// Softmax of one row.
#[must_use]
pub fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

/// −ln softmax(logits)\[label\] of one row.
#[must_use]
pub fn cross_entropy(logits: &[f64], label: usize) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln() - logits[label]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::central_difference;

    fn close(a: f64, b: f64, bound: f64) {
        assert!((a - b).abs() <= bound, "{a} and {b}");
    }

    #[test]
    fn the_normal_distribution_has_its_tabulated_values() {
        // Abramowitz and Stegun, table 26.1.
        for (x, value) in [(0.0, 0.5), (1.0, 0.841_344_746_068_543), (2.0, 0.977_249_868_051_821), (-3.0, 0.001_349_898_031_630)]
        {
            close(normal_cdf(x), value, 1e-14);
        }
        close(normal_cdf(-6.0) / 9.865_876_450e-10, 1.0, 1e-9);
        close(normal_cdf(3.999_999_9), normal_cdf(4.000_000_1), 1e-10);
        close(central_difference(|x| normal_cdf(x[0]), &[0.7])[0], (-0.245f64).exp() / std::f64::consts::TAU.sqrt(), 1e-9);
    }

    #[test]
    fn normalised_rows_have_unit_mean_square() {
        let y = rms_norm(&[3.0, 4.0, 1.0, 1.0], &[1.0, 1.0], 0.0, 0.0);
        close(y[0] * y[0] + y[1] * y[1], 2.0, 1e-12);
        close(y[2], 1.0, 1e-12);
        close(rms_norm(&[3.0, 4.0], &[1.0, 1.0], 0.0, 1.0)[0], 2.0 * y[0], 1e-12);
    }

    #[test]
    fn a_rotation_keeps_lengths_and_position_zero() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(rope(&x, 1, 5, &[0], &[1.0, 0.1]), x);
        let y = rope(&x, 1, 5, &[7], &[1.0, 0.1]);
        close(y[0] * y[0] + y[2] * y[2], 10.0, 1e-12);
        close(y[0], 7.0f64.cos() - 3.0 * 7.0f64.sin(), 1e-12);
        assert_eq!(y[4], 5.0);
    }

    #[test]
    fn activations_have_their_known_values() {
        close(silu(1.0), 0.731_058_578_630_005, 1e-14);
        close(gelu(1.0), 0.841_344_746_068_543, 1e-14);
        close(gelu_tanh(1.0), 0.841_191_990_608_309, 1e-12);
    }

    #[test]
    fn the_gradient_of_cross_entropy_is_softmax_less_one_hot() {
        let logits = [1.0, -2.0, 0.5];
        let found = central_difference(|x| cross_entropy(x, 1), &logits);
        for (i, (found, p)) in found.iter().zip(softmax(&logits)).enumerate() {
            close(*found, p - f64::from(u8::from(i == 1)), 1e-9);
        }
    }

    #[test]
    fn matmul_of_a_known_pair() {
        assert_eq!(matmul(&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0], 2, 2, 2), [19.0, 22.0, 43.0, 50.0]);
    }
}
