//! What is kept of a forward pass for the backward pass, block by block.

use std::ops::Range;

use nibble_autograd::Leaf;
use nibble_lora::Linear;
use nibble_tensor::{
    DType, Device,
    ops::{linear, lm_head_loss},
};

use crate::{Transformer, config::ModelConfig};

/// The share of the host link's rate that copies beside kernels are planned with.
const LINK_SHARE: f64 = 0.9;

/// What is kept of the forward pass for the backward pass. Every choice gives bitwise the same gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Everything an op saves; a gated unit's result only where its backward does not make it again at no cost.
    #[default]
    None,
    /// Outputs of matrix products and attention; norms and the gated activation are made again.
    Selective,
    /// The inputs of each block: a second forward pass in exchange for the memory.
    Full,
    /// As [`Checkpointing::Full`], with the inputs in host memory meanwhile.
    Offload,
    /// The fastest mix that fits the memory that is free: [`Transformer::fastest_mix`] chooses for each shape of a step.
    Auto,
    /// A mix.
    Mixed(Mix),
}

/// How many blocks keep what. Blocks are counted from the last, whose activations are needed first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mix {
    /// The last blocks, which keep everything.
    pub everything: usize,
    /// Those before them, which keep the outputs of their products.
    pub products: usize,
    /// Of the rest, spread evenly: those whose attention's values wait on the host, so that only their MLP runs again.
    pub attention_on_host: usize,
    /// Whether the rest keep their input on the host.
    pub inputs_on_host: bool,
}

/// What a block keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    Everything,
    Products,
    /// Outputs of the attention's products, and the MLP's input.
    Attention,
    Input,
}

/// What a block keeps, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockPlan {
    pub(crate) keep: Keep,
    pub(crate) on_host: bool,
}

impl Checkpointing {
    /// As a mix over `blocks` blocks.
    #[must_use]
    pub fn mix(self, blocks: usize) -> Mix {
        match self {
            Self::None => Mix { everything: blocks, ..Mix::default() },
            Self::Selective | Self::Auto => Mix { products: blocks, ..Mix::default() },
            Self::Full => Mix::default(),
            Self::Offload => Mix { inputs_on_host: true, ..Mix::default() },
            Self::Mixed(mix) => mix,
        }
    }
}

impl Mix {
    /// What block `index` of `blocks` keeps.
    pub(crate) fn of_block(self, index: usize, blocks: usize) -> BlockPlan {
        let from_last = blocks - 1 - index;
        if from_last < self.everything {
            return BlockPlan { keep: Keep::Everything, on_host: false };
        }
        if from_last < self.everything + self.products {
            return BlockPlan { keep: Keep::Products, on_host: false };
        }
        let rest = blocks - self.everything - self.products;
        if is_of_spread(index, self.attention_on_host, rest) {
            return BlockPlan { keep: Keep::Attention, on_host: true };
        }
        BlockPlan { keep: Keep::Input, on_host: self.inputs_on_host }
    }

    /// Whether anything waits on the host.
    #[must_use]
    pub fn uses_host(self) -> bool {
        self.inputs_on_host || self.attention_on_host > 0
    }
}

/// Whether `index` is one of `some` of `all`, spread evenly: where their share of the first ones reaches one more whole.
pub(crate) fn is_of_spread(index: usize, some: usize, all: usize) -> bool {
    let share = |count: usize| count * some / all;
    share(index + 1) > share(index)
}

/// Elements that a token takes while a block runs backward (measured: 72 K of the 86 K of Llama-3-8B).
fn working_set(config: &ModelConfig) -> usize {
    let heads = config.num_attention_heads + 2 * config.num_key_value_heads;
    4 * config.intermediate_size + 4 * config.hidden_size + 2 * heads * config.head_dim
}

impl Transformer {
    /// Bytes that a block keeps for so many tokens, by what it keeps: results with the room behind them, log-sums of attention, and h of
    /// the adapters.
    fn kept(&self, keep: Keep, tokens: usize) -> usize {
        let config = &self.config;
        let (c, f, d, size) = (config.hidden_size, config.intermediate_size, config.head_dim, self.dtype.size());
        let (q, kv) = (config.num_attention_heads * d, 2 * config.num_key_value_heads * d);
        let room = linear::room_of(self.arena.device(), self.dtype, tokens);
        let ranks = self.blocks.first().map_or([0; 7], |block| block.linears().map(Linear::rank));
        let ranks = |linears: Range<usize>| ranks[linears].iter().sum::<usize>();
        let log_sums = config.num_attention_heads * DType::F32.size() / size;
        let attention = 2 * c + 2 * q + kv + room + log_sums + ranks(0..4);
        let products = attention + 2 * f + room + ranks(4..7);
        let elements = match keep {
            Keep::Input => c,
            Keep::Attention => attention,
            Keep::Products => products,
            Keep::Everything => products + 2 * (c + room) + if self.makes_gated_again(tokens) { 0 } else { f + room },
        };
        tokens * size * elements
    }

