//! A model with the keys and values of the texts that it reads.

use nibble_autograd::{ParamStore, Tape};
use nibble_tensor::{
    Owner, Tensor,
    ops::{Documents, sample::Texts},
};

use crate::{
    Error, Result, Transformer,
    block::{Keys, LayerCache, Slot},
    transformer::Stream,
};

/// Slots of as many tokens each, one for a text.
#[derive(Debug)]
pub(super) struct Cache<'m> {
    pub(super) model: &'m Transformer,
    params: &'m ParamStore,
    layers: Vec<LayerCache>,
    pub(super) capacity: usize,
}

impl<'m> Cache<'m> {
    /// # Errors
    /// [`Error::TooLong`] when the model has not as many positions, out of memory.
    pub(super) fn new(model: &'m Transformer, params: &'m ParamStore, slots: usize, capacity: usize) -> Result<Self> {
        if capacity > model.max_positions() {
            return Err(Error::TooLong { tokens: capacity, positions: model.max_positions() });
        }
        let config = &model.config;
        let shape = [slots * capacity, config.num_key_value_heads, config.head_dim];
        let _scope = model.arena.scope(Owner::KvCache);
        let cache = || Tensor::empty(&model.arena, model.dtype, shape);
        let layers =
            (0..config.num_hidden_layers).map(|_| Ok(LayerCache { keys: cache()?, values: cache()? })).collect::<Result<_>>()?;
        Ok(Self { model, params, layers, capacity })
    }

    /// Reads tokens into a slot that holds `len` before them; the logits that follow the last one, F32 [1, V].
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::TooLong`] beyond the capacity, a token beyond the vocabulary.
    pub(super) fn read(&mut self, slot: usize, len: usize, tokens: &[u32]) -> Result<Tensor> {
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if len + tokens.len() > self.capacity {
            return Err(Error::TooLong { tokens: len + tokens.len(), positions: self.capacity });
        }
        let arena = &self.model.arena;
        let documents = Documents::continuation(arena, len, tokens.len())?;
        let stream = Stream::from_documents(arena, tokens, documents)?;
        stream.expect_within(self.model.config.vocab_size, self.model.max_positions())?;
        let slot = Slot { first: slot * self.capacity, len };
        self.run(&stream.tokens, tokens.len() - 1, |layer| Keys::Slot(&stream.documents, layer, slot))
    }

    /// Reads the newest token of each text; the logits that follow, F32 [B, V].
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn step(&mut self, texts: &Texts) -> Result<Tensor> {
        self.run(&texts.tokens, 0, |layer| Keys::Texts(layer, texts))
    }

    /// The model over `tokens`; the logits of those from `first` on.
    fn run<'k>(&'k mut self, tokens: &Tensor, first: usize, keys: impl Fn(&'k mut LayerCache) -> Keys<'k>) -> Result<Tensor> {
        let mut tape = Tape::inference(self.params);
        let mut x = self.model.embed(&mut tape, tokens)?;
        let mut a = None;
        for (i, (block, layer)) in self.model.blocks.iter().zip(&mut self.layers).enumerate() {
            self.model.bring_weights(i, false)?;
            let [next, added] = block.forward(&mut tape, &self.model.shared, x, a, keys(layer), None)?;
            (x, a) = (next, Some(added));
        }
        self.model.release_weights()?;
        let h = self.model.last_norm(&mut tape, x, a)?.into_tensor();
        self.model.head_logits(self.params, &h.rows(first, tokens.numel() - first)?)
    }
}
