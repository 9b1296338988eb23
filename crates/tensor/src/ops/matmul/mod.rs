//! Matrix multiplication on the CPU: `c (+)= sum_s scale_s a_s b_s + bias`.
//!
//! `c` is a row-major `M x N` matrix; each segment multiplies an `M x K_s` by a `K_s x N` operand. Operands are f32,
//! bf16, f16, blockwise 4-bit or row-wise 8-bit matrices, read as stored or transposed; sums are always f32.
//! Several segments are one product over the concatenated reduction: `y = [x | h] [W | sB]^T` and
//! `dx = [dy | t] [W ; A]` each read and write `c` as often as their base product alone.
//!
//! # Paths
//! * [`gemv`]: up to four rows against row-major weights (generation). Every weight is read and decoded once.
//! * [`fused`]: several products over the same rows, with adapters beside the bases: each input is packed once for all.
//! * [`outer`]: `aᵀ b` with few columns (gradients of adapters), where `a` is read where it lies.
//! * [`blocked`]: everything else, in the blocking of BLIS (Van Zee and van de Geijn, 2015). Operands are copied into
//!   zero-padded panels ([`pack`]), where 4-bit and 8-bit weights are decoded, scaled and rounded, each element of
//!   `b` once; a register tile ([`kernels`]) then runs over pairs of panels.
//!
//! # Determinism
//! The reduction is cut into blocks by `K` alone and the blocks are added in order, so the result depends on the
//! shape and the instruction set, never on the number of threads.

mod blocked;
mod fused;
mod gemv;
mod kernels;
mod outer;
mod pack;
mod scratch;
#[cfg(test)]
mod tests;
mod tiles;

pub(crate) use fused::{Input, Product, Term, gemm_rows, gemm_rows_first};
pub(crate) use outer::{Outer, add_outer};

use half::{bf16, f16};
use kernels::Kernel;
use nibble_nf4::BlocksView;

/// Where an operand's elements come from: a row-major matrix, read as f32. `ld` is the distance between rows.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Single precision.
    F32 { data: &'a [f32], ld: usize },
    /// Brain floating point.
    Bf16 { data: &'a [bf16], ld: usize },
    /// Half precision.
    F16 { data: &'a [f16], ld: usize },
    /// Blockwise 4-bit codes of a contiguous matrix with `cols` columns.
    Blocks { view: BlocksView<'a>, cols: usize },
    /// Row-wise 8-bit codes (LLM.int8): `value = code * row_scale[row] / 127`.
    Int8 { codes: &'a [i8], row_scale: &'a [f32], ld: usize },
}

/// A stored matrix, and whether the product reads its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    /// The stored matrix.
    pub(crate) source: Source<'a>,
    /// Whether the logical matrix is the transpose of the stored one.
    pub(crate) transposed: bool,
}

impl<'a> Operand<'a> {
    /// The matrix as it is stored.
    pub(crate) fn new(source: Source<'a>) -> Self {
        Self { source, transposed: false }
    }

    /// The transpose of the stored matrix.
    pub(crate) fn transpose(source: Source<'a>) -> Self {
        Self { source, transposed: true }
    }
}

/// One product of the sum: `scale * a b`, where `a` is `M x k` and `b` is `k x N` (after their transpositions).
///
/// `scale` multiplies the smaller operand (`a` if `M <= N`) before that operand is rounded to the precision.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    /// The left operand, `M x k`.
    pub(crate) a: Operand<'a>,
    /// The right operand, `k x N`.
    pub(crate) b: Operand<'a>,
    /// Length of the reduction.
    pub(crate) k: usize,
    /// Factor of the product.
    pub(crate) scale: f32,
}

/// The result, row-major `M x N` and contiguous.
pub(crate) enum Output<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Brain floating point, rounded once from the f32 sum.
    Bf16(&'a mut [bf16]),
    /// Half precision, rounded once from the f32 sum.
    F16(&'a mut [f16]),
}

/// What the elements of both operands are rounded to before they are multiplied; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precision {
    /// Not rounded.
    F32,
    /// Rounded to bf16, ties to even. With AVX-512 BF16 subnormal operands and sums count as zero.
    Bf16,
    /// Rounded to f16, ties to even.
    F16,
}

/// `c = sum_s scale_s a_s b_s + bias`, or `c += …` with `accumulate`; `bias` has `n` elements.
///
/// Without segments the sum is zero. The caller has checked the shapes: slices shorter than their shape panic.
pub(crate) fn gemm(
    c: Output,
    accumulate: bool,
    m: usize,
    n: usize,
    segments: &[Segment],
    bias: Option<&[f32]>,
    precision: Precision,
) {
    gemm_with(Kernel::best(precision), c, accumulate, m, n, segments, bias, precision);
}

/// `dst[s * width + lane] = src[lane * ld + s]` for `lanes <= width` rows of `steps` words.
pub(crate) fn transpose(src: &[f32], ld: usize, lanes: usize, steps: usize, dst: &mut [f32], width: usize) {
    Kernel::best(Precision::F32).transpose(src, ld, lanes, steps, dst, width);
}

/// [`gemm`] on a given instruction set.
fn gemm_with(
    kernel: Kernel,
    c: Output,
    accumulate: bool,
    m: usize,
    n: usize,
    segments: &[Segment],
    bias: Option<&[f32]>,
    precision: Precision,
) {
    if m == 0 || n == 0 {
        return;
    }
    let problem = Problem { kernel, precision, m, n, segments, accumulate, bias };
    if gemv::fits(&problem) {
        gemv::gemv(&problem, c);
    } else {
        blocked::gemm(&problem, c);
    }
}

/// The arguments of one call, without its output.
struct Problem<'a> {
    kernel: Kernel,
    precision: Precision,
    m: usize,
    n: usize,
    segments: &'a [Segment<'a>],
    accumulate: bool,
    bias: Option<&'a [f32]>,
}

