//! Steps on a GPU: enqueued without waiting, and captured when their shape comes again.
//!
//! Streams are padded to one of few shapes. The inputs of a shape (tokens, documents, labels) have memory of their own, which each step of that shape writes anew; all
//! else that changes from step to step is read from device memory. The first step of a shape runs kernel by kernel, the second
//! is captured as a graph, later ones replay it; the third and the fourth may be captured again, for they find more weights widened. Loss and gradient norm are copied to pinned memory and read when asked for.

use nibble_autograd::{ParamGrads, ParamStore, Tape};
use nibble_data::Batch;
use nibble_model::{Checkpointing, LossOptions, Stream, Transformer};
use nibble_optim::Optimizer;
use nibble_tensor::{
    Arena, DType, Device, LookAhead, Rng, Tensor,
    cuda::{CudaDevice, Graph, Pinned},
    ops::{lm_head_loss::Labels, loss_scale::LossScale, step},
    size_class,
};

use crate::{Result, TrainConfig, trainer::resolve};

/// Shapes whose inputs and graphs are kept: those used last.
const MOST_SHAPES: usize = 32;
/// Tokens of a stream are padded to a multiple of this, in 16 classes an octave: 2 % on average.
const PAD: usize = 64;
/// How often a step is captured for more of the weights that the one before has widened.
const CAPTURES: usize = 3;
/// Steps that may be on their way at once.
const SLOTS: usize = 2;

/// What a step reads and changes.
pub(crate) struct Parts<'a> {
    pub(crate) model: &'a Transformer,
    pub(crate) params: &'a mut ParamStore,
    pub(crate) grads: &'a mut ParamGrads,
    pub(crate) optimizer: &'a mut Optimizer,
    pub(crate) config: &'a TrainConfig,
    /// With gradients in f16.
    pub(crate) loss_scale: Option<&'a LossScale>,
}

/// What a step found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) loss: f64,
    /// Norm of the gradient. Where it or the loss is not finite the step changed nothing.
    pub(crate) grad_norm: f64,
    /// What the loss was multiplied by, with gradients in f16.
    pub(crate) loss_scale: Option<f64>,
}

/// The shapes met so far.
#[derive(Debug)]
pub(crate) struct DeviceSteps {
    device: CudaDevice,
    shapes: Vec<Shape>,
    reports: Vec<Report>,
    next: usize,
    /// Steps that a graph ran.
    pub(crate) replayed: usize,
}

/// One shape of a step: its inputs, and the graph once it has come twice.
#[derive(Debug)]
struct Shape {
    batches: Vec<(Stream, Labels)>,
    /// Of each micro-batch; chosen once, so that a captured step repeats it.
    checkpointing: Vec<Checkpointing>,
    /// F32 `[micro-batches]`.
    losses: Tensor,
    graph: Option<Graph>,
    /// How often it was captured since it was not valid.
    captured: usize,
    steps: usize,
}

/// Where a step's results arrive.
#[derive(Debug)]
struct Report {
    values: Pinned,
    losses: Pinned,
}

/// A step on its way: which report it arrives in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    slot: usize,
    batches: usize,
}

impl DeviceSteps {
    /// On a GPU; nothing on the CPU.
    pub(crate) fn new(arena: &Arena, batches: usize) -> Result<Option<Self>> {
        let Device::Cuda(device) = arena.device() else { return Ok(None) };
        let report = || Ok(Report { values: Pinned::new(device, 4 * step::LEN)?, losses: Pinned::new(device, 4 * batches)? });
        let reports = (0..SLOTS).map(|_| report()).collect::<Result<_>>()?;
        Ok(Some(Self { device, shapes: Vec::new(), reports, next: 0, replayed: 0 }))
    }

    /// Enqueues a step: forward and backward of the micro-batches, which are [`of_a_class`], clipping, update.
    pub(crate) fn enqueue(
        &mut self,
        mut parts: Parts<'_>,
        batches: &[Batch],
        scale: f32,
        lr: f64,
        dropout: Rng,
    ) -> Result<Ticket> {
        let index = self.shape(&parts, batches, scale)?;
        parts.optimizer.begin(lr)?;
        dropout.announce(self.device)?;
        let shape = &mut self.shapes[index];
        shape.steps += 1;
        match &shape.graph {
            Some(graph) if !graph.is_valid() => (shape.graph, shape.captured) = (None, 0),
            Some(graph) if !graph.is_settled() && shape.captured < CAPTURES => shape.graph = None,
            _ => {}
        }
        if self.device.is_profiling() || self.device.is_dry() {
            shape.graph = None;
        } else if shape.steps > 1 && shape.graph.is_none() {
            let arena = parts.model.arena().clone();
            let (graph, ()) =
                Graph::capture(&arena, || shape.run(&mut parts, dropout).map_err(Captured::from)).map_err(|error| error.0)?;
            shape.graph = Some(graph);
            shape.captured += 1;
        }
        match &shape.graph {
            Some(graph) => {
                graph.launch()?;
                self.replayed += 1;
            }
            None => shape.run(&mut parts, dropout)?,
        }
        let slot = self.next;
        self.next = (slot + 1) % SLOTS;
        let report = &mut self.reports[slot];
        if let Some(values) = parts.optimizer.report() {
            report.values.fetch(values)?;
        }
        report.losses.fetch(&shape.losses)?;
        Ok(Ticket { slot, batches: batches.len() })
    }

