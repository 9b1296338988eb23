//! The language-model head and its cross entropy in one, over the trained rows only, without the T x V logits.
//!
//! With labels y_t already shifted (y_t is the token that follows t) and -100 where nothing is trained:
//!
//! ```text
//! s_t = W h_t,  z = cap tanh(s / cap)           (z = s without softcap)
//! loss = scale Σ_t (ln Σ_v exp z_tv - z_t,y_t)  over rows with a label
//! ds_tv = scale (exp z_tv / Σ_u exp z_tu - [v = y_t]) (1 - (z_tv / cap)²)
//! dh_t = Wᵀ ds_t,  dW += ds hᵀ
//! ```
//!
//! h [T, C], weight [V, C], labels `[T]` with their scale ([`Labels`]). Nothing is saved for backward: the forward pass computes dh for a loss gradient
//! of 1 along the way, the gradient written over the logits; the head's own gradient, where it trains, computes the logits
//! again. Rows go in chunks whose logits take a bounded memory: on the CPU at most 256 rows and about 64 MiB, on a GPU at most 8,192 rows
//! and 192 MiB, or four times the bytes of h where that is more.
//!
//! With [`Labels::scaled`] gradients are those of S · loss; the loss is as without.
//!
//! Products are as in [`super::linear`]: in f32 for f32 activations, with operands rounded to the activations' type for 16-bit
//! ones, and sums in f32; ds of f16 activations stays f32, since it would underflow. A loss that is not finite is returned
//! as it is.

use std::sync::Arc;

use super::loss_scale::LossScale;
use crate::{Arena, DType, Device, Error, Result, Shape, Tensor, TensorMut};

const OP: &str = "lm_head_loss";

/// The label of a row that is not trained.
pub const IGNORE: i32 = -100;

/// How logits become a loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Bound of the logits (Gemma 2's `final_logit_softcapping`).
    pub softcap: Option<f32>,
}

/// What each position of a stream is trained to predict, and the factor of the sum.
#[derive(Clone, Debug)]
pub struct Labels {
    trained: Arc<[Trained]>,
    /// A negative label that is not [`IGNORE`], and its position: refused where the vocabulary is known.
    negative: Option<(usize, i32)>,
    tokens: usize,
    scale: f32,
    /// S of the gradients, on the CPU.
    loss_scale: f32,
    device: Option<cuda::Labels>,
}

impl Labels {
    /// From labels already shifted, [`IGNORE`] where nothing is trained; `scale` is 1 / the trained tokens of the whole step, over
    /// all its micro-batches.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]. Labels outside the vocabulary are refused by [`forward`], which knows it.
    pub fn new(arena: &Arena, labels: &[i32], scale: f32) -> Result<Self> {
        let (mut trained, mut negative) = (Vec::new(), None);
        for (position, &label) in labels.iter().enumerate() {
            match usize::try_from(label) {
                Ok(label) => trained.push((position, label)),
                _ if label == IGNORE => {}
                _ => negative = negative.or(Some((position, label))),
            }
        }
        let device = match arena.device() {
            Device::Cpu => None,
            Device::Cuda(_) => Some(cuda::Labels::new(arena, &trained, labels.len(), scale)?),
        };
        Ok(Self { trained: trained.into(), negative, tokens: labels.len(), scale, loss_scale: 1.0, device })
    }

    /// The same labels, for gradients of `loss_scale` · loss: as it is now on the CPU, as it is at each run of a kernel on a GPU.
    #[must_use]
    pub fn scaled(mut self, loss_scale: &LossScale) -> Self {
        self.loss_scale = loss_scale.value();
        if let (Some(device), Some(memory)) = (&mut self.device, loss_scale.memory()) {
            device.loss_scale = Some(memory.clone());
        }
        self
    }

    /// What the gradient is multiplied by, on the CPU.
    fn gradient_scale(&self) -> f32 {
        self.scale * self.loss_scale
    }

    /// Whether `other` differs in its values alone, so that a captured step serves both.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        let layout = |labels: &Self| labels.device.as_ref().map(cuda::Labels::layout);
        self.tokens == other.tokens && layout(self) == layout(other)
    }

    /// Copies the values of `other` into the same memory.
    ///
    /// # Errors
    /// [`Error::Argument`] when it is not [`Labels::is_like`] this, [`Error::Shared`] when a step still reads these.
    pub fn update(&mut self, other: &Self) -> Result<()> {
        if !self.is_like(other) {
            return Err(Error::Argument { op: OP, argument: "labels", expected: "of the same layout", found: other.count() });
        }
        if let (Some(device), Some(other)) = (&mut self.device, &other.device) {
            device.update(other)?;
        }
        (self.trained, self.negative, self.scale) = (Arc::clone(&other.trained), other.negative, other.scale);
        self.loss_scale = other.loss_scale;
        Ok(())
    }

    /// Number of trained positions.
    #[must_use]
    pub fn count(&self) -> usize {
        self.trained.len()
    }
}

