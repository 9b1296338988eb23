//! Products of a few rows with 4-bit matrices, which read the codes themselves: the step of generation, `few_rows.cu`.

use nibble_kernels::ComputeCapability;

use super::{call::Call, hopper::is_hopper};
use crate::{
    Absmax, BlockWeight, DType, Result, Tensor, Weight,
    cuda::{Arg, Grid, suffix},
    ops::{
        dequantize::cuda::code,
        linear::{OP, Part},
    },
};

/// Rows of x at most.
pub(super) const FEW: usize = 8;
/// Matrices of one launch.
const PARTS: usize = 3;
/// Rows of W in a tile, and columns in a unit.
const TILE: usize = 16;
const UNIT: usize = 256;
/// A kernel: warps of its blocks, units whose scales each has under way (none in [`ONE`]), and stages of codes in shared memory.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    warps: usize,
    depth: usize,
    stages: usize,
}

/// For up to 4 rows of x, for more, where x does not fit in shared memory; on Hopper for up to 4 (`few_rows_sm90.cu`), one of whose
/// warps multiplies nothing, and for one (`one_row_sm90.cu`), two of whose warps do not.
const FOUR: Kind = Kind { name: "few_rows", warps: 16, depth: 2, stages: 0 };
const HELD: Kind = Kind { name: "few_rows_held", warps: 16, depth: 2, stages: 0 };
const ANY: Kind = Kind { name: "few_rows_any", warps: 8, depth: 2, stages: 0 };
const BULK: [Kind; 2] = [
    Kind { name: "few_rows_bulk3", warps: 17, depth: 2, stages: 3 },
    Kind { name: "few_rows_bulk2", warps: 17, depth: 2, stages: 2 },
];
const ONE: Kind = Kind { name: "one_row", warps: 10, depth: 0, stages: 3 };
/// Its tiles of a block at most, whose sums lie beside the table's entries; bytes of its stage; and shared memory of which a
/// multiprocessor has no two.
const ONE_TILES: usize = 19;
const ONE_STAGE: usize = TILE * 8 * UNIT / 2;
const ONE_ALONE: u32 = 128 << 10;
/// Bytes of a stage of codes of the others.
const STAGE: usize = TILE * (16 * UNIT / 2 + 64);

impl Kind {
    /// Bytes of shared memory that are not dynamic: maps, and scales of the units under way.
    const fn fixed(self) -> usize {
        4 * (3 * 256 + self.warps * self.depth * 4 * TILE)
    }
}

/// y = x Wᵀ + bias + s h Bᵀ of all parts in one launch, h being [m, ΣR]; nothing for what the kernels do not serve.
pub(super) fn products(call: &Call<'_, '_>, h: Option<&Tensor>) -> Result<Option<Vec<Tensor>>> {
    let Some(blocks) = served(call) else { return Ok(None) };
    let x = call.x()?;
    let Some(plan) = Plan::new(call, &blocks) else { return Ok(None) };
    let mut ys = Vec::with_capacity(blocks.len());
    for part in call.parts {
        ys.push(Tensor::empty(&call.arena, call.dtype, [call.tokens, part.outputs()])?);
    }
    // Copies must live until the launch.
    let biases = call.parts.iter().map(|part| part.bias.as_ref().map(|bias| bias.to_dtype(call.dtype)).transpose());
    let biases = biases.collect::<Result<Vec<_>>>()?;
    let mut list = [Described::NONE; PARTS];
    for (i, described) in list.iter_mut().enumerate().take(blocks.len()) {
        let b = call.pairs[i].as_ref().map(|(_, b)| b);
        *described = Described::new(blocks[i], &call.parts[i], &mut ys[i], biases[i].as_ref(), b)?;
    }
    let mut args: Vec<Arg> = list.iter().map(|part| part.y).collect();
    args.extend([Arg::read(x)?, Arg::read_or_none(h)?, code(call.device, blocks[0])?]);
    let pick = |pick: fn(&Described) -> Arg| list.iter().map(pick).collect::<Vec<_>>();
    for column in [pick(|p| p.packed), pick(|p| p.absmax), pick(|p| p.absmax2), pick(|p| p.map), pick(|p| p.bias), pick(|p| p.b)]
    {
        args.extend(column);
    }
    for column in [pick(|p| p.offset), pick(|p| p.scale), pick(|p| p.n), pick(|p| p.rank)] {
        args.extend(column);
    }
    args.extend([call.tokens, call.inputs, blocks[0].config.block_size].map(Arg::size));
    let grid = Grid { shared: plan.shared as u32, ..Grid::new(plan.blocks, plan.kind.warps as u32 * 32) };
    let name = format!("{}_{}", plan.kind.name, suffix(OP, call.dtype)?);
    if plan.kind.name == ONE.name {
        call.device.launch_spread(&name, grid, ONE_ALONE, &args)?;
    } else if plan.kind.name == ANY.name {
        // It reads x through the first-level cache, of which launches that overlap leave little.
        call.device.launch(&name, grid, &args)?;
    } else {
        call.device.launch_early(&name, grid, &args)?;
    }
    Ok(Some(ys))
}

