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
        Device, Rng, Weight,
        ops::linear::{Adapter, cuda::few::tests::gpu},
    };

    /// A device that only counts checks each launch's arguments against the kernel's. With one row of A more than pays nothing is served.
    #[test]
    fn launches_of_one_token_are_as_their_kernels_have_it() {
        let arena = gpu(ComputeCapability::HOPPER, 132);
        let Device::Cuda(device) = arena.device() else { unreachable!("made on a GPU") };
        let zeros = |rows, cols| Tensor::zeros(&arena, DType::Bf16, [rows, cols]).unwrap();
        let parts = |ranks: &[usize], [outputs, inputs]: [usize; 2]| {
            let all = zeros(ranks.iter().sum(), inputs);
            let part = |(i, &rank): (usize, &usize)| {
                let weight = Weight::random(&arena, [outputs, inputs], &QuantConfig::default(), 0.02, Rng::new(1)).unwrap();
                let a = all.rows(ranks[..i].iter().sum(), rank).unwrap();
                Part { weight, bias: None, adapter: Some(Adapter { a, b: zeros(outputs, rank), scale: 1.0, dropout: None }) }
            };
            ranks.iter().enumerate().map(part).collect::<Vec<_>>()
        };
        let (x, weight) = (zeros(1, 512), Tensor::zeros(&arena, DType::F32, [512]).unwrap());
        let behind_norm = |ranks: &[usize]| {
            let config = Config { eps: 1e-5, offset: 0.0 };
            super::behind_norm(device, [&x, &x], &weight, config, &parts(ranks, [1024, 512])).unwrap()
        };
        let (r, ys) = behind_norm(&[132, 132]).unwrap();
        assert_eq!([r.dims(), ys[1].dims()], [&[1, 512], &[1, 1024]]);
        assert!(behind_norm(&[132, 133]).is_none());
        let gate = zeros(1, 1024);
        let behind_gate =
            |up: &Tensor, rank| super::behind_gate(device, [&gate, up], Activation::Gelu, &parts(&[rank], [512, 1024]));
        assert_eq!(behind_gate(&gate, 132).unwrap().unwrap()[0].dims(), [1, 512]);
        assert!(behind_gate(&gate, 133).unwrap().is_none());
        assert!(behind_gate(&zeros(1, 1016), 8).is_err());
    }
}
