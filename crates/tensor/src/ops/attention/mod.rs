//! Causal attention over packed documents, with grouped key/value heads, a sliding window and soft-capped scores.
//!
//! For token i and head h of a document, with g = h K / H its key/value head:
//!
//! ```text
//! s_ij = scale q_i · k_j            for j of the same document, i - window < j <= i
//! z_ij = cap tanh(s_ij / cap)       (z = s without softcap)
//! lse_i = ln Σ_j exp z_ij
//! p_ij = exp(z_ij - lse_i),  o_i = Σ_j p_ij v_j
//!
//! δ_i = do_i · o_i
//! ds_ij = p_ij (do_i · v_j - δ_i) (1 - (z_ij / cap)²)
//! dq_i = scale Σ_j ds_ij k_j,  dk_j = scale Σ_i ds_ij q_i,  dv_j = Σ_i p_ij do_i
//! ```
//!
//! q, o [T, H, D]; k, v [T, K, D]; lse F32 [H, T]. H is a multiple of K; query heads g H/K .. (g + 1) H/K read key/value
//! head g. Saved for backward: q, k, v, o, lse. The T x T matrix never exists: a tile of it does, per thread (Dao 2023,
//! "FlashAttention-2"; online softmax of Milakov and Gimelshein 2018).
//!
//! Sums are in f32 whatever the activations' type. For 16-bit activations the unnormalised probabilities
//! exp(z - running maximum) are rounded to that type's precision before they multiply v in the forward pass, as the
//! reference's flash attention does (their sum is of the unrounded ones). In the backward pass p and ds are rounded to bf16 for
//! bf16 activations on processors that multiply pairs of those, as on a GPU; else it rounds only what it returns.
//! Results do not depend on the number of threads.

mod backward;
mod cuda;
mod decode;
mod forward;
mod hopper;
mod operands;
mod scratch;
mod step;
mod strip;
#[cfg(test)]
mod tests;
mod tile;

pub use step::step;

use super::{
    Documents,
    rope::{self, RopeTable},
};
use crate::{DType, Device, Error, Result, Tensor, dtype::with_float};

/// What the scores go through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Factor of q · k, most often 1/√D.
    pub scale: f32,
    /// Token i sees itself and the `window - 1` tokens before it (transformers' `sliding_window`); all if `None`.
    pub window: Option<usize>,
    /// Bound of the scores (Gemma 2's `attn_logit_softcapping`).
    pub softcap: Option<f32>,
}