/// The weights, when all are 4-bit of one format and the sizes are what the kernels take.
fn served<'a>(call: &Call<'_, 'a>) -> Option<Vec<&'a BlockWeight>> {
    let (k, tokens) = (call.inputs, call.tokens);
    if tokens > FEW || call.dtype == DType::F32 || k == 0 || !k.is_multiple_of(64) || !(1..=PARTS).contains(&call.parts.len()) {
        return None;
    }
    let blocks = call.parts.iter().map(|part| match &part.weight {
        Weight::Nf4(blocks) | Weight::Fp4(blocks) => Some(blocks),
        _ => None,
    });
    let blocks = blocks.collect::<Option<Vec<_>>>()?;
    let config = blocks.first()?.config;
    let fits = |b: &&BlockWeight| {
        let one_kind = (b.config.format, b.config.block_size) == (config.format, config.block_size);
        one_kind && config.block_size >= 64 && b.shape.numel() < 1 << 32
    };
    blocks.iter().all(fits).then_some(blocks)
}

/// Which kernel, and with how much of everything.
struct Plan {
    kind: Kind,
    blocks: usize,
    shared: usize,
}

impl Plan {
    fn new(call: &Call<'_, '_>, weights: &[&BlockWeight]) -> Option<Self> {
        let info = call.device.info();
        let outputs: usize = weights.iter().map(|w| w.shape.dims()[0]).sum();
        let tiles = weights.iter().map(|w| w.shape.dims()[0].div_ceil(TILE)).sum::<usize>().max(1);
        let table = if info.capability.major >= 8 { 64 << 10 } else { 32 << 10 };
        // One block a multiprocessor, or `waves` times as many, so that the sums of a block's tiles fit.
        let plan = |kind: Kind, more: usize, waves: usize| {
            let blocks = tiles.min(waves * info.multiprocessors);
            let sums = tiles.div_ceil(blocks) * kind.warps * TILE * call.tokens * 4;
            let shared = table + more + kind.stages * STAGE + sums;
            (shared + kind.fixed() <= most_shared(info.capability)).then_some(Self { kind, blocks, shared })
        };
        let any_waves = |kind, more| (1..=tiles.div_ceil(info.multiprocessors)).find_map(|waves| plan(kind, more, waves));
        let units = call.inputs.div_ceil(UNIT);
        let held = units * UNIT * 2 * call.tokens;
        let few = call.tokens <= 4;
        let regular = is_hopper(call) && weights.iter().all(|weight| regular(weight));
        if call.tokens == 1 && regular && outputs > 0 && tiles <= ONE_TILES * info.multiprocessors {
            let shared = table + ONE.stages * ONE_STAGE;
            return Some(Self { kind: ONE, blocks: tiles.min(info.multiprocessors), shared });
        }
        // A stage has a unit for each of its warps, but for the last of a tile: it pays where few have none.
        let filled = 4 * units >= 3 * units.next_multiple_of(16) || tiles <= info.multiprocessors;
        let bulk = || BULK.into_iter().filter(|_| few && filled && regular).find_map(|kind| plan(kind, held, 1));
        bulk().or_else(|| any_waves(if few { FOUR } else { HELD }, held)).or_else(|| any_waves(ANY, 0))
    }
}

