//! The loop.

mod resume;

use std::{collections::BTreeMap, time::Instant};

use nibble_autograd::{ParamGrads, ParamStore, Tape, ops::Loss};
use nibble_data::{Batch, DataLoader, Dataset, LoaderState, Packer};
use nibble_model::{Checkpointing, LossOptions, Stream, Transformer};
use nibble_optim::{Layout, LrSchedule, Optimizer, clip_grad_norm};
use nibble_tensor::{
    DType, Device, Rng,
    ops::{
        lm_head_loss::Labels,
        loss_scale::{self, LossScale},
    },
};

use crate::{
    Error, EvalStats, LogEntry, Observer, Plan, Result, StepStats, TrainConfig,
    device_step::{DeviceSteps, Outcome as Found, Parts, Ticket, of_a_class},
};

use resume::Position;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Optimizer steps done.
    pub steps: usize,
    /// Whether the observer ended it before its last step.
    pub stopped_early: bool,
    /// Mean of the steps' losses.
    pub train_loss: f64,
    /// Seconds, evaluations included.
    pub seconds: f64,
    /// Tokens learned from or read as context.
    pub tokens: usize,
}

/// A run: model, trained values, optimizer and data.
#[derive(Debug)]
pub struct Trainer {
    model: Transformer,
    params: ParamStore,
    grads: ParamGrads,
    optimizer: Optimizer,
    schedule: LrSchedule,
    data: DataLoader,
    config: TrainConfig,
    max_steps: usize,
    step: usize,
    /// After the last step that counts: neither one that broke nor those that were enqueued behind it.
    done: Position,
    /// What the steps depend on and only the caller knows, by name.
    named: BTreeMap<String, String>,
    /// With gradients in f16.
    loss_scale: Option<LossScale>,
    /// Steps on a GPU; none on the CPU.
    device: Option<DeviceSteps>,
    /// When the last step's results had come.
    finished: Option<Instant>,
}

/// A step that has been enqueued, or on the CPU done.
#[derive(Debug)]
struct Pending {
    stats: StepStats,
    /// Of the data, behind it.
    data: LoaderState,
    rows: Vec<usize>,
    begin: Instant,
    ticket: Option<Ticket>,
}

impl Trainer {
    /// Prepares a run.
    ///
    /// # Errors
    /// [`Error::NothingTrains`], [`Error::Setting`], [`Error::TooLong`], out of memory.
    pub fn new(model: Transformer, mut params: ParamStore, data: DataLoader, config: TrainConfig) -> Result<Self> {
        config.validate()?;
        if params.numel() == 0 {
            return Err(Error::NothingTrains);
        }
        check_lengths(&model, data.dataset())?;
        let steps_per_epoch = steps_per_epoch(&data, &config);
        let max_steps = config.max_steps.unwrap_or_else(|| (config.num_train_epochs * steps_per_epoch as f64).ceil() as usize);
        // Before the gradients: values that move into pages leave room for them.
        let optimizer = optimizer(&model, &mut params, &config)?;
        let grads = params.zero_grads()?;
        let schedule = config.schedule(max_steps)?;
        let loss_scale = if model.compute_dtype() == DType::F16 { Some(LossScale::new(model.arena())?) } else { None };
        let device = DeviceSteps::new(model.arena(), config.gradient_accumulation_steps)?;
        let (step, finished) = (0, None);
        let (done, named) = (Position { step, tokens: 0, data: data.state() }, BTreeMap::new());
        Ok(Self {
            model,
            params,
            grads,
            optimizer,
            schedule,
            data,
            config,
            max_steps,
            step,
            done,
            named,
            loss_scale,
            device,
            finished,
        })
    }

