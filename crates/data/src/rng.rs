//! The small generator behind shuffling: xoshiro256** seeded by SplitMix64.

/// Xoshiro256** (Blackman and Vigna, 2018), its state filled by SplitMix64 as its authors advise.
///
/// A fixed algorithm, written out, so that a seed gives the same order in every version of this crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xoshiro256 {
    state: [u64; 4],
}

impl Xoshiro256 {
    /// The generator of a seed and a stream number (an epoch): different streams are unrelated sequences.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        // Mixing the stream before adding it keeps (seed, epoch + 1) apart from (seed + 1, epoch).
        let mut mix = seed ^ split_mix(&mut stream.wrapping_add(0x5851_F42D_4C95_7F2D));
        Self { state: std::array::from_fn(|_| split_mix(&mut mix)) }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A uniform integer in `0..bound` without modulo bias (Lemire, 2019); 0 for a bound of 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(bound);
            let low = wide as u64;
            // Reject the few values that would make some results likelier than others.
            if low >= bound || low >= bound.wrapping_neg() % bound.max(1) {
                return (wide >> 64) as u64;
            }
        }
    }

    /// Shuffles in place, every order equally likely (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// One step of SplitMix64 (Steele, Lea and Flood, 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The order of examples: a permutation that depends on the seed and the epoch alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampler {
    /// The seed of the run.
    pub seed: u64,
    /// `false` keeps the file's order in every epoch.
    pub shuffle: bool,
}

impl Sampler {
    /// The order of `n` examples in an epoch (from 0).
    #[must_use]
    pub fn order(&self, epoch: usize, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        if self.shuffle {
            Xoshiro256::new(self.seed, epoch as u64).shuffle(&mut order);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generator_is_xoshiro256_starstar() {
        // First outputs for the state (1, 2, 3, 4), from the authors' C code.
        let mut rng = Xoshiro256 { state: [1, 2, 3, 4] };
        let got: Vec<u64> = (0..4).map(|_| rng.next_u64()).collect();
        assert_eq!(got, [11520, 0, 1509978240, 1215971899390074240]);
    }

    #[test]
    fn seeding_is_split_mix() {
        let mut state = 1234567;
        let got: Vec<u64> = (0..3).map(|_| split_mix(&mut state)).collect();
        assert_eq!(got, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    }

    #[test]
    fn order_is_a_permutation_that_seed_and_epoch_determine() {
        let sampler = Sampler { seed: 7, shuffle: true };
        let a = sampler.order(0, 100);
        assert_eq!(a, sampler.order(0, 100));
        assert_ne!(a, sampler.order(1, 100));
        assert_ne!(a, Sampler { seed: 8, shuffle: true }.order(0, 100));
        let mut sorted = a;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn without_shuffling_the_order_is_the_files() {
        assert_eq!(Sampler { seed: 7, shuffle: false }.order(3, 4), [0, 1, 2, 3]);
    }

    #[test]
    fn every_order_of_three_is_about_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(Sampler { seed: 1, shuffle: true }.order(epoch, 3)).or_insert(0_i32) += 1;
        }
        assert_eq!(counts.len(), 6);
        // Standard deviation of each count is sqrt(6000 · 1/6 · 5/6) < 29; five of them never happen by chance.
        assert!(counts.values().all(|c| (c - 1000).abs() < 145), "{counts:?}");
    }

    #[test]
    fn below_stays_below() {
        let mut rng = Xoshiro256::new(0, 0);
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
        assert!((0..1000).all(|_| rng.below(3) < 3));
    }
}