impl Problem<'_> {
    /// Whether `b` is the smaller operand, and so the one that is scaled.
    fn scales_b(&self) -> bool {
        self.n < self.m
    }

    /// Multiply-adds of the whole product.
    fn work(&self) -> usize {
        self.m * self.n * self.segments.iter().map(|s| s.k).sum::<usize>()
    }
}

impl Output<'_> {
    /// Reads `out.len()` elements from `start` on.
    fn load(&self, start: usize, out: &mut [f32], kernel: Kernel) {
        let range = start..start + out.len();
        match self {
            Self::F32(c) => out.copy_from_slice(&c[range]),
            Self::Bf16(c) => kernel.widen_bf16(&c[range], out),
            Self::F16(c) => half::slice::HalfFloatSliceExt::convert_to_f32_slice(&c[range], out),
        }
    }

    /// Writes `values` from `start` on.
    fn store(&mut self, start: usize, values: &[f32], kernel: Kernel) {
        match self {
            Self::F32(c) => Row::F32(c).store(start, values, kernel),
            Self::Bf16(c) => Row::Bf16(c).store(start, values, kernel),
            Self::F16(c) => Row::F16(c).store(start, values, kernel),
        }
    }

    /// The same place for a while.
    fn reborrow(&mut self) -> Output<'_> {
        match self {
            Self::F32(c) => Output::F32(c),
            Self::Bf16(c) => Output::Bf16(c),
            Self::F16(c) => Output::F16(c),
        }
    }

    /// Read as an operand with rows of `ld`.
    fn source(&self, ld: usize) -> Source<'_> {
        match self {
            Self::F32(data) => Source::F32 { data, ld },
            Self::Bf16(data) => Source::Bf16 { data, ld },
            Self::F16(data) => Source::F16 { data, ld },
        }
    }

    /// Calls `store` with each row, numbered, in parallel if asked to.
    fn for_each_row(&mut self, n: usize, parallel: bool, store: impl Fn(usize, Row) + Sync) {
        match self {
            Self::F32(c) => each_chunk(c, n, parallel, |i, row| store(i, Row::F32(row))),
            Self::Bf16(c) => each_chunk(c, n, parallel, |i, row| store(i, Row::Bf16(row))),
            Self::F16(c) => each_chunk(c, n, parallel, |i, row| store(i, Row::F16(row))),
        }
    }
}

impl Output<'_> {
    /// The first `len` elements and the others.
    fn split_at(self, len: usize) -> (Self, Self) {
        match self {
            Self::F32(c) => both(c.split_at_mut(len), Output::F32),
            Self::Bf16(c) => both(c.split_at_mut(len), Output::Bf16),
            Self::F16(c) => both(c.split_at_mut(len), Output::F16),
        }
    }
}

fn both<T, U>((a, b): (T, T), f: impl Fn(T) -> U) -> (U, U) {
    (f(a), f(b))
}

/// Rows of f32 this far apart share one set of a first-level cache.
const ALIASING: usize = 1024;

/// Whether rows this far apart share sets of the caches: a column of tiles would not stay there between blocks.
fn aliases(ld: usize) -> bool {
    ld.is_multiple_of(ALIASING)
}

/// One row of an [`Output`].
enum Row<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
}

impl Row<'_> {
    /// Writes `values` from column `start` on.
    fn store(&mut self, start: usize, values: &[f32], kernel: Kernel) {
        let range = start..start + values.len();
        match self {
            Self::F32(row) => row[range].copy_from_slice(values),
            Self::Bf16(row) => kernel.narrow_bf16(values, &mut row[range]),
            Self::F16(row) => {
                half::slice::HalfFloatSliceExt::convert_from_f32_slice(&mut row[range], values);
            }
        }
    }
}

/// Runs `f` on consecutive chunks of `data`, numbered, on the thread pool only where it is asked for and pays.
fn each_chunk<T: Send>(data: &mut [T], size: usize, parallel: bool, f: impl Fn(usize, &mut [T]) + Sync) {
    use rayon::prelude::*;
    if parallel && data.len() > size {
        data.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| f(i, chunk));
    } else {
        for (i, chunk) in data.chunks_mut(size).enumerate() {
            f(i, chunk);
        }
    }
}
