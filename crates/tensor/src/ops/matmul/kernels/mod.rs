//! Register tiles and the conversions around them, one module for each instruction set.
//!
//! A tile adds `steps` outer products of an `mr`-column panel of `a` and an `nr`-row panel of `b` into an `mr x nr`
//! piece of `c`. Panels are made of 32-bit words, `mr` (or `nr`) to a step: a word is one f32, or, for the bf16 tile,
//! two bf16 that follow each other in the reduction (the first in the low half).

#![allow(unsafe_code)] // vector instructions and their pointers, behind the checks of `Kernel`

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
mod portable;

use super::Precision;
use crate::ops::simd::{Level, level, multiplies_pairs};
use half::bf16;

/// The most words a tile of any instruction set has.
pub(super) const MAX_TILE: usize = 14 * 32;

/// Rows and columns of the tiles of [`Kernel::outer`].
pub(super) const OUTER: usize = 16;

/// A set of instructions that this machine has: values are made by [`Kernel::available`] and [`Kernel::best`] alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernel(Isa);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

/// A stretch of a tile's reduction. Tiles sum over several, so that operands are packed one by one and used in any
/// combination.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    /// Words of the reduction.
    pub(super) steps: usize,
    /// The left operand: `mr` words of a step follow each other.
    pub(super) a: &'a [f32],
    /// Distance between steps of `a`: `mr` in a packed panel, the row's length where the columns of a stored matrix are read.
    pub(super) a_step: usize,
    /// A packed panel of the right operand.
    pub(super) b: &'a [f32],
    /// What later tiles read: brought nearer meanwhile, from its start on, a line for every eight steps.
    pub(super) ahead: &'a [f32],
}

impl Isa {
    /// Best first.
    #[cfg(target_arch = "x86_64")]
    const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];
    #[cfg(not(target_arch = "x86_64"))]
    const ALL: [Self; 1] = [Self::Portable];

    /// Whether this machine has it; the standard library caches the answer.
    fn detected(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => level() == Level::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => multiplies_pairs(),
        }
    }

    fn serves(self, precision: Precision) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Avx512Bf16 {
            return precision == Precision::Bf16;
        }
        let _ = precision;
        true
    }
}

