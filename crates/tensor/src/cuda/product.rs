//! Products of many rows by kernels of our own (`product_sm90.cu`, `product_gated_sm90.cu`), where they keep a Hopper GPU busier than
//! cuBLASLt's.

use super::{
    context::CudaDevice,
    launch::{Arg, Grid, TensorMap, suffix},
    matmul::{Gemm, Matrix},
    widen::WidenBeside,
};
use crate::{DType, Result};

/// Rows and columns of a cluster's tile.
const TILE: usize = 256;
/// Rows of a box of A, and of B as it lies [n, k]; of B [k, n] and of C.
const HALF: u32 = 128;
const BOX: u32 = 64;
/// Columns of the boxes that a gated product leaves.
const NARROW: u32 = 32;
/// `PRODUCT_BYTES`.
const SHARED: u32 = 4 * 49_152 + 4 * 8192 + 8 * 8 + 2 * 8;
/// The share of the tiles' places that must be filled, in eighths: else the library's choice of smaller tiles takes less time.
const FILLED: usize = 7;

/// A gated unit around a product: its kernels' name for the activation, and how its matrices [m, f] lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatedUnit {
    pub(crate) activation: &'static str,
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
}

impl CudaDevice {
    /// Whether a product is served; else it is left to cuBLASLt.
    pub(crate) fn serves_gemm(self, gemm: &Gemm) -> bool {
        let &Gemm { m, n, a, b, c, ldc, input, .. } = gemm;
        let result = Matrix { address: c, ld: ldc, transposed: false };
        let plain = gemm.alpha == 1.0 && !gemm.accumulate && gemm.bias.is_none() && !a.transposed && gemm.output == input;
        plain && self.serves_product([m, n], input) && [a, b, result].iter().all(is_aligned)
    }

    /// C = A B, or A Bᵀ, of a product that is served.
    pub(crate) fn product(self, gemm: &Gemm, ahead: &WidenBeside) -> Result<()> {
        let &Gemm { m, n, k, a, b, c, ldc, input, .. } = gemm;
        let result = Matrix { address: c, ld: ldc, transposed: false };
        let (turned, b_sizes, b_rows) = if b.transposed { ("", [n, k], HALF) } else { ("turned_", [k, n], BOX) };
        let args = [
            Arg::Map(TensorMap::rows(self, result, [m, n], input, BOX)?),
            Arg::Map(TensorMap::rows(self, a, [m, k], input, HALF)?),
            Arg::Map(TensorMap::rows(self, b, b_sizes, input, b_rows)?),
            Arg::size(m),
            Arg::size(n),
            Arg::size(k),
        ];
        self.launch_product(&format!("product_{turned}sm90_{}", suffix("product", input)?), [m, n], &args, ahead)
    }

    /// [gate | up] = A Bᵀ, B [2 f, k] with gate's rows before up's, and y = act(gate) up, for k columns.
    ///
    /// The caller has asked [`Self::serves_product`] for [m, 2 f]; f is a multiple of 8, and all is aligned.
    pub(crate) fn gated_product(
        self,
        [a, b]: [Matrix; 2],
        [m, f, k]: [usize; 3],
        unit: GatedUnit,
        y: Matrix,
        dtype: DType,
        ahead: &WidenBeside,
    ) -> Result<()> {
        let left = |matrix| TensorMap::boxes(self, matrix, [m, f], dtype, [NARROW, BOX]).map(Arg::Map);
        let args = [
            left(unit.gate)?,
            left(unit.up)?,
            left(y)?,
            Arg::Map(TensorMap::rows(self, a, [m, k], dtype, HALF)?),
            Arg::Map(TensorMap::paired(self, b, [f, k], dtype)?),
            Arg::size(m),
            Arg::size(2 * f),
            Arg::size(k),
        ];
        let name = format!("product_gated_sm90_{}_{}", suffix("gated product", dtype)?, unit.activation);
        self.launch_product(&name, [m, 2 * f], &args, ahead)
    }

    /// With dy = A B [m, f], which is not written: the gradients of gate and up, which may lie over those, and act(gate) up to `y`.
    ///
    /// The caller has asked [`Self::serves_product`] for [m, f], and all is aligned.
    pub(crate) fn gated_gradients(
        self,
        [a, b]: [Matrix; 2],
        [m, f, k]: [usize; 3],
        unit: GatedUnit,
        gradients: [Matrix; 2],
        y: Option<Matrix>,
        dtype: DType,
        ahead: &WidenBeside,
    ) -> Result<()> {
        let boxes = |matrix, sizes, rows| TensorMap::rows(self, matrix, sizes, dtype, rows).map(Arg::Map);
        let args = [
            boxes(gradients[0], [m, f], BOX)?,
            boxes(gradients[1], [m, f], BOX)?,
            boxes(y.unwrap_or(unit.gate), [m, f], BOX)?,
            boxes(unit.gate, [m, f], BOX)?,
            boxes(unit.up, [m, f], BOX)?,
            boxes(a, [m, k], HALF)?,
            boxes(b, [k, f], BOX)?,
            Arg::size(m),
            Arg::size(f),
            Arg::size(k),
            Arg::U32(y.is_some().into()),
        ];
        let name = format!("product_gated_bwd_sm90_{}_{}", suffix("gated gradients", dtype)?, unit.activation);
        self.launch_product(&name, [m, f], &args, ahead)
    }

    fn launch_product(self, name: &str, [m, n]: [usize; 2], args: &[Arg], ahead: &WidenBeside) -> Result<()> {
        let args = [args, &[Arg::Pointer(ahead.out), Arg::Widen(ahead.widen)]].concat();
        let grid = Grid { shared: SHARED, ..Grid::new(2 * self.clusters().min(tiles(m, n)), 384) };
        self.launch_early(name, grid, &args)
    }

    fn clusters(self) -> usize {
        self.info().multiprocessors / 2
    }

    /// Whether the kernels serve a result [m, n] of a type: its tiles fill the device in all rounds but for a little, and are full
    /// themselves.
    pub(crate) fn serves_product(self, [m, n]: [usize; 2], dtype: DType) -> bool {
        let capability = self.info().capability;
        let clusters = self.clusters().max(1);
        let rounds = tiles(m, n).div_ceil(clusters);
        (capability.major, capability.minor) == (9, 0)
            && matches!(dtype, DType::Bf16 | DType::F16)
            && rounds > 0
            && 8 * m * n >= FILLED * rounds * clusters * TILE * TILE
    }
}

/// Whether the copy engine can read and write a matrix.
pub(crate) fn is_aligned(matrix: &Matrix) -> bool {
    matrix.address.is_multiple_of(16) && matrix.ld.is_multiple_of(8)
}

fn tiles(m: usize, n: usize) -> usize {
    m.div_ceil(TILE) * n.div_ceil(TILE)
}