    /// Bytes beside what is kept: of a block that runs backward with its largest weight widened, and of the head.
    fn working_bytes(&self, tokens: usize) -> usize {
        let (config, size) = (&self.config, self.dtype.size());
        let sizes = [tokens, config.hidden_size, config.vocab_size];
        // On a GPU a head that is stored in another type is widened while it is multiplied.
        let stored = |dtype| dtype != self.dtype && self.arena.device() != Device::Cpu;
        let widens = matches!(self.head(), Leaf::Frozen(head) if stored(head.dtype()));
        let head = lm_head_loss::logits_bytes(sizes, self.dtype) + if widens { sizes[1] * sizes[2] * size } else { 0 };
        let weight = self.linears().map(|linear| linear.sizes().0 * linear.sizes().1).max().unwrap_or(0);
        size * (tokens * working_set(config) + weight) + head
    }

    /// Whether the gated unit's result is never kept.
    fn makes_gated_again(&self, tokens: usize) -> bool {
        let (device, activation) = (self.arena.device(), self.shared.activation);
        self.blocks.iter().all(|block| block.down_proj.makes_gated_again(device, self.dtype, tokens, activation))
    }

    /// The fastest mix for steps of `tokens` tokens within `room` bytes of memory that nobody holds. What does not fit goes to
    /// the host as far as its link carries it while the kernels run; the rest is run again.
    #[must_use]
    pub fn fastest_mix(&self, tokens: usize, room: usize) -> Mix {
        let blocks = self.config().num_hidden_layers;
        let bytes = |keep| self.kept(keep, tokens);
        let room = room.saturating_sub(self.working_bytes(tokens));
        let (input, products, everything) = (bytes(Keep::Input), bytes(Keep::Products), bytes(Keep::Everything));
        let within = |room: usize, each: usize| room.checked_div(each).unwrap_or(blocks).min(blocks);
        if within(room, products) == blocks {
            let everything = within(room - blocks * products, everything - products);
            return Mix { everything, products: blocks - everything, ..Mix::default() };
        }
        let attention = bytes(Keep::Attention);
        if room >= blocks * input + attention {
            let products = within(room - blocks * input - attention, products - input);
            return Mix { products, ..self.on_host(tokens, blocks - products, false) };
        }
        // What is on its way takes memory: a block's values.
        let products = within(room.saturating_sub(attention), products);
        Mix { products, ..self.on_host(tokens, blocks - products, true) }
    }

    /// Bytes of the device that tensors on their way to and from the host may take beside the newest one.
    pub(crate) fn offload_window(&self, mix: Mix, tokens: usize) -> usize {
        if mix.attention_on_host > 0 { self.kept(Keep::Attention, tokens) } else { 0 }
    }

    /// How many of `blocks` can send their attention's values to the host in the time that all of them run forward.
    fn on_host(&self, tokens: usize, blocks: usize, inputs_on_host: bool) -> Mix {
        let Device::Cuda(device) = self.arena().device() else { return Mix { inputs_on_host, ..Mix::default() } };
        let config = self.config();
        let bytes = |keep| self.kept(keep, tokens);
        let linears: usize = self.linears().map(Linear::sizes).map(|(out, inputs)| out * inputs).sum();
        let flops = 2 * tokens * linears / config.num_hidden_layers.max(1) * blocks;
        let carried = LINK_SHARE * device.link_rate() * flops as f64 / device.matmul_rate();
        let input = if inputs_on_host { bytes(Keep::Input) } else { 0 };
        let left = (carried as usize).saturating_sub(blocks * input);
        let attention_on_host = left.checked_div(bytes(Keep::Attention) - input).unwrap_or(0).min(blocks);
        Mix { attention_on_host, inputs_on_host, ..Mix::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(mix: Mix, blocks: usize) -> Vec<(Keep, bool)> {
        (0..blocks).map(|i| mix.of_block(i, blocks)).map(|plan| (plan.keep, plan.on_host)).collect()
    }

    #[test]
    fn the_last_blocks_keep_most_and_the_hosts_share_is_spread_over_the_first() {
        let mix = Mix { everything: 1, products: 2, attention_on_host: 2, inputs_on_host: true };
        let (input, sent) = ((Keep::Input, true), (Keep::Attention, true));
        let kept = [(Keep::Products, false), (Keep::Products, false), (Keep::Everything, false)];
        assert_eq!(plans(mix, 9), [&[input, input, sent, input, input, sent][..], &kept].concat());
    }

    #[test]
    fn each_name_is_a_mix_of_one_kind() {
        for (checkpointing, plan) in [
            (Checkpointing::None, (Keep::Everything, false)),
            (Checkpointing::Selective, (Keep::Products, false)),
            (Checkpointing::Full, (Keep::Input, false)),
            (Checkpointing::Offload, (Keep::Input, true)),
        ] {
            assert_eq!(plans(checkpointing.mix(3), 3), [plan; 3]);
        }
    }
}
