//! A small counter-based generator: the n-th number of a stream is a function of seed, stream and n alone.

use crate::{Result, cuda::CudaDevice};

/// SplitMix64 over a counter (Steele, Lea, Flood 2014), so that a dropout mask can be made again in the backward pass and on
/// another device without being stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rng {
    key: u64,
    /// Where the path below begins: what a device is told anew each step, while paths stay.
    root: u64,
    /// Up to four indices of 16 bits from the root to this stream, the first in the lowest bits.
    path: u64,
    depth: u32,
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// The stream with this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self::at(mix(seed.wrapping_add(GOLDEN)))
    }

    /// An independent stream below this one.
    #[must_use]
    pub const fn stream(self, index: u64) -> Self {
        let key = mix(self.key ^ mix(index.wrapping_add(GOLDEN)));
        if self.depth == 4 || index > 0xffff {
            return Self::at(key);
        }
        Self { key, root: self.root, path: self.path | index << (16 * self.depth), depth: self.depth + 1 }
    }

    const fn at(key: u64) -> Self {
        Self { key, root: key, path: 0, depth: 0 }
    }

    /// The same numbers, as a stream that others are counted from.
    #[must_use]
    pub const fn rooted(self) -> Self {
        Self::at(self.key)
    }

    /// Tells a GPU the root of the masks to come: before a step that is captured or replayed, which reads it from there.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn announce(self, device: CudaDevice) -> Result<()> {
        device.dropout_root(self.root).map(drop)
    }

    /// What numbers are counted from.
    pub(crate) const fn key(self) -> u64 {
        self.key
    }

    /// The root's key, and the path from it to this stream with its depth.
    pub(crate) const fn parts(self) -> (u64, u64, u32) {
        (self.root, self.path, self.depth)
    }

    /// The n-th 64 random bits.
    #[must_use]
    #[inline]
    pub const fn bits(self, n: u64) -> u64 {
        mix(self.key.wrapping_add(n.wrapping_add(1).wrapping_mul(GOLDEN)))
    }

    /// The n-th number, uniform in [0, 1) with 24 bits.
    #[must_use]
    #[inline]
    pub fn uniform(self, n: u64) -> f32 {
        (self.bits(n) >> 40) as f32 * (1.0 / 16_777_216.0)
    }

    /// The n-th number of the standard normal distribution (Box-Muller).
    #[must_use]
    pub fn normal(self, n: u64) -> f32 {
        let bits = self.bits(n);
        let u = ((bits >> 32) as f64 + 0.5) / 4_294_967_296.0;
        let v = (bits & 0xffff_ffff) as f64 / 4_294_967_296.0;
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn moments_are_those_of_the_distributions() {
        let rng = Rng::new(1).stream(2);
        let n = 100_000u64;
        let uniform: f64 = (0..n).map(|i| f64::from(rng.uniform(i))).sum::<f64>() / n as f64;
        let variance: f64 = (0..n).map(|i| f64::from(rng.normal(i)).powi(2)).sum::<f64>() / n as f64;
        assert!((uniform - 0.5).abs() < 0.005 && (variance - 1.0).abs() < 0.02, "{uniform} {variance}");
    }

    #[test]
    fn a_path_from_the_root_leads_to_the_same_key() {
        let deep = Rng::new(7).stream(70_000).stream(3).stream(65_535).stream(0).stream(9);
        let (root, path, depth) = deep.parts();
        let mut again = Rng::at(root);
        for level in 0..depth {
            again = again.stream(path >> (16 * level) & 0xffff);
        }
        assert_eq!((again.key, depth), (deep.key, 4));
        assert_eq!(deep.stream(1).bits(5), deep.rooted().stream(1).bits(5));
    }

    #[test]
    fn streams_differ_and_repeat() {
        assert_eq!(Rng::new(7).bits(3), Rng::new(7).bits(3));
        assert_ne!(Rng::new(7).bits(3), Rng::new(8).bits(3));
        assert_ne!(Rng::new(7).stream(0).bits(3), Rng::new(7).stream(1).bits(3));
    }
}
