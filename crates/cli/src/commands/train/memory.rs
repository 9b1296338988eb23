//! How much memory a run will need, by what needs it.

use nibble_data::{Dataset, LoaderOptions, Packer};
use nibble_model::{Checkpointing, Transformer};
use nibble_optim::{Layout, OptimizerName};

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
        Self {
            linears,
            rest,
            adapter: 4 * trained,
            gradients: 4 * trained,
            optimizer: optim.config(0.0).state_bytes(&Layout::one(trained)),
            activations: model.activation_bytes(checkpointing, tokens),
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
