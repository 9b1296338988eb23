//! The layers around a gated unit, with the unit in the ends of products where the kernels serve (`product_gated_sm90.cu`), and by
//! itself elsewhere.

use super::{
    super::{Gated, Part, PartGrads, Saved, room},
    Pending,
    call::{Call, rows},
};
use crate::{
    DType, Result, Tensor, ahead,
    cuda::{CudaDevice, GatedUnit, is_aligned},
    ops::glu::{self, Activation},
};

/// The activation's name in the kernels', if they have it.
fn name(activation: Activation) -> Option<&'static str> {
    match activation {
        Activation::Silu => Some("silu"),
        Activation::GeluTanh => Some("gelu_tanh"),
        Activation::Gelu => None,
    }
}

/// The unit in the ends of one product for gate and up; nothing where that does not serve.
pub(in super::super) fn forward_gated(
    device: CudaDevice,
    x: &Tensor,
    parts: &[Part],
    activation: Activation,
) -> Result<Option<(Gated, Saved)>> {
    let (Some(activation), [gate, _]) = (name(activation), parts) else { return Ok(None) };
    let (room, sizes) = (room(x), [x.shape().rows(), 2 * gate.outputs()]);
    if room == 0 || !device.serves_product(sizes, x.dtype()) || !is_aligned(&rows(x)?) {
        return Ok(None);
    }
    let call = Call::new(device, x, parts)?;
    if !call.serves_gated() {
        return Ok(None);
    }
    let Some(h) = call.narrow()? else { return Ok(None) };
    let beside = call.beside(&h)?;
    let Ok([gate, up]) = <[Tensor; 2]>::try_from(call.outputs(room)?) else { return Ok(None) };
    let y = Tensor::with_room(&call.arena, call.dtype, gate.shape(), room)?;
    let weight = call.weights_beside(0..2)?;
    let unit = GatedUnit { activation, gate: rows(&gate)?, up: rows(&up)? };
    let sizes = [call.tokens, gate.shape().last(), call.inputs + call.ranks];
    let ([m, f, k], operands, y_at) = (sizes, [rows(&beside)?, rows(&weight)?], rows(&y)?);
    ahead::beside(device, &call.arena, [m, 2 * f, k], |ahead| {
        device.gated_product(operands, sizes, unit, y_at, call.dtype, ahead)
    })?;
    Ok(Some((Gated { gate, up, y }, Saved(vec![Some(h)]))))
}

/// Whether a product that makes the gradient [m, f] of a gated unit may make those of its operands instead.
pub(in super::super) fn serves_gated_gradients(
    device: CudaDevice,
    dtype: DType,
    [m, f]: [usize; 2],
    activation: Activation,
) -> bool {
    name(activation).is_some() && f.is_multiple_of(8) && device.serves_product([m, f], dtype)
}

/// The backward pass of the layer behind the unit and of the unit, for layers whose input may come last.
#[allow(clippy::too_many_arguments)] // the two ops' operands
pub(in super::super) fn backward_gated(
    device: CudaDevice,
    dy: &Tensor,
    [gate, up]: [Tensor; 2],
    y: Option<Tensor>,
    activation: Activation,
    saved: &Saved,
    parts: &[Part],
    grads: &mut PartGrads<'_>,
) -> Result<(Tensor, Tensor)> {
    let (dys, grads) = (std::slice::from_ref(dy), std::slice::from_mut(grads));
    let call = Call::of_shape(device, dy.arena(), dy.dtype(), gate.shape(), parts)?;
    let pending = call.output_gradients(dys, saved, grads, true)?;
    let mut add_a = |y: &Tensor| match pending.t()? {
        Some(t) => Call::new(device, y, parts)?.add_a_gradients(t, grads),
        None => Ok(()),
    };
    if let Some((apart, again)) = call.gated_gradients(dys, &pending, [&gate, &up], y.is_none(), activation)? {
        again.or(y).map_or(Ok(()), |y| add_a(&y))?;
        return Ok(apart.unwrap_or([gate, up]).into());
    }
    if let Some(y) = y {
        add_a(&y)?;
        drop(y);
        let dx = call.input_gradient(dys, pending.t()?)?;
        return glu::backward(&dx, gate, up, activation);
    }
    let dx = call.input_gradient(dys, pending.t()?)?;
    let (dgate, dup, y) = glu::backward_and_forward(dx, gate, up, activation)?;
    add_a(&y)?;
    Ok((dgate, dup))
}

/// Memory for the gradients, unless it is that of gate and up; and y, if it was made again.
type GatedGradients = (Option<[Tensor; 2]>, Option<Tensor>);

