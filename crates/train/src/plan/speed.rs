//! Tokens a second to expect: an estimate, from what the parts of a step take on the one GPU that was measured.

use nibble_model::{
    Checkpointing,
    config::{ModelConfig, Role},
};

use super::{Gpu, Setup, Streamed};

// Shares of the data sheet's peaks that were measured within steps on an H200 (BENCHMARKS.md).

/// Of products: 692 of 989 TFLOP/s.
const PRODUCTS: f64 = 0.70;
/// Of attention, forward and backward.
const ATTENTION: f64 = 0.45;
/// Of the memory: 4,270 of 4,800 GB/s.
const MEMORY: f64 = 0.89;
/// Of the host link, beside kernels: 53 of 63 GB/s on an H100.
const LINK: f64 = 0.84;
/// Elements of hidden and intermediate size that norms, the gated unit and adapters read and write for a token, in a block.
const PASSES: f64 = 30.0;
/// Seconds that the kernels of a block cost however small they are: some 60 of them, forward and backward.
const KERNELS: f64 = 60.0 * 2.5e-6;

/// Tokens a second of `setup` on `gpu`; nothing where its rates are not known.
#[must_use]
pub fn tokens_per_second(model: &ModelConfig, gpu: &Gpu, setup: &Setup) -> Option<f64> {
    if gpu.tflops <= 0.0 {
        return None;
    }
    let (peak, bandwidth) = (gpu.tflops * 1e12, gpu.bandwidth * 1e9 * MEMORY);
    let (blocks, tokens) = (model.num_hidden_layers as f64, setup.tokens().max(1) as f64);
    let linears = parameters(model, |role| role == Role::Linear);
    let head = (model.vocab_size * model.hidden_size) as f64;
    let again = if recomputes(setup.train.checkpointing) { 1.0 } else { 0.0 };
    let weight_gradients = if setup.adapter.is_none() { 1.0 } else { 0.0 };
    // Forward, the input's gradient, and what else the setup asks for.
    let passes = 2.0 + again + weight_gradients;
    let products = 2.0 * (passes * linears + (2.0 + weight_gradients) * head) / (peak * PRODUCTS);
    // Two products forward and five backward over half of the pairs.
    let pairs = blocks * (model.num_attention_heads * model.head_dim * setup.longest()) as f64;
    let attention = (3.5 + again) * 2.0 * pairs / (peak * ATTENTION);
    let channels = (model.hidden_size + model.intermediate_size) as f64;
    let size = setup.load.compute_dtype.size() as f64;
    let other = PASSES * (1.0 + again / 3.0) * channels * blocks * size / bandwidth;
    // Read and written once a pass where they are widened.
    let weights = if setup.load.quant.is_some() { (2.0 + again) * linears * (0.5 + size) / bandwidth } else { 0.0 };
    let kernels = blocks * KERNELS * (1.0 + again / 3.0);
    let step = tokens * (products + attention + other) + weights + kernels;
    Some(tokens / beside_the_link(model, gpu, setup, step))
}

/// Bytes a second over the host link of `gpu` beside kernels; nothing where it is not known.
pub(super) fn link_rate(gpu: &Gpu) -> Option<f64> {
    (gpu.link > 0.0).then_some(gpu.link * 1e9 * LINK)
}

/// Seconds of a step whose kernels take `step` seconds, a third of them forward, while weights come from the host in each direction:
/// a pass takes as long as the longer of both (measured: 70B in 24 GB, 72 of 80 blocks, runs at the link's rate; 18 of 80 cost nothing).
fn beside_the_link(model: &ModelConfig, gpu: &Gpu, setup: &Setup, step: f64) -> f64 {
    let link = Streamed::of(model, gpu, setup).and_then(|streamed| streamed.link_seconds).unwrap_or(0.0);
    (step / 3.0).max(link / 2.0) + (2.0 * step / 3.0).max(link / 2.0)
}

/// Whether blocks run forward twice.
fn recomputes(checkpointing: Checkpointing) -> bool {
    !matches!(checkpointing, Checkpointing::None | Checkpointing::Selective)
}

fn parameters(model: &ModelConfig, of: impl Fn(Role) -> bool) -> f64 {
    let specs = model.tensors();
    specs.iter().filter(|spec| of(spec.role)).map(|spec| spec.shape.iter().product::<usize>() as f64).sum()
}