    /// What the run will do.
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan {
            max_steps: self.max_steps,
            steps_per_epoch: steps_per_epoch(&self.data, &self.config),
            trainable_parameters: self.params.numel(),
            base_parameters: self.model.num_parameters(),
            examples: self.data.dataset().examples().len(),
            effective_batch_size: self.data.dataset().examples().len().div_ceil(self.data.batches_per_epoch())
                * self.config.gradient_accumulation_steps,
        }
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// The trained values.
    #[must_use]
    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// Makes the f32 values those of [`Trainer::params`], where they live in the optimizer's pages: before they are saved.
    ///
    /// # Errors
    /// What reading the pages returns.
    pub fn gather_params(&mut self) -> Result<()> {
        if let Some(values) = self.optimizer.values()? {
            self.params.set_masters(values);
        }
        Ok(())
    }

    /// The gradients of the last step, before clipping; times the loss scale, with gradients in f16.
    #[must_use]
    pub fn grads(&self) -> &ParamGrads {
        &self.grads
    }

    /// Steps on a GPU that ran as a graph, and not kernel by kernel.
    #[must_use]
    pub fn replayed_steps(&self) -> usize {
        self.device.as_ref().map_or(0, |device| device.replayed)
    }

    /// With gradients in f16: what the next step's loss is multiplied by, and the steps since that changed; a run continues from
    /// it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn loss_scale(&self) -> Result<Option<(f32, u32)>> {
        Ok(self.loss_scale.as_ref().map(LossScale::state).transpose()?)
    }

    /// Continues from what [`Trainer::loss_scale`] gave, before the first step; without gradients in f16 it does nothing.
    ///
    /// # Errors
    /// [`Error::Tensor`] after the first step.
    pub fn load_loss_scale(&mut self, state: (f32, u32)) -> Result<()> {
        Ok(self.loss_scale.as_mut().map_or(Ok(()), |scale| scale.load(state))?)
    }

    /// Runs to the last step, or until the observer says so.
    ///
    /// # Errors
    /// As [`Trainer::step`] and [`Trainer::evaluate`].
    pub fn train(&mut self, eval: Option<&Dataset>, observer: &mut dyn Observer) -> Result<Outcome> {
        observer.on_start(&self.plan());
        let begin = Instant::now();
        let (mut window, mut all) = (Window::default(), Window::default());
        let mut stopped_early = false;
        let mut pending: Option<Pending> = None;
        loop {
            let next = if self.runs_ahead(pending.as_ref(), stopped_early) { self.enqueue().map(Some) } else { Ok(None) };
            if next.is_err()
                && let Some(before) = pending.take()
            {
                // What the step before has learned is learned.
                observer.on_step(&self.finish(before)?);
            }
            let next = next?;
            // On a GPU the step before is looked at while this one runs.
            let ready = if self.device.is_some() && next.is_some() {
                std::mem::replace(&mut pending, next)
            } else {
                pending.take().or(next)
            };
            let Some(ready) = ready else {
                if pending.is_none() && (stopped_early || self.step == self.max_steps) {
                    break;
                }
                continue;
            };
            let stats = self.finish(ready)?;
            observer.on_step(&stats);
            window.add(&stats);
            all.add(&stats);
            let last = stats.step == self.max_steps;
            stopped_early |= observer.should_stop() && !last;
            if last || stopped_early || stats.step.is_multiple_of(self.config.logging_steps) {
                observer.on_log(&window.entry(&stats, self.done.tokens));
                window = Window::default();
            }
            if stopped_early {
                continue;
            }
            if let Some(data) = eval.filter(|_| self.evaluates_after(stats.step)) {
                observer.on_evaluate(stats.step, &self.evaluate(data)?);
            }
        }
        let seconds = begin.elapsed().as_secs_f64();
        Ok(Outcome { steps: all.steps, stopped_early, train_loss: all.loss(), seconds, tokens: all.tokens })
    }

    /// Whether the next step may be enqueued before the results of `pending` are looked at.
    fn runs_ahead(&self, pending: Option<&Pending>, stopping: bool) -> bool {
        !stopping && self.step < self.max_steps && pending.is_none_or(|pending| !self.evaluates_after(pending.stats.step))
    }

    fn evaluates_after(&self, step: usize) -> bool {
        step == self.max_steps || self.config.eval_steps.is_some_and(|steps| step.is_multiple_of(steps))
    }

    /// One optimizer step: the micro-batches that are next, clip, update.
    ///
    /// # Errors
    /// [`Error::NonFinite`] before anything is changed by it (with gradients in f16, once the loss scale is as small as it gets); what the model's ops return.
    pub fn step(&mut self) -> Result<StepStats> {
        let pending = self.enqueue()?;
        self.finish(pending)
    }

    fn enqueue(&mut self) -> Result<Pending> {
        let begin = Instant::now();
        let (batches, rows) = self.next_batches()?;
        let labels: usize = batches.iter().map(Batch::label_count).sum();
        let tokens = batches.iter().map(Batch::len).sum();
        let scale = 1.0 / labels.max(1) as f32;
        let learning_rate = self.schedule.lr(self.step as u64);
        let dropout = Rng::new(self.config.seed).stream(self.step as u64).rooted();
        let (mut found, mut ticket) = (Found::default(), None);
        if let Some(device) = &mut self.device {
            let Self { model, params, grads, optimizer, config, loss_scale, .. } = self;
            let parts = Parts { model, params, grads, optimizer, config, loss_scale: loss_scale.as_ref() };
            let batches: Vec<Batch> = batches.into_iter().map(of_a_class).collect();
            ticket = Some(device.enqueue(parts, &batches, scale, learning_rate, dropout)?);
        } else {
            let device = self.model.arena().device();
            found = device.run(|| self.host_step(&batches, scale, learning_rate, dropout))?;
        }
        self.step += 1;
        let state = self.data.state();
        let epoch = state.epoch as f64 + state.index as f64 / state.batches_per_epoch as f64;
        let seconds = begin.elapsed().as_secs_f64();
        let Found { loss, grad_norm, loss_scale } = found;
        let step = self.step;
        let stats =
            StepStats { step, epoch, loss, grad_norm, learning_rate, tokens, labels, seconds, loss_scale, skipped: false };
        Ok(Pending { stats, data: state, rows, begin, ticket })
    }

    /// The results of an enqueued step.
    fn finish(&mut self, pending: Pending) -> Result<StepStats> {
        let Pending { mut stats, data, rows, begin, ticket } = pending;
        if let (Some(device), Some(ticket)) = (&self.device, ticket) {
            let Found { loss, grad_norm, loss_scale } = device.wait(ticket)?;
            (stats.loss, stats.grad_norm, stats.loss_scale) = (loss, grad_norm, loss_scale);
            // Steps overlap on the host: each counts from the end of the one before.
            let now = Instant::now();
            let from = self.finished.map_or(begin, |finished| finished.max(begin));
            self.finished = Some(now);
            stats.seconds = (now - from).as_secs_f64();
        }
        stats.skipped = !stats.loss.is_finite() || !stats.grad_norm.is_finite();
        // The scale may be at fault as long as it can be smaller.
        if stats.skipped && stats.loss_scale.is_none_or(|scale| scale <= loss_scale::LEAST.into()) {
            let (quantity, value) =
                if stats.loss.is_finite() { ("gradient norm", stats.grad_norm) } else { ("loss", stats.loss) };
            // On a GPU the step behind this one is on its way, and changes nothing either.
            self.optimizer.resume()?;
            return Err(Error::NonFinite { step: stats.step, quantity, value, rows });
        }
        self.done = Position { step: stats.step, tokens: self.done.tokens + stats.tokens, data };
        Ok(stats)
    }

    /// A step on the CPU. What is not finite leaves everything but the loss scale as it was.
    fn host_step(&mut self, batches: &[Batch], scale: f32, lr: f64, dropout: Rng) -> Result<Found> {
        self.grads.zero()?;
        let mut loss = 0.0;
        for (i, batch) in batches.iter().enumerate() {
            loss += self.backward(batch, scale, Some(dropout.stream(i as u64)))?;
        }
        let loss_scale = self.loss_scale.as_ref().map(LossScale::value);
        let divisor = loss_scale.unwrap_or(1.0);
        // A loss that is no number has no gradient: as on a GPU, whose kernels would find NaN.
        let mut clip = clip_grad_norm(self.grads.flat(), self.config.max_grad_norm * f64::from(divisor))?;
        if !loss.is_finite() {
            clip.norm = f64::NAN;
        }
        let finite = clip.norm.is_finite();
        if finite {
            self.optimizer.step(self.params.data_mut(), self.grads.flat(), lr, clip.scale / divisor)?;
        }
        if let Some(scale) = &mut self.loss_scale {
            scale.update(finite);
        }
        Ok(Found { loss, grad_norm: clip.norm / f64::from(divisor), loss_scale: loss_scale.map(f64::from) })
    }

    /// The micro-batches of the next step (a step does not reach over the end of an epoch), and their rows in the file.
    fn next_batches(&mut self) -> Result<(Vec<Batch>, Vec<usize>)> {
        let (mut batches, mut rows) = (Vec::new(), Vec::new());
        for _ in 0..self.config.gradient_accumulation_steps {
            let indices = self.data.next_indices()?;
            rows.extend(indices.iter().map(|&i| self.data.dataset().examples()[i].row));
            batches.push(self.data.dataset().batch(&indices));
            let state = self.data.state();
            if state.index == state.batches_per_epoch {
                break;
            }
        }
        Ok((batches, rows))
    }

    /// Adds a micro-batch's gradients; gives its part of the step's loss.
    fn backward(&mut self, batch: &Batch, scale: f32, dropout: Option<Rng>) -> Result<f64> {
        let arena = self.model.arena();
        let stream = Stream::new(arena, &batch.tokens, &batch.cu_seqlens)?;
        let mut labels = Labels::new(arena, &batch.labels, scale)?;
        if let Some(loss_scale) = &self.loss_scale {
            labels = labels.scaled(loss_scale);
        }
        let options = LossOptions { checkpointing: resolve(&self.model, self.config.checkpointing, batch.len())?, dropout };
        let mut tape = Tape::new(&self.params);
        let loss = self.model.loss(&mut tape, &stream, &labels, options)?;
        let value = loss.value()?;
        // A loss that is no number has no gradient worth computing: the caller reports it.
        if value.is_finite() {
            loss.backward(tape, &mut self.grads)?;
        }
        Ok(value)
    }

    /// The loss over all labelled tokens of `data`, without dropout.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn evaluate(&self, data: &Dataset) -> Result<EvalStats> {
        evaluate(&self.model, &self.params, data, self.config.eval_batch_size)
    }
}

