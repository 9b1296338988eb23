//! The next token of each of B texts from its logits, where the device does everything: nothing is read back to go on.
//!
//! With l a text's logits F32 `[V]`, those of tokens that it has seen divided (positive) or multiplied (negative) by the penalty:
//!
//! ```text
//! temperature 0: the first of the highest
//! w = 2³¹ exp((l - max l) / temperature) in whole numbers, 0 below 2⁻³²
//! order: the largest w first, of equal ones the lowest token
//! kept: the first k of it; of these the fewest from the front that have p of their sum
//! token: the first whose sum with those before it is above uniform · the kept sum
//! ```
//!
//! All of it is f32 operations that round alike everywhere and integers: the same logits give the same tokens on every device.
//! The n-th token of a text takes the n-th number of the stream, whatever else is written beside it.

mod cuda;

use super::typed;
use crate::{Arena, DType, Device, Error, Result, Rng, Tensor};

const OP: &str = "sample";

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// 0 takes the likeliest token always.
    pub temperature: f32,
    /// Only the k first; 0 for all.
    pub top_k: usize,
    /// Only the first that have this part of the sum; 1 for all.
    pub top_p: f32,
    /// 1 for none.
    pub repetition_penalty: f32,
    /// The draws.
    pub rng: Rng,
}

/// What B texts are about to read, on their device.
#[derive(Debug)]
pub struct Texts {
    /// U32 `[B]`: the newest token of each.
    pub tokens: Tensor,
    /// U32 `[B]`: tokens so far, the newest one included, which is at position len - 1.
    pub lens: Tensor,
    /// U32 `[B]`: where each has its keys and values in a cache of several texts.
    pub slots: Tensor,
    /// U32 `[B]`: tokens chosen so far.
    counts: Tensor,
    /// U32 [B, ceil(V / 32)]: a bit for each token that occurred.
    seen: Tensor,
    /// Tokens that a slot holds: `lens` stays there.
    capacity: usize,
    vocab: usize,
}

/// A text as the host knows it.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    /// Tokens that its slot holds already, and that the penalty does not see.
    pub before: usize,
    /// Its tokens after them, the chosen ones included.
    pub tokens: &'a [u32],
    /// How many of them were chosen.
    pub chosen: usize,
    /// Its place in the cache.
    pub slot: usize,
}

impl Text<'_> {
    const fn len(&self) -> usize {
        self.before + self.tokens.len()
    }
}

