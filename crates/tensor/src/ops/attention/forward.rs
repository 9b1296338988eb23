//! The forward pass: tasks of (key/value head, document, block of queries), keys in tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Config, Sizes,
    scratch::with_parts,
    strip::{Rule, Running, Scores, Seen, columns_to_panels, from_panel, online_softmax, scale_panel, to_columns, widen},
    tile::{Size, View, product, product_transposed},
};
use crate::{
    DType, Float, Result, Tensor,
    ops::{Documents, simd::LANES},
};

/// Keys of a tile: K's and V's rows of a tile, and what a strip of queries takes, fit the first-level cache about. A multiple
/// of the products' rows.
pub(super) fn tile_keys(head_size: usize) -> usize {
    if head_size <= 64 { 96 } else { 48 }
}

/// Rows of queries (tokens x heads of a group) a block holds, about: each tile of keys is widened once for so many.
const ROWS: usize = 192;

/// Queries of one block, which read one key/value head. A row is a (query, head of the group) pair, heads fastest, as q
/// holds them.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) kv_head: usize,
    /// Rows of q.
    pub(super) queries: Range<usize>,
    /// The first query's own key; the next query's is the next.
    pub(super) key: usize,
    /// The document's first key.
    pub(super) first_key: usize,
}

/// What blocks of one call share.
pub(super) struct Inputs<'a, E> {
    pub(super) q: &'a [E],
    /// [K, keys, D].
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) keys: usize,
    pub(super) sizes: Sizes,
    pub(super) config: Config,
}

impl<E: Float> Inputs<'_, E> {
    /// Keys seen by row `row` of the block.
    fn seen(&self, block: &Block, row: usize) -> Range<usize> {
        let key = block.key + row / self.sizes.group();
        let first = self.config.window.map_or(0, |window| (key + 1).saturating_sub(window));
        first.max(block.first_key)..key + 1
    }

    /// Keys seen by any of `rows` (not empty).
    pub(super) fn seen_by(&self, block: &Block, rows: Range<usize>) -> Range<usize> {
        self.seen(block, rows.start).start..self.seen(block, rows.end - 1).end
    }

    /// The bounds of each row from `start` on relative to `keys`, unless all of them see all of `keys`.
    pub(super) fn mask(&self, block: &Block, rows: Range<usize>, keys: &Range<usize>) -> Option<Seen> {
        let all = self.seen(block, rows.end - 1).start <= keys.start && self.seen(block, rows.start).end >= keys.end;
        if all {
            return None;
        }
        let bounds: [Range<usize>; LANES] = std::array::from_fn(|lane| self.seen(block, (rows.start + lane).min(rows.end - 1)));
        let relative = |key: usize| (key as i64 - keys.start as i64) as i32;
        Some(Seen {
            first: std::array::from_fn(|lane| relative(bounds[lane].start)),
            last: std::array::from_fn(|lane| relative(bounds[lane].end) - 1),
        })
    }

    /// Widens the block's rows of `from` [T, H, D] to columns of `rows` rows.
    pub(super) fn load(&self, block: &Block, from: &[E], scale: f32, columns: &mut [f32], rows: usize) {
        columns.fill(0.0);
        for (i, query) in block.queries.clone().enumerate() {
            to_columns(self.query(block, from, query), self.sizes.head_size, scale, i * self.sizes.group(), rows, columns);
        }
    }

    /// The rows of `from` [T, H, D] that belong to one query and the block's key/value head.
    pub(super) fn query<'b>(&self, block: &Block, from: &'b [E], query: usize) -> &'b [E] {
        let Sizes { heads, head_size, .. } = self.sizes;
        let group = self.sizes.group();
        &from[(query * heads + block.kv_head * group) * head_size..][..group * head_size]
    }

    /// Rows from `key` on of one head of `from` (k or v).
    pub(super) fn rows<'b>(&self, from: &'b [f32], kv_head: usize, key: usize) -> View<'b> {
        let size = self.sizes.head_size;
        View::new(&from[(kv_head * self.keys + key) * size..(kv_head + 1) * self.keys * size], size)
    }
}

