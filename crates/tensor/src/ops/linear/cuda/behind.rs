//! One token's input of some layers and the h of their adapters from one kernel: `residual_rms_norm_h` and `glu_h`.

use super::{
    super::{OP, Part},
    call::Call,
    products,
};
use crate::{
    DType, Result, Tensor,
    cuda::{Arg, CudaDevice, Grid, suffix},
    ops::{
        glu::{Activation, cuda::number},
        rms_norm::{Config, cuda::block},
        typed::widened,
    },
};

/// Elements of a row that a thread of the norm holds.
const VALUES: usize = 16;

/// (r, ys), or nothing where the kernel does not serve.
pub(in super::super) fn behind_norm(
    device: CudaDevice,
    x: &Tensor,
    a: &Tensor,
    weight: &Tensor,
    config: Config,
    parts: &[Part],
) -> Result<Option<(Tensor, Vec<Tensor>)>> {
    let Some((lora_a, ranks)) = served(device, [x, a], parts)? else { return Ok(None) };
    let (cols, [threads, rows]) = (x.shape().last(), block(x));
    if rows != 1 || cols > VALUES * threads as usize {
        return Ok(None);
    }
    let weight = widened(OP, "weight", weight)?;
    let empty = |cols: usize| Tensor::empty(x.arena(), x.dtype(), [1, cols]);
    let (mut r, mut y, mut h) = (empty(cols)?, empty(cols)?, empty(ranks)?);
    let args = [
        Arg::write(&mut r)?,
        Arg::write(&mut y)?,
        Arg::write(&mut h)?,
        Arg::read(x)?,
        Arg::read(a)?,
        Arg::read(&weight)?,
        lora_a,
        Arg::F32(config.eps),
        Arg::F32(config.offset),
        Arg::size(cols),
    ];
    let name = format!("residual_rms_norm_h_{}", suffix(OP, x.dtype())?);
    device.launch_early(&name, Grid::new(ranks, threads), &args)?;
    Ok(Some((r, products(&Call::new(device, &y, parts)?, Some(&h), None, 0)?)))
}

/// ys, or nothing where the kernel does not serve.
pub(in super::super) fn behind_gate(
    device: CudaDevice,
    gate: &Tensor,
    up: &Tensor,
    activation: Activation,
    parts: &[Part],
) -> Result<Option<Vec<Tensor>>> {
    let Some((lora_a, ranks)) = served(device, [gate, up], parts)? else { return Ok(None) };
    let cols = gate.shape().last();
    let empty = |cols: usize| Tensor::empty(gate.arena(), gate.dtype(), [1, cols]);
    let (mut y, mut h) = (empty(cols)?, empty(ranks)?);
    let outputs = [Arg::write(&mut y)?, Arg::write(&mut h)?];
    let inputs = [Arg::read(gate)?, Arg::read(up)?, lora_a, number(activation), Arg::size(cols)];
    let name = format!("glu_h_{}", suffix(OP, gate.dtype())?);
    device.launch_early(&name, Grid::new(ranks, 512), &[&outputs[..], &inputs].concat())?;
    Ok(Some(products(&Call::new(device, &y, parts)?, Some(&h), None, 0)?))
}

/// A of all parts and its rows, where kernels for one token may read them and the `operands`: in 16 bits, on 16 bytes, A as it lies.
fn served(device: CudaDevice, operands: [&Tensor; 2], parts: &[Part]) -> Result<Option<(Arg, usize)>> {
    let x = operands[0];
    let call = Call::of_shape(device, x.arena(), x.dtype(), x.shape(), parts)?;
    let one = call.tokens == 1 && call.dtype != DType::F32 && call.inputs.is_multiple_of(8);
    let Some(a) = call.all_a()?.filter(|_| one) else { return Ok(None) };
    let addresses = [a.address, operands[0].address()?, operands[1].address()?];
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    Ok(aligned.then_some((Arg::Pointer(a.address), call.ranks)))
}
