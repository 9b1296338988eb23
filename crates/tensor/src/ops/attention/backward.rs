//! The backward pass: tasks of (key/value head, document, part of its queries), blocks of queries within, keys in tiles.
//!
//! A task adds to gradients of k and v of its own; where a document's queries are split over tasks, the parts are summed
//! in order at the end. The split depends on the sizes alone, so the sums do not depend on the number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Config, Saved, Sizes,
    forward::{Block, Inputs, block_queries, tile_keys, ungroup},
    operands::{pair_lanes, pair_rows, panel_to_rows, rows_to_columns, rows_to_panels},
    scratch::with_parts,
    strip::{RowFacts, Rule, Scores, dot, softmax_backward},
    tile::{Form, Size, View, product, product_transposed},
};
use crate::{
    DType, Float, Result, Tensor,
    ops::{
        Documents,
        simd::{LANES, multiversion},
    },
};

/// Tasks that a call is split into at least where it can be: enough for a machine of that many cores.
const TASKS: usize = 16;

/// Keys taken at a time where a tile meets the diagonal; a multiple of the products' rows.
fn diagonal(form: Form) -> usize {
    if form == Form::Pair { 16 } else { 12 }
}

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
    let inputs = Inputs::new(saved.q, saved.k, saved.v, sizes, config)?;
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
    let gather = |from: &Tensor, factor: f32| -> Result<Tensor> {
        let mut to = Tensor::empty(arena, E::DTYPE, saved.k.shape())?;
        sum_parts::<E>(from.as_slice()?, factor, to.as_mut_slice()?, &plan, sizes);
        Ok(to)
    };
    Ok((dq, gather(&dk, config.scale)?, gather(&dv, 1.0)?))
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

/// factor Σ of the parts' gradients [kv head][part][token][padded D], to [T, K, D].
fn sum_parts<E: Float>(from: &[f32], factor: f32, to: &mut [E], plan: &[Vec<(Range<usize>, Range<usize>)>], sizes: Sizes) {
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
                with_parts([size], |[sums]| {
                    sums.fill(0.0);
                    let mut at = kv_head * per_head + start;
                    for (document, queries) in parts {
                        let len = queries.end - document.start;
                        // A part knows the keys up to its last query.
                        if token < len {
                            add(sums, &from[at + token * padded..]);
                        }
                        at += len * padded;
                    }
                    scaled(sums, factor, to);
                });
            }
        });
    });
}

multiversion! {
    fn add(sums: &mut [f32], terms: &[f32]) {
        for (sum, x) in sums.iter_mut().zip(terms) {
            *sum += x;
        }
    }
}

multiversion! {
    fn scaled<E: Float>(from: &[f32], factor: f32, to: &mut [E]) {
        for (y, x) in to.iter_mut().zip(from) {
            *y = E::from_f32(x * factor);
        }
    }
}

fn run<E: Float>(shared: &Shared<E>, task: Task<E>) {
    let Task { kv_head, document, queries, dq, dk, dv } = task;
    let (group, size) = (shared.inputs.sizes.group(), shared.inputs.sizes.head_size);
    let step = block_queries(group);
    for (start, dq) in queries.clone().step_by(step).zip(dq.chunks_mut(step * group * size)) {
        let block = Block { kv_head, queries: start..(start + step).min(queries.end), key: start, first_key: document.start };
        let lengths = Layout::new(&shared.inputs, block.queries.len() * group).lengths();
        with_parts(lengths, |parts| run_block(shared, &block, dq, dk, dv, parts));
    }
}

/// Sizes in a block of `rows` rows.
#[derive(Clone, Copy)]
struct Layout {
    form: Form,
    rows: usize,
    strips: usize,
    /// D, and the words of as many elements.
    size: usize,
    words: usize,
    /// Words between keys of a tile of probabilities, for sums over rows: one cache line more than the rows, so that a
    /// column's lines spread over the cache.
    stride: usize,
}