/// The first `keys` rows of `x` [L, K, D] as F32 [K, keys, D]: a tile of one head then lies in one piece.
pub(super) fn by_head<E: Float>(x: &Tensor, keys: usize, sizes: Sizes) -> Result<Tensor> {
    const RUN: usize = 64;
    let Sizes { kv_heads, head_size, .. } = sizes;
    let mut to = Tensor::empty(x.arena(), DType::F32, [kv_heads, keys, head_size])?;
    let from = x.as_slice::<E>()?;
    let heads = to.as_mut_slice::<f32>()?.par_chunks_exact_mut((keys * head_size).max(1)).enumerate();
    heads.for_each(|(kv_head, to)| {
        to.par_chunks_mut(RUN * head_size).enumerate().for_each(|(run, to)| {
            let from = &from[(run * RUN * kv_heads + kv_head) * head_size..];
            widen(from, kv_heads * head_size, head_size, to);
        });
    });
    Ok(to)
}

/// Queries of a block when each has `group` heads.
pub(super) fn block_queries(group: usize) -> usize {
    (ROWS / group).max(4)
}

pub(super) fn documents<E: Float>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &Documents,
    sizes: Sizes,
    config: Config,
) -> Result<(Tensor, Tensor)> {
    let blocks = |kv_head| {
        documents.ranges().flat_map(move |document| {
            let step = block_queries(sizes.group());
            document.clone().step_by(step).map(move |start| {
                let queries = start..(start + step).min(document.end);
                Block { kv_head, queries, key: start, first_key: document.start }
            })
        })
    };
    let keys = documents.tokens();
    let (k, v) = (by_head::<E>(k, keys, sizes)?, by_head::<E>(v, keys, sizes)?);
    let inputs = Inputs::<E> { q: q.as_slice()?, k: k.as_slice()?, v: v.as_slice()?, keys, sizes, config };
    run(&inputs, q, (0..sizes.kv_heads).flat_map(blocks))
}

/// Runs blocks, which cover the queries of one key/value head after another.
pub(super) fn run<E: Float>(inputs: &Inputs<E>, q: &Tensor, blocks: impl Iterator<Item = Block>) -> Result<(Tensor, Tensor)> {
    let Sizes { heads, kv_heads, head_size } = inputs.sizes;
    let (tokens, group) = (q.dims()[0], inputs.sizes.group());
    // Grouped by key/value head, so that each task's output is one slice.
    let mut grouped = Tensor::empty(q.arena(), E::DTYPE, [kv_heads, tokens, group, head_size])?;
    let mut grouped_lse = Tensor::empty(q.arena(), DType::F32, [kv_heads, tokens, group])?;
    let (mut o_rest, mut lse_rest) = (grouped.as_mut_slice::<E>()?, grouped_lse.as_mut_slice::<f32>()?);
    let mut tasks = Vec::new();
    for block in blocks {
        let rows = block.queries.len() * group;
        let o = o_rest.split_off_mut(..rows * head_size).unwrap_or_default();
        let lse = lse_rest.split_off_mut(..rows).unwrap_or_default();
        tasks.push((block, o, lse));
    }
    // Longest first: the last tasks to end are short.
    tasks.sort_by_key(|(block, ..)| std::cmp::Reverse(block.key - block.first_key));
    tasks.into_par_iter().with_max_len(1).for_each(|(block, o, lse)| {
        run_block(inputs, &block, o, lse);
    });
    let mut o = Tensor::empty(q.arena(), E::DTYPE, q.shape())?;
    ungroup(grouped.as_slice::<E>()?, o.as_mut_slice()?, kv_heads, group * head_size);
    let mut lse = Tensor::empty(q.arena(), DType::F32, [heads, tokens])?;
    let from = grouped_lse.as_slice::<f32>()?;
    for (head, lse) in lse.as_mut_slice::<f32>()?.chunks_exact_mut(tokens.max(1)).enumerate() {
        let from = &from[head / group * tokens * group..];
        for (token, lse) in lse.iter_mut().enumerate() {
            *lse = from[token * group + head % group];
        }
    }
    Ok((o, lse))
}