/// `Auto` as the mix for a micro-batch of `tokens` tokens.
pub(crate) fn resolve(model: &Transformer, checkpointing: Checkpointing, tokens: usize) -> Result<Checkpointing> {
    if checkpointing != Checkpointing::Auto {
        return Ok(checkpointing);
    }
    // A processor's memory is not known to be anybody's: without a limit the cheap values are made again.
    Ok(model.arena().room()?.map_or(Checkpointing::Selective, |room| Checkpointing::Mixed(model.fastest_mix(tokens, room))))
}

fn steps_per_epoch(data: &DataLoader, config: &TrainConfig) -> usize {
    data.batches_per_epoch().div_ceil(config.gradient_accumulation_steps)
}

/// The optimizer that `config` names, with its states.
pub(crate) fn optimizer(model: &Transformer, params: &mut ParamStore, config: &TrainConfig) -> Result<Optimizer> {
    let (arena, layout, optim) = (model.arena(), layout(params), config.optimizer()?);
    if !config.optim.is_paged() {
        return Ok(Optimizer::new(arena, &layout, optim)?);
    }
    config.check_paging(arena.device(), model.compute_dtype())?;
    let mut optimizer = Optimizer::paged(arena, &layout, optim, &config.optim_paging)?;
    if optimizer.holds_values() {
        optimizer.set_values(&params.hand_over(model.compute_dtype())?)?;
    }
    Ok(optimizer)
}

