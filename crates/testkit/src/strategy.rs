//! Shapes and values for property tests.

use proptest::prelude::*;

/// `most` cases, or as many as `PROPTEST_CASES` says where those are fewer: for properties whose cases are long.
#[must_use]
pub fn cases(most: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.min(most), ..config }
}

/// A size from 1 to `max`, with 1, odd numbers and the neighbours of multiples of 16 and 64 more often than by chance.
pub fn size(max: usize) -> impl Strategy<Value = usize> {
    let max = max.max(1);
    let near =
        move |step: usize| (0..=max / step, 0..3usize).prop_map(move |(k, d)| (k * step + d).saturating_sub(1).clamp(1, max));
    prop_oneof![1 => Just(1), 3 => 1..=max, 2 => near(16), 1 => near(64)]
}

/// Several independent sizes, each up to its own `max`.
pub fn sizes<const N: usize>(max: [usize; N]) -> impl Strategy<Value = [usize; N]> {
    max.map(size).prop_map(|sizes| sizes)
}

/// `n` numbers of the standard normal distribution, a function of the seed alone (SplitMix64 and Box-Muller).
#[must_use]
pub fn normals(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / 9_007_199_254_740_992.0
    };
    (0..n)
        .map(|_| {
            let (u, v) = (uniform(), uniform());
            ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest! {
        #[test]
        fn sizes_stay_in_range([a, b] in sizes([1, 70])) {
            prop_assert!(a == 1 && (1..=70).contains(&b));
        }
    }

    #[test]
    fn normals_have_unit_variance_and_repeat() {
        let x = normals(1, 50_000);
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 5e4;
        let variance = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 5e4;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        assert_eq!(x, normals(1, 50_000));
        assert_ne!(x[..4], normals(2, 4)[..]);
    }
}
