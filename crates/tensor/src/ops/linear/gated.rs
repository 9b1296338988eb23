//! The layers around a gated unit y = act(gate) · up: `gate` and `up` over one input before it, and the one behind it, whose backward
//! pass goes on to their gradients. On a GPU the unit may be done in the ends of their products; its values are the same then.

use super::{MANY_TOKENS, Part, PartGrads, Saved, backward, can_wait_for_input, cuda, forward_with_room, room};
use crate::{
    DType, Device, Error, Result, Tensor,
    ops::glu::{self, Activation},
};

/// A gated unit: its operands and its result, [T, F] each.
#[derive(Clone, Debug)]
pub struct Gated {
    /// What the activation is of.
    pub gate: Tensor,
    /// What that is multiplied with.
    pub up: Tensor,
    /// act(gate) · up, with room behind its rows for the layer that reads it.
    pub y: Tensor,
}

/// The unit over the layers `gate` and `up`, in this order, of `x` [T, K].
///
/// # Errors
/// As [`super::forward`]; [`Error::Argument`] for another number of layers.
pub fn forward_gated(x: &Tensor, parts: &[Part], activation: Activation) -> Result<(Gated, Saved)> {
    if let [gate, up] = parts
        && let Device::Cuda(device) = x.device()
    {
        super::check(x.shape().last(), gate)?;
        super::check(x.shape().last(), up)?;
        if let Some(found) = cuda::forward_gated(device, x, parts, activation)? {
            return Ok(found);
        }
    }
    let (ys, saved) = forward_with_room(x, parts, room(x))?;
    let [gate, up] = <[Tensor; 2]>::try_from(ys).map_err(|ys| Error::Argument {
        op: "gated unit",
        argument: "parts",
        expected: "two, gate and up",
        found: ys.len(),
    })?;
    let y = glu::forward_with_room(&gate, &up, activation, room(x))?;
    Ok((Gated { gate, up, y }, saved))
}

/// Whether [`backward_gated`] makes y [T, F] again at next to no cost, so that it need not be kept: for a frozen 4-bit or 8-bit layer [N, F]
/// with an adapter of `rank` and no dropout.
#[must_use]
pub fn makes_gated_again(
    device: Device,
    dtype: DType,
    [tokens, f, outputs]: [usize; 3],
    rank: usize,
    activation: Activation,
) -> bool {
    let Device::Cuda(device) = device else { return false };
    // dy is copied beside t where it has no room, if it is narrow.
    let rides = rank > 0 && rank.is_multiple_of(8) && tokens >= MANY_TOKENS && outputs <= f;
    rides && cuda::serves_gated_gradients(device, dtype, [tokens, f], activation)
}

/// (dgate, dup) from the gradient `dy` [T, N] of the layer `part` over act(gate) · up; adds to the gradients of what trains in the layer.
/// `y` is the unit's result, or nothing to have it made again. On a GPU the gradients lie over `gate` and `up` where those are
/// their only handles.
///
/// # Errors
/// As [`super::backward`].
pub fn backward_gated(
    dy: &Tensor,
    [gate, up]: [Tensor; 2],
    y: Option<Tensor>,
    activation: Activation,
    saved: &Saved,
    part: &Part,
    mut grads: PartGrads<'_>,
) -> Result<(Tensor, Tensor)> {
    let (dys, parts) = (std::slice::from_ref(dy), std::slice::from_ref(part));
    super::check_backward(dys, gate.shape(), parts, std::slice::from_ref(&grads))?;
    let waits = can_wait_for_input(dys, parts) && grads.weight.is_none();
    if let (Device::Cuda(device), true) = (dy.device(), waits) {
        return cuda::backward_gated(device, dy, [gate, up], y, activation, saved, parts, &mut grads);
    }
    let is_read = part.adapter.is_some() || grads.weight.is_some();
    let y = match y {
        Some(y) => y,
        None if is_read => glu::forward(&gate, &up, activation)?,
        // Anything of its sizes: for dx and the bias its values are not read.
        None => gate.clone(),
    };
    let dx = backward(dys, y, saved, parts, vec![grads], true)?;
    let dx = dx.ok_or(Error::Argument { op: "gated unit", argument: "dx", expected: "what was asked for", found: 0 })?;
    glu::backward(&dx, gate, up, activation)
}
