//! The products of adapters that read x, each by a kernel of our own that reads it once (`lora_sm90.cu`): x Aᵀ and tᵀ x for 16-bit
//! types and few ranks; and the plan of the pass over dy for t and dB (`lora_t_db_sm90.cu`).

use super::{
    super::OP,
    OnePass,
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

/// Whether the device is one and computes in 16 bits.
pub(super) fn is_hopper(call: &Call<'_, '_>) -> bool {
    let capability = call.device.info().capability;
    (capability.major, capability.minor) == (9, 0) && matches!(call.dtype, DType::Bf16 | DType::F16)
}

/// The pass over dy as `lora_t_db_sm90.cu` says; nothing where it is not served.
pub(super) fn one_pass(call: &Call<'_, '_>, dy: Matrix, outputs: usize, rank: usize) -> Option<OnePass> {
    let (wide, deep) = (outputs.div_ceil(1024), rank.div_ceil(16));
    let serves = is_hopper(call) && outputs.is_multiple_of(8) && dy.ld.is_multiple_of(8) && dy.address.is_multiple_of(16);
    let clusters = call.device.info().multiprocessors * 7 / 8 / (wide * deep * SPLIT);
    serves.then(|| {
        // A block takes eight steps at least.
        let clusters = clusters.min(call.tokens.div_ceil(8 * 16 * SPLIT)).max(1);
        OnePass { wide, shares: clusters, grid: Grid { shared: 149_504, ..Grid::new(clusters * SPLIT * wide * deep, 256) } }
    })
}

/// Whether these kernels serve a call, with its x and `others` as they lie.
fn serves(call: &Call<'_, '_>, others: &[Matrix]) -> Result<bool> {
    let x = rows(call.x()?)?;
    let aligned = |matrix: &Matrix| matrix.address.is_multiple_of(16) && matrix.ld.is_multiple_of(8);
    Ok(is_hopper(call)
        && call.tokens >= MANY_TOKENS
        && call.ranks <= 64
        && call.ranks.is_multiple_of(8)
        && call.inputs.is_multiple_of(8)
        && [x].iter().chain(others).all(aligned))
}

/// h = x Aᵀ with the A of all parts, written to `beside` as well; false where it is not served.
pub(super) fn adapter_inputs(call: &Call<'_, '_>, a: Matrix, h: Matrix, beside: Option<Matrix>) -> Result<bool> {
    let place = beside.unwrap_or(h);
    if !serves(call, &[a, h, place])? {
        return Ok(false);
    }
    let n = if call.ranks <= 32 { 32 } else { 64 };
    let args = [
        Arg::Pointer(h.address),
        Arg::Pointer(beside.map_or(0, |beside| beside.address)),
        Arg::Map(TensorMap::rows(call.device, rows(call.x()?)?, [call.tokens, call.inputs], call.dtype, WIDE as u32)?),
        Arg::Map(TensorMap::rows(call.device, a, [call.ranks, call.inputs], call.dtype, n)?),
        Arg::size(call.tokens),
        Arg::size(call.inputs),
        Arg::size(call.ranks),
        Arg::size(h.ld),
        Arg::size(place.ld),
    ];
    let grid = Grid { shared: 4 * (16_384 + 128 * n) + 64, ..Grid::new(SPLIT * call.tokens.div_ceil(WIDE), THREADS) };
    call.device.launch(&format!("lora_h_sm90_{}_r{n}", suffix(OP, call.dtype)?), grid, &args)?;
    Ok(true)
}

/// dA += tᵀ x with the t of all parts, at the address of the first's; false where it is not served.
pub(super) fn add_a_gradient(call: &Call<'_, '_>, t: Matrix, da: u64) -> Result<bool> {
    if !serves(call, &[t])? {
        return Ok(false);
    }
    let args = [
        Arg::Pointer(da),
        Arg::Map(TensorMap::rows(call.device, rows(call.x()?)?, [call.tokens, call.inputs], call.dtype, 64)?),
        Arg::Map(TensorMap::rows(call.device, t, [call.tokens, call.ranks], call.dtype, 64)?),
        Arg::size(call.tokens),
        Arg::size(call.inputs),
        Arg::size(call.ranks),
    ];
    let grid = Grid { shared: 98_368, ..Grid::new(SPLIT * call.inputs.div_ceil(WIDE), THREADS) };
    call.device.launch(&format!("lora_da_sm90_{}", suffix(OP, call.dtype)?), grid, &args)?;
    Ok(true)
}
