//! Attention on Hopper's own instructions, for 16-bit types, head sizes up to 128 and scores without a soft cap.

use super::{Config, Documents, Saved, Sizes, Wanted, cuda::delta};
use crate::{
    DType, Result, Tensor,
    cuda::{Arg, CudaDevice, Grid, TensorMap, suffix},
    ops::rope::RopeTable,
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

/// Whether the backward pass turns gradients of heads like these back: whole heads, of a size that there is an instance of, where
/// the two of a pair lie in one thread's registers.
pub(super) fn turns_back(sizes: Sizes, table: &RopeTable) -> bool {
    matches!(sizes.head_size, 64 | 128) && 2 * table.cos.shape().last() == sizes.head_size
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

    /// What turns gradients back: positions, cos and sin, or nothing.
    fn turn_back(&self, table: Option<&RopeTable>) -> Result<[Arg; 3]> {
        let Some(RopeTable { cos, sin }) = table else { return Ok([Arg::NONE; 3]) };
        Ok([Arg::read(self.documents.positions())?, Arg::read(cos)?, Arg::read(sin)?])
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
    saved: &Saved<'_>,
    documents: &Documents,
    heads: Sizes,
    config: Config,
    wanted: Wanted<'_>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { d_o, q, k, v, o, lse } = *saved;
    let call = Call::new(device, documents, heads, config);
    let delta = delta(device, o, d_o, documents, heads)?;
    let shapes = [q, k, v].map(Tensor::shape);
    let alone = |shape| Tensor::empty(q.arena(), q.dtype(), shape);
    let [dq, mut dk, mut dv] = match wanted.side_by_side {
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
    let tiles = call.slots_of(64);
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
    let turn = call.turn_back(wanted.rope)?;
    let args = [&gradients[..], &inputs, &turn].concat();
    let suffix = suffix(OP, q.dtype())?;
    let grid = call.persistent(call.slots_of(128) * heads.kv_heads * parts, 384, 1536 * call.d + 34816);
    device.launch(&format!("attention_bwd_sm90_{suffix}_d{}", call.d), grid, &args)?;
    if let Some(kv_sums) = kv_sums {
        let sizes = [Arg::U64(k.numel() as u64), Arg::size(heads.kv_heads * heads.head_size), Arg::size(parts), Arg::size(ld)];
        let args = [&gradients[..], &[Arg::read(&kv_sums)?], &sizes].concat();
        device.launch(&format!("attention_dkv_{suffix}"), Grid::over(k.numel(), 512, 256), &args)?;
    }
    Ok((query_gradient(&call, dq, &sums, &turn)?, dk, dv))
}

/// Heads that a block of the kernel takes in turn, so that it reads cos and sin once for all: where there are blocks enough.
const IN_TURN: usize = 4;

/// dq from its f32 sums over the key tiles.
fn query_gradient(call: &Call<'_>, mut dq: Tensor, sums: &Tensor, turn: &[Arg; 3]) -> Result<Tensor> {
    let (tiles, heads) = (call.slots_of(64), call.heads.heads);
    let many = tiles * heads >= 4 * IN_TURN * call.device.info().multiprocessors;
    let (address, ld) = dq.rows_address_mut()?;
    let args = [
        Arg::Pointer(address),
        Arg::read(sums)?,
        call.offsets()?,
        call.docs(),
        call.tokens(),
        Arg::size(heads),
        Arg::size(call.heads.head_size),
        Arg::F32(call.config.scale),
        Arg::size(ld),
    ];
    let args = [&args[..], turn].concat();
    let rows = if many { heads.div_ceil(IN_TURN) } else { heads };
    let grid = Grid { blocks: [tiles as u32, rows as u32, 1], threads: [2 * call.d as u32, 1], shared: 0 };
    call.device.launch(&format!("attention_dq_{}_d{}", suffix(OP, dq.dtype())?, call.d), grid, &args)?;
    Ok(dq)
}

/// Into how many parts the query heads of a group are dealt: enough that the device has two tiles a multiprocessor.
fn parts(tiles: usize, group: usize, multiprocessors: usize) -> usize {
    let wanted = (2 * multiprocessors).div_ceil(tiles.max(1));
    (1..=group).find(|&parts| parts >= wanted && group.is_multiple_of(parts)).unwrap_or(group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Arena, Device,
        cuda::{ComputeCapability, DeviceInfo},
        ops::attention::{self, cuda},
    };

    fn gpu(capability: ComputeCapability) -> CudaDevice {
        let (name, driver) = ("a GPU of attention's tests".to_owned(), 13_000);
        CudaDevice::dry(&DeviceInfo { ordinal: 0, name, capability, memory: 80 << 30, multiprocessors: 132, driver })
    }

    fn table(arena: &Arena, half: usize, positions: usize) -> RopeTable {
        RopeTable::new(arena, &vec![1.0; half], 1.0, positions).unwrap()
    }

    /// A device that only counts checks each launch's arguments against the kernel's.
    #[test]
    fn launches_of_the_backward_pass_are_as_their_kernels_have_it() {
        let config = Config { scale: 0.1, window: Some(300), softcap: None };
        for capability in [ComputeCapability::HOPPER, ComputeCapability::new(8, 6)] {
            let arena = Arena::on(Device::Cuda(gpu(capability)), usize::MAX).unwrap();
            let documents = Documents::new(&arena, &[0, 700, 8000]).unwrap();
            for (dtype, size) in [(DType::Bf16, 64), (DType::Bf16, 128), (DType::F16, 128), (DType::Bf16, 96), (DType::F32, 64)] {
                let heads = |heads| Tensor::zeros(&arena, dtype, [8000, heads, size]).unwrap();
                let [d_o, q, k, v, o] = [32, 32, 8, 8, 32].map(heads);
                let lse = Tensor::zeros(&arena, DType::F32, [32, 8000]).unwrap();
                let saved = Saved { d_o: &d_o, q: &q, k: &k, v: &v, o: &o, lse: &lse };
                let table = table(&arena, size / 2, 8000);
                for (side_by_side, rope) in [(None, None), (None, Some(&table)), (Some(8), None), (Some(8), Some(&table))] {
                    let (dq, dk, dv) = attention::backward_to(&saved, &documents, config, Wanted { side_by_side, rope }).unwrap();
                    assert_eq!([dq.dims(), dk.dims(), dv.dims()], [q.dims(), k.dims(), v.dims()]);
                    let hopper = capability == ComputeCapability::HOPPER && dtype != DType::F32;
                    assert_eq!(dk.continues(&dq), hopper && side_by_side.is_some(), "{capability:?} {dtype:?} {size}");
                }
            }
        }
    }

    #[test]
    fn whole_heads_of_64_and_128_are_turned_on_hopper_in_16_bits() {
        let config = Config { scale: 0.1, window: None, softcap: None };
        let turns = |capability, dtype, head_size, half, config| {
            let (arena, sizes) = (Arena::new(Device::Cpu), Sizes { heads: 4, kv_heads: 2, head_size });
            cuda::turns_back(gpu(capability), dtype, sizes, config, Some(&table(&arena, half, 1)))
        };
        let hopper = ComputeCapability::HOPPER;
        for (dtype, size) in [(DType::Bf16, 64), (DType::Bf16, 128), (DType::F16, 64), (DType::F16, 128)] {
            assert!(turns(hopper, dtype, size, size / 2, config));
            assert!(!turns(hopper, dtype, size, size / 4, config), "a part of each head");
            assert!(!turns(ComputeCapability::new(8, 6), dtype, size, size / 2, config));
            assert!(!turns(hopper, dtype, size, size / 2, Config { softcap: Some(30.0), ..config }));
        }
        assert!(!turns(hopper, DType::Bf16, 96, 48, config));
        assert!(!turns(hopper, DType::F32, 64, 32, config));
        let sizes = Sizes { heads: 4, kv_heads: 2, head_size: 64 };
        assert!(!cuda::turns_back(gpu(hopper), DType::Bf16, sizes, config, None));
    }
}
