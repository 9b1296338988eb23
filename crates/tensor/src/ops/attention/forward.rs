//! The forward pass: tasks of (key/value head, document, block of queries), keys in tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Config, Sizes,
    operands::{load_over_rows, load_rows, pair_rows, panel_to_rows, rows_to_panels},
    scratch::with_parts,
    strip::{Rule, Running, Scores, Seen, online_softmax, scale_panel},
    tile::{Form, Size, View, product, product_transposed},
};
use crate::{
    DType, Float, Result, Tensor,
    ops::{Documents, simd::LANES},
};

/// Keys of a tile: K's and V's rows of a tile, and what a strip of queries takes, fit the first-level cache about. A multiple
/// of the products' rows.
pub(super) fn tile_keys(form: Form, head_size: usize) -> usize {
    let keys = if form == Form::Pair { 128 } else { 96 };
    if head_size <= 64 { keys } else { keys / 2 }
}

/// Rows of queries (tokens x heads of a group) a block holds, about: each tile of keys is loaded once for so many.
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
    /// [T, H, D].
    pub(super) q: &'a [E],
    /// [L, K, D].
    pub(super) k: &'a [E],
    pub(super) v: &'a [E],
    pub(super) sizes: Sizes,
    pub(super) config: Config,
    pub(super) form: Form,
}

impl<'a, E: Float> Inputs<'a, E> {
    pub(super) fn new(q: &'a Tensor, k: &'a Tensor, v: &'a Tensor, sizes: Sizes, config: Config) -> Result<Self> {
        let form = Form::of(E::DTYPE);
        Ok(Self { q: q.as_slice()?, k: k.as_slice()?, v: v.as_slice()?, sizes, config, form })
    }

    /// Words of a row of D elements.
    pub(super) fn words(&self) -> usize {
        self.form.words(self.sizes.head_size)
    }

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

    /// Loads the block's rows of `from` [T, H, D]; zeros behind them.
    pub(super) fn load(&self, block: &Block, from: &[E], to: &mut [f32]) {
        let row = self.sizes.group() * self.words();
        for (query, to) in block.queries.clone().zip(to.chunks_mut(row)) {
            load_rows(self.form, self.query(block, from, query), self.sizes.head_size, self.sizes.head_size, to);
        }
        to[block.queries.len() * row..].fill(0.0);
    }

    /// The rows of `from` [T, H, D] that belong to one query and the block's key/value head.
    pub(super) fn query<'b>(&self, block: &Block, from: &'b [E], query: usize) -> &'b [E] {
        let Sizes { heads, head_size, .. } = self.sizes;
        let group = self.sizes.group();
        &from[(query * heads + block.kv_head * group) * head_size..][..group * head_size]
    }

    /// Keys of one head of `from` (k or v), and the distance between them.
    pub(super) fn keys<'b>(&self, from: &'b [E], kv_head: usize, keys: &Range<usize>) -> (&'b [E], usize) {
        let Sizes { kv_heads, head_size, .. } = self.sizes;
        let row = |key| (key * kv_heads + kv_head) * head_size;
        (&from[row(keys.start)..row(keys.end - 1) + head_size], kv_heads * head_size)
    }

    /// Loads a tile of k or v as rows.
    pub(super) fn load_keys(&self, from: &[E], kv_head: usize, tile: &Range<usize>, to: &mut [f32]) {
        let (from, ld) = self.keys(from, kv_head, tile);
        load_rows(self.form, from, ld, self.sizes.head_size, &mut to[..tile.len() * self.words()]);
    }

    /// Loads a tile of k or v for sums over its keys.
    pub(super) fn load_over_keys(&self, from: &[E], kv_head: usize, tile: &Range<usize>, to: &mut [f32]) {
        let (from, ld) = self.keys(from, kv_head, tile);
        load_over_rows(self.form, from, ld, self.sizes.head_size, tile.len(), to);
    }

    /// The keys of a tile that some rows see, widened to whole words: relative to the tile's first.
    pub(super) fn part(&self, block: &Block, rows: Range<usize>, tile: &Range<usize>) -> Option<Range<usize>> {
        let seen = overlap(&self.seen_by(block, rows), tile)?;
        let each = self.form.each();
        let end = (seen.end - tile.start).next_multiple_of(each).min(tile.len());
        Some((seen.start - tile.start) / each * each..end)
    }
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
    let inputs = Inputs::<E>::new(q, k, v, sizes, config)?;
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
    let (size, words) = (inputs.sizes.head_size, inputs.words());
    let (rows, keys) = (lse.len().next_multiple_of(LANES), tile_keys(inputs.form, size));
    let room = rows * words.max(size);
    let lengths = [room, rows * words, rows * size, keys * words, inputs.form.words(keys) * size, keys * LANES, 2 * rows];
    with_parts(lengths, |parts| run_parts(inputs, block, o, lse, parts));
}

fn run_parts<E: Float>(inputs: &Inputs<E>, block: &Block, o: &mut [E], lse: &mut [f32], parts: [&mut [f32]; 7]) {
    let [room, panels, sums, keys, values, scores, state] = parts;
    let state: &mut [Running] = bytemuck::cast_slice_mut(state);
    let (form, size, words, rows) = (inputs.form, inputs.sizes.head_size, inputs.words(), lse.len());
    let loaded = &mut room[..state.len() * LANES * words];
    inputs.load(block, inputs.q, loaded);
    rows_to_panels(loaded, words, panels);
    sums.fill(0.0);
    state.fill(Running::START);
    // Pairs are rounded when they are made.
    let rule = Rule::new(inputs.config, if form == Form::Pair { DType::F32 } else { E::DTYPE });
    let all = inputs.seen_by(block, 0..rows);
    for start in all.clone().step_by(tile_keys(inputs.form, size)) {
        let tile = start..(start + tile_keys(inputs.form, size)).min(all.end);
        inputs.load_keys(inputs.k, block.kv_head, &tile, keys);
        inputs.load_over_keys(inputs.v, block.kv_head, &tile, values);
        for (strip, state) in state.iter_mut().enumerate() {
            let rows = strip * LANES..((strip + 1) * LANES).min(rows);
            let Some(part) = inputs.part(block, rows.clone(), &tile) else { continue };
            let n = part.len();
            let scores = &mut scores[..n * LANES];
            let query = View::new(&panels[strip * LANES * words..], LANES);
            product(
                form,
                scores,
                LANES,
                false,
                View::new(&keys[part.start * words..], words),
                query,
                Size { m: n, n: LANES, k: words },
            );
            let mask = inputs.mask(block, rows, &(tile.start + part.start..tile.start + part.end));
            let shrink = online_softmax(Scores { data: scores, ld: LANES }, mask.as_ref(), rule, state);
            let sums = &mut sums[strip * LANES * size..][..LANES * size];
            if shrink != [1.0; LANES] {
                scale_panel(sums, &shrink);
            }
            if form == Form::Pair {
                pair_rows(scores);
            }
            let values = View::new(&values[part.start / form.each() * size..], size);
            product_transposed(
                form,
                sums,
                LANES,
                true,
                values,
                View::new(scores, LANES),
                Size { m: size, n: LANES, k: form.words(n) },
            );
        }
    }
    for (strip, state) in state.iter().enumerate() {
        let rows = strip * LANES..((strip + 1) * LANES).min(rows);
        let factor = state.sum.map(|sum| 1.0 / sum);
        let sums = &sums[strip * LANES * size..][..LANES * size];
        panel_to_rows(sums, size, &factor, &mut o[rows.start * size..rows.end * size], &mut room[..LANES * size]);
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
