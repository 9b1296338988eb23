//! t and dB of the adapters of one call on Hopper, from one pass over the dy of up to three parts (`lora_t_db_sm90.cu`).

use super::{
    super::{OP, PartGrads},
    call::{Call, rows},
    hopper::is_hopper,
};
use crate::{
    DType, Result, Tensor,
    cuda::{Arg, Grid, Matrix, TensorMap, suffix},
    ops::typed::scratch,
};

/// Parts of a launch, and columns of a unit, as the kernel says.
const PARTS: usize = 3;
const UNIT: usize = 128;
/// Units of a block at most, rows of a step, columns of h that a launch sees, blocks of a cluster.
const UNITS: usize = 8;
const DEPTH: usize = 64;
const RANKS: usize = 64;
const CLUSTER: usize = 2;
/// Outputs and tokens from which one pass, with its partial sums, takes less time than two products for each part.
const OUTPUTS: usize = 1024;
const TOKENS: usize = 1024;
/// Tokens from which parts are launched one by one: their partial sums of t would take memory, and a launch no time.
const LONG: usize = 1 << 15;

/// A part's operands.
struct Served<'a> {
    index: usize,
    dy: Matrix,
    b: &'a Tensor,
    db: u64,
    outputs: usize,
    rank: usize,
    scale: f32,
}

/// How a launch is dealt out: units of a block, blocks beside each other, shares of the rows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Plan {
    units: usize,
    wide: usize,
    shares: usize,
}

impl Plan {
    /// The fastest one for that many units of columns and steps of rows: by the tiles of dy that a block reads, about one a unit that
    /// its end takes, and the partial sums, half a tile for each step and unit (measured on an H200).
    fn new(all: usize, steps: usize, multiprocessors: usize) -> Self {
        let plan = |units: usize| {
            let wide = all.div_ceil(units).max(1);
            // A block takes two steps at least.
            let shares = (multiprocessors / wide).min(steps / 2).max(CLUSTER) / CLUSTER * CLUSTER;
            Self { units, wide, shares }
        };
        let cost = |plan: &Self| {
            let tiles = (steps.div_ceil(plan.shares) + 1) * plan.units;
            2 * multiprocessors * tiles + plan.wide * steps + plan.shares * all
        };
        let mut best = plan(UNITS);
        for other in (4..UNITS).map(plan) {
            if cost(&other) < cost(&best) {
                best = other;
            }
        }
        best
    }
}

