//! Generation with cached keys and values: one text ([`Session`]), or several at once ([`generate_batch`]).

mod cache;
mod writer;

use nibble_autograd::ParamStore;
use nibble_tensor::{DType, Rng, Tensor, ops::sample};

use self::{
    cache::Cache,
    writer::{Written, write},
};
use crate::{Result, Transformer};

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
    /// Seed of the choices: the n-th token of a text takes the n-th number of its stream.
    pub seed: u64,
    /// Tokens that end the text (and are given as the last one).
    pub stop: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 256, temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0, stop: Vec::new() }
    }
}

impl GenerateOptions {
    fn sampling(&self) -> sample::Config {
        sample::Config {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            rng: Rng::new(self.seed),
        }
    }
}

/// One text being read and written: the keys and values of its tokens so far.
#[derive(Debug)]
pub struct Session<'m> {
    cache: Cache<'m>,
    len: usize,
}

impl<'m> Session<'m> {
    /// An empty text of at most `capacity` tokens.
    ///
    /// # Errors
    /// [`crate::Error::TooLong`] when the model has not as many positions, out of memory.
    pub fn new(model: &'m Transformer, params: &'m ParamStore, capacity: usize) -> Result<Self> {
        Ok(Self { cache: Cache::new(model, params, 1, capacity)?, len: 0 })
    }

    /// Reads more tokens; gives the logits that follow the last one, `[V]`.
    ///
    /// # Errors
    /// [`crate::Error::EmptyPrompt`], [`crate::Error::TooLong`] beyond the capacity, a token beyond the vocabulary.
    pub fn read(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        Ok(self.logits(tokens)?.to_f32_vec()?)
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let logits = self.cache.read(0, self.len, tokens)?;
        self.len += tokens.len();
        Ok(logits)
    }

    /// Writes on after `prompt` until a stop token or the limit, handing each token to `on_token` as it comes (which ends the
    /// text by returning false); gives the new tokens. The last of them has not been read.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let before = self.len;
        let logits = self.logits(prompt)?;
        if options.max_new_tokens == 0 {
            return Ok(Vec::new());
        }
        let mut text = [Written::new(0, before, prompt)];
        write(&mut self.cache, &mut text, &logits, options, &mut |_, token| on_token(token))?;
        let new = text[0].new_tokens().to_vec();
        self.len += new.len() - 1;
        Ok(new)
    }
}

/// Answers several prompts at once, each as [`Session::generate`] alone would: it has its own length, draws and end. `on_token` gets
/// the prompt's number and the token. Products of more rows may sum in another order, so 16-bit logits can differ in their last
/// digit.
///
/// # Errors
/// As [`Session::new`] with a capacity of `capacity` tokens a text, and [`Session::read`].
pub fn generate_batch(
    model: &Transformer,
    params: &ParamStore,
    prompts: &[Vec<u32>],
    capacity: usize,
    options: &GenerateOptions,
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    if prompts.is_empty() || options.max_new_tokens == 0 {
        return Ok(vec![Vec::new(); prompts.len()]);
    }
    let mut cache = Cache::new(model, params, prompts.len(), capacity)?;
    let mut logits = Tensor::empty(&model.arena, DType::F32, [prompts.len(), model.config.vocab_size])?;
    for (slot, prompt) in prompts.iter().enumerate() {
        logits.copy_rows(slot, &cache.read(slot, 0, prompt)?)?;
    }
    let mut texts: Vec<Written> = prompts.iter().enumerate().map(|(slot, prompt)| Written::new(slot, 0, prompt)).collect();
    write(&mut cache, &mut texts, &logits, options, &mut on_token)?;
    Ok(texts.iter().map(|text| text.new_tokens().to_vec()).collect())
}
