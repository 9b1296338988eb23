//! Attention on Hopper's own instructions, for 16-bit types, head sizes up to 128 and scores without a soft cap.

use super::{Config, Documents, Sizes, cuda::delta};
use crate::{
    DType, Result, Tensor,
    cuda::{Arg, CudaDevice, Grid, TensorMap, suffix},
};

const OP: &str = "attention";

/// Whether these kernels serve a call.
pub(super) fn serves(device: CudaDevice, dtype: DType, sizes: Sizes, config: Config) -> bool {
    let capability = device.info().capability;
    (capability.major, capability.minor) == (9, 0)
        && matches!(dtype, DType::Bf16 | DType::F16)
        && sizes.head_size <= 128
        && sizes.head_size.is_multiple_of(8)
        && config.softcap.is_none()
        && config.scale > 0.0
}

/// What a call's launches share.
struct Call<'a> {
    device: CudaDevice,
    documents: &'a Documents,
    heads: Sizes,
    config: Config,
    window: u32,
    /// Of the instance.
    d: usize,
}

impl<'a> Call<'a> {
    fn new(device: CudaDevice, documents: &'a Documents, heads: Sizes, config: Config) -> Self {
        let d = if heads.head_size <= 64 { 64 } else { 128 };
        Self { device, documents, heads, config, window: config.window.unwrap_or(0) as u32, d }
    }

    fn docs(&self) -> Arg {
        Arg::size(self.documents.ranges().len())
    }

    fn tokens(&self) -> Arg {
        Arg::size(self.documents.tokens())
    }

    fn offsets(&self) -> Result<Arg> {
        Arg::read(self.documents.offsets())
    }

    /// The tables of the order in which tiles are worked on: of the forward pass with heads of 64 and of 128, and of the backward
    /// pass.
    fn order(&self, like: &Tensor) -> Result<[Tensor; 3]> {
        self.documents.order(self.window, || {
            let table = |rows| Tensor::empty(like.arena(), DType::U32, [self.slots_of(rows)]);
            let [mut forward_d64, mut forward_d128, mut backward] = [table(192)?, table(128)?, table(128)?];
            let args = [
                Arg::write(&mut forward_d64)?,
                Arg::write(&mut forward_d128)?,
                Arg::write(&mut backward)?,
                self.offsets()?,
                self.docs(),
                self.tokens(),
                Arg::U32(self.window),
            ];
            self.device.launch("attention_order", Grid::over(self.slots_of(128), 256, 256), &args)?;
            Ok([forward_d64, forward_d128, backward])
        })
    }

    /// Tiles of `rows` tokens, at most: each document may end with a part of one.
    fn slots_of(&self, rows: usize) -> usize {
        self.documents.tokens() / rows + self.documents.ranges().len()
    }

    fn persistent(&self, tiles: usize, threads: u32, shared: usize) -> Grid {
        let blocks = tiles.min(self.device.info().multiprocessors) as u32;
        Grid { blocks: [blocks, 1, 1], threads: [threads, 1], shared: shared as u32 }
    }
}

pub(super) fn forward(
    device: CudaDevice,
    [q, k, v]: [&Tensor; 3],
    documents: &Documents,
    heads: Sizes,
    config: Config,
    room: usize,
) -> Result<(Tensor, Tensor)> {
    let call = Call::new(device, documents, heads, config);
    let mut o = Tensor::with_room(q.arena(), q.dtype(), q.shape(), room)?;
    let mut lse = Tensor::empty(q.arena(), DType::F32, [heads.heads, documents.tokens()])?;
    let [order_d64, order_d128, _] = call.order(q)?;
    // Warpgroups of 64 query rows each: small heads leave registers for a third.
    let (groups, order) = if call.d == 64 { (3, order_d64) } else { (2, order_d128) };
    let (address, ld) = o.rows_address_mut()?;
    let args = [
        Arg::Pointer(address),
        Arg::write(&mut lse)?,
        Arg::Pointer(device.zeros("attention_fwd", 8)?),
        Arg::Map(TensorMap::heads(q, 64 * groups as u32)?),
        Arg::Map(TensorMap::heads(k, 128)?),
        Arg::Map(TensorMap::heads(v, 128)?),
        call.offsets()?,
        Arg::read(&order)?,
        call.docs(),
        call.tokens(),
        Arg::size(heads.heads),
        Arg::size(heads.kv_heads),
        Arg::size(heads.head_size),
        Arg::F32(config.scale),
        Arg::U32(call.window),
        Arg::size(ld),
    ];
    let tiles = call.slots_of(64 * groups) * heads.heads;
    let grid = call.persistent(tiles, 128 * (groups as u32 + 1), 256 * call.d * (groups + 4) + 256);
    device.launch(&format!("attention_fwd_sm90_{}_d{}", suffix(OP, q.dtype())?, call.d), grid, &args)?;
    Ok((o, lse))
}

