//! How much memory a run will need, by what needs it.

use nibble_data::{Dataset, LoaderOptions, Packer};
use nibble_model::{Checkpointing, Transformer};
use nibble_optim::OptimizerName;

use crate::ui;

/// Bytes, by component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// The frozen linears of all blocks.
    pub(crate) linears: usize,
    /// Embedding, head, norms.
    pub(crate) rest: usize,
    /// Trained values, f32.
    pub(crate) adapter: usize,
    /// Their gradients, f32.
    pub(crate) gradients: usize,
    /// The optimizer's states.
    pub(crate) optimizer: usize,
    /// What the backward pass needs of the forward pass: an estimate.
    pub(crate) activations: usize,
}

impl Memory {
    /// Of training `trained` values of `model` with micro-batches of up to `tokens` tokens.
    pub(crate) fn of(
        model: &Transformer,
        trained: usize,
        optim: OptimizerName,
        checkpointing: Checkpointing,
        tokens: usize,
    ) -> Self {
        let (linears, rest) = model.base_bytes();
        let states = if optim == OptimizerName::Sgd { 0 } else { 2 };
        Self {
            linears,
            rest,
            adapter: 4 * trained,
            gradients: 4 * trained,
            optimizer: 4 * states * trained,
            activations: tokens * activation_bytes(model, checkpointing),
        }
    }

    /// All of it.
    pub(crate) fn total(&self) -> usize {
        self.linears + self.rest + self.adapter + self.gradients + self.optimizer + self.activations
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [linears, rest, adapter, gradients, optimizer, activations, total] =
            [self.linears, self.rest, self.adapter, self.gradients, self.optimizer, self.activations, self.total()]
                .map(ui::bytes);
        write!(
            f,
            "about {total}: frozen linears {linears}, embedding and norms {rest}, trained {adapter}, gradients {gradients}, \
             optimizer {optimizer}, activations up to {activations}"
        )
    }
}

/// Bytes a token. A block keeps its input, both norms' outputs and sums, q, k, v, the attention's output, and gate, up and
/// their product; selectively no norms' outputs and no product, in full only the two parts of its input. One block is whole
/// at a time.
fn activation_bytes(model: &Transformer, checkpointing: Checkpointing) -> usize {
    let config = model.config();
    let (c, f) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let size = model.compute_dtype().size();
    let block = size * (4 * c + 3 * q + 3 * kv + 3 * f);
    // The backward pass of a block holds about as much again in gradients.
    match checkpointing {
        Checkpointing::None => (config.num_hidden_layers + 1) * block,
        Checkpointing::Selective => config.num_hidden_layers * size * (2 * c + 2 * q + 2 * kv + 2 * f) + block,
        Checkpointing::Full => config.num_hidden_layers * size * 2 * c + 2 * block,
    }
}

/// Tokens of the largest micro-batch there can be.
pub(crate) fn largest_batch(data: &Dataset, loader: LoaderOptions) -> usize {
    let mut lengths: Vec<usize> = data.examples().iter().map(|example| example.tokens.len()).collect();
    let all = lengths.iter().sum();
    match loader.packer {
        Packer::BestFitDecreasing { budget } => budget.min(all),
        Packer::Documents { batch_size } => {
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.iter().take(batch_size).sum()
        }
    }
}
