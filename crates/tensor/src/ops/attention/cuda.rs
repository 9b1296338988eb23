//! Attention on a GPU: tiles in shared memory, one block a tile of queries or keys of one document.

use super::{Config, Documents, Saved, Sizes, Wanted, hopper};
use crate::{
    DType, Error, Result, Tensor,
    cuda::{Arg, CudaDevice, Grid, suffix},
    ops::{rope::RopeTable, sample::Texts},
};

const OP: &str = "attention";

/// Head sizes that there are kernels for; others take the next one.
const HEAD_SIZES: [usize; 5] = [32, 64, 96, 128, 256];

/// The same of the decoding kernels.
const DECODE_SIZES: [usize; 3] = [64, 128, 256];

fn instance(sizes: &[usize], head_size: usize) -> Result<usize> {
    let found = sizes.iter().copied().find(|&size| head_size <= size);
    found.filter(|_| head_size.is_multiple_of(8)).ok_or(Error::Argument {
        op: OP,
        argument: "head_size",
        expected: "a multiple of 8, at most 256, on a GPU",
        found: head_size,
    })
}

/// The arguments that end every kernel's list.
fn sizes(documents: &Documents, sizes: Sizes, config: Config) -> Result<[Arg; 9]> {
    Ok([
        Arg::read(documents.offsets())?,
        Arg::size(documents.ranges().len()),
        Arg::size(documents.tokens()),
        Arg::size(sizes.heads),
        Arg::size(sizes.kv_heads),
        Arg::size(sizes.head_size),
        Arg::F32(config.scale),
        Arg::size(config.window.unwrap_or(0)),
        Arg::F32(config.softcap.unwrap_or(0.0)),
    ])
}

/// Blocks of tiles of `rows` for all documents, each of which may end with a part of one.
fn tiles(documents: &Documents, rows: usize) -> u32 {
    (documents.tokens() / rows + documents.ranges().len()) as u32
}

pub(super) fn forward(
    device: CudaDevice,
    [q, k, v]: [&Tensor; 3],
    documents: &Documents,
    heads: Sizes,
    config: Config,
    room: usize,
) -> Result<(Tensor, Tensor)> {
    if hopper::serves(device, q.dtype(), heads, config) {
        return hopper::forward(device, [q, k, v], documents, heads, config, room);
    }
    let mut o = Tensor::empty(q.arena(), q.dtype(), q.shape())?;
    let mut lse = Tensor::empty(q.arena(), DType::F32, [heads.heads, documents.tokens()])?;
    let d = instance(&HEAD_SIZES, heads.head_size)?;
    let outputs = [Arg::write(&mut o)?, Arg::write(&mut lse)?, Arg::read(q)?, Arg::read(k)?, Arg::read(v)?];
    let args = [&outputs[..], &sizes(documents, heads, config)?].concat();
    let (rows, shared) = if q.dtype() == DType::F32 {
        let keys = if d == 256 { 16 } else { 32 };
        (32, 4 * ((32 + keys) * (d + 4) + 32 * (keys + 4)))
    } else {
        let keys = if d == 256 { 32 } else { 64 };
        (64, 2 * d * (64 + 2 * keys))
    };
    let blocks = [tiles(documents, rows), heads.heads as u32, 1];
    let grid = Grid { blocks, threads: [128, 1], shared: shared as u32 };
    device.launch(&format!("attention_fwd_{}_d{d}", suffix(OP, q.dtype())?), grid, &args)?;
    Ok((o, lse))
}

