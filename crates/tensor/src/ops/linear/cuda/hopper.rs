//! The products of adapters that read x, each by a kernel of our own that reads it once (`lora_sm90.cu`): x Aᵀ and tᵀ x for 16-bit
//! types and few ranks.

use super::{
    super::OP,
    call::{Call, rows},
};
use crate::{
    DType, Result,
    cuda::{Arg, Grid, Matrix, TensorMap, suffix},
};

/// Blocks that share a reduction, for h.
const H_SPLIT: usize = 2;
/// Rows of x (for dA: columns) a cluster: as `lora_sm90.cu` says.
const H_ROWS: usize = 64;
const DA_COLUMNS: usize = 128;
/// Tokens from which these kernels fill the device.
const MANY_TOKENS: usize = 1024;

/// Whether the device is one and computes in 16 bits.
pub(super) fn is_hopper(call: &Call<'_, '_>) -> bool {
    let capability = call.device.info().capability;
    (capability.major, capability.minor) == (9, 0) && matches!(call.dtype, DType::Bf16 | DType::F16)
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

/// Columns of h and t that an instance has.
fn wide(call: &Call<'_, '_>) -> u32 {
    if call.ranks <= 32 { 32 } else { 64 }
}

/// h = x Aᵀ with the A of all parts, written to `beside` as well; false where it is not served.
pub(super) fn adapter_inputs(call: &Call<'_, '_>, a: Matrix, h: Matrix, beside: Option<Matrix>) -> Result<bool> {
    let place = beside.unwrap_or(h);
    if !serves(call, &[a, h, place])? {
        return Ok(false);
    }
    let n = wide(call);
    let args = [
        Arg::Pointer(h.address),
        Arg::Pointer(beside.map_or(0, |beside| beside.address)),
        Arg::Map(TensorMap::rows(call.device, rows(call.x()?)?, [call.tokens, call.inputs], call.dtype, H_ROWS as u32)?),
        Arg::Map(TensorMap::rows(call.device, a, [call.ranks, call.inputs], call.dtype, n)?),
        Arg::size(call.tokens),
        Arg::size(call.inputs),
        Arg::size(call.ranks),
        Arg::size(h.ld),
        Arg::size(place.ld),
    ];
    let grid = Grid { shared: 98_432, ..Grid::new(H_SPLIT * call.tokens.div_ceil(H_ROWS), 160) };
    call.device.launch_early(&format!("lora_h_sm90_{}_r{n}", suffix(OP, call.dtype)?), grid, &args)?;
    Ok(true)
}

/// dA += tᵀ x with the t of all parts, at the address of the first's; false where it is not served.
pub(super) fn add_a_gradient(call: &Call<'_, '_>, t: Matrix, da: u64) -> Result<bool> {
    if !serves(call, &[t])? {
        return Ok(false);
    }
    let n = wide(call);
    let args = [
        Arg::Pointer(da),
        Arg::Map(TensorMap::rows(call.device, rows(call.x()?)?, [call.tokens, call.inputs], call.dtype, 64)?),
        Arg::Map(TensorMap::boxes(call.device, t, [call.tokens, call.ranks], call.dtype, [n, 64])?),
        Arg::size(call.tokens),
        Arg::size(call.inputs),
        Arg::size(call.ranks),
    ];
    // As many blocks of a cluster as leave the device with all of them at once, three a multiprocessor; eight only for few columns.
    let (tiles, multiprocessors) = (call.inputs.div_ceil(DA_COLUMNS), call.device.info().multiprocessors);
    let split = match tiles {
        few if 8 * few <= multiprocessors => 8,
        some if 4 * some < 3 * multiprocessors => 4,
        _ => 2,
    };
    let grid = Grid { shared: 3 * (16_384 + 128 * n) + 48, ..Grid::new(split * tiles, 288) };
    // Not early: beside the launch before it its clusters would lie unevenly over the device.
    call.device.launch(&format!("lora_da_sm90_{}_r{n}_split{split}", suffix(OP, call.dtype)?), grid, &args)?;
    Ok(true)
}