/// [K, T, row] to [T, K, row].
pub(super) fn ungroup<E: Float>(from: &[E], to: &mut [E], kv_heads: usize, row: usize) {
    let tokens = to.len() / (kv_heads * row).max(1);
    to.par_chunks_mut(64 * kv_heads * row).enumerate().for_each(|(chunk, to)| {
        for (i, to) in to.chunks_exact_mut(kv_heads * row).enumerate() {
            for (kv_head, to) in to.chunks_exact_mut(row).enumerate() {
                let start = (kv_head * tokens + chunk * 64 + i) * row;
                to.copy_from_slice(&from[start..start + row]);
            }
        }
    });
}

/// o and lse of one block: rows x D, and rows.
fn run_block<E: Float>(inputs: &Inputs<E>, block: &Block, o: &mut [E], lse: &mut [f32]) {
    let size = inputs.sizes.head_size;
    let rows = lse.len().next_multiple_of(LANES);
    let (columns, panels) = (rows * size.next_multiple_of(LANES), rows * size);
    let lengths = [columns, panels, panels, tile_keys(size) * LANES, 2 * rows];
    with_parts(lengths, |parts| run_parts(inputs, block, o, lse, parts));
}

fn run_parts<E: Float>(inputs: &Inputs<E>, block: &Block, o: &mut [E], lse: &mut [f32], parts: [&mut [f32]; 5]) {
    let [columns, panels, sums, scores, state] = parts;
    let state: &mut [Running] = bytemuck::cast_slice_mut(state);
    let (size, rows) = (inputs.sizes.head_size, lse.len());
    let panel = size * LANES;
    inputs.load(block, inputs.q, inputs.config.scale, columns, state.len() * LANES);
    columns_to_panels(columns, state.len() * LANES, size, panels);
    sums.fill(0.0);
    state.fill(Running::START);
    let rule = Rule::new(inputs.config.softcap, E::DTYPE);
    let all = inputs.seen_by(block, 0..rows);
    for start in all.clone().step_by(tile_keys(size)) {
        let tile = start..(start + tile_keys(size)).min(all.end);
        for (strip, state) in state.iter_mut().enumerate() {
            let rows = strip * LANES..((strip + 1) * LANES).min(rows);
            let Some(seen) = overlap(&inputs.seen_by(block, rows.clone()), &tile) else { continue };
            let (keys, values) =
                (inputs.rows(inputs.k, block.kv_head, seen.start), inputs.rows(inputs.v, block.kv_head, seen.start));
            let n = seen.len();
            let scores = &mut scores[..n * LANES];
            let query = View::new(&panels[strip * panel..], LANES);
            product(scores, LANES, false, keys, query, Size { m: n, n: LANES, k: size });
            let mask = inputs.mask(block, rows, &seen);
            let shrink = online_softmax(Scores { data: scores, ld: LANES }, mask.as_ref(), rule, state);
            let sums = &mut sums[strip * panel..(strip + 1) * panel];
            if shrink != [1.0; LANES] {
                scale_panel(sums, &shrink);
            }
            product_transposed(sums, LANES, true, values, View::new(scores, LANES), Size { m: size, n: LANES, k: n });
        }
    }
    for (strip, state) in state.iter().enumerate() {
        let rows = strip * LANES..((strip + 1) * LANES).min(rows);
        let factor = state.sum.map(|sum| 1.0 / sum);
        from_panel(&sums[strip * panel..], size, &factor, &mut o[rows.start * size..rows.end * size]);
        for (lane, lse) in lse[rows].iter_mut().enumerate() {
            *lse = state.max[lane] + state.sum[lane].ln();
        }
    }
}

/// The common part, if there is one.
pub(super) fn overlap(a: &Range<usize>, b: &Range<usize>) -> Option<Range<usize>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (!both.is_empty()).then_some(both)
}
