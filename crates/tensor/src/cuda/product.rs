//! Products of many rows by a kernel of our own (`product_sm90.cu`), where it keeps a Hopper GPU busier than cuBLASLt's.

use super::{
    context::CudaDevice,
    launch::{Arg, Grid, TensorMap, suffix},
    matmul::{Gemm, Matrix},
};
use crate::{DType, Result};

/// Rows and columns of a cluster's tile.
const TILE: usize = 256;
/// Rows of a box of A, and of B as it lies [n, k]; of B [k, n] and of C.
const HALF: u32 = 128;
const BOX: u32 = 64;
/// `PRODUCT_BYTES`.
const SHARED: u32 = 4 * 49_152 + 4 * 8192 + 64;
/// The share of the tiles' places that must be filled, in eighths: else the library's choice of smaller tiles takes less time.
const FILLED: usize = 7;

impl CudaDevice {
    /// C = A B, or A Bᵀ, if the kernel serves it; false where it is left to cuBLASLt.
    pub(super) fn product(self, gemm: &Gemm) -> Result<bool> {
        if !self.serves(gemm) {
            return Ok(false);
        }
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
        let clusters = self.clusters().min(tiles(m, n));
        let grid = Grid { shared: SHARED, ..Grid::new(2 * clusters, 384) };
        self.launch_early(&format!("product_{turned}sm90_{}", suffix("product", input)?), grid, &args)?;
        Ok(true)
    }

    fn clusters(self) -> usize {
        self.info().multiprocessors / 2
    }

    fn serves(self, gemm: &Gemm) -> bool {
        let capability = self.info().capability;
        let plain = gemm.alpha == 1.0 && !gemm.accumulate && gemm.bias.is_none() && !gemm.a.transposed;
        let typed = gemm.input == gemm.output && matches!(gemm.input, DType::Bf16 | DType::F16);
        let aligned = |address: u64, ld: usize| address.is_multiple_of(16) && ld.is_multiple_of(8);
        (capability.major, capability.minor) == (9, 0)
            && plain
            && typed
            && aligned(gemm.a.address, gemm.a.ld)
            && aligned(gemm.b.address, gemm.b.ld)
            && aligned(gemm.c, gemm.ldc)
            && self.is_filled(gemm)
    }

    /// Whether the tiles fill the device in all rounds but for a little, and are full themselves.
    fn is_filled(self, gemm: &Gemm) -> bool {
        let rounds = tiles(gemm.m, gemm.n).div_ceil(self.clusters().max(1));
        8 * gemm.m * gemm.n >= FILLED * rounds * self.clusters() * TILE * TILE
    }
}

fn tiles(m: usize, n: usize) -> usize {
    m.div_ceil(TILE) * n.div_ceil(TILE)
}