/// (o [T, H, D], lse F32 [H, T]).
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Argument`] for a window or softcap of 0, [`Error::OutOfMemory`].
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, config: Config) -> Result<(Tensor, Tensor)> {
    forward_with_room(q, k, v, documents, config, 0)
}

/// [`forward`], o with room for `room` elements behind the heads of each token where a GPU's kernel leaves it.
///
/// # Errors
/// As [`forward`].
pub fn forward_with_room(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &Documents,
    config: Config,
    room: usize,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "attention";
    let sizes = check(OP, q, k, v, config)?;
    check_tokens(OP, q, k, documents)?;
    match q.device() {
        Device::Cpu => with_float!(q.dtype(), OP, "q", E => forward::documents::<E>(q, k, v, documents, sizes, config)),
        Device::Cuda(device) => cuda::forward(device, [q, k, v], documents, sizes, config, room),
    }
}

/// (dq, dk, dv), each in the shape and dtype of q, k and v. `d_o` is the gradient of o.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    documents: &Documents,
    config: Config,
) -> Result<(Tensor, Tensor, Tensor)> {
    backward_to(&Saved { d_o, q, k, v, o, lse }, documents, config, Wanted::default())
}

/// What the forward pass read and left, and the gradient of its output.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// The gradient of o.
    pub d_o: &'a Tensor,
    /// [T, H, D].
    pub q: &'a Tensor,
    /// [T, K, D].
    pub k: &'a Tensor,
    /// [T, K, D].
    pub v: &'a Tensor,
    /// [T, H, D].
    pub o: &'a Tensor,
    /// F32 [H, T].
    pub lse: &'a Tensor,
}

/// In what form the gradients are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted<'a> {
    /// Where a GPU's kernel leaves them so, a token's dq, dk and dv lie side by side, with room for so many elements behind them:
    /// linear layers read them as one matrix.
    pub side_by_side: Option<usize>,
    /// q and k are rotary embeddings by this table, at the documents' positions: dq and dk are those of what was embedded, as
    /// [`rope::backward`] makes them. On Hopper in 16 bits they are turned in f32, before they are rounded.
    pub rope: Option<&'a RopeTable>,
}

/// [`backward`], in another form.
///
/// # Errors
/// As [`forward`], and as [`rope::backward`].
pub fn backward_to(
    saved: &Saved<'_>,
    documents: &Documents,
    config: Config,
    wanted: Wanted<'_>,
) -> Result<(Tensor, Tensor, Tensor)> {
    const OP: &str = "attention backward";
    let Saved { d_o, q, k, v, o, lse } = *saved;
    let sizes = check(OP, q, k, v, config)?;
    check_tokens(OP, q, k, documents)?;
    for (name, tensor) in [("d_o", d_o), ("o", o)] {
        tensor.expect_shape(OP, name, q.shape())?;
        expect_dtype(OP, name, q.dtype(), tensor)?;
    }
    lse.expect_shape(OP, "lse", [sizes.heads, documents.tokens()])?;
    expect_dtype(OP, "lse", DType::F32, lse)?;
    let positions = documents.positions();
    if let Some(table) = wanted.rope {
        rope::check("q", q, positions, table)?;
    }
    let (dq, dk, dv) = match q.device() {
        Device::Cpu => with_float!(q.dtype(), OP, "q", E => backward::documents::<E>(saved, documents, sizes, config))?,
        Device::Cuda(device) if cuda::turns_back(device, q.dtype(), sizes, config, wanted.rope) => {
            return cuda::backward(device, saved, documents, sizes, config, wanted);
        }
        Device::Cuda(device) => cuda::backward(device, saved, documents, sizes, config, Wanted { rope: None, ..wanted })?,
    };
    Ok(match wanted.rope {
        Some(table) => (rope::backward(dq, positions, table)?, rope::backward(dk, positions, table)?, dv),
        None => (dq, dk, dv),
    })
}

/// o [n, H, D] of the last n of `len` cached tokens, for generation: q [n, H, D] are their queries, and the first `len` rows
/// of `keys` and `values` [L, K, D] the tokens so far, all of one document. Serves the prompt (n = len) and single tokens.
///
/// # Errors
/// As [`forward`]; [`Error::Argument`] when `len` is below n or above L.
pub fn cached_forward(q: &Tensor, keys: &Tensor, values: &Tensor, len: usize, config: Config) -> Result<Tensor> {
    const OP: &str = "cached attention";
    let sizes = check(OP, q, keys, values, config)?;
    if len < q.dims()[0] || len > keys.dims()[0] {
        let expected = "at least the number of queries and at most the cache's length";
        return Err(Error::Argument { op: OP, argument: "len", expected, found: len });
    }
    match q.device() {
        Device::Cpu => with_float!(q.dtype(), OP, "q", E => decode::cached::<E>(q, keys, values, len, sizes, config)),
        Device::Cuda(device) => cuda::cached(device, q, keys, values, len, sizes, config),
    }
}

/// H, K and D.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    head_size: usize,
}

impl Sizes {
    /// Query heads of one key/value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

fn check(op: &'static str, q: &Tensor, k: &Tensor, v: &Tensor, config: Config) -> Result<Sizes> {
    let argument = |argument, expected, found| Error::Argument { op, argument, expected, found };
    let (&[_, heads, head_size], &[len, kv_heads, _]) = (q.dims(), k.dims()) else {
        let (operand, rank) = if q.dims().len() == 3 { ("k", k.dims().len()) } else { ("q", q.dims().len()) };
        return Err(argument(operand, "of three sizes (tokens, heads, head size)", rank));
    };
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(argument("heads", "a multiple of the key/value heads, both positive", heads));
    }
    if head_size == 0 {
        return Err(argument("head_size", "at least 1", 0));
    }
    k.expect_shape(op, "k", [len, kv_heads, head_size])?;
    v.expect_shape(op, "v", k.shape())?;
    expect_dtype(op, "k", q.dtype(), k)?;
    expect_dtype(op, "v", q.dtype(), v)?;
    if config.window == Some(0) {
        return Err(argument("window", "at least 1", 0));
    }
    if config.softcap.is_some_and(|cap| cap <= 0.0 || !cap.is_finite()) {
        return Err(argument("softcap", "positive and finite", 0));
    }
    Ok(Sizes { heads, kv_heads, head_size })
}

fn check_tokens(op: &'static str, q: &Tensor, k: &Tensor, documents: &Documents) -> Result<()> {
    for (name, tensor) in [("q", q), ("k", k)] {
        tensor.expect_shape(op, name, [documents.tokens(), tensor.dims()[1], tensor.dims()[2]])?;
    }
    Ok(())
}

fn expect_dtype(op: &'static str, operand: &'static str, expected: DType, tensor: &Tensor) -> Result<()> {
    if tensor.dtype() == expected {
        return Ok(());
    }
    Err(Error::DType { op, operand, expected: expected.name(), found: tensor.dtype() })
}
