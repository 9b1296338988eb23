//! One source for a loop, compiled for AVX-512, AVX2 and the baseline, chosen at run time.
// `unsafe` here is the call of a function compiled for instructions that were just detected.
#![allow(unsafe_code)]

use std::sync::OnceLock;

/// The widest instruction set that loops are compiled for and this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the target guarantees.
    Portable,
    /// AVX2 and FMA, 256 bits.
    Avx2,
    /// AVX-512 F, BW, DQ, VL, 512 bits.
    Avx512,
}

/// The level of this machine, detected once.
#[must_use]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                return Level::Avx512;
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Portable
    })
}

/// Whether this machine multiplies pairs of bf16 (AVX-512 BF16).
pub(crate) fn multiplies_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    return level() == Level::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Defines a function whose body is compiled once for each [`Level`] and chosen at run time.
///
/// Floating-point results are the same at each level: the compiler neither reorders sums nor contracts products, so write
/// reductions over fixed lanes (see [`LANES`]) and avoid `mul_add`.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? { body $(::<$($g),+>)? ($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? { body $(::<$($g),+>)? ($($arg),*) }
                match $crate::ops::simd::level() {
                    // SAFETY: the level says that this machine has these instructions.
                    #[allow(unsafe_code)]
                    $crate::ops::simd::Level::Avx512 => return unsafe { avx512 $(::<$($g),+>)? ($($arg),*) },
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    $crate::ops::simd::Level::Avx2 => return unsafe { avx2 $(::<$($g),+>)? ($($arg),*) },
                    $crate::ops::simd::Level::Portable => {}
                }
            }
            #[allow(unreachable_code)]
            body $(::<$($g),+>)? ($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Lanes that reductions are split into, whatever the instruction set.
pub(crate) const LANES: usize = 16;

/// Sum of `f(i)` for `i` in `0 .. n`, over fixed lanes: the same bits at each [`Level`].
#[inline(always)]
pub(crate) fn sum_lanes(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = n / LANES * LANES;
    for base in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(base + lane);
        }
    }
    for i in whole..n {
        lanes[i - whole] += f(i);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// eˣ within 2 units in the last place, without a branch, so that loops over it vectorise; 0 below -87.3, +inf above 88.7.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; e^r by a polynomial of degree 6; 2ⁿ by the exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = clamped - n * 0.693_359_4;
    let r = r - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let e = p * (r * r) + r + 1.0;
    // n may be 128 at the upper end: two factors keep each exponent in range.
    let n = shifted.to_bits() as i32 - MAGIC.to_bits() as i32;
    let half = n >> 1;
    let scale = f32::from_bits(((half + 127) as u32) << 23);
    let rest = f32::from_bits(((n - half + 127) as u32) << 23);
    let y = e * scale * rest;
    let y = if x < -87.336_54 { 0.0 } else { y };
    let y = if x > 88.722_83 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -870_000..887_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    multiversion! {
        fn dot(a: &[f32], b: &[f32]) -> f32 {
            sum_lanes(a.len(), |i| a[i] * b[i])
        }
    }

    #[test]
    fn lanes_sum_every_element_once() {
        for n in 0..70 {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let ones = vec![1.0; n];
            assert_eq!(dot(&a, &ones), (0..n).sum::<usize>() as f32);
        }
    }
}
