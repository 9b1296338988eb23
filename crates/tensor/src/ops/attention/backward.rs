//! The backward pass: tasks of (key/value head, document, part of its queries), blocks of queries within, keys in tiles.
//!
//! A task adds to gradients of k and v of its own; where a document's queries are split over tasks, the parts are summed
//! in order at the end. The split depends on the sizes alone, so the sums do not depend on the number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Config, Sizes,
    forward::{Block, Inputs, block_queries, by_head, overlap, tile_keys, ungroup},
    scratch::with_parts,
    strip::{RowFacts, Scores, columns_to_panels, dot, from_panel, softmax_backward},
    tile::{Size, View, product, product_transposed},
};
use crate::{
    DType, Float, Result, Tensor,
    ops::{Documents, simd::LANES},
};

/// What the forward pass left, and the gradient of its output.
pub(super) struct Saved<'a> {
    pub(super) d_o: &'a Tensor,
    pub(super) q: &'a Tensor,
    pub(super) k: &'a Tensor,
    pub(super) v: &'a Tensor,
    pub(super) o: &'a Tensor,
    pub(super) lse: &'a Tensor,
}

/// Tasks that a call is split into at least where it can be: enough for a machine of that many cores.
const TASKS: usize = 16;

/// Keys taken at a time where a tile meets the diagonal; a multiple of the products' rows.
const DIAGONAL: usize = 12;

/// Parts a document's queries are split into at most: each takes gradients of k and v of its own.
const MOST_PARTS: usize = 8;

/// Queries whose gradients one task computes.
struct Task<'a, E> {
    kv_head: usize,
    document: Range<usize>,
    queries: Range<usize>,
    /// Queries x heads of the group x D.
    dq: &'a mut [E],
    /// Tokens of the document from its first on, up to the last query, x padded D.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

/// What all tasks read.
struct Shared<'a, E> {
    inputs: Inputs<'a, E>,
    d_o: &'a [E],
    o: &'a [E],
    lse: &'a [f32],
}

