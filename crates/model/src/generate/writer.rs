//! Texts written on together, a token each at a time.
//!
//! What a step needs (tokens, lengths) lies on the device and changes there, so a GPU is given the next step before the host has
//! seen the tokens of the last: it never waits. The first step of a set of texts runs kernel by kernel, the second is captured,
//! later ones replay it. Texts that have ended leave the set; a GPU keeps them until they are half of it, since another set is
//! another graph.

use std::collections::VecDeque;

use nibble_tensor::{
    Device, Tensor,
    cuda::{CudaDevice, Graph, Pinned},
    ops::sample::{self, Text, Texts},
};

use super::{GenerateOptions, cache::Cache};
use crate::Result;

/// Sets of tokens that a GPU may be ahead of the host, and one more.
const SLOTS: usize = 2;

/// A text, its slot in the cache, and what was written.
#[derive(Debug)]
pub(super) struct Written {
    slot: usize,
    /// Tokens that the slot held before.
    before: usize,
    tokens: Vec<u32>,
    prompt: usize,
    ended: bool,
}

impl Written {
    pub(super) fn new(slot: usize, before: usize, prompt: &[u32]) -> Self {
        Self { slot, before, tokens: prompt.to_vec(), prompt: prompt.len(), ended: false }
    }

    /// The tokens after the prompt.
    pub(super) fn new_tokens(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }
}

/// Writes on after texts whose prompts were read, from their next logits F32 [B, V]. `on_token` gets a text's number and its
/// new token, and ends the text by returning false.
pub(super) fn write(
    cache: &mut Cache<'_>,
    texts: &mut [Written],
    logits: &Tensor,
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(usize, u32) -> bool,
) -> Result<()> {
    let mut active: Vec<usize> = (0..texts.len()).collect();
    let mut set = Set::new(cache, texts, &active, options)?;
    sample::next(logits, &mut set.texts, &options.sampling())?;
    set.fetch()?;
    loop {
        while set.on_their_way() <= set.ahead() && set.chosen < options.max_new_tokens {
            set.step(cache)?;
            set.fetch()?;
        }
        let tokens = set.wait()?;
        deliver(texts, &active, &tokens, cache.capacity, options, on_token);
        let left = active.iter().filter(|&&i| !texts[i].ended).count();
        if left == 0 {
            return Ok(());
        }
        if set.device.is_none() && left < active.len() || left * 2 <= active.len() {
            while set.on_their_way() > 0 {
                let tokens = set.wait()?;
                deliver(texts, &active, &tokens, cache.capacity, options, on_token);
            }
            active.retain(|&i| !texts[i].ended);
            if active.is_empty() {
                return Ok(());
            }
            let next = Set::new(cache, texts, &active, options)?;
            set = Set { chosen: set.chosen, ..next };
        }
    }
}

/// Hands each text its token.
fn deliver(
    texts: &mut [Written],
    active: &[usize],
    tokens: &[u32],
    capacity: usize,
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(usize, u32) -> bool,
) {
    for (&i, &token) in active.iter().zip(tokens) {
        let text = &mut texts[i];
        if text.ended {
            continue;
        }
        text.tokens.push(token);
        text.ended = !on_token(i, token)
            || options.stop.contains(&token)
            || text.new_tokens().len() == options.max_new_tokens
            || text.before + text.tokens.len() > capacity;
    }
}

/// Texts that take their steps together.
struct Set {
    device: Option<CudaDevice>,
    texts: Texts,
    sampling: sample::Config,
    graph: Option<Graph>,
    /// Steps of this set.
    steps: usize,
    /// Tokens that each text has been given, those on their way included.
    chosen: usize,
    pinned: Vec<Pinned>,
    /// Tokens that were chosen and not seen: where they arrive on a GPU, or they themselves.
    pending: VecDeque<Pending>,
    next: usize,
}

enum Pending {
    Slot(usize),
    Tokens(Vec<u32>),
}

impl Set {
    fn new(cache: &Cache<'_>, texts: &[Written], active: &[usize], options: &GenerateOptions) -> Result<Self> {
        let arena = cache.model.arena();
        let device = match arena.device() {
            Device::Cuda(device) => Some(device),
            _ => None,
        };
        let list: Vec<Text<'_>> = active
            .iter()
            .map(|&i| {
                let text = &texts[i];
                Text { before: text.before, tokens: &text.tokens, chosen: text.new_tokens().len(), slot: text.slot }
            })
            .collect();
        let pinned = match device {
            Some(device) => (0..SLOTS).map(|_| Pinned::new(device, 4 * list.len())).collect::<nibble_tensor::Result<_>>()?,
            None => Vec::new(),
        };
        Ok(Self {
            device,
            texts: Texts::new(arena, &list, cache.model.config.vocab_size, cache.capacity)?,
            sampling: options.sampling(),
            graph: None,
            steps: 0,
            chosen: 0,
            pinned,
            pending: VecDeque::new(),
            next: 0,
        })
    }

    /// Sets of tokens that may be under way while the host looks at one.
    fn ahead(&self) -> usize {
        if self.device.is_some() { SLOTS - 1 } else { 0 }
    }

    fn on_their_way(&self) -> usize {
        self.pending.len()
    }

    /// One more token for each text.
    fn step(&mut self, cache: &mut Cache<'_>) -> Result<()> {
        self.steps += 1;
        let model = cache.model;
        let (texts, sampling) = (&mut self.texts, self.sampling);
        let mut run = || -> Result<()> {
            let logits = cache.step(texts)?;
            Ok(sample::next(&logits, texts, &sampling)?)
        };
        let Some(device) = self.device else { return run() };
        if device.is_profiling() || self.graph.as_ref().is_some_and(|graph| !graph.is_valid()) {
            self.graph = None;
        }
        if self.steps > 1 && self.graph.is_none() && !device.is_profiling() {
            self.graph = Some(Graph::capture(model.arena(), &mut run)?.0);
        }
        match &self.graph {
            Some(graph) => Ok(graph.launch()?),
            None => run(),
        }
    }

    /// Sends for the tokens just chosen.
    fn fetch(&mut self) -> Result<()> {
        self.chosen += 1;
        if self.device.is_none() {
            self.pending.push_back(Pending::Tokens(self.texts.tokens.to_vec::<u32>()?));
            return Ok(());
        }
        self.pinned[self.next].fetch(&self.texts.tokens)?;
        self.pending.push_back(Pending::Slot(self.next));
        self.next = (self.next + 1) % SLOTS;
        Ok(())
    }

    /// The oldest tokens that were sent for.
    fn wait(&mut self) -> Result<Vec<u32>> {
        Ok(match self.pending.pop_front() {
            Some(Pending::Tokens(tokens)) => tokens,
            Some(Pending::Slot(slot)) => {
                self.pinned[slot].wait()?;
                let bytes = &self.pinned[slot].bytes()[..4 * self.texts.count()];
                bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            None => Vec::new(),
        })
    }
}