impl Layout {
    fn new<E: Float>(inputs: &Inputs<E>, rows: usize) -> Self {
        let (form, strips) = (inputs.form, rows.div_ceil(LANES));
        let stride = form.words(strips * LANES) + LANES;
        Self { form, rows, strips, size: inputs.sizes.head_size, words: inputs.words(), stride }
    }

    /// Rows of the strips.
    fn all_rows(self) -> usize {
        self.strips * LANES
    }

    /// Words between keys of the strip that is worked on: f32 are left where [`add_tile`] reads them, pairs are made of them.
    fn strip_stride(self) -> usize {
        if self.form == Form::Pair { LANES } else { self.stride }
    }

    /// Words of what [`run_block`] works with, in its order.
    fn lengths(self) -> [usize; 14] {
        let Self { form, size, words, .. } = self;
        let (rows, keys) = (self.all_rows(), tile_keys(form, size));
        let (panels, columns) = (rows * words, form.words(rows) * size.next_multiple_of(LANES));
        let scores = keys * self.strip_stride();
        let pairs = if form == Form::Pair { [form.words(keys) * size, keys * self.stride, keys * self.stride] } else { [0; 3] };
        let room = usize::max(panels, LANES * size);
        let tile = keys * words;
        let [key_pairs, p, ds] = pairs;
        [room, panels, panels, columns, columns, rows * size, 2 * rows, tile, tile, key_pairs, scores, scores, p, ds]
    }
}