/// Whether [`backward`] turns dq and dk back before their rotary embedding.
pub(super) fn turns_back(device: CudaDevice, dtype: DType, heads: Sizes, config: Config, table: Option<&RopeTable>) -> bool {
    table.is_some_and(|table| hopper::serves(device, dtype, heads, config) && hopper::turns_back(heads, table))
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
    if hopper::serves(device, q.dtype(), heads, config) {
        return hopper::backward(device, saved, documents, heads, config, wanted);
    }
    let suffix = suffix(OP, q.dtype())?;
    let delta = delta(device, o, d_o, documents, heads)?;
    let [mut dq, mut dk, mut dv] = [
        Tensor::empty(q.arena(), q.dtype(), q.shape())?,
        Tensor::empty(q.arena(), q.dtype(), k.shape())?,
        Tensor::empty(q.arena(), q.dtype(), k.shape())?,
    ];
    let d = instance(&HEAD_SIZES, heads.head_size)?;
    let tensors = [
        Arg::write(&mut dq)?,
        Arg::write(&mut dk)?,
        Arg::write(&mut dv)?,
        Arg::read(d_o)?,
        Arg::read(q)?,
        Arg::read(k)?,
        Arg::read(v)?,
        Arg::read(lse)?,
        Arg::read(&delta)?,
    ];
    let args = [&tensors[..], &sizes(documents, heads, config)?].concat();
    let (rows, shared) = backward_tile(d, q.dtype());
    let blocks = [tiles(documents, rows), (heads.kv_heads + heads.heads) as u32, 1];
    let grid = Grid { blocks, threads: [128, 1], shared: shared as u32 };
    device.launch(&format!("attention_bwd_{suffix}_d{d}"), grid, &args)?;
    Ok((dq, dk, dv))
}

/// δ of every row and head, F32 [H, T].
pub(super) fn delta(device: CudaDevice, o: &Tensor, d_o: &Tensor, documents: &Documents, heads: Sizes) -> Result<Tensor> {
    let mut delta = Tensor::empty(o.arena(), DType::F32, [heads.heads, documents.tokens()])?;
    let (address, ld) = o.rows_address()?;
    let args = [
        Arg::write(&mut delta)?,
        Arg::Pointer(address),
        Arg::read(d_o)?,
        Arg::size(documents.tokens()),
        Arg::size(heads.heads),
        Arg::size(heads.head_size),
        Arg::size(ld),
    ];
    let rows = documents.tokens() * heads.heads;
    device.launch(&format!("attention_delta_{}", suffix(OP, o.dtype())?), Grid::over(rows, 8, 128), &args)?;
    Ok(delta)
}

/// Rows of a block and its shared memory, as `attention_bwd.cu` says.
fn backward_tile(d: usize, dtype: DType) -> (usize, usize) {
    if dtype == DType::F32 {
        let (rows, stream) = if d == 256 { (16, 8) } else { (32, 16) };
        return (rows, 8 * (rows + stream) * (d + 4) + 4 * rows * (stream + 4) + 8 * stream);
    }
    let rows = if d == 256 { 32 } else { 64 };
    let stream = match d {
        32 | 64 => 64,
        96 | 128 => 32,
        _ => 16,
    };
    (rows, 4 * d * (rows + 2 * stream) + 16 * stream)
}

/// Query rows of a call that the decoding kernels serve.
const FEW: usize = 8;

/// Queries of the newest tokens against a cache.
pub(super) fn cached(
    device: CudaDevice,
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    len: usize,
    heads: Sizes,
    config: Config,
) -> Result<Tensor> {
    let new = q.dims()[0];
    if new <= FEW && new < len {
        return decode(device, q, keys, values, len, heads, config);
    }
    // The last rows of one document of all tokens so far: the queries of the others are not asked for.
    let all = Documents::continuation(q.arena(), 0, len)?;
    let padded = if new == len {
        q.clone()
    } else {
        let mut padded = Tensor::zeros(q.arena(), q.dtype(), [len, heads.heads, heads.head_size])?;
        padded.copy_rows(len - new, q)?;
        padded
    };
    let (o, _) = forward(device, [&padded, &keys.rows(0, len)?, &values.rows(0, len)?], &all, heads, config, 0)?;
    o.rows(len - new, new)
}

/// A few queries of one text.
fn decode(
    device: CudaDevice,
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    len: usize,
    heads: Sizes,
    config: Config,
) -> Result<Tensor> {
    let cache = Cached { keys, values, lens: device.number(len)?, slots: None, capacity: 0, longest: len };
    split(device, q, q.dims()[0], 1, &cache, heads, config)
}

