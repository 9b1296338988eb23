//! Soft-capped logits: z = cap tanh(s / cap), as Gemma 2 does to attention scores and to the head's logits.

use super::simd::exp;

/// tanh x within 4e-7 of its size, without a branch, so that loops over it vectorise.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    // Far from 0: 1 - 2 / (e^2x + 1) loses nothing.
    let far = 1.0 - 2.0 / (exp(2.0 * size) + 1.0);
    // Near 0: the odd series to x^13, whose next term is below 1e-7 of x for |x| < 0.5.
    let s = x * x;
    let series = 3.592_128e-3;
    let series = series * s + -8.863_236e-3;
    let series = series * s + 2.186_948_8e-2;
    let series = series * s + -5.396_825_4e-2;
    let series = series * s + 1.333_333_3e-1;
    let series = series * s + -3.333_333_4e-1;
    let near = x + x * (s * series);
    let far = if x < 0.0 { -far } else { far };
    let y = if size < 0.5 { near } else { far };
    if x.is_nan() { x } else { y }
}

/// cap tanh(s / cap).
#[inline(always)]
pub(crate) fn softcap(s: f32, cap: f32) -> f32 {
    cap * tanh(s / cap)
}

/// dz / ds at a capped value z: 1 - (z / cap)².
#[inline(always)]
pub(crate) fn slope(z: f32, cap: f32) -> f32 {
    let r = z / cap;
    1.0 - r * r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_within_its_bound() {
        for i in -120_000..=120_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).tanh();
            let error = (f64::from(tanh(x)) - exact).abs();
            assert!(error <= 4e-7 * exact.abs(), "tanh({x}) is off by {error:e}");
        }
        assert_eq!(tanh(200.0), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn slope_is_the_derivative() {
        for s in [-70.0f32, -3.0, 0.0, 0.2, 11.0] {
            let f = |s: f64| 30.0 * (s / 30.0).tanh();
            let exact = (f(f64::from(s) + 1e-5) - f(f64::from(s) - 1e-5)) / 2e-5;
            assert!((f64::from(slope(softcap(s, 30.0), 30.0)) - exact).abs() < 1e-6);
        }
    }
}
