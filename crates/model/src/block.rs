//! The one block of every family.

use nibble_autograd::{
    Leaf, Tape, Var,
    ops::{self, Gradients},
};
use nibble_lora::{Linear, forward_behind_norm, forward_gated_behind_norm};
use nibble_tensor::{
    HostWeight, Result, Rng, Tensor,
    ops::{Documents, attention, glu, rms_norm, rope::RopeTable, sample::Texts},
};

/// Attention and MLP with their norms.
///
/// ```text
/// h = norm(x + a)          a: what the block before adds to the residual stream
/// q, k, v = h Wqᵀ, h Wkᵀ, h Wvᵀ;  q, k = rope(head_norm(q)), rope(head_norm(k))
/// a' = attention(q, k, v) Woᵀ
/// h' = norm(x + a + a')
/// a'' = (activation(h' Wgᵀ) · (h' Wuᵀ)) Wdᵀ
/// ```
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) input_norm: Leaf,
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    /// [D] each, before rope.
    pub(crate) head_norms: Option<[Leaf; 2]>,
    pub(crate) post_attention_norm: Leaf,
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
    pub(crate) attention: attention::Config,
}

/// What all blocks of a model share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) norm: rms_norm::Config,
    pub(crate) activation: glu::Activation,
    pub(crate) rope: RopeTable,
    /// D.
    pub(crate) head_dim: usize,
}

/// Where a block's queries find their keys.
pub(crate) enum Keys<'a> {
    /// In their own document of the stream.
    Stream(&'a Documents),
    /// In a slot of a cache with the tokens before, which the document's are added to.
    Slot(&'a Documents, &'a mut LayerCache, Slot),
    /// Each in the slot of its own text, whose newest token it is.
    Texts(&'a mut LayerCache, &'a Texts),
}

/// Keys and values of one layer, [S L, K, D] each: S slots of L tokens.
#[derive(Debug)]
pub(crate) struct LayerCache {
    pub(crate) keys: Tensor,
    pub(crate) values: Tensor,
}

/// A slot of a cache: its first row, and how many are filled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) first: usize,
    pub(crate) len: usize,
}

impl Block {
    /// (x, a) to (x + a + a', a''): the residual stream, and what the MLP adds to it. `dropout` is the stream of this
    /// block's masks in this forward pass.
    pub(crate) fn forward<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        shared: &'m Shared,
        x: Var,
        a: Option<Var>,
        keys: Keys<'_>,
        dropout: Option<Rng>,
    ) -> Result<[Var; 2]> {
        let [x, a] = self.attention_part(tape, shared, x, a, keys, dropout)?;
        self.mlp_part(tape, shared, x, Some(a), dropout)
    }

    /// (x, a) to (x + a, a').
    pub(crate) fn attention_part<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        shared: &'m Shared,
        x: Var,
        a: Option<Var>,
        keys: Keys<'_>,
        dropout: Option<Rng>,
    ) -> Result<[Var; 2]> {
        let rng = |index: u64| dropout.map(|rng| rng.stream(index));
        let (norm, layers) = ((&self.input_norm, shared.norm), [&self.q_proj, &self.k_proj, &self.v_proj]);
        let (x, qkv) = forward_behind_norm(tape, x, a, norm, layers, rng(0))?;
        let o = self.attend(tape, shared, qkv, keys)?;
        Ok([x, self.o_proj.forward(tape, o, rng(1))?])
    }

    /// (x, a) to (x + a, a''): a is what attention adds, unless x has it already.
    pub(crate) fn mlp_part<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        shared: &'m Shared,
        x: Var,
        a: Option<Var>,
        dropout: Option<Rng>,
    ) -> Result<[Var; 2]> {
        let rng = |index: u64| dropout.map(|rng| rng.stream(index));
        let (norm, layers) = ((&self.post_attention_norm, shared.norm), [&self.gate_proj, &self.up_proj, &self.down_proj]);
        forward_gated_behind_norm(tape, x, a, norm, layers, shared.activation, [rng(2), rng(3)])
    }

    /// q, k, v as [T, channels] to the attention's output as [T, H D].
    fn attend<'m>(&'m self, tape: &mut Tape<'m>, shared: &'m Shared, [q, k, v]: [Var; 3], keys: Keys<'_>) -> Result<Var> {
        let ([tokens, channels], d) = ([q.tensor().shape().rows(), q.tensor().shape().last()], shared.head_dim);
        let heads = |tape: &mut Tape<'m>, x: Var| {
            let channels = x.tensor().shape().last();
            ops::reshape(tape, x, [tokens, channels / d, d])
        };
        let (mut q, mut k, v) = (heads(tape, q)?, heads(tape, k)?, heads(tape, v)?);
        if let Some([q_norm, k_norm]) = &self.head_norms {
            q = ops::rms_norm(tape, q, q_norm, shared.norm)?;
            k = ops::rms_norm(tape, k, k_norm, shared.norm)?;
        }
        let o = match keys {
            Keys::Stream(documents) => {
                let gradients = if self.head_norms.is_some() { Gradients::Apart } else { Gradients::SideBySide };
                ops::rope_attention(tape, [q, k, v], documents, &shared.rope, self.attention, gradients)?
            }
            Keys::Slot(documents, cache, slot) => {
                let q = ops::rope(tape, q, documents, &shared.rope)?;
                let k = ops::rope(tape, k, documents, &shared.rope)?;
                cache.attend(slot, q, &k, &v, self.attention)?
            }
            Keys::Texts(cache, texts) => {
                let (new, caches) = ([q, k, v].map(Var::into_tensor), [&mut cache.keys, &mut cache.values]);
                Var::from(attention::step(new, caches, texts, &shared.rope, self.attention)?)
            }
        };
        ops::reshape(tape, o, [tokens, channels])
    }

    /// Its linears, in the order of the forward pass.
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    /// The bases whose codes are on the host.
    pub(crate) fn host_bases(&self) -> impl Iterator<Item = &HostWeight> {
        self.linears().into_iter().filter_map(Linear::host_base)
    }

    /// Whether anything in it trains.
    pub(crate) fn trains(&self) -> bool {
        let norms = [&self.input_norm, &self.post_attention_norm].into_iter().chain(self.head_norms.iter().flatten());
        self.linears().into_iter().any(Linear::trains) || norms.into_iter().any(|norm| norm.param().is_some())
    }

    pub(crate) fn linears(&self) -> [&Linear; 7] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj, &self.gate_proj, &self.up_proj, &self.down_proj]
    }
}

impl LayerCache {
    /// Adds the stream's keys and values, and attends to all.
    fn attend(&mut self, slot: Slot, q: Var, k: &Var, v: &Var, config: attention::Config) -> Result<Var> {
        let len = slot.len + k.tensor().dims()[0];
        self.keys.copy_rows(slot.first + slot.len, k.tensor())?;
        self.values.copy_rows(slot.first + slot.len, v.tensor())?;
        let (keys, values) = (self.keys.rows(slot.first, len)?, self.values.rows(slot.first, len)?);
        Ok(Var::from(attention::cached_forward(&q.into_tensor(), &keys, &values, len, config)?))
    }
}