/// The loss of one stream.
#[derive(Clone, Debug)]
pub struct Output {
    /// F32 `[1]`: scale x the sum over trained rows.
    pub loss: Tensor,
    /// Number of trained rows.
    pub rows: usize,
    /// [T, C] in h's dtype, for a loss gradient of 1 (or S); zero where nothing is trained.
    pub dh: Option<Tensor>,
}

/// The loss, and with `want_dh` its gradient by h.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::TokenOutOfRange`] for a label outside the vocabulary that is not [`IGNORE`],
/// [`Error::Argument`] for a softcap that is not positive, [`Error::OutOfMemory`].
pub fn forward(h: &Tensor, weight: &Tensor, labels: &Labels, config: Config, want_dh: bool) -> Result<Output> {
    check(h, weight, config.softcap)?;
    check_labels(h, weight, labels)?;
    match h.device() {
        Device::Cpu => cpu::forward(h, weight, labels, config, want_dh),
        Device::Cuda(device) => cuda::forward(device, h, weight, labels, config, want_dh),
    }
}

/// Adds the loss's gradient by the weight to `dweight` F32 [V, C].
///
/// # Errors
/// As [`forward`].
pub fn backward_weight(h: &Tensor, weight: &Tensor, labels: &Labels, config: Config, mut dweight: TensorMut) -> Result<()> {
    check(h, weight, config.softcap)?;
    dweight.expect_shape(OP, "dweight", weight.shape())?;
    check_labels(h, weight, labels)?;
    match h.device() {
        Device::Cpu => cpu::backward_weight(h, weight, labels, config, dweight.as_mut_slice()?),
        Device::Cuda(device) => cuda::backward_weight(device, h, weight, labels, config, &mut dweight),
    }
}

/// Bytes of the logits that [`forward`] has at once on a GPU, all of the tokens being trained.
#[must_use]
pub fn logits_bytes([tokens, channels, vocab]: [usize; 3], dtype: DType) -> usize {
    cuda::chunk_rows(tokens, tokens * channels, vocab, dtype) * vocab * dtype.size()
}

/// The logits F32 [T, V] of every row, for generation.
///
/// # Errors
/// As [`forward`].
pub fn logits(h: &Tensor, weight: &Tensor, softcap: Option<f32>) -> Result<Tensor> {
    check(h, weight, softcap)?;
    match h.device() {
        Device::Cpu => cpu::logits(h, weight, softcap),
        Device::Cuda(device) => cuda::logits(device, h, weight, softcap),
    }
}

/// A row of h and its label.
type Trained = (usize, usize);

fn check(h: &Tensor, weight: &Tensor, softcap: Option<f32>) -> Result<()> {
    let (&[_, inputs], &[vocab, _]) = (h.dims(), weight.dims()) else {
        let (operand, rank) = if h.dims().len() == 2 { ("weight", weight.dims().len()) } else { ("h", h.dims().len()) };
        return Err(Error::Argument { op: OP, argument: operand, expected: "of two sizes", found: rank });
    };
    weight.expect_shape(OP, "weight", [vocab, inputs])?;
    for (operand, tensor) in [("h", h), ("weight", weight)] {
        if !tensor.dtype().is_float() {
            return Err(Error::DType { op: OP, operand, expected: "float32, bfloat16 or float16", found: tensor.dtype() });
        }
    }
    if softcap.is_some_and(|cap| cap <= 0.0 || !cap.is_finite()) {
        return Err(Error::Argument { op: OP, argument: "softcap", expected: "positive and finite", found: 0 });
    }
    Ok(())
}

fn check_labels(h: &Tensor, weight: &Tensor, labels: &Labels) -> Result<()> {
    if labels.tokens != h.dims()[0] {
        let (expected, found) = ([h.dims()[0]].into(), [labels.tokens].into());
        return Err(Error::Shape { op: OP, operand: "labels", expected, found });
    }
    let vocab_size = weight.dims()[0];
    if let Some((position, id)) = labels.negative {
        return Err(Error::TokenOutOfRange { op: OP, position, id: id.into(), vocab_size });
    }
    match labels.trained.iter().find(|(_, label)| *label >= vocab_size) {
        Some(&(position, id)) => Err(Error::TokenOutOfRange { op: OP, position, id: id as i64, vocab_size }),
        None => Ok(()),
    }
}

mod cpu;
mod cuda;

#[cfg(test)]
mod tests;
