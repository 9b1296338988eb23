//! Attention of new tokens to cached ones.

use super::{
    Config, Sizes,
    forward::{Block, Inputs, block_queries, run},
};
use crate::{Float, Result, Tensor};

pub(super) fn cached<E: Float>(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    len: usize,
    sizes: Sizes,
    config: Config,
) -> Result<Tensor> {
    let inputs = Inputs::<E> { q: q.as_slice()?, k: keys.as_slice()?, v: values.as_slice()?, sizes, config };
    let (n, step) = (q.dims()[0], block_queries(sizes.group()));
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
