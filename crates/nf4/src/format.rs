//! The 4-bit code tables, and the thresholds between their levels.
#![expect(clippy::excessive_precision, reason = "the tables are copied digit for digit")]

/// The NormalFloat-4 levels (QLoRA, Dettmers et al. 2023, appendix E): code `i` decodes to `NF4[i] * absmax`.
///
/// Quantiles of a normal distribution, made asymmetric so that 0 is a level, divided by the largest. Ascending.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// The 4-bit float levels of bitsandbytes (1 sign, 2 exponent, 1 mantissa bit; divided by 12): code `i` decodes to `FP4[i] * absmax`.
///
/// Bit 3 of the code is the sign, and the magnitudes are not sorted by code.
pub const FP4: [f32; 16] = [
    0.0,
    0.005208333333,
    0.66666667,
    1.0,
    0.33333333,
    0.5,
    0.16666667,
    0.25,
    -0.0,
    -0.005208333333,
    -0.66666667,
    -1.0,
    -0.33333333,
    -0.5,
    -0.16666667,
    -0.25,
];

/// The NF4 code of `y` is the number of these that `y` is strictly above (bitsandbytes' `dQuantizeNF4`).
pub(crate) const NF4_THRESHOLDS: [f32; 15] = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
];

/// The rank of `|y|` among the FP4 magnitudes is the number of these it is strictly above (bitsandbytes' `dQuantizeFP4`).
///
/// 0.583333, with fewer digits than its neighbours, is what the reference compares against.
pub(crate) const FP4_THRESHOLDS: [f32; 7] = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

/// The FP4 code (sign apart) of each rank.
pub(crate) const FP4_RANK_TO_CODE: [u8; 8] = [0b000, 0b001, 0b110, 0b111, 0b100, 0b101, 0b010, 0b011];

/// A 4-bit code table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// 4-bit NormalFloat, [`NF4`].
    #[default]
    Nf4,
    /// 4-bit float, [`FP4`].
    Fp4,
}

impl Format {
    /// The sixteen levels, indexed by code.
    #[must_use]
    pub const fn table(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// bitsandbytes' name of the format: `nf4` or `fp4`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The code of a value already divided by its block's absmax: the nearest level, a tie to the smaller one (in magnitude for FP4).
    ///
    /// NaN, which arises only in all-zero blocks (0 times 1/0), compares false everywhere and has code 0, as in bitsandbytes on CUDA.
    #[must_use]
    #[inline]
    pub fn encode(self, y: f32) -> u8 {
        let above = |thresholds: &[f32], y: f32| thresholds.iter().map(|&t| u8::from(y > t)).sum::<u8>();
        match self {
            Self::Nf4 => above(&NF4_THRESHOLDS, y),
            Self::Fp4 => {
                let rank = above(&FP4_THRESHOLDS, y.abs());
                FP4_RANK_TO_CODE[usize::from(rank & 7)] | (u8::from(y < 0.0) << 3)
            }
        }
    }
}
