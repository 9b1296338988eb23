//! Linear layers over one input: frozen bases in any format, low-rank adapters beside them.
//!
//! For each part i (q, k and v of an attention, gate and up of an MLP, or one alone), with x [T, K], W [N, K], bias `[N]`,
//! A [R, K], B [N, R] and s the adapter's scaling:
//!
//! ```text
//! h  = dropout(x) Aᵀ                          [T, R]
//! y  = x Wᵀ + bias + s h Bᵀ = [x | h] [W | s B]ᵀ + bias
//!
//! t  = s dy B                                 [T, R]
//! dx = Σ dy W + dropout'(t A) = Σ [dy | t] [W ; A]   (the second form without dropout)
//! dA += tᵀ dropout(x),  dB += s dyᵀ h,  dW += dyᵀ x,  dbias += Σ dy
//! ```
//!
//! A frozen weight's gradient is never computed. Saved for backward: x and h. The dropout mask is a function of a seed and
//! the element's index ([`Rng`]), so that it is made again instead of stored.

mod behind;
mod cuda;
mod gated;

pub use behind::{behind_norm, gated_behind_norm};
pub use gated::{Gated, backward_gated, forward_gated, makes_gated_again};

use crate::{DType, Device, Error, Result, Rng, Shape, Tensor, TensorMut, Weight};

const OP: &str = "linear";

/// Inverted dropout: each element is kept with probability 1 - p and divided by it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping, in [0, 1).
    pub p: f32,
    /// Stream of the mask: element n is dropped when its n-th number is below p.
    pub rng: Rng,
}

/// A low-rank update beside a weight.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// [R, K].
    pub a: Tensor,
    /// [N, R].
    pub b: Tensor,
    /// s.
    pub scale: f32,
    /// On the adapter's input.
    pub dropout: Option<Dropout>,
}

/// One linear layer of those that share an input.
#[derive(Clone, Debug)]
pub struct Part {
    /// [N, K].
    pub weight: Weight,
    /// `[N]`.
    pub bias: Option<Tensor>,
    /// The trained update.
    pub adapter: Option<Adapter>,
}

/// What [`forward`] keeps for [`backward`]: h of each part that has an adapter, or of all parts side by side.
#[derive(Clone, Debug)]
pub struct Saved(Vec<Option<Tensor>>);

/// Where the gradients of one part's trained values are added; nothing where frozen.
#[derive(Debug, Default)]
pub struct PartGrads<'a> {
    /// [N, K].
    pub weight: Option<TensorMut<'a>>,
    /// `[N]`.
    pub bias: Option<TensorMut<'a>>,
    /// [R, K] and [N, R].
    pub adapter: Option<(TensorMut<'a>, TensorMut<'a>)>,
}

/// Room that an op leaves behind the rows of what linear layers read on a GPU, for x and h to be one operand [x | h]: whole
/// lines of memory.
const ROOM: usize = 64;
/// Tokens from which [x | h] and [dy | t] are made: below, they cost more launches than they save bytes.
const MANY_TOKENS: usize = 256;

/// How much room an op leaves behind the rows of a result that linear layers read, of the tokens and the type of its input `x`.
#[must_use]
pub fn room(x: &Tensor) -> usize {
    room_of(x.device(), x.dtype(), x.dims().first().copied().unwrap_or(0))
}

/// [`room`], in elements a row, for so many tokens.
#[must_use]
pub fn room_of(device: Device, dtype: DType, tokens: usize) -> usize {
    if device == Device::Cpu || dtype == DType::F32 || tokens < MANY_TOKENS { 0 } else { ROOM }
}

/// y of each part. Products of f32 activations are in f32; of 16-bit activations, both operands are rounded to that type and
/// summed in f32.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::OutOfMemory`].
pub fn forward(x: &Tensor, parts: &[Part]) -> Result<(Vec<Tensor>, Saved)> {
    forward_with_room(x, parts, 0)
}