/// A loop over elements, compiled for the kernel's instructions.
macro_rules! by_elements {
    ($kernel:expr, $name:ident($($arg:expr),*)) => {
        match $kernel.0 {
            Isa::Portable => portable::$name($($arg),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instructions were detected when the kernel was made.
            Isa::Avx2 => unsafe { avx2::$name($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512::$name($($arg),*) },
        }
    };
}

/// The tile of a size that [`Kernel::fit`] gives.
#[cfg(target_arch = "x86_64")]
macro_rules! by_size {
    ($isa:ident, $size:expr, $($arg:expr),*) => {
        match ($size.0 == avx512::MR, $size.1 == avx512::NR) {
            (true, true) => $isa::tile::<{ avx512::MR }, 2>($($arg),*),
            (true, false) => $isa::tile::<{ avx512::MR }, 1>($($arg),*),
            (false, true) => $isa::tile::<{ avx512::FEW }, 2>($($arg),*),
            (false, false) => $isa::tile::<{ avx512::FEW }, 1>($($arg),*),
        }
    };
}

/// The plain loops over elements, compiled for more instructions.
#[cfg(target_arch = "x86_64")]
macro_rules! elements {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(super) fn widen_bf16(src: &[half::bf16], out: &mut [f32]) {
            super::portable::widen_bf16(src, out);
        }

        #[target_feature(enable = $features)]
        pub(super) fn narrow_bf16(src: &[f32], out: &mut [half::bf16]) {
            super::portable::narrow_bf16(src, out);
        }

        #[target_feature(enable = $features)]
        pub(super) fn round_bf16(values: &mut [f32]) {
            super::portable::round_bf16(values);
        }

        #[target_feature(enable = $features)]
        pub(super) fn pair_bf16(low: &[half::bf16], high: &[half::bf16], out: &mut [f32]) {
            super::portable::pair_bf16(low, high, out);
        }
    };
}
#[cfg(target_arch = "x86_64")]
use elements;

impl Kernel {
    /// Every kernel of this machine that serves the precision, best first.
    pub(super) fn available(precision: Precision) -> impl Iterator<Item = Self> {
        Isa::ALL.into_iter().filter(move |isa| isa.serves(precision) && isa.detected()).map(Self)
    }

    /// The fastest kernel of this machine for the precision.
    pub(super) fn best(precision: Precision) -> Self {
        Self::available(precision).next().unwrap_or(Self(Isa::Portable))
    }

    /// Rows of a tile.
    pub(super) fn mr(self) -> usize {
        match self.0 {
            Isa::Portable => portable::MR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::MR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => avx512::MR,
        }
    }

    /// Columns of a tile.
    pub(super) fn nr(self) -> usize {
        match self.0 {
            Isa::Portable => portable::NR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::NR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => avx512::NR,
        }
    }

    /// Elements of the reduction in a word: 1, or 2 for pairs of bf16.
    pub(super) fn pair(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => 2,
            _ => 1,
        }
    }

    /// Most steps of a block of the reduction. A panel of `b` stays in the first-level cache; where a step is work for fourteen
    /// cycles, the second-level cache feeds it, and fewer blocks are written fewer times.
    pub(super) fn max_steps(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => 320,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => 800,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 576,
            _ => 256,
        }
    }

    /// The smallest tile there is that has so many rows and columns (at least 1, at most `mr` and `nr`).
    pub(super) fn fit(self, rows: usize, columns: usize) -> (usize, usize) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => {
                let rows = if rows <= avx512::FEW { avx512::FEW } else { avx512::MR };
                (rows, if columns <= avx512::NR / 2 { avx512::NR / 2 } else { avx512::NR })
            }
            _ => (self.mr(), self.nr()),
        }
    }

    /// One tile: `c (+)= Σ a b` over the runs; rows of `c` are `ldc` apart. `size` is one of [`Kernel::fit`]: the first rows and
    /// columns of the panels.
    pub(super) fn tile(self, runs: &[Run], c: &mut [f32], ldc: usize, add: bool, size: (usize, usize)) {
        let (mr, nr) = (self.mr(), self.nr());
        for run in runs.iter().filter(|run| run.steps > 0) {
            assert!(run.a.len() >= (run.steps - 1) * run.a_step + mr, "short panel of a");
            assert!(run.b.len() >= run.steps * nr, "short panel of b");
        }
        assert_eq!(size, self.fit(size.0, size.1), "a tile of another size");
        assert!(c.len() >= (size.0 - 1) * ldc + size.1, "short tile of c");
        match self.0 {
            Isa::Portable => portable::tile(runs, c, ldc, add),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instructions were detected when `self` was made; the lengths were checked above.
            Isa::Avx2 => unsafe { avx2::tile(runs, c, ldc, add) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { by_size!(avx512, size, runs, c, ldc, add) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512Bf16 => unsafe { by_size!(avx512bf16, size, runs, c, ldc, add) },
        }
    }

    /// `c[j * OUTER + i]` = the sum over `k` rows of `a[row * lda + i]` times element j of `b`, for kernels of pairs: `i` up
    /// to `width` (at most [`OUTER`], 0 beyond), `b` a packed panel of [`OUTER`] columns.
    pub(super) fn outer(self, a: &[bf16], lda: usize, k: usize, width: usize, b: &[f32], c: &mut [f32; OUTER * OUTER]) {
        assert!(self.pair() == 2 && width <= OUTER, "a tile of another kernel or width");
        assert!(k == 0 || a.len() >= (k - 1) * lda + width, "short rows of a");
        assert!(b.len() >= k.div_ceil(2) * OUTER, "short panel of b");
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instructions were detected when `self` was made; the lengths were checked above.
            Isa::Avx512Bf16 => unsafe { avx512bf16::outer(a, lda, k, width, b, c) },
            _ => unreachable!("only one kernel has pairs"),
        }
    }

    /// `dst[s * width + lane] = src[lane * ld + s]` for `lanes <= width` rows of `steps` words.
    pub(super) fn transpose(self, src: &[f32], ld: usize, lanes: usize, steps: usize, dst: &mut [f32], width: usize) {
        if lanes == 0 || steps == 0 {
            return;
        }
        assert!(lanes <= width, "more lanes than the panel has");
        assert!(src.len() >= (lanes - 1) * ld + steps, "short rows");
        assert!(dst.len() >= (steps - 1) * width + lanes, "short panel");
        match self.0 {
            Isa::Portable => portable::transpose(src, ld, 0..lanes, 0..steps, dst, width),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instructions were detected when `self` was made; the lengths were checked above.
            Isa::Avx2 => unsafe { avx2::transpose(src, ld, lanes, steps, dst, width) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512::transpose(src, ld, lanes, steps, dst, width) },
        }
    }

    /// The dot product of two slices of one length.
    pub(super) fn dot(self, x: &[f32], y: &[f32]) -> f32 {
        assert_eq!(x.len(), y.len(), "dot product of unequal lengths");
        match self.0 {
            Isa::Portable => portable::dot(x, y),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: every other instruction set includes AVX2 and FMA; the lengths are equal.
            _ => unsafe { avx2::dot(x, y) },
        }
    }

    /// Widens bf16 to f32, exactly.
    pub(super) fn widen_bf16(self, src: &[bf16], out: &mut [f32]) {
        assert_eq!(src.len(), out.len(), "widening to another length");
        by_elements!(self, widen_bf16(src, out));
    }

    /// Rounds f32 to bf16, ties to even.
    pub(super) fn narrow_bf16(self, src: &[f32], out: &mut [bf16]) {
        assert_eq!(src.len(), out.len(), "narrowing to another length");
        by_elements!(self, narrow_bf16(src, out));
    }

    /// Rounds f32 to the nearest bf16 in place, ties to even.
    pub(super) fn round_bf16(self, values: &mut [f32]) {
        by_elements!(self, round_bf16(values));
    }

    /// `out[i]` = the word of `low[i]` and `high[i]`.
    pub(super) fn pair_bf16(self, low: &[bf16], high: &[bf16], out: &mut [f32]) {
        assert!(low.len() == out.len() && high.len() == out.len(), "pairs of unequal lengths");
        by_elements!(self, pair_bf16(low, high, out));
    }
}
