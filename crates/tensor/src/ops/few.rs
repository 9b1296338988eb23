//! Products of a few rows with dense 16-bit matrices on a GPU, `dense_few.cu`: the head and the adapters' inputs in generation.

use crate::{
    DType, Result,
    cuda::{Arg, CudaDevice, Gemm, Grid, suffix},
};

/// Rows of x at most; from 5 on cuBLASLt's kernels read a large matrix as fast.
const FEW: usize = 4;
/// Warps of a block.
const WARPS: usize = 8;

/// C = A Bᵀ by a kernel for few rows, where it serves: plain rows, one type of input. False: it is left to kernels for many.
pub(crate) fn product(device: CudaDevice, gemm: &Gemm) -> Result<bool> {
    let Gemm { m, n, k, a, b, c, ldc, alpha, accumulate, bias, input, output } = *gemm;
    let plain = alpha == 1.0 && !accumulate && bias.is_none() && !a.transposed && b.transposed && [a.ld, b.ld, ldc] == [k, k, n];
    let aligned = (a.address | b.address) % 16 == 0 && k.is_multiple_of(8);
    if !plain || !aligned || m > FEW || input == DType::F32 || !(output == input || output == DType::F32) {
        return Ok(false);
    }
    let multiprocessors = device.info().multiprocessors;
    // Warps of a row: more where rows are too few to fill the device.
    let mut group = 1;
    while group < WARPS && n * group < multiprocessors * 32 {
        group *= 2;
    }
    let rows = WARPS / group;
    let suffix = suffix("few rows", input)?;
    let name = if output == input { format!("dense_few_{suffix}") } else { format!("dense_few_f32_{suffix}") };
    let args = [
        Arg::Pointer(c),
        Arg::Pointer(a.address),
        Arg::Pointer(b.address),
        Arg::size(m),
        Arg::size(n),
        Arg::size(k),
        Arg::size(group),
    ];
    device.launch_early(&name, Grid::new(n.div_ceil(rows).min(8 * multiprocessors), 32 * WARPS as u32), &args)?;
    Ok(true)
}