/// [`forward`], on a GPU with room for `room` elements behind the rows of each y, or of two that lie side by side behind those of the
/// last: where they are written over with their gradients, t may lie there.
///
/// # Errors
/// As [`forward`].
pub fn forward_with_room(x: &Tensor, parts: &[Part], room: usize) -> Result<(Vec<Tensor>, Saved)> {
    let inputs = x.shape().last();
    for part in parts {
        check(inputs, part)?;
    }
    match x.device() {
        Device::Cpu => {
            let outputs = cpu::forward(x, parts)?;
            let (ys, hs) = outputs.into_iter().unzip();
            Ok((ys, Saved(hs)))
        }
        Device::Cuda(device) => cuda::forward(device, x, parts, room),
    }
}

/// What [`forward`] keeps for [`backward`], without y: where the forward pass runs again and nobody reads its result.
///
/// # Errors
/// As [`forward`].
pub fn forward_unread(x: &Tensor, parts: &[Part]) -> Result<Saved> {
    let inputs = x.shape().last();
    for part in parts {
        check(inputs, part)?;
    }
    match x.device() {
        Device::Cpu => Ok(Saved(cpu::adapter_inputs(x, parts)?)),
        Device::Cuda(device) => cuda::forward_unread(device, x, parts),
    }
}

/// Adds to the gradients of what trains, and returns dx when it is wanted. `saved` is what the forward pass kept;
/// `x` is let go where it is not needed any more.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::OutOfMemory`]; [`Error::Argument`] without parts, or where there are not as many `dys` and `grads`.
pub fn backward(
    dys: &[Tensor],
    x: Tensor,
    saved: &Saved,
    parts: &[Part],
    grads: Vec<PartGrads<'_>>,
    want_dx: bool,
) -> Result<Option<Tensor>> {
    check_backward(dys, x.shape(), parts, &grads)?;
    match x.device() {
        Device::Cpu => cpu::backward(dys, &x, &saved.0, parts, grads, want_dx),
        Device::Cuda(device) => cuda::backward(device, dys, x, saved, parts, grads, want_dx),
    }
}

/// Whether dx, dB and dbias can be made before the input is there: on a GPU, where every layer has an adapter and nothing is dropped.
fn can_wait_for_input(dys: &[Tensor], parts: &[Part]) -> bool {
    let plain = |part: &Part| part.adapter.as_ref().is_some_and(|adapter| adapter.dropout.is_none());
    dys.iter().all(|dy| dy.device() != Device::Cpu) && parts.iter().all(plain)
}

fn check_backward(dys: &[Tensor], shape: Shape, parts: &[Part], grads: &[PartGrads<'_>]) -> Result<()> {
    if parts.is_empty() {
        return Err(Error::Argument { op: OP, argument: "parts", expected: "at least one", found: 0 });
    }
    for (name, found) in [("dys", dys.len()), ("grads", grads.len())] {
        if found != parts.len() {
            return Err(Error::Argument { op: "linear", argument: name, expected: "as many as parts", found });
        }
    }
    for (part, dy) in parts.iter().zip(dys) {
        check(shape.last(), part)?;
        dy.expect_shape("linear", "dy", [shape.rows(), part.outputs()])?;
    }
    Ok(())
}

impl Part {
    /// N.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.weight.shape().dims()[0]
    }
}

fn check(inputs: usize, part: &Part) -> Result<()> {
    let outputs = part.outputs();
    let expect = |operand, expected: Shape, found: Shape| {
        if expected == found { Ok(()) } else { Err(Error::Shape { op: "linear", operand, expected, found }) }
    };
    expect("weight", [outputs, inputs].into(), part.weight.shape())?;
    if let Some(bias) = &part.bias {
        expect("bias", [outputs].into(), bias.shape())?;
    }
    if let Some(adapter) = &part.adapter {
        let rank = adapter.a.shape().rows();
        expect("lora_A", [rank, inputs].into(), adapter.a.shape())?;
        expect("lora_B", [outputs, rank].into(), adapter.b.shape())?;
    }
    Ok(())
}

mod cpu;

impl Dropout {
    /// What element `n` is multiplied by: 0 or 1 / (1 - p).
    fn factor(&self, n: usize) -> f32 {
        if self.rng.uniform(n as u64) < self.p { 0.0 } else { 1.0 / (1.0 - self.p) }
    }
}

#[cfg(test)]
mod tests;