    /// Waits for a step.
    pub(crate) fn wait(&self, ticket: Ticket) -> Result<Outcome> {
        let report = &self.reports[ticket.slot];
        report.losses.wait()?;
        report.values.wait()?;
        let floats =
            |bytes: &[u8]| -> Vec<f32> { bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect() };
        let losses = floats(report.losses.bytes());
        let loss = losses[..ticket.batches].iter().map(|&loss| f64::from(loss)).sum();
        let values = floats(report.values.bytes());
        let loss_scale = Some(f64::from(values[step::LOSS_SCALE])).filter(|scale| *scale > 0.0);
        Ok(Outcome { loss, grad_norm: values[step::NORM].into(), loss_scale })
    }

    /// The inputs of these batches, in the memory of their shape.
    fn shape(&mut self, parts: &Parts<'_>, batches: &[Batch], scale: f32) -> Result<usize> {
        let (model, checkpointing) = (parts.model, parts.config.checkpointing);
        let arena = model.arena();
        let labels = |batch: &Batch| {
            let labels = Labels::new(arena, &batch.labels, scale)?;
            Ok::<_, crate::Error>(match parts.loss_scale {
                Some(loss_scale) => labels.scaled(loss_scale),
                None => labels,
            })
        };
        let labels = batches.iter().map(labels).collect::<Result<Vec<_>, _>>()?;
        if let Some(index) = self.shapes.iter().position(|shape| shape.fits(batches, &labels)) {
            // The one used last comes last.
            self.shapes[index..].rotate_left(1);
            let index = self.shapes.len() - 1;
            let shape = &mut self.shapes[index];
            for ((held, batch), labels) in shape.batches.iter_mut().zip(batches).zip(&labels) {
                held.0.update(&batch.tokens, &batch.cu_seqlens)?;
                held.1.update(labels)?;
            }
            return Ok(index);
        }
        if self.shapes.len() == MOST_SHAPES {
            self.shapes.remove(0);
        }
        let lengths = batches.iter().map(Batch::len);
        let checkpointing = lengths.map(|tokens| resolve(model, checkpointing, tokens)).collect::<Result<_>>()?;
        let batches = batches
            .iter()
            .zip(labels)
            .map(|(batch, labels)| Ok((Stream::new(arena, &batch.tokens, &batch.cu_seqlens)?, labels)))
            .collect::<Result<Vec<_>>>()?;
        let losses = Tensor::zeros(arena, DType::F32, [batches.len()])?;
        self.shapes.push(Shape { batches, checkpointing, losses, graph: None, captured: 0, steps: 0 });
        Ok(self.shapes.len() - 1)
    }
}

/// The batch padded to one of few shapes, so that steps of about the same size are one graph.
pub(crate) fn of_a_class(batch: Batch) -> Batch {
    let tokens = size_class(batch.len().div_ceil(PAD), 16) * PAD;
    batch.padded(tokens, |documents| size_class(documents.div_ceil(4), 8) * 4)
}

impl Shape {
    fn fits(&self, batches: &[Batch], labels: &[Labels]) -> bool {
        self.batches.len() == batches.len()
            && self.batches.iter().zip(batches).zip(labels).all(|(((stream, held), batch), labels)| {
                stream.documents.tokens() == batch.tokens.len()
                    && stream.documents.cu_seqlens().len() == batch.cu_seqlens.len()
                    && held.is_like(labels)
            })
    }

    /// The work of a step, in order.
    fn run(&mut self, parts: &mut Parts<'_>, dropout: Rng) -> Result<()> {
        // An evaluation may have left some on the device: a captured step begins without.
        parts.model.release_weights()?;
        parts.grads.zero()?;
        for (i, ((stream, labels), &checkpointing)) in self.batches.iter().zip(&self.checkpointing).enumerate() {
            let _pass = LookAhead::new(parts.model.arena(), stream.documents.tokens());
            let options = LossOptions { checkpointing, dropout: Some(dropout.stream(i as u64)) };
            let mut tape = Tape::new(parts.params);
            let loss = parts.model.loss(&mut tape, &stream.for_step(), labels, options)?;
            self.losses.copy_rows(i, loss.tensor())?;
            loss.backward(tape, parts.grads)?;
        }
        parts.model.release_weights()?;
        let scaler = parts.loss_scale.zip(parts.optimizer.report());
        scaler.map_or(Ok(()), |(scale, values)| scale.divide(values))?;
        parts.optimizer.apply(parts.params.data_mut(), parts.grads.flat(), Some(&self.losses), parts.config.max_grad_norm)?;
        let scaler = parts.loss_scale.zip(parts.optimizer.report());
        scaler.map_or(Ok(()), |(scale, values)| scale.update_from(values))?;
        parts.params.prepare(parts.model.compute_dtype())?;
        Ok(())
    }
}

/// This crate's error on its way through a capture, which fails by itself with the tensors' error.
struct Captured(crate::Error);

impl From<crate::Error> for Captured {
    fn from(error: crate::Error) -> Self {
        Self(error)
    }
}

impl From<nibble_tensor::Error> for Captured {
    fn from(error: nibble_tensor::Error) -> Self {
        Self(error.into())
    }
}