impl Call<'_, '_> {
    /// Whether one product makes gate, up and their unit, if it fills the device.
    fn serves_gated(&self) -> bool {
        let [gate, up] = self.parts else { return false };
        let f = gate.outputs();
        let plain = self.parts.iter().all(|part| part.bias.is_none() && self.rides(part));
        // The copy engine wants rows on 16 bytes.
        let aligned = f.is_multiple_of(8) && self.inputs.is_multiple_of(8);
        plain && aligned && up.outputs() == f && self.tokens >= self.inputs
    }

    /// The gradients of gate and up by the product that makes that of their unit, and the unit `again`; nothing where that does not serve.
    fn gated_gradients(
        &self,
        dys: &[Tensor],
        pending: &Pending,
        [gate, up]: [&Tensor; 2],
        again: bool,
        activation: Activation,
    ) -> Result<Option<GatedGradients>> {
        let (gate_at, up_at) = (rows(gate)?, rows(up)?);
        let outputs_aligned = self.parts.iter().all(|part| part.outputs().is_multiple_of(8));
        let aligned = outputs_aligned && [&gate_at, &up_at, &rows(&dys[0])?].into_iter().all(is_aligned);
        let lies = gate_at.ld == up_at.ld && glu::cuda::may_be_written_over(gate, up);
        let rides = self.stacked && self.parts.iter().all(|part| self.rides(part));
        let served =
            aligned && lies && rides && serves_gated_gradients(self.device, self.dtype, [self.tokens, self.inputs], activation);
        let (Some(activation), Some(riders), Some(t)) = (name(activation).filter(|_| served), self.riders(dys), pending.t()?)
        else {
            return Ok(None);
        };
        let Some(([beside, weight], width)) = self.gradients_beside(riders, dys, t)? else { return Ok(None) };
        let (left, right) = (rows(&beside)?, rows(&weight)?);
        let apart = glu::cuda::memory_apart(gate, up)?;
        let [dgate, dup] = apart.as_ref().map_or([gate, up], |[dgate, dup]| [dgate, dup]);
        let y = again.then(|| Tensor::empty(&self.arena, self.dtype, gate.shape())).transpose()?;
        let unit = GatedUnit { activation, gate: gate_at, up: up_at };
        let sizes = [self.tokens, self.inputs, width];
        let y_at = y.as_ref().map(rows).transpose()?;
        let gradients = [rows(dgate)?, rows(dup)?];
        ahead::beside(self.device, &self.arena, sizes, |ahead| {
            self.device.gated_gradients([left, right], sizes, unit, gradients, y_at, self.dtype, ahead)
        })?;
        Ok(Some((apart, y)))
    }
}

#[cfg(test)]
mod tests {
    use nibble_nf4::QuantConfig;

    use super::{super::super::ROOM, *};
    use crate::{
        Arena, Device, Rng, Weight,
        cuda::{ComputeCapability, DeviceInfo},
        ops::linear::{self, Adapter},
    };

    /// A device that only counts checks each launch's arguments against the kernel's.
    #[test]
    fn launches_around_a_gated_unit_are_as_their_kernels_have_it() {
        let (name, driver) = ("a GPU".to_owned(), 13_000);
        let capability = ComputeCapability::HOPPER;
        let info = DeviceInfo { ordinal: 0, name, capability, memory: 80 << 30, multiprocessors: 132, driver };
        let arena = Arena::on(Device::Cuda(CudaDevice::dry(&info)), usize::MAX).unwrap();
        let part = |[n, k]: [usize; 2]| {
            let weight = Weight::random(&arena, [n, k], &QuantConfig::default(), 0.02, Rng::new(1)).unwrap();
            let [a, b] = [[16, k], [n, 16]].map(|shape| Tensor::zeros(&arena, DType::Bf16, shape).unwrap());
            Part { weight, bias: None, adapter: Some(Adapter { a, b, scale: 1.0, dropout: None }) }
        };
        let x = Tensor::with_room(&arena, DType::Bf16, [1024, 128], ROOM).unwrap();
        let (down, served) = (part([128, 4096]), [Activation::Silu, Activation::GeluTanh]);
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            let (gated, _) = linear::forward_gated(&x, &[part([4096, 128]), part([4096, 128])], activation).unwrap();
            let sizes = [1024, 4096, 128];
            let again = linear::makes_gated_again(arena.device(), DType::Bf16, sizes, 16, activation);
            assert_eq!(again, served.contains(&activation));
            let (_, saved) = linear::forward(&gated.y, std::slice::from_ref(&down)).unwrap();
            let operands = [gated.gate, gated.up];
            let (dgate, dup) =
                linear::backward_gated(&x, operands, None, activation, &saved, &down, PartGrads::default()).unwrap();
            assert_eq!([dgate.dims(), dup.dims()], [[1024, 4096]; 2]);
        }
    }
}
