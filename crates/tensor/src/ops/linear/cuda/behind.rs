//! One token's input of some layers and the h of their adapters from one kernel, then the layers' products.

use super::{super::Part, call::Call, products};
use crate::{
    DType, Result, Tensor,
    cuda::CudaDevice,
    ops::{
        glu::{self, Activation},
        rms_norm::{self, Config},
    },
};

/// (r, ys), or nothing where the kernel does not serve.
pub(in super::super) fn behind_norm(
    device: CudaDevice,
    [x, a]: [&Tensor; 2],
    weight: &Tensor,
    config: Config,
    parts: &[Part],
) -> Result<Option<(Tensor, Vec<Tensor>)>> {
    let Some((call, lora_a)) = served(device, x, parts)? else { return Ok(None) };
    let Some([r, y, h]) = rms_norm::cuda::residual_forward_with_h(device, [x, a], weight, config, lora_a)? else {
        return Ok(None);
    };
    Ok(Some((r, products(&call.with_input(&y), Some(&h), None, 0)?)))
}

/// ys, or nothing where the kernel does not serve.
pub(in super::super) fn behind_gate(
    device: CudaDevice,
    [gate, up]: [&Tensor; 2],
    activation: Activation,
    parts: &[Part],
) -> Result<Option<Vec<Tensor>>> {
    let Some((call, lora_a)) = served(device, gate, parts)? else { return Ok(None) };
    let Some([y, h]) = glu::cuda::forward_with_h(device, [gate, up], activation, lora_a)? else { return Ok(None) };
    Ok(Some(products(&call.with_input(&y), Some(&h), None, 0)?))
}

/// The call for an input like `x`, and where A of all parts lies with its rows: for one token in 16 bits, if it is one matrix as it is kept.
fn served<'p>(device: CudaDevice, x: &Tensor, parts: &'p [Part]) -> Result<Option<(Call<'static, 'p>, (u64, usize))>> {
    if x.shape().rows() != 1 || x.dtype() == DType::F32 {
        return Ok(None);
    }
    let call = Call::of_shape(device, x.arena(), x.dtype(), x.shape(), parts)?;
    let found = call.all_a()?.map(|a| (a.address, call.ranks));
    Ok(found.map(|lora_a| (call, lora_a)))
}

#[cfg(test)]
mod tests {
    use nibble_kernels::ComputeCapability;
    use nibble_nf4::QuantConfig;

    use super::*;
    use crate::{
        Rng, Weight,
        ops::linear::{Adapter, behind_norm, cuda::few::tests::gpu, gated_behind_norm},
    };

    /// A device that only counts checks each launch's arguments against the kernel's.
    #[test]
    fn launches_of_one_token_are_as_their_kernels_have_it() {
        let arena = gpu(ComputeCapability::HOPPER, 132);
        let zeros = |rows, cols| Tensor::zeros(&arena, DType::Bf16, [rows, cols]).unwrap();
        let parts = |outputs: &[usize], inputs| {
            let all = zeros(8 * outputs.len(), inputs);
            let part = |(i, &n): (usize, &usize)| {
                let weight = Weight::random(&arena, [n, inputs], &QuantConfig::default(), 0.02, Rng::new(1)).unwrap();
                let (a, b) = (all.rows(8 * i, 8).unwrap(), zeros(n, 8));
                Part { weight, bias: None, adapter: Some(Adapter { a, b, scale: 1.0, dropout: None }) }
            };
            outputs.iter().enumerate().map(part).collect::<Vec<_>>()
        };
        let (x, weight) = (zeros(1, 512), Tensor::zeros(&arena, DType::F32, [512]).unwrap());
        let (config, before) = (Config { eps: 1e-5, offset: 0.0 }, parts(&[1024, 1024], 512));
        let (r, ys) = behind_norm(x.clone(), zeros(1, 512), &weight, config, &before).unwrap();
        assert_eq!([r.dims(), ys[1].dims()], [&[1, 512], &[1, 1024]]);
        let down = parts(&[512], 1024);
        let (_, y) = gated_behind_norm(x, zeros(1, 512), &weight, config, &before, Activation::Gelu, &down).unwrap();
        assert_eq!(y.dims(), [1, 512]);
        let up = zeros(1, 1016);
        assert!(super::behind_gate(device_of(&up), [&zeros(1, 1024), &up], Activation::Silu, &down).is_err());
    }

    fn device_of(x: &Tensor) -> CudaDevice {
        match x.device() {
            crate::Device::Cuda(device) => device,
            crate::Device::Cpu => unreachable!("made on a GPU"),
        }
    }
}