/// The parameters as the optimizer sees them: biases and norms do not decay, as in the Trainer.
fn layout(params: &ParamStore) -> Layout {
    let exempt = |name: &str| name.rsplit('.').next() == Some("bias") || name.contains("norm.");
    Layout::new(params.params().iter().map(|param| (param.shape, !exempt(&param.name))))
}

/// The cross entropy of a model over all labelled tokens of `data`: weighted by token, whatever `batch_size` is.
///
/// # Errors
/// [`Error::TooLong`], [`Error::NonFiniteEval`], what the model's ops return.
pub fn evaluate(model: &Transformer, params: &ParamStore, data: &Dataset, batch_size: usize) -> Result<EvalStats> {
    model.arena().device().run(|| evaluate_here(model, params, data, batch_size))
}

fn evaluate_here(model: &Transformer, params: &ParamStore, data: &Dataset, batch_size: usize) -> Result<EvalStats> {
    check_lengths(model, data)?;
    let lengths: Vec<usize> = data.examples().iter().map(|example| example.tokens.len()).collect();
    let order: Vec<usize> = (0..lengths.len()).collect();
    let (mut sum, mut tokens) = (0.0, 0);
    let on_cpu = model.arena().device() == Device::Cpu;
    for indices in (Packer::Documents { batch_size: batch_size.max(1) }).pack(&order, &lengths)? {
        let batch = data.batch(&indices);
        let batch = if on_cpu { batch } else { of_a_class(batch) };
        let loss = eval_loss(model, params, &batch)?;
        let value = loss.value()?;
        if !value.is_finite() {
            let rows = indices.iter().map(|&i| data.examples()[i].row).collect();
            return Err(Error::NonFiniteEval { value, rows });
        }
        sum += value;
        tokens += loss.rows;
    }
    model.release_weights()?;
    let loss = sum / tokens.max(1) as f64;
    Ok(EvalStats { loss, perplexity: loss.exp(), tokens })
}

