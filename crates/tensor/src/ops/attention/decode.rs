//! Attention of new tokens to cached ones.
//!
//! Many tokens (a prompt) go as in training. For one or a few, reading the cache is all the work: tasks of (key/value head,
//! run of keys) each leave a softmax over their run, and the runs are put together in order ("flash decoding").

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Config, Sizes,
    forward::{Block, Inputs, block_queries, overlap, run},
    scratch::with_parts,
    strip::{Rule, add_rows, dot_rows, softmax_row},
};
use crate::{DType, Float, Result, Tensor};

/// Tokens up to which keys are read where they lie.
const FEW: usize = 4;

/// Keys of a task.
const RUN: usize = 256;

pub(super) fn cached<E: Float>(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    len: usize,
    sizes: Sizes,
    config: Config,
) -> Result<Tensor> {
    let n = q.dims()[0];
    if n <= FEW {
        return few::<E>(q, keys, values, len, sizes, config);
    }
    let inputs = Inputs::<E>::new(q, keys, values, sizes, config)?;
    let step = block_queries(sizes.group());
    let blocks = (0..sizes.kv_heads).flat_map(|kv_head| {
        (0..n).step_by(step).map(move |start| Block {
            kv_head,
            queries: start..(start + step).min(n),
            key: len - n + start,
            first_key: 0,
        })
    });
    Ok(run(&inputs, q, blocks)?.0)
}

/// Facts of a run ahead of its D sums: the largest score, and the sum of exponentials.
const FACTS: usize = 2;

fn few<E: Float>(q: &Tensor, keys: &Tensor, values: &Tensor, len: usize, sizes: Sizes, config: Config) -> Result<Tensor> {
    let Sizes { heads, kv_heads, head_size: size } = sizes;
    let (n, group) = (q.dims()[0], sizes.group());
    let seen = |token: usize| {
        let end = len - n + token + 1;
        config.window.map_or(0, |window| end.saturating_sub(window))..end
    };
    let first = seen(0).start;
    let runs = (len - first).div_ceil(RUN);
    let (row, rows) = (size + FACTS, n * group);
    let mut parts = Tensor::empty(q.arena(), DType::F32, [kv_heads, runs, rows, row])?;
    let (q_data, k, v) = (q.as_slice::<E>()?, keys.as_slice::<E>()?, values.as_slice::<E>()?);
    let rule = Rule::new(config, E::DTYPE);
    parts.as_mut_slice::<f32>()?.par_chunks_mut((rows * row).max(1)).with_max_len(1).enumerate().for_each(|(task, parts)| {
        let (kv_head, start) = (task / runs, first + task % runs * RUN);
        let part = start..(start + RUN).min(len);
        for (i, to) in parts.chunks_exact_mut(row).enumerate() {
            let (token, head) = (i / group, kv_head * group + i % group);
            let q = &q_data[(token * heads + head) * size..][..size];
            let (facts, sums) = to.split_at_mut(FACTS);
            sums.fill(0.0);
            facts.copy_from_slice(&[f32::MIN, 0.0]);
            let Some(keys) = overlap(&seen(token), &part) else { continue };
            let rows = |from| head_rows(from, &keys, kv_head, sizes);
            with_parts([size, keys.len()], |[query, scores]| {
                for (y, x) in query.iter_mut().zip(q) {
                    *y = x.to_f32();
                }
                dot_rows(query, rows(k), kv_heads * size, scores);
                let (max, sum) = softmax_row(scores, rule);
                facts.copy_from_slice(&[max, sum]);
                add_rows(scores, rows(v), kv_heads * size, sums);
            });
        }
    });
    let mut o = Tensor::empty(q.arena(), E::DTYPE, q.shape())?;
    let parts = parts.as_slice::<f32>()?;
    for (i, o) in o.as_mut_slice::<E>()?.chunks_exact_mut(size).enumerate() {
        let (token, head) = (i / heads, i % heads);
        let at = |run: usize| ((head / group * runs + run) * rows + token * group + head % group) * row;
        with_parts([size], |[sums]| join(o, sums, (0..runs).map(|run| &parts[at(run)..][..row])));
    }
    Ok(o)
}

/// Rows `keys` of one head of k or v [L, K, D], up to the end of the last one.
fn head_rows<'a, E>(from: &'a [E], keys: &Range<usize>, kv_head: usize, sizes: Sizes) -> &'a [E] {
    let Sizes { kv_heads, head_size, .. } = sizes;
    let row = |key| (key * kv_heads + kv_head) * head_size;
    &from[row(keys.start)..row(keys.end - 1) + head_size]
}

/// One row of o from its runs, in order.
fn join<'a, E: Float>(o: &mut [E], sums: &mut [f32], runs: impl Iterator<Item = &'a [f32]>) {
    let (mut max, mut total) = (f32::MIN, 0.0);
    sums.fill(0.0);
    for run in runs {
        let (facts, run_sums) = run.split_at(FACTS);
        let together = max.max(facts[0]);
        let (shrink, factor) = ((max - together).exp(), (facts[0] - together).exp());
        (max, total) = (together, total * shrink + facts[1] * factor);
        for (sum, x) in sums.iter_mut().zip(run_sums) {
            *sum = *sum * shrink + x * factor;
        }
    }
    for (o, sum) in o.iter_mut().zip(sums) {
        *o = E::from_f32(*sum / total);
    }
}