/// The newest token of each text.
pub(super) fn step(
    device: CudaDevice,
    [mut q, k, v]: [Tensor; 3],
    [keys, values]: [&mut Tensor; 2],
    texts: &Texts,
    table: &RopeTable,
    heads: Sizes,
    config: Config,
) -> Result<Tensor> {
    let (lens, slots) = (texts.lens.address()?, texts.slots.address()?);
    let args = [
        Arg::write(&mut q)?,
        Arg::write(keys)?,
        Arg::write(values)?,
        Arg::read(&k)?,
        Arg::read(&v)?,
        Arg::Pointer(lens),
        Arg::Pointer(slots),
        Arg::read(&table.cos)?,
        Arg::read(&table.sin)?,
        Arg::size(heads.heads),
        Arg::size(heads.kv_heads),
        Arg::size(heads.head_size),
        Arg::size(table.cos.shape().last()),
        Arg::size(texts.capacity()),
    ];
    let blocks = [texts.count() as u32, (heads.heads + 2 * heads.kv_heads) as u32, 1];
    let grid = Grid { blocks, threads: [heads.head_size.div_ceil(2).next_multiple_of(32).min(256) as u32, 1], shared: 0 };
    device.launch_early(&format!("rope_append_{}", suffix(OP, q.dtype())?), grid, &args)?;
    let (capacity, slots) = (texts.capacity(), Some(slots));
    let cache = Cached { keys, values, lens, slots, capacity, longest: capacity };
    split(device, &q, 1, texts.count(), &cache, heads, config)
}

/// Where the keys and values of texts lie.
struct Cached<'a> {
    keys: &'a Tensor,
    values: &'a Tensor,
    /// Addresses of each text's length and slot; no slots for one text.
    lens: u64,
    slots: Option<u64>,
    /// Rows of a slot.
    capacity: usize,
    /// The most tokens of a text.
    longest: usize,
}

/// `new` queries of each of `texts`: the keys are split among blocks, whose sums the last one adds up.
fn split(
    device: CudaDevice,
    q: &Tensor,
    new: usize,
    texts: usize,
    cache: &Cached<'_>,
    heads: Sizes,
    config: Config,
) -> Result<Tensor> {
    let d = instance(&DECODE_SIZES, heads.head_size)?;
    let rows = heads.kv_heads * (new * heads.group()).div_ceil(16);
    let splits = (2 * device.info().multiprocessors / (rows * texts)).min(cache.longest.div_ceil(64)).clamp(1, 256);
    let mut o = Tensor::empty(q.arena(), q.dtype(), q.shape())?;
    let mut partial = Tensor::empty(q.arena(), DType::F32, [texts * rows, splits, 16 * (d + 2)])?;
    let args = [
        Arg::write(&mut o)?,
        Arg::write(&mut partial)?,
        Arg::Pointer(device.zeros("attention_decode", 4 * rows * texts)?),
        Arg::read(q)?,
        Arg::read(cache.keys)?,
        Arg::read(cache.values)?,
        Arg::Pointer(cache.lens),
        Arg::Pointer(cache.slots.unwrap_or(0)),
        Arg::size(cache.capacity),
        Arg::size(new),
        Arg::size(heads.heads),
        Arg::size(heads.kv_heads),
        Arg::size(heads.head_size),
        Arg::F32(config.scale),
        Arg::size(config.window.unwrap_or(0)),
        Arg::F32(config.softcap.unwrap_or(0.0)),
    ];
    let threads = if d == 256 { 64 } else { 128 };
    let blocks = [splits as u32, rows as u32, texts as u32];
    let grid = Grid { blocks, threads: [threads, 1], shared: (512 * d).min(65_536) as u32 };
    device.launch_early(&format!("attention_decode_{}_d{d}", suffix(OP, q.dtype())?), grid, &args)?;
    Ok(o)
}