fn run_block<E: Float>(shared: &Shared<E>, block: &Block, dq: &mut [E], dk: &mut [f32], dv: &mut [f32], parts: [&mut [f32]; 14]) {
    let Shared { inputs, .. } = shared;
    let layout = Layout::new(inputs, block.queries.len() * inputs.sizes.group());
    let Layout { form, size, words, strips, rows, .. } = layout;
    let (panel, ld) = (words * LANES, layout.strip_stride());
    let [room, q_panels, d_o_panels, q, d_o, dq_panels, facts, keys, values, key_pairs, scores, d_scores, p, ds] = parts;
    let facts: &mut [RowFacts] = bytemuck::cast_slice_mut(facts);
    load_facts(shared, block, facts);
    let loaded = &mut room[..layout.all_rows() * words];
    for (from, panels, columns) in [(inputs.q, &mut *q_panels, &mut *q), (shared.d_o, &mut *d_o_panels, &mut *d_o)] {
        inputs.load(block, from, loaded);
        rows_to_panels(loaded, words, panels);
        rows_to_columns(form, loaded, size, columns);
    }
    dq_panels.fill(0.0);
    let rule = Rule::new(inputs.config, DType::F32);
    let all = inputs.seen_by(block, 0..rows);
    for start in all.clone().step_by(tile_keys(form, size)) {
        let tile = start..(start + tile_keys(form, size)).min(all.end);
        inputs.load_keys(inputs.k, block.kv_head, &tile, keys);
        inputs.load_keys(inputs.v, block.kv_head, &tile, values);
        if form == Form::Pair {
            inputs.load_over_keys(inputs.k, block.kv_head, &tile, key_pairs);
        }
        for strip in 0..strips {
            let rows = strip * LANES..((strip + 1) * LANES).min(rows);
            let part = inputs.part(block, rows.clone(), &tile).unwrap_or_default();
            let n = part.len();
            // Where the strip's probabilities go for the sums over rows.
            let left = form.words(LANES) * strip;
            let (whole_p, whole_ds) = if form == Form::Pair { (&mut *p, &mut *ds) } else { (&mut *scores, &mut *d_scores) };
            for left_operand in [whole_p, whole_ds] {
                clear(left_operand, layout, left, tile.len(), &part);
            }
            if n == 0 {
                continue;
            }
            let (first, column) = if form == Form::Pair { (0, 0) } else { (part.start, left) };
            let (at, end) = (first * ld + column, (first + n - 1) * ld + column + LANES);
            let (s, d) = (&mut scores[at..end], &mut d_scores[at..end]);
            let over_size = Size { m: n, n: LANES, k: words };
            let of_part = |tile| View::new(tile, words);
            product(
                form,
                s,
                ld,
                false,
                of_part(&keys[part.start * words..]),
                View::new(&q_panels[strip * panel..], LANES),
                over_size,
            );
            product(
                form,
                d,
                ld,
                false,
                of_part(&values[part.start * words..]),
                View::new(&d_o_panels[strip * panel..], LANES),
                over_size,
            );
            let mask = inputs.mask(block, rows, &(tile.start + part.start..tile.start + part.end));
            softmax_backward(Scores { data: s, ld }, Scores { data: d, ld }, mask.as_ref(), rule, &facts[strip]);
            let mut by_key = &keys[part.start * words..];
            if form == Form::Pair {
                let left = part.start * layout.stride + left;
                pair_lanes(s, &mut p[left..], layout.stride);
                pair_lanes(d, &mut ds[left..], layout.stride);
                pair_rows(d);
                by_key = &key_pairs[part.start / 2 * size..];
            }
            let over_keys = Size { m: size, n: LANES, k: form.words(n) };
            let dq = &mut dq_panels[strip * LANES * size..][..LANES * size];
            product_transposed(form, dq, LANES, true, View::new(by_key, size), View::new(d, ld), over_keys);
        }
        let left = if form == Form::Pair { (&*p, &*ds) } else { (&*scores, &*d_scores) };
        add_tile(inputs, block, &tile, layout, (dv, dk), left, (d_o, q));
    }
    for (strip, dq) in dq.chunks_mut(LANES * size).enumerate() {
        let sums = &dq_panels[strip * LANES * size..][..LANES * size];
        panel_to_rows(sums, size, &[inputs.config.scale; LANES], dq, &mut room[..LANES * size]);
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

/// Zeros a strip's column of an operand of sums over rows, for the keys that were not computed.
fn clear(operand: &mut [f32], layout: Layout, column: usize, keys: usize, computed: &Range<usize>) {
    for key in (0..computed.start).chain(computed.end..keys) {
        operand[key * layout.stride + column..][..layout.form.words(LANES)].fill(0.0);
    }
}

/// dv += Pᵀ do and dk += dSᵀ q for the keys of a tile, from all rows of the block that see them.
fn add_tile<E: Float>(
    inputs: &Inputs<E>,
    block: &Block,
    tile: &Range<usize>,
    layout: Layout,
    (dv, dk): (&mut [f32], &mut [f32]),
    (p, ds): (&[f32], &[f32]),
    (d_o, q): (&[f32], &[f32]),
) {
    let Layout { form, rows, stride, .. } = layout;
    let group = inputs.sizes.group();
    let padded = inputs.sizes.head_size.next_multiple_of(LANES);
    // On the diagonal fewer keys at a time, because rows before a key's own do not see it.
    let step = if tile.end <= block.key + 1 { tile.len() } else { diagonal(form) };
    for start in tile.clone().step_by(step) {
        let keys = start..(start + step).min(tile.end);
        let first_row = keys.start.saturating_sub(block.key) * group / LANES * LANES;
        let size = Size { m: keys.len(), n: LANES, k: form.words(rows - first_row) };
        let at = (keys.start - tile.start) * stride + form.words(first_row);
        for column in (0..padded).step_by(LANES) {
            let to = (keys.start - block.first_key) * padded + column..(keys.end - block.first_key) * padded;
            let right = column * form.words(layout.all_rows()) + form.words(first_row) * LANES;
            product(form, &mut dv[to.clone()], padded, true, View::new(&p[at..], stride), View::new(&d_o[right..], LANES), size);
            product(form, &mut dk[to], padded, true, View::new(&ds[at..], stride), View::new(&q[right..], LANES), size);
        }
    }
}