pub(super) fn backward(
    device: CudaDevice,
    saved: &super::backward::Saved<'_>,
    documents: &Documents,
    heads: Sizes,
    config: Config,
    room: Option<usize>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let super::backward::Saved { d_o, q, k, v, o, lse } = *saved;
    let call = Call::new(device, documents, heads, config);
    let delta = delta(device, o, d_o, documents, heads)?;
    let shapes = [q, k, v].map(Tensor::shape);
    let alone = |shape| Tensor::empty(q.arena(), q.dtype(), shape);
    let [dq, mut dk, mut dv] = match room {
        Some(room) => Tensor::side_by_side(q.arena(), q.dtype(), shapes, room)?,
        None => [alone(shapes[0])?, alone(shapes[1])?, alone(shapes[2])?],
    };
    let ((dk_at, ld), (dv_at, _)) = (dk.rows_address_mut()?, dv.rows_address_mut()?);
    let gradients = [Arg::Pointer(dk_at), Arg::Pointer(dv_at)];
    let parts = parts(call.slots_of(128) * heads.kv_heads, heads.group(), device.info().multiprocessors);
    let mut kv_sums = match parts {
        1 => None,
        _ => Some(Tensor::empty(q.arena(), DType::F32, [parts, 2, k.numel()])?),
    };
    let tiles = documents.tokens() / 64 + documents.ranges().len();
    let mut sums = Tensor::empty(q.arena(), DType::F32, [heads.heads, tiles, 64 * call.d])?;
    let turns = device.zeros("attention_bwd", 4 * (2 + 2 * heads.heads * tiles))?;
    let [_, _, order] = call.order(q)?;
    let inputs = [
        kv_sums.as_mut().map_or(Ok(Arg::NONE), Arg::write)?,
        Arg::write(&mut sums)?,
        Arg::Pointer(turns),
        Arg::Map(TensorMap::heads(q, 64)?),
        Arg::Map(TensorMap::heads(k, 128)?),
        Arg::Map(TensorMap::heads(v, 128)?),
        Arg::Map(TensorMap::heads(d_o, 64)?),
        Arg::read(lse)?,
        Arg::read(&delta)?,
        call.offsets()?,
        Arg::read(&order)?,
        call.docs(),
        call.tokens(),
        Arg::size(heads.heads),
        Arg::size(heads.kv_heads),
        Arg::size(heads.head_size),
        Arg::size(parts),
        Arg::F32(config.scale),
        Arg::U32(call.window),
        Arg::size(ld),
    ];
    let args = [&gradients[..], &inputs].concat();
    let suffix = suffix(OP, q.dtype())?;
    let grid = call.persistent(call.slots_of(128) * heads.kv_heads * parts, 384, 1536 * call.d + 34816);
    device.launch(&format!("attention_bwd_sm90_{suffix}_d{}", call.d), grid, &args)?;
    if let Some(kv_sums) = kv_sums {
        let sizes = [Arg::U64(k.numel() as u64), Arg::size(heads.kv_heads * heads.head_size), Arg::size(parts), Arg::size(ld)];
        let args = [&gradients[..], &[Arg::read(&kv_sums)?], &sizes].concat();
        device.launch(&format!("attention_dkv_{suffix}"), Grid::over(k.numel(), 512, 256), &args)?;
    }
    Ok((query_gradient(&call, dq, &sums, tiles)?, dk, dv))
}

/// dq from its f32 sums over the key tiles.
fn query_gradient(call: &Call<'_>, mut dq: Tensor, sums: &Tensor, tiles: usize) -> Result<Tensor> {
    let (address, ld) = dq.rows_address_mut()?;
    let args = [
        Arg::Pointer(address),
        Arg::read(sums)?,
        call.offsets()?,
        call.docs(),
        call.tokens(),
        Arg::size(call.heads.heads),
        Arg::size(call.heads.head_size),
        Arg::F32(call.config.scale),
        Arg::size(ld),
    ];
    let grid = Grid { blocks: [tiles as u32, call.heads.heads as u32, 1], threads: [256, 1], shared: 0 };
    call.device.launch(&format!("attention_dq_{}_d{}", suffix(OP, dq.dtype())?, call.d), grid, &args)?;
    Ok(dq)
}

/// Into how many parts the query heads of a group are dealt: enough that the device has two tiles a multiprocessor.
fn parts(tiles: usize, group: usize, multiprocessors: usize) -> usize {
    let wanted = (2 * multiprocessors).div_ceil(tiles.max(1));
    (1..=group).find(|&parts| parts >= wanted && group.is_multiple_of(parts)).unwrap_or(group)
}