/// Whether a weight's scales are codes of blocks of 64, in rows of whole units.
fn regular(weight: &BlockWeight) -> bool {
    let nested = matches!(weight.absmax, Absmax::Nested { .. });
    nested && weight.config.block_size == 64 && weight.shape.last().is_multiple_of(UNIT)
}

/// Bytes of shared memory that a block may have (CUDA's programming guide, by compute capability).
fn most_shared(capability: ComputeCapability) -> usize {
    match (capability.major, capability.minor) {
        (7, _) => 64 << 10,
        (8, 0 | 7) => 163 << 10,
        (8 | 12, _) => 99 << 10,
        _ => 227 << 10,
    }
}

/// A part's arguments.
#[derive(Clone, Copy)]
struct Described {
    y: Arg,
    packed: Arg,
    absmax: Arg,
    absmax2: Arg,
    map: Arg,
    bias: Arg,
    b: Arg,
    offset: Arg,
    scale: Arg,
    n: Arg,
    rank: Arg,
}

impl Described {
    const NONE: Self = Self {
        y: Arg::NONE,
        packed: Arg::NONE,
        absmax: Arg::NONE,
        absmax2: Arg::NONE,
        map: Arg::NONE,
        bias: Arg::NONE,
        b: Arg::NONE,
        offset: Arg::F32(0.0),
        scale: Arg::F32(0.0),
        n: Arg::U32(0),
        rank: Arg::U32(0),
    };

    fn new(weight: &BlockWeight, part: &Part, y: &mut Tensor, bias: Option<&Tensor>, b: Option<&Tensor>) -> Result<Self> {
        let (absmax, absmax2, map, offset) = match &weight.absmax {
            Absmax::Plain(absmax) => (absmax, Arg::NONE, Arg::NONE, 0.0),
            Absmax::Nested { codes, absmax, offset, map } => (codes, Arg::read(absmax)?, Arg::read(map)?, *offset),
        };
        Ok(Self {
            y: Arg::write(y)?,
            packed: Arg::read(&weight.packed)?,
            absmax: Arg::read(absmax)?,
            absmax2,
            map,
            bias: Arg::read_or_none(bias)?,
            b: Arg::read_or_none(b)?,
            offset: Arg::F32(offset),
            scale: Arg::F32(part.adapter.as_ref().map_or(0.0, |adapter| adapter.scale)),
            n: Arg::size(part.outputs()),
            rank: Arg::size(b.map_or(0, |b| b.shape().last())),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use nibble_nf4::QuantConfig;

    use super::*;
    use crate::{
        Arena, Device, Rng,
        cuda::{CudaDevice, DeviceInfo},
        ops::linear,
    };

    pub(in super::super) fn gpu(capability: ComputeCapability, multiprocessors: usize) -> Arena {
        let (name, driver) = ("a GPU".to_owned(), 13_000);
        let info = DeviceInfo { ordinal: 0, name, capability, memory: 80 << 30, multiprocessors, driver };
        Arena::on(Device::Cuda(CudaDevice::dry(&info)), usize::MAX).unwrap()
    }

    /// A device that only counts checks each launch's arguments against the kernel's.
    #[test]
    fn launches_of_few_rows_are_as_their_kernels_have_it() {
        for (capability, multiprocessors) in [(ComputeCapability::HOPPER, 132), (ComputeCapability::new(8, 6), 84)] {
            let arena = gpu(capability, multiprocessors);
            let shapes: [(&[usize], usize); 5] =
                [(&[14_336], 4096), (&[4096, 1024, 1024], 4096), (&[1000], 192), (&[64], 28_672), (&[151_936], 1536)];
            for ((outputs, inputs), rows) in shapes.into_iter().flat_map(|shape| [1, 2, 4, 8].map(|rows| (shape, rows))) {
                let part = |&n: &usize| Part {
                    weight: Weight::random(&arena, [n, inputs], &QuantConfig::default(), 0.02, Rng::new(1)).unwrap(),
                    bias: None,
                    adapter: None,
                };
                let parts: Vec<Part> = outputs.iter().map(part).collect();
                let x = Tensor::zeros(&arena, DType::Bf16, [rows, inputs]).unwrap();
                let ys = linear::forward(&x, &parts).unwrap().0;
                assert_eq!(ys[0].dims(), [rows, outputs[0]]);
            }
        }
    }
}
