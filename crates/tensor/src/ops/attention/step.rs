//! One more token of each of B texts: its key and value into the cache, its query over all of the text's.
//!
//! q [B, H, D], k and v [B, K, D] as the projections gave them; keys and values [S L, K, D]: slot s of a cache, L tokens as the texts'
//! capacity says, begins at row s L. Text i lies in slot slots\[i\], which is filled up to lens\[i\] - 1. Queries and keys are turned
//! by rope here. Lengths and slots are read where the device has them, so that a captured step serves the tokens to come.

use super::{Config, Sizes, check, cuda, decode};
use crate::{
    Device, Error, Result, Tensor,
    dtype::with_float,
    ops::{
        rope::{self, RopeTable},
        sample::Texts,
        typed,
    },
};

const OP: &str = "attention step";

/// o [B, H, D].
///
/// # Errors
/// As [`super::forward`]; [`Error::Argument`] for a slot beyond the cache (on a GPU: for none that holds a slot).
pub fn step(
    [q, k, v]: [Tensor; 3],
    [keys, values]: [&mut Tensor; 2],
    texts: &Texts,
    table: &RopeTable,
    config: Config,
) -> Result<Tensor> {
    let sizes = check(OP, &q, keys, values, config)?;
    q.expect_shape(OP, "q", [texts.count(), sizes.heads, sizes.head_size])?;
    for (name, new) in [("k", &k), ("v", &v)] {
        new.expect_shape(OP, name, [texts.count(), sizes.kv_heads, sizes.head_size])?;
        super::expect_dtype(OP, name, q.dtype(), new)?;
    }
    let limits = [
        (table.positions(), "positions", "as many as a slot holds, at least"),
        (keys.dims()[0], "keys", "as many rows as a slot holds, at least"),
    ];
    for (found, argument, expected) in limits {
        if found < texts.capacity() {
            return Err(Error::Argument { op: OP, argument, expected, found });
        }
    }
    match q.device() {
        Device::Cpu => on_host([q, k, v], [keys, values], texts, table, sizes, config),
        Device::Cuda(device) => {
            cuda::step(device, [typed::writable(OP, "q", q)?, k, v], [keys, values], texts, table, sizes, config)
        }
    }
}

fn on_host(
    [q, k, v]: [Tensor; 3],
    [keys, values]: [&mut Tensor; 2],
    texts: &Texts,
    table: &RopeTable,
    sizes: Sizes,
    config: Config,
) -> Result<Tensor> {
    let (lens, slots) = (texts.lens.as_slice::<u32>()?, texts.slots.as_slice::<u32>()?);
    let positions: Vec<u32> = lens.iter().map(|len| len - 1).collect();
    let positions = Tensor::from_slice(q.arena(), &positions, [positions.len()])?;
    let (q, k) = (rope::forward(q, &positions, table)?, rope::forward(k, &positions, table)?);
    let mut o = Tensor::empty(q.arena(), q.dtype(), q.shape())?;
    for (i, (&len, &slot)) in lens.iter().zip(slots).enumerate() {
        let (len, first) = (len as usize, slot as usize * texts.capacity());
        if first + texts.capacity() > keys.dims()[0] {
            return Err(Error::Argument { op: OP, argument: "slot", expected: "within the cache", found: slot as usize });
        }
        keys.copy_rows(first + len - 1, &k.rows(i, 1)?)?;
        values.copy_rows(first + len - 1, &v.rows(i, 1)?)?;
        let (query, keys, values) = (q.rows(i, 1)?, keys.rows(first, len)?, values.rows(first, len)?);
        let of_text = with_float!(q.dtype(), OP, "q", E => decode::cached::<E>(&query, &keys, &values, len, sizes, config))?;
        o.copy_rows(i, &of_text)?;
    }
    Ok(o)
}
