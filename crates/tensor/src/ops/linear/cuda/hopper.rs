//! The products of adapters that read x, each by a kernel of our own that reads it once (`lora_sm90.cu`): x Aᵀ and tᵀ x for 16-bit
//! types and few ranks, where the library's kernels run at less than half of the memory's rate.

use super::{
    super::OP,
    call::{Call, rows},
};
use crate::{
    DType, Result,
    cuda::{Arg, Grid, Matrix, TensorMap, suffix},
};

/// Blocks that share a reduction.
const SPLIT: usize = 4;
/// Rows (for dA: columns) of x a cluster, and threads of a block: as `lora_sm90.cu` says.
const WIDE: usize = 128;
const THREADS: u32 = 288;
/// Tokens from which these kernels fill the device.
const MANY_TOKENS: usize = 1024;

/// Whether these kernels serve a call's A, and matrices at `others` beside it.
fn serves(call: &Call<'_, '_>, a: Matrix, others: &[u64]) -> Result<bool> {
    let capability = call.device.info().capability;
    let addresses = [a.address, rows(call.x()?)?.address];
    Ok((capability.major, capability.minor) == (9, 0)
        && matches!(call.dtype, DType::Bf16 | DType::F16)
        && call.tokens >= MANY_TOKENS
        && call.ranks <= 64
        && call.ranks.is_multiple_of(8)
        && call.inputs.is_multiple_of(8)
        && addresses.iter().chain(others).all(|address| address.is_multiple_of(16)))
}

/// h = x Aᵀ with the A of all parts; false where it is not served.
pub(super) fn adapter_inputs(call: &Call<'_, '_>, a: Matrix, h: Matrix) -> Result<bool> {
    if !serves(call, a, &[h.address])? {
        return Ok(false);
    }
    let n = if call.ranks <= 32 { 32 } else { 64 };
    let args = [
        Arg::Pointer(h.address),
        Arg::NONE,
        Arg::Map(TensorMap::rows(rows(call.x()?)?, [call.tokens, call.inputs], call.dtype, WIDE as u32)?),
        Arg::Map(TensorMap::rows(a, [call.ranks, call.inputs], call.dtype, n)?),
        Arg::size(call.tokens),
        Arg::size(call.inputs),
        Arg::size(call.ranks),
        Arg::size(h.ld),
        Arg::size(h.ld),
    ];
    let grid = Grid { shared: 4 * (16_384 + 128 * n) + 64, ..Grid::new(SPLIT * call.tokens.div_ceil(WIDE), THREADS) };
    call.device.launch(&format!("lora_h_sm90_{}_r{n}", suffix(OP, call.dtype)?), grid, &args)?;
    Ok(true)
}

/// dA += tᵀ x with the t of all parts, at the address of the first's; false where it is not served.
pub(super) fn add_a_gradient(call: &Call<'_, '_>, t: Matrix, da: u64) -> Result<bool> {
    if !serves(call, t, &[])? {
        return Ok(false);
    }
    let args = [
        Arg::Pointer(da),
        Arg::Map(TensorMap::rows(rows(call.x()?)?, [call.tokens, call.inputs], call.dtype, 64)?),
        Arg::Map(TensorMap::rows(t, [call.tokens, call.ranks], call.dtype, 64)?),
        Arg::size(call.tokens),
        Arg::size(call.inputs),
        Arg::size(call.ranks),
    ];
    let grid = Grid { shared: 98_368, ..Grid::new(SPLIT * call.inputs.div_ceil(WIDE), THREADS) };
    call.device.launch(&format!("lora_da_sm90_{}", suffix(OP, call.dtype)?), grid, &args)?;
    Ok(true)
}