/// t and dB of the parts that it serves, from the h of all; says which.
pub(super) fn one_pass(
    call: &Call<'_, '_>,
    dys: &[Tensor],
    [h, t]: [Matrix; 2],
    grads: &mut [PartGrads<'_>],
) -> Result<Vec<bool>> {
    let mut done = vec![false; call.parts.len()];
    let aligned = |matrix: &Matrix| matrix.address.is_multiple_of(16) && matrix.ld.is_multiple_of(8);
    if !is_hopper(call) || call.tokens < TOKENS || !aligned(&h) || !aligned(&t) {
        return Ok(done);
    }
    let mut served = Vec::new();
    for (index, dy) in dys.iter().enumerate() {
        let (Some(adapter), Some((_, b)), Some((_, db))) =
            (&call.parts[index].adapter, &call.pairs[index], &mut grads[index].adapter)
        else {
            continue;
        };
        let (outputs, rank, dy, db) = (b.dims()[0], b.shape().last(), rows(dy)?, db.address()?);
        let first = call.offsets[index];
        let sizes = matches!(rank, 8 | 16) && [outputs, first].iter().all(|n| n.is_multiple_of(8)) && first + rank <= RANKS;
        if sizes && aligned(&dy) && (db | b.address()?).is_multiple_of(16) {
            served.push(Served { index, dy, b, db, outputs, rank, scale: adapter.scale });
        }
    }
    for parts in served.chunks(if call.tokens < LONG { PARTS } else { 1 }) {
        let outputs: usize = parts.iter().map(|part| part.outputs).sum();
        if outputs >= OUTPUTS && call.tokens * outputs >= TOKENS * 4 * OUTPUTS {
            launch(call, parts, [h, t])?;
            for part in parts {
                done[part.index] = true;
            }
        }
    }
    Ok(done)
}

fn launch(call: &Call<'_, '_>, parts: &[Served<'_>], [h, t]: [Matrix; 2]) -> Result<()> {
    let (tokens, suffix) = (call.tokens, suffix(OP, call.dtype)?);
    let units: usize = parts.iter().map(|part| part.outputs.div_ceil(UNIT)).sum();
    let plan = Plan::new(units, tokens.div_ceil(DEPTH), call.device.info().multiprocessors);
    let sums = 16 * (slots(parts, plan.units) * tokens + plan.shares / CLUSTER * units * UNIT);
    let mut partials = scratch(&call.arena, DType::F32, [sums])?;
    let each = |of: &dyn Fn(&Served<'_>) -> Result<Arg>, none: Arg| {
        (0..PARTS).map(|i| parts.get(i).map_or(Ok(none), of)).collect::<Result<Vec<_>>>()
    };
    let size = |of: fn(&Served<'_>) -> usize| each(&|part| Ok(Arg::size(of(part))), Arg::U32(0));
    let (n, r) = (size(|part| part.outputs)?, size(|part| part.rank)?);
    let first = each(&|part| Ok(Arg::size(call.offsets[part.index])), Arg::U32(0))?;

    let mut args = vec![Arg::write(&mut partials)?];
    let map = |part: &Served<'_>| {
        let shape = [tokens, part.outputs];
        TensorMap::rows(call.device, part.dy, shape, call.dtype, DEPTH as u32).map(Arg::Map)
    };
    let h = TensorMap::rows(call.device, h, [tokens, call.ranks], call.dtype, DEPTH as u32)?;
    args.extend(each(&map, map(&parts[0])?)?);
    args.extend(each(&|part| Arg::read(part.b), Arg::NONE)?);
    args.push(Arg::Map(h));
    for sizes in [&n, &r, &first] {
        args.extend(sizes);
    }
    args.extend([tokens, plan.units].map(Arg::size));
    let grid = Grid { shared: 188_560, ..Grid::new(plan.shares * plan.wide, 288) };
    call.device.launch_early(&format!("lora_t_db_sm90_{suffix}"), grid, &args)?;

    let mut args = vec![Arg::Pointer(t.address)];
    args.extend(each(&|part| Ok(Arg::Pointer(part.db)), Arg::NONE)?);
    args.push(Arg::read(&partials)?);
    args.extend(each(&|part| Ok(Arg::F32(part.scale)), Arg::F32(0.0))?);
    for sizes in [&n, &r, &first] {
        args.extend(sizes);
    }
    args.extend([tokens, t.ld, plan.units, plan.shares / CLUSTER].map(Arg::size));
    let threads = (4 * tokens * parts.len()).next_multiple_of(32) + 16 * UNIT * units;
    let grid = Grid::over(threads, 256, 256);
    call.device.launch_early(&format!("lora_t_db_sum_sm90_{suffix}"), grid, &args)
}

/// Partial sums of t: one for each block and part that it has columns of.
fn slots(parts: &[Served<'_>], units: usize) -> usize {
    let mut unit = 0;
    let of = |part: &Served<'_>| {
        let first = unit;
        unit += part.outputs.div_ceil(UNIT);
        (unit - 1) / units - first / units + 1
    };
    parts.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::{CLUSTER, Plan, UNITS};

    #[test]
    fn columns_and_rows_are_dealt_out_evenly() {
        // q, k and v of Llama-3-8B, gate and up, o; Qwen2.5-1.5B's q, k and v, gate and up, down; with 132 multiprocessors.
        let cases =
            [(48, [6, 8, 16]), (224, [7, 32, 4]), (32, [4, 8, 16]), (16, [4, 4, 32]), (140, [7, 20, 6]), (12, [4, 3, 44])];
        for (all, [units, wide, shares]) in cases {
            assert_eq!(Plan::new(all, 128, 132), Plan { units, wide, shares }, "{all}");
        }
        assert!((1..2000).all(|all| (1..600).step_by(7).all(|steps| {
            let plan = Plan::new(all, steps, 132);
            plan.units * plan.wide >= all && plan.shares > 0 && plan.shares.is_multiple_of(CLUSTER) && plan.units <= UNITS
        })));
    }
}
