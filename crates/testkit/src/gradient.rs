//! Gradients of f64 references by central differences.

/// ∂f/∂xᵢ ≈ (f(x + h eᵢ) − f(x − h eᵢ)) / 2h for every i, with h = 1e-5 · max(1, |xᵢ|): the error is of order h² f‴, about
/// 1e-10 for a smooth f of unit scale.
pub fn central_difference(mut f: impl FnMut(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (center, h) = (x[i], 1e-5 * x[i].abs().max(1.0));
            x[i] = center + h;
            let above = f(&x);
            x[i] = center - h;
            let below = f(&x);
            x[i] = center;
            (above - below) / (2.0 * h)
        })
        .collect()
}

/// Σ wᵢ yᵢ: the scalar whose gradient is what a backward gets as `dy = w`.
///
/// # Panics
/// When the lengths differ.
#[must_use]
pub fn weighted_sum(weights: &[f64], y: &[f64]) -> f64 {
    assert_eq!(weights.len(), y.len(), "lengths differ");
    weights.iter().zip(y).map(|(w, y)| w * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient_of_a_known_function() {
        let found = central_difference(|x| x[0] * x[0] * x[1] + x[1].sin(), &[3.0, 2.0]);
        assert!((found[0] - 12.0).abs() < 1e-8 && (found[1] - (9.0 + 2.0f64.cos())).abs() < 1e-8, "{found:?}");
    }
}
