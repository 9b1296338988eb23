//! Distances and bounds.

/// Unit roundoff of f32: half the spacing of the numbers next to 1.
pub const UNIT_F32: f64 = 1.0 / 16_777_216.0;
/// Unit roundoff of bfloat16.
pub const UNIT_BF16: f64 = 1.0 / 256.0;
/// Unit roundoff of IEEE half precision.
pub const UNIT_F16: f64 = 1.0 / 2048.0;

/// Each value, exactly, in f64.
#[must_use]
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// ‖found − reference‖ / ‖reference‖ in the Euclidean norm; the plain distance when the reference is zero.
///
/// # Panics
/// When the lengths differ.
#[must_use]
pub fn relative_error(found: &[f64], reference: &[f64]) -> f64 {
    assert_eq!(found.len(), reference.len(), "lengths differ");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut found.iter().zip(reference).map(|(a, b)| a - b));
    let size = norm(&mut reference.iter().copied());
    if size == 0.0 { distance } else { distance / size }
}

/// Checks `|found[i] - reference[i]| <= bound(i)` for every element.
///
/// # Panics
/// When the lengths differ or an element is off by more (NaN included), naming the worst one.
#[track_caller]
pub fn assert_within(what: &str, found: &[f32], reference: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(found.len(), reference.len(), "{what}: lengths differ");
    let excess = |i: usize| (f64::from(found[i]) - reference[i]).abs() / bound(i).max(f64::MIN_POSITIVE);
    let rank = |i: usize| if excess(i).is_nan() { f64::INFINITY } else { excess(i) };
    if let Some(worst) = (0..found.len()).max_by(|&a, &b| rank(a).total_cmp(&rank(b))) {
        assert!(
            rank(worst) <= 1.0,
            "{what}: element {worst} of {}: expected {:e}, found {:e}, {:.2} times the bound {:e}",
            found.len(),
            reference[worst],
            found[worst],
            excess(worst),
            bound(worst),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_half_the_spacing_next_to_one() {
        assert_eq!(UNIT_F32, f64::from(f32::EPSILON) / 2.0);
        assert_eq!(UNIT_F32 * 65_536.0, UNIT_BF16);
        assert_eq!(UNIT_F32 * 8192.0, UNIT_F16);
    }

    #[test]
    fn relative_error_is_scale_free() {
        assert!((relative_error(&[3.0, 4.4], &[3.0, 4.0]) - 0.08).abs() < 1e-12);
        assert!((relative_error(&[3e9, 4.4e9], &[3e9, 4e9]) - 0.08).abs() < 1e-12);
        assert_eq!(relative_error(&[2.0], &[0.0]), 2.0);
    }

    #[test]
    #[should_panic(expected = "element 1 of 2")]
    fn the_worst_element_is_named() {
        assert_within("case", &[1.0, 2.0], &[1.0, 2.5], |_| 0.1);
    }

    #[test]
    #[should_panic(expected = "element 0 of 1")]
    fn nan_is_never_within() {
        assert_within("case", &[f32::NAN], &[0.0], |_| f64::INFINITY);
    }
}
