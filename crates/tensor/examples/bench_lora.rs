//! What adapters of rank 16 add to a training step beside the products with their bases, for the layers of two models at 8192
//! tokens on a GPU: h = x Aᵀ, and t = s dy B, dB += s dyᵀ h, dA += tᵀ x. Microseconds, and the share of the rate of a plain copy in the
//! same run (read + write) that reading x, dy and x again once each comes to.
//!
//! `cargo run --release -p nibble-tensor --example bench_lora`
//!
//! Each call is a graph of calls over operands in turn, several times the second-level cache together; `block` is the calls of one block
//! of the model one after another. Kernels alone are by the device's clock, with a few microseconds of its own. dA and dB are compared
//! with the CPU's (`error`: largest difference over the largest value).
#![allow(clippy::print_stdout)]

mod shared;

use nibble_tensor::{
    Arena, DType, Device, Shape, Tensor, Weight,
    cuda::{CudaDevice, KernelTimer},
    ops::linear::{self, Adapter, Part, PartGrads, Saved},
};
use shared::{Result, normal};

const TOKENS: usize = 8192;
const RANK: usize = 16;
const SCALE: f32 = 0.5;
/// Outputs of the parts, and inputs, of a block's calls.
type Shapes = (&'static [usize], usize);
const MODELS: [(&str, [Shapes; 4]); 2] = [
    ("Llama-3-8B", [(&[4096, 1024, 1024], 4096), (&[4096], 4096), (&[14_336, 14_336], 4096), (&[4096], 14_336)]),
    ("Qwen2.5-1.5B", [(&[1536, 256, 256], 1536), (&[1536], 1536), (&[8960, 8960], 1536), (&[1536], 8960)]),
];
/// Bytes of operands that a graph goes through, at least.
const BYTES: usize = 400 << 20;

/// A call's operands, and where its gradients go.
struct Call {
    x: Tensor,
    dys: Vec<Tensor>,
    parts: Vec<Part>,
    saved: Saved,
    grads: Tensor,
    ranges: Vec<(usize, Shape)>,
}

impl Call {
    fn new(arena: &Arena, (outputs, inputs): Shapes) -> Result<Self> {
        let a = normal(1, arena, [RANK * outputs.len(), inputs])?;
        let (mut parts, mut dys, mut ranges, mut at) = (Vec::new(), Vec::new(), Vec::new(), outputs.len() * RANK * inputs);
        for (i, &n) in outputs.iter().enumerate() {
            let b = normal(2 + i as u64, arena, [n, RANK])?;
            let adapter = Adapter { a: a.rows(i * RANK, RANK)?, b, scale: SCALE, dropout: None };
            // Nobody reads it.
            let weight = Weight::Dense(Tensor::empty(arena, DType::Bf16, [n, inputs])?);
            parts.push(Part { weight, bias: None, adapter: Some(adapter) });
            dys.push(normal(6 + i as u64, arena, [TOKENS, n])?);
            ranges.extend([(i * RANK * inputs, [RANK, inputs].into()), (at, [n, RANK].into())]);
            at += n * RANK;
        }
        let x = normal(5, arena, [TOKENS, inputs])?;
        let saved = linear::forward_unread(&x, &parts)?;
        Ok(Self { x, dys, parts, saved, grads: Tensor::zeros(arena, DType::F32, [at])?, ranges })
    }

    /// Bytes of x and of dy.
    fn bytes(&self) -> [usize; 2] {
        [std::slice::from_ref(&self.x), &self.dys[..]].map(|tensors| tensors.iter().map(|tensor| 2 * tensor.numel()).sum())
    }

    fn forward(&mut self) -> nibble_tensor::Result<()> {
        linear::forward_unread(&self.x, &self.parts).map(drop)
    }

    fn backward(&mut self) -> nibble_tensor::Result<()> {
        let mut views = self.grads.views_mut(&self.ranges)?.into_iter();
        let pairs = std::iter::from_fn(|| Some((views.next()?, views.next()?)));
        let grads = pairs.map(|adapter| PartGrads { adapter: Some(adapter), ..PartGrads::default() }).collect();
        linear::backward(&self.dys, self.x.clone(), &self.saved, &self.parts, grads, false).map(drop)
    }
}

fn main() -> Result<()> {
    let (device, arena, copy) = shared::open()?;
    for (model, calls) in MODELS {
        for call in calls {
            measure(device, &arena, copy, model, call)?;
        }
        let mut block = calls.into_iter().map(|call| Call::new(&arena, call)).collect::<Result<Vec<_>>>()?;
        let bytes = block.iter().map(|call| 2 * call.bytes()[0] + call.bytes()[1]).sum();
        let seconds = shared::seconds(device, &arena, || {
            block.iter_mut().try_for_each(Call::forward)?;
            block.iter_mut().rev().try_for_each(Call::backward)
        })?;
        report(&format!("{model}, block"), bytes, seconds, copy);
    }
    Ok(())
}

fn report(name: &str, bytes: usize, seconds: f64, copy: f64) {
    let share = 100.0 * bytes as f64 / seconds / 1e9 / copy;
    println!("{name}: {:.1} us, {share:.1} % of the copy rate", 1e6 * seconds);
}

fn measure(device: CudaDevice, arena: &Arena, copy: f64, model: &str, shapes: Shapes) -> Result<()> {
    let first = Call::new(arena, shapes)?;
    let [x, dy] = first.bytes();
    let name = format!("{model}, {:?} x {}", shapes.0, shapes.1);
    let mut calls = vec![first];
    while calls.len() < 2 || calls.len() * x.min(dy) < BYTES {
        calls.push(Call::new(arena, shapes)?);
    }
    let count = calls.len() as f64;
    let forward = shared::seconds(device, arena, || calls.iter_mut().try_for_each(Call::forward))? / count;
    report(&format!("{name}: h"), x, forward, copy);
    let backward = shared::seconds(device, arena, || calls.iter_mut().try_for_each(Call::backward))? / count;
    report(&format!("{name}: t, dB, dA"), x + dy, backward, copy);
    let call = &mut calls[0];
    for kernel in KernelTimer::new(arena)?.time_kernels(|| call.backward())? {
        println!("    {} x {}: {:.1} us", kernel.calls, kernel.name, 1e3 * kernel.milliseconds / kernel.calls as f64);
    }
    println!("    error {:.1e}", error(arena, shapes)?);
    Ok(())
}

/// Of the gradients, against those of the CPU.
fn error(arena: &Arena, shapes: Shapes) -> Result<f32> {
    let gradients = |arena: &Arena| -> Result<Vec<f32>> {
        let mut call = Call::new(arena, shapes)?;
        call.backward()?;
        Ok(call.grads.to_f32_vec()?)
    };
    let (found, expected) = (gradients(arena)?, gradients(&Arena::new(Device::Cpu))?);
    // dA and dB have sizes of their own.
    let (mut worst, split) = (0.0f32, shapes.0.len() * RANK * shapes.1);
    for range in [0..split, split..expected.len()] {
        let (found, expected) = (&found[range.clone()], &expected[range]);
        let size = expected.iter().fold(0.0f32, |size, x| size.max(x.abs()));
        worst = found.iter().zip(expected).fold(worst, |worst, (a, b)| worst.max((a - b).abs() / size));
    }
    Ok(worst)
}
