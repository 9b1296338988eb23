//! Generation with cached keys and values.

use nibble_autograd::{ParamStore, Tape};
use nibble_tensor::{Owner, Rng, Tensor, ops::Documents};

use crate::{
    Error, Result, Transformer,
    block::{Keys, LayerCache},
    transformer::Stream,
};

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// At most this many new tokens.
    pub max_new_tokens: usize,
    /// Logits are divided by it; 0 takes the likeliest token always.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1 for all.
    pub top_p: f32,
    /// Logits of tokens that occurred are divided (positive) or multiplied (negative) by it (Keskar et al. 2019); 1 for none.
    pub repetition_penalty: f32,
    /// Seed of the choices.
    pub seed: u64,
    /// Tokens that end the text (and are given as the last one).
    pub stop: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 256, temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0, stop: Vec::new() }
    }
}

/// One text being read and written: the keys and values of its tokens so far.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Transformer,
    params: &'m ParamStore,
    layers: Vec<LayerCache>,
    len: usize,
    capacity: usize,
}

impl<'m> Session<'m> {
    /// An empty text of at most `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::TooLong`] when the model has not as many positions, out of memory.
    pub fn new(model: &'m Transformer, params: &'m ParamStore, capacity: usize) -> Result<Self> {
        if capacity > model.max_positions() {
            return Err(Error::TooLong { tokens: capacity, positions: model.max_positions() });
        }
        let config = &model.config;
        let shape = [capacity, config.num_key_value_heads, config.head_dim];
        let _scope = model.arena.scope(Owner::KvCache);
        let layers = (0..config.num_hidden_layers)
            .map(|_| {
                let cache = || Tensor::empty(&model.arena, model.dtype, shape);
                Ok(LayerCache { keys: cache()?, values: cache()?, len: 0 })
            })
            .collect::<Result<_>>()?;
        Ok(Self { model, params, layers, len: 0, capacity })
    }

    /// Reads more tokens; gives the logits that follow the last one, `[V]`.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::TooLong`] beyond the capacity, a token beyond the vocabulary.
    pub fn read(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if self.len + tokens.len() > self.capacity {
            return Err(Error::TooLong { tokens: self.len + tokens.len(), positions: self.capacity });
        }
        let arena = &self.model.arena;
        let documents = Documents::continuation(arena, self.len, tokens.len())?;
        let stream = Stream::from_documents(arena, tokens, documents)?;
        stream.expect_within(self.model.config.vocab_size, self.model.max_positions())?;
        let mut tape = Tape::inference(self.params);
        let mut x = self.model.embed(&mut tape, &stream.tokens)?;
        let mut a = None;
        for (block, cache) in self.model.blocks.iter().zip(&mut self.layers) {
            let keys = Keys::Cache(cache);
            let [next, added] = block.forward(&mut tape, &self.model.shared, &stream.documents, x, a, keys, None)?;
            (x, a) = (next, Some(added));
        }
        self.len += tokens.len();
        let h = self.model.last_norm(&mut tape, x, a)?.into_tensor().rows(tokens.len() - 1, 1)?;
        Ok(self.model.head_logits(self.params, &h)?.to_f32_vec()?)
    }

    /// Writes on after `prompt` until a stop token or the limit, handing each token to `on_token` as it comes (which ends the
    /// text by returning false); gives the new tokens.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let rng = Rng::new(options.seed);
        let mut seen = prompt.to_vec();
        let mut logits = self.read(prompt)?;
        let mut new = Vec::new();
        while new.len() < options.max_new_tokens {
            let token = choose(&mut logits, &seen, options, rng.uniform(new.len() as u64));
            new.push(token);
            seen.push(token);
            if !on_token(token)
                || options.stop.contains(&token)
                || new.len() == options.max_new_tokens
                || self.len == self.capacity
            {
                break;
            }
            logits = self.read(&[token])?;
        }
        Ok(new)
    }
}

/// The next token, in transformers' order: repetition penalty, temperature, top-k, top-p, then a draw with `uniform` in [0, 1).
fn choose(logits: &mut [f32], seen: &[u32], options: &GenerateOptions, uniform: f32) -> u32 {
    penalize(logits, seen, options.repetition_penalty);
    if options.temperature <= 0.0 {
        return likeliest(logits);
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    // Ties go to the lower id, so that a seed gives the same text everywhere.
    order.sort_unstable_by(|&i, &j| logits[j as usize].total_cmp(&logits[i as usize]).then(i.cmp(&j)));
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let top = logits[order[0] as usize];
    let weights: Vec<f64> = order.iter().map(|&i| f64::from((logits[i as usize] - top) / options.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = weights.len();
    let mut mass = 0.0;
    for (i, weight) in weights.iter().enumerate() {
        mass += weight;
        if mass >= f64::from(options.top_p) * total {
            kept = i + 1;
            break;
        }
    }
    let mut left = f64::from(uniform) * weights[..kept].iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(&weights[..kept]) {
        left -= weight;
        if left < 0.0 {
            return token;
        }
    }
    order[kept - 1]
}

fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut tokens = seen.to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    for token in tokens {
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    }
}

/// The first of the highest, as torch's argmax.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> GenerateOptions {
        GenerateOptions { temperature: 1.0, ..GenerateOptions::default() }
    }

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        assert_eq!(choose(&mut [0.0, 3.0, 3.0, 1.0], &[], &GenerateOptions::default(), 0.9), 1);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        for step in 0..100 {
            let uniform = step as f32 / 100.0;
            let k = choose(&mut [1.0, 3.0, 2.0, 0.0], &[], &GenerateOptions { top_k: 2, ..options() }, uniform);
            assert!([1, 2].contains(&k));
            let p = choose(&mut [1.0, 3.0, 2.0, 0.0], &[], &GenerateOptions { top_p: 0.6, ..options() }, uniform);
            assert_eq!(p, 1, "the likeliest alone has 0.64");
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let mut count = 0;
        for step in 0..1000 {
            count += usize::from(choose(&mut [0.0, 3f32.ln()], &[], &options(), step as f32 / 1000.0) == 1);
        }
        // 751 where the boundary itself is one of the draws.
        assert!((750..=751).contains(&count), "{count}");
    }

    #[test]
    fn a_penalty_lowers_what_was_seen_on_either_side_of_zero() {
        let mut logits = [2.0, -2.0, 1.0];
        penalize(&mut logits, &[0, 1, 1], 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }
}