/// The summed loss of one micro-batch of an evaluation.
pub(crate) fn eval_loss(model: &Transformer, params: &ParamStore, batch: &Batch) -> Result<Loss> {
    let stream = Stream::new(model.arena(), &batch.tokens, &batch.cu_seqlens)?;
    let labels = Labels::new(model.arena(), &batch.labels, 1.0)?;
    let options = LossOptions { checkpointing: Checkpointing::None, dropout: None };
    Ok(model.loss(&mut Tape::inference(params), &stream, &labels, options)?)
}

fn check_lengths(model: &Transformer, data: &Dataset) -> Result<()> {
    let positions = model.max_positions();
    match data.examples().iter().find(|example| example.tokens.len() > positions) {
        Some(example) => Err(Error::TooLong { row: example.row, tokens: example.tokens.len(), positions }),
        None => Ok(()),
    }
}

/// Sums over some steps.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    steps: usize,
    skipped: usize,
    /// Finite ones, and how many.
    losses: (f64, usize),
    tokens: usize,
    seconds: f64,
}

impl Window {
    fn add(&mut self, stats: &StepStats) {
        self.steps += 1;
        self.skipped += usize::from(stats.skipped);
        if stats.loss.is_finite() {
            self.losses = (self.losses.0 + stats.loss, self.losses.1 + 1);
        }
        self.tokens += stats.tokens;
        self.seconds += stats.seconds;
    }

    fn loss(&self) -> f64 {
        self.losses.0 / self.losses.1.max(1) as f64
    }

    fn entry(&self, last: &StepStats, tokens: usize) -> LogEntry {
        LogEntry {
            step: last.step,
            epoch: last.epoch,
            loss: self.loss(),
            grad_norm: last.grad_norm,
            learning_rate: last.learning_rate,
            tokens,
            tokens_per_second: self.tokens as f64 / self.seconds.max(1e-9),
            loss_scale: last.loss_scale,
            skipped_steps: last.loss_scale.map(|_| self.skipped),
        }
    }
}