impl Texts {
    /// Texts that were read up to the token before the last: [`next`] is to come, or the last one is to be read.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], [`Error::Argument`] for an empty text or one beyond `capacity`, [`Error::OutOfMemory`].
    pub fn new(arena: &Arena, texts: &[Text<'_>], vocab: usize, capacity: usize) -> Result<Self> {
        let words = vocab.div_ceil(32);
        let mut seen = vec![0u32; texts.len() * words];
        for (text, seen) in texts.iter().zip(seen.chunks_exact_mut(words.max(1))) {
            if text.tokens.is_empty() || text.len() > capacity {
                let expected = "one to as many tokens as a slot holds";
                return Err(Error::Argument { op: OP, argument: "tokens", expected, found: text.len() });
            }
            for (position, &id) in text.tokens.iter().enumerate() {
                if id as usize >= vocab {
                    return Err(Error::TokenOutOfRange { op: OP, position, id: id.into(), vocab_size: vocab });
                }
                seen[id as usize / 32] |= 1 << (id % 32);
            }
        }
        let each = |of: &dyn Fn(&Text<'_>) -> u32| {
            let values: Vec<u32> = texts.iter().map(of).collect();
            Tensor::from_slice(arena, &values, [values.len()])
        };
        Ok(Self {
            tokens: each(&|text| text.tokens.last().copied().unwrap_or_default())?,
            lens: each(&|text| text.len() as u32)?,
            slots: each(&|text| text.slot as u32)?,
            counts: each(&|text| text.chosen as u32)?,
            seen: Tensor::from_slice(arena, &seen, [texts.len(), words])?,
            capacity,
            vocab,
        })
    }

    /// B.
    #[must_use]
    pub fn count(&self) -> usize {
        self.tokens.numel()
    }

    /// Tokens that a slot holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

/// Chooses a token for each text from its logits F32 [B, V], which it goes on with.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::OutOfMemory`].
pub fn next(logits: &Tensor, texts: &mut Texts, config: &Config) -> Result<()> {
    logits.expect_shape(OP, "logits", [texts.count(), texts.vocab])?;
    typed::expect_dtype(OP, "logits", logits, DType::F32)?;
    match logits.device() {
        Device::Cpu => {
            let words = texts.vocab.div_ceil(32);
            let (lens, counts) = (texts.lens.as_mut_slice::<u32>()?, texts.counts.as_mut_slice::<u32>()?);
            let (tokens, seen) = (texts.tokens.as_mut_slice::<u32>()?, texts.seen.as_mut_slice::<u32>()?);
            for (text, logits) in logits.as_slice::<f32>()?.chunks_exact(texts.vocab.max(1)).enumerate() {
                let seen = &mut seen[text * words..][..words];
                let token = cpu::choose(logits, seen, config, u64::from(counts[text]));
                tokens[text] = token;
                counts[text] += 1;
                lens[text] = (lens[text] + 1).min(texts.capacity as u32);
                seen[token as usize / 32] |= 1 << (token % 32);
            }
            Ok(())
        }
        Device::Cuda(device) => cuda::next(device, logits, texts, config),
    }
}

mod cpu {
    use super::Config;
    use crate::Rng;

    /// The `count`-th token of a text that has seen the tokens of a bitmap.
    pub(super) fn choose(logits: &[f32], seen: &[u32], config: &Config, count: u64) -> u32 {
        let penalty = config.repetition_penalty;
        let penalized = |(id, &logit): (usize, &f32)| {
            if penalty == 1.0 || seen[id / 32] >> (id % 32) & 1 == 0 {
                logit
            } else if logit > 0.0 {
                logit / penalty
            } else {
                logit * penalty
            }
        };
        let all = || logits.iter().enumerate().map(penalized);
        let (best, top) = highest(all());
        if config.temperature <= 0.0 {
            return best;
        }
        let weights = all().map(|logit| power((logit - top) / config.temperature * std::f32::consts::LOG2_E));
        // The order as numbers that grow: of equal weights the lower token first.
        let mut order: Vec<u64> =
            weights.zip(0u64..).filter(|&(weight, _)| weight > 0).map(|(weight, id)| u64::from(!weight) << 32 | id).collect();
        order.sort_unstable();
        draw(&order, config, bits(config.rng, count))
    }

    /// The first of the highest logits, as torch's argmax; NaN is below all.
    fn highest(logits: impl Iterator<Item = f32>) -> (u32, f32) {
        let mut best = None;
        for (id, logit) in (0u32..).zip(logits) {
            if !logit.is_nan() && best.is_none_or(|(_, top)| logit > top) {
                best = Some((id, logit));
            }
        }
        best.unwrap_or((0, 0.0))
    }

    /// 2³¹ · 2ᵗ for t <= 0, to 24 bits. No fused multiply-add, nowhere.
    pub(super) fn power(t: f32) -> u32 {
        const C: [f32; 6] = [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0];
        if t.is_nan() || t <= -32.0 {
            return 0;
        }
        let n = (t + 0.5).floor();
        let f = t - n;
        let p = C.iter().fold(1.540_353e-4f32, |p, c| p * f + c);
        let shift = (-n) as u32;
        if shift < 32 { ((p * 8_388_608.0) as u32) << 8 >> shift } else { 0 }
    }

    /// 24 random bits.
    fn bits(rng: Rng, n: u64) -> u64 {
        rng.bits(n) >> 40
    }

    fn draw(order: &[u64], config: &Config, uniform: u64) -> u32 {
        let weight = |entry: u64| u64::from(!((entry >> 32) as u32));
        let most = if config.top_k == 0 { order.len() } else { config.top_k.min(order.len()) };
        let kept = &order[..most];
        let mut total: u64 = kept.iter().map(|&entry| weight(entry)).sum();
        // Sums are below 2⁵³.
        let need = ((f64::from(config.top_p) * total as f64).ceil() as u64).max(1);
        let mut sum = 0;
        if need < total {
            for &entry in kept {
                sum += weight(entry);
                if sum >= need {
                    break;
                }
            }
            total = sum;
        }
        let target = (total >> 24) * uniform + (((total & 0xff_ffff) * uniform) >> 24);
        let mut sum = 0;
        for &entry in kept {
            sum += weight(entry);
            if sum > target {
                return entry as u32;
            }
        }
        0
    }
}

#[cfg(test)]
mod tests;
