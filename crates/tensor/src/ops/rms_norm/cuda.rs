//! The kernels of `rms_norm.cu`.

use super::{Config, OP};
use crate::{
    DType, Result, Tensor, TensorMut,
    cuda::{Arg, CudaDevice, Grid, suffix},
    ops::typed::widened,
};

/// Elements of a row that a thread holds, as the source says.
const VALUES: usize = 16;

/// Threads of a row, and rows of a block: as the top comment of `rms_norm.cu` says.
fn block(x: &Tensor) -> [u32; 2] {
    let packs = (x.shape().last() * x.dtype().size()).div_ceil(16).max(1) as u32;
    if packs <= 32 {
        let threads = packs.next_power_of_two();
        return [threads, 128 / threads];
    }
    [x.shape().last().div_ceil(16).next_multiple_of(32).min(512) as u32, 1]
}

/// Where y begins, and the pitch of its rows: of the last size, but where there is room behind those of the first.
fn output(y: &mut Tensor) -> Result<(Arg, Arg)> {
    let (last, dense) = (y.shape().last(), y.is_dense());
    let (address, pitch) = y.rows_address_mut()?;
    Ok((Arg::Pointer(address), Arg::size(if dense { last } else { pitch })))
}

/// As many blocks as the device holds at once, of `resident` threads a multiprocessor: a block keeps w for its rows.
fn grid(device: CudaDevice, x: &Tensor, resident: usize) -> Grid {
    let threads = block(x);
    let most = device.info().multiprocessors * resident / (threads[0] * threads[1]) as usize;
    let blocks = x.shape().rows().div_ceil(threads[1] as usize).min(most) as u32;
    Grid { blocks: [blocks, 1, 1], threads, shared: 0 }
}

pub(super) fn forward(
    device: CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    config: Config,
    y: &mut Tensor,
    inv: &mut Tensor,
) -> Result<()> {
    let (rows, cols) = (Arg::size(x.shape().rows()), Arg::size(x.shape().last()));
    let (y, ld) = output(y)?;
    let outputs = [y, Arg::write(inv)?];
    let inputs = [Arg::read(x)?, Arg::read(weight)?, Arg::F32(config.eps), Arg::F32(config.offset), rows, cols, ld];
    device.launch_early(
        &format!("rms_norm_fwd_{}", suffix(OP, x.dtype())?),
        grid(device, x, 2048),
        &[&outputs[..], &inputs].concat(),
    )
}

pub(super) fn residual_forward(
    device: CudaDevice,
    x: &Tensor,
    r: &mut Tensor,
    weight: &Tensor,
    config: Config,
    y: &mut Tensor,
    inv: &mut Tensor,
) -> Result<()> {
    let (rows, cols) = (Arg::size(x.shape().rows()), Arg::size(x.shape().last()));
    let a = Arg::read(r)?;
    let (y, ld) = output(y)?;
    let outputs = [Arg::write(r)?, y, Arg::write(inv)?];
    let inputs = [Arg::read(x)?, a, Arg::read(weight)?, Arg::F32(config.eps), Arg::F32(config.offset), rows, cols, ld];
    device.launch_early(
        &format!("residual_rms_norm_fwd_{}", suffix(OP, x.dtype())?),
        grid(device, x, 2048),
        &[&outputs[..], &inputs].concat(),
    )
}

/// r, y and h = y Aᵀ [1, R] of one row x + a, for the A [R, C] at that address; nothing where the kernel does not serve.
pub(in crate::ops) fn residual_forward_with_h(
    device: CudaDevice,
    [x, a]: [&Tensor; 2],
    weight: &Tensor,
    config: Config,
    (lora_a, ranks): (u64, usize),
) -> Result<Option<[Tensor; 3]>> {
    let (cols, [threads, rows]) = (x.shape().last(), block(x));
    let aligned = [x.address()?, a.address()?, lora_a].iter().all(|address| address.is_multiple_of(16));
    // Each block makes all of the norm. 192 rows of A gain by it, 512 and 768 lose: the limit lies between.
    let fits = cols.is_multiple_of(8) && cols <= VALUES * threads as usize && ranks <= 2 * device.info().multiprocessors;
    if x.dtype() == DType::F32 || x.shape().rows() != 1 || rows != 1 || !aligned || !fits {
        return Ok(None);
    }
    let weight = widened(OP, "weight", weight)?;
    let empty = |cols: usize| Tensor::empty(x.arena(), x.dtype(), [1, cols]);
    let (mut r, mut y, mut h) = (empty(cols)?, empty(cols)?, empty(ranks)?);
    let outputs = [Arg::write(&mut r)?, Arg::write(&mut y)?, Arg::write(&mut h)?];
    let constants = [Arg::F32(config.eps), Arg::F32(config.offset), Arg::size(cols)];
    let inputs = [Arg::read(x)?, Arg::read(a)?, Arg::read(&weight)?, Arg::Pointer(lora_a)];
    let name = format!("residual_rms_norm_h_{}", suffix(OP, x.dtype())?);
    device.launch_early(&name, Grid::new(ranks, threads), &[&outputs[..], &inputs, &constants].concat())?;
    Ok(Some([r, y, h]))
}

pub(super) fn backward(
    device: CudaDevice,
    dx: &mut Tensor,
    add: bool,
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    inv: &Tensor,
    config: Config,
    dweight: Option<TensorMut<'_>>,
) -> Result<()> {
    let (rows, cols) = (x.shape().rows(), x.shape().last());
    let grid = grid(device, x, if dweight.is_some() { 512 } else { 2048 });
    let mut partials = None;
    if dweight.is_some() {
        partials = Some(Tensor::empty(x.arena(), DType::F32, [grid.blocks[0] as usize, cols])?);
    }
    let sums = partials.as_mut().map_or(Ok(Arg::NONE), Arg::write)?;
    let (dx, ld) = output(dx)?;
    let args = [
        dx,
        sums,
        Arg::read(dy)?,
        Arg::read(x)?,
        Arg::read(weight)?,
        Arg::read(inv)?,
        Arg::F32(config.offset),
        Arg::size(rows),
        Arg::size(cols),
        Arg::U32(add.into()),
        ld,
    ];
    device.launch(&format!("rms_norm_bwd_{}", suffix(OP, x.dtype())?), grid, &args)?;
    if let (Some(mut dweight), Some(partials)) = (dweight, partials) {
        let args = [Arg::write_view(&mut dweight)?, Arg::read(&partials)?, Arg::U32(grid.blocks[0]), Arg::size(cols)];
        let columns = Grid { blocks: [cols.div_ceil(32) as u32, 1, 1], threads: [32, 16], shared: 0 };
        device.launch("rms_norm_dw", columns, &args)?;
    }
    Ok(())
}