pub(super) fn documents<E: Float>(
    saved: &Saved,
    documents: &Documents,
    sizes: Sizes,
    config: Config,
) -> Result<(Tensor, Tensor, Tensor)> {
    let keys = documents.tokens();
    let (k, v) = (by_head::<E>(saved.k, keys, sizes)?, by_head::<E>(saved.v, keys, sizes)?);
    let inputs = Inputs { q: saved.q.as_slice()?, k: k.as_slice()?, v: v.as_slice()?, keys, sizes, config };
    let shared = Shared::<E> { inputs, d_o: saved.d_o.as_slice()?, o: saved.o.as_slice()?, lse: saved.lse.as_slice()? };
    let (tokens, group, size) = (documents.tokens(), sizes.group(), sizes.head_size);
    let arena = saved.q.arena();
    let plan: Vec<_> = documents.ranges().map(|document| parts(&document, documents.ranges().len(), sizes)).collect();
    let padded = size.next_multiple_of(LANES);
    let slots: usize =
        sizes.kv_heads * plan.iter().flatten().map(|(document, queries)| queries.end - document.start).sum::<usize>();
    let mut grouped = Tensor::empty(arena, E::DTYPE, [sizes.kv_heads, tokens, group, size])?;
    let mut dk = Tensor::zeros(arena, DType::F32, [slots, padded])?;
    let mut dv = Tensor::zeros(arena, DType::F32, [slots, padded])?;
    let (mut dq_rest, mut dk_rest, mut dv_rest) = (grouped.as_mut_slice::<E>()?, dk.as_mut_slice()?, dv.as_mut_slice()?);
    let mut tasks = Vec::new();
    for kv_head in 0..sizes.kv_heads {
        for (document, queries) in plan.iter().flatten().cloned() {
            let keys = (queries.end - document.start) * padded;
            let dq = dq_rest.split_off_mut(..queries.len() * group * size).unwrap_or_default();
            let (dk, dv) = (dk_rest.split_off_mut(..keys).unwrap_or_default(), dv_rest.split_off_mut(..keys).unwrap_or_default());
            tasks.push(Task { kv_head, document, queries, dq, dk, dv });
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|task| run(&shared, task));
    let mut dq = Tensor::empty(arena, E::DTYPE, saved.q.shape())?;
    ungroup(grouped.as_slice::<E>()?, dq.as_mut_slice()?, sizes.kv_heads, group * size);
    drop(grouped);
    let gather = |from: &Tensor| -> Result<Tensor> {
        let mut to = Tensor::empty(arena, E::DTYPE, saved.k.shape())?;
        sum_parts::<E>(from.as_slice()?, to.as_mut_slice()?, &plan, sizes);
        Ok(to)
    };
    Ok((dq, gather(&dk)?, gather(&dv)?))
}

/// A document and the ranges of queries it is split into, so that each part has about the same work.
fn parts(document: &Range<usize>, documents: usize, sizes: Sizes) -> Vec<(Range<usize>, Range<usize>)> {
    let (len, step) = (document.len(), block_queries(sizes.group()));
    let wanted = TASKS.div_ceil(sizes.kv_heads * documents).min(MOST_PARTS).min(len.div_ceil(step)).max(1);
    // The work up to query i is about i²: bounds at the square roots.
    let bound = |part: usize| match part {
        0 => 0,
        part if part == wanted => len,
        part => ((part as f64 / wanted as f64).sqrt() * len as f64) as usize,
    };
    (0..wanted)
        .map(|part| (document.clone(), document.start + bound(part)..document.start + bound(part + 1)))
        .filter(|(_, queries)| !queries.is_empty())
        .collect()
}

/// Sums the parts' gradients [kv head][part][token][padded D] to [T, K, D].
fn sum_parts<E: Float>(from: &[f32], to: &mut [E], plan: &[Vec<(Range<usize>, Range<usize>)>], sizes: Sizes) {
    let Sizes { kv_heads, head_size: size, .. } = sizes;
    let padded = size.next_multiple_of(LANES);
    let per_head = from.len() / kv_heads;
    let (mut rest, mut start) = (to, 0);
    let mut pieces = Vec::new();
    for parts in plan {
        let Some((document, _)) = parts.first() else { continue };
        pieces.push((rest.split_off_mut(..document.len() * kv_heads * size).unwrap_or_default(), parts, start));
        start += parts.iter().map(|(document, queries)| (queries.end - document.start) * padded).sum::<usize>();
    }
    pieces.into_par_iter().for_each(|(to, parts, start)| {
        to.par_chunks_mut(kv_heads * size).with_min_len(32).enumerate().for_each(|(token, to)| {
            for (kv_head, to) in to.chunks_exact_mut(size).enumerate() {
                sum_token(&from[kv_head * per_head + start..], token, parts, padded, to);
            }
        });
    });
}

/// Sums one token's parts: those whose last query does not come before it.
fn sum_token<E: Float>(from: &[f32], token: usize, parts: &[(Range<usize>, Range<usize>)], padded: usize, to: &mut [E]) {
    for (d, to) in to.iter_mut().enumerate() {
        let (mut sum, mut start) = (0.0, 0);
        for (document, queries) in parts {
            let len = queries.end - document.start;
            if token < len {
                sum += from[start + token * padded + d];
            }
            start += len * padded;
        }
        *to = E::from_f32(sum);
    }
}

fn run<E: Float>(shared: &Shared<E>, task: Task<E>) {
    let Task { kv_head, document, queries, dq, dk, dv } = task;
    let (group, size) = (shared.inputs.sizes.group(), shared.inputs.sizes.head_size);
    let step = block_queries(group);
    for (start, dq) in queries.clone().step_by(step).zip(dq.chunks_mut(step * group * size)) {
        let block = Block { kv_head, queries: start..(start + step).min(queries.end), key: start, first_key: document.start };
        let rows = block.queries.len() * group;
        let strips = rows.div_ceil(LANES);
        let (panels, columns) = (strips * LANES * size, strips * LANES * size.next_multiple_of(LANES));
        let scores = tile_keys(size) * score_stride(strips);
        let lengths = [columns, columns, panels, panels, panels, scores, scores, strips * 2 * LANES];
        with_parts(lengths, |parts| run_block(shared, &block, dq, dk, dv, parts));
    }
}

/// Floats between keys of a tile of scores: one cache line more than the rows, so that a column's lines spread over the cache.
fn score_stride(strips: usize) -> usize {
    (strips + 1) * LANES
}

fn run_block<E: Float>(shared: &Shared<E>, block: &Block, dq: &mut [E], dk: &mut [f32], dv: &mut [f32], parts: [&mut [f32]; 8]) {
    let Shared { inputs, .. } = shared;
    let (size, group) = (inputs.sizes.head_size, inputs.sizes.group());
    let rows = block.queries.len() * group;
    let strips = rows.div_ceil(LANES);
    let (all_rows, panel, ld) = (strips * LANES, size * LANES, score_stride(strips));
    let [q, d_o, q_panels, d_o_panels, dq_panels, scores, d_scores, facts] = parts;
    let facts: &mut [RowFacts] = bytemuck::cast_slice_mut(facts);
    load_facts(shared, block, facts);
    inputs.load(block, inputs.q, inputs.config.scale, q, all_rows);
    inputs.load(block, shared.d_o, 1.0, d_o, all_rows);
    columns_to_panels(q, all_rows, size, q_panels);
    columns_to_panels(d_o, all_rows, size, d_o_panels);
    dq_panels.fill(0.0);
    let all = inputs.seen_by(block, 0..rows);
    for start in all.clone().step_by(tile_keys(size)) {
        let tile = start..(start + tile_keys(size)).min(all.end);
        for strip in 0..strips {
            let rows = strip * LANES..((strip + 1) * LANES).min(rows);
            let column = strip * LANES;
            let seen = overlap(&inputs.seen_by(block, rows.clone()), &tile).unwrap_or(tile.start..tile.start);
            let (first, n) = (seen.start - tile.start, seen.len());
            clear(scores, ld, column, tile.len(), first..first + n);
            clear(d_scores, ld, column, tile.len(), first..first + n);
            if n == 0 {
                continue;
            }
            let (at, end) = (first * ld + column, (first + n - 1) * ld + column + LANES);
            let (s, d) = (&mut scores[at..end], &mut d_scores[at..end]);
            let (keys, values) =
                (inputs.rows(inputs.k, block.kv_head, seen.start), inputs.rows(inputs.v, block.kv_head, seen.start));
            let over_size = Size { m: n, n: LANES, k: size };
            product(s, ld, false, keys, View::new(&q_panels[strip * panel..], LANES), over_size);
            product(d, ld, false, values, View::new(&d_o_panels[strip * panel..], LANES), over_size);
            let mask = inputs.mask(block, rows, &seen);
            softmax_backward(Scores { data: s, ld }, Scores { data: d, ld }, mask.as_ref(), inputs.config.softcap, &facts[strip]);
            let over_keys = Size { m: size, n: LANES, k: n };
            let dq = &mut dq_panels[strip * panel..(strip + 1) * panel];
            product_transposed(dq, LANES, true, keys, View::new(d, ld), over_keys);
        }
        add_tile(inputs, block, &tile, rows, (dv, dk), (scores, d_scores), (d_o, q));
    }
    for (strip, dq) in dq.chunks_mut(LANES * size).enumerate() {
        from_panel(&dq_panels[strip * panel..], size, &[inputs.config.scale; LANES], dq);
    }
}

/// lse and do · o of each row.
fn load_facts<E: Float>(shared: &Shared<E>, block: &Block, facts: &mut [RowFacts]) {
    let Sizes { heads, head_size, .. } = shared.inputs.sizes;
    let (group, tokens) = (shared.inputs.sizes.group(), shared.lse.len() / heads);
    facts.fill(RowFacts::NONE);
    for (i, query) in block.queries.clone().enumerate() {
        let rows = |from| shared.inputs.query(block, from, query).chunks_exact(head_size);
        for (g, (d_o, o)) in rows(shared.d_o).zip(rows(shared.o)).enumerate() {
            let row = i * group + g;
            let facts = &mut facts[row / LANES];
            facts.delta[row % LANES] = dot(d_o, o);
            facts.lse[row % LANES] = shared.lse[(block.kv_head * group + g) * tokens + query];
        }
    }
}

/// Zeros the strip's column of scores where it was not computed.
fn clear(scores: &mut [f32], ld: usize, column: usize, keys: usize, computed: Range<usize>) {
    for key in (0..computed.start).chain(computed.end..keys) {
        scores[key * ld + column..][..LANES].fill(0.0);
    }
}

/// dv += Pᵀ do and dk += dSᵀ q for the keys of a tile, from all rows of the block that see them.
fn add_tile<E: Float>(
    inputs: &Inputs<E>,
    block: &Block,
    tile: &Range<usize>,
    rows: usize,
    (dv, dk): (&mut [f32], &mut [f32]),
    (scores, d_scores): (&[f32], &[f32]),
    (d_o, q): (&[f32], &[f32]),
) {
    let group = inputs.sizes.group();
    let padded = inputs.sizes.head_size.next_multiple_of(LANES);
    let all_rows = rows.next_multiple_of(LANES);
    let ld = score_stride(all_rows / LANES);
    // On the diagonal fewer keys at a time, because rows before a key's own do not see it.
    let step = if tile.end <= block.key + 1 { tile.len() } else { DIAGONAL };
    for start in tile.clone().step_by(step) {
        let keys = start..(start + step).min(tile.end);
        let first_row = keys.start.saturating_sub(block.key) * group / LANES * LANES;
        let size = Size { m: keys.len(), n: LANES, k: rows - first_row };
        let at = (keys.start - tile.start) * ld + first_row;
        for column in (0..padded).step_by(LANES) {
            let to = (keys.start - block.first_key) * padded + column..(keys.end - block.first_key) * padded;
            let right = column * all_rows + first_row * LANES;
            product(&mut dv[to.clone()], padded, true, View::new(&scores[at..], ld), View::new(&d_o[right..], LANES), size);
            product(&mut dk[to], padded, true, View::new(&d_scores[at..], ld), View::new(&q[right..], LANES), size);
        }
    }
}
