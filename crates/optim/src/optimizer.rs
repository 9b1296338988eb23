//! An optimizer over one flat buffer.

use nibble_tensor::{Arena, DType, Owner, Tensor};

use crate::{
    Error, OptimizerConfig, Paging, Result, StateMismatch,
    captured::StepMemory,
    layout::Layout,
    paged::Paged,
    plan::{Now, Plan, Spec},
};

/// One of the optimizers, with its states.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    numel: usize,
    specs: Vec<Spec>,
    states: States,
    /// Updates so far, on the CPU.
    steps: u32,
    /// On a GPU; the updates so far are counted there.
    memory: Option<StepMemory>,
}

/// Where the states are.
#[derive(Debug)]
enum States {
    /// On the device, a tensor each.
    Whole(Box<Plan>, Vec<Tensor>),
    /// In pages.
    Paged(Paged),
}

impl Optimizer {
    /// For parameters laid out as `layout` says; states are taken from `arena`.
    ///
    /// # Errors
    /// [`Error::Option`], or out of memory.
    pub fn new(arena: &Arena, layout: &Layout, config: OptimizerConfig) -> Result<Self> {
        Self::with(arena, layout, config, None)
    }

    /// The same with states in pages, as far as they do not fit into what `paging` lets them take of the device. Steps are bit
    /// for bit those of [`Optimizer::new`].
    ///
    /// # Errors
    /// Also [`Error::DeviceMemory`], [`Error::PageFile`], [`Error::PageFileOnGpu`].
    pub fn paged(arena: &Arena, layout: &Layout, config: OptimizerConfig, paging: &Paging) -> Result<Self> {
        Self::with(arena, layout, config, Some(paging))
    }

    fn with(arena: &Arena, layout: &Layout, config: OptimizerConfig, paging: Option<&Paging>) -> Result<Self> {
        config.check()?;
        let _scope = arena.scope(Owner::Optimizer);
        let specs = config.specs(layout);
        let paged = paging.map(|paging| Paged::new(arena, layout, &config, paging)).transpose()?.flatten();
        let zeros = |spec: &Spec| Ok(Tensor::zeros(arena, spec.dtype, [spec.len])?);
        let states = if let Some(paged) = paged {
            States::Paged(paged)
        } else {
            let plan = Box::new(Plan::new(arena, layout, &config)?);
            States::Whole(plan, specs.iter().map(zeros).collect::<Result<_>>()?)
        };
        let memory = StepMemory::new(arena, config.corrections())?;
        Ok(Self { config, numel: layout.numel(), specs, states, steps: 0, memory })
    }

    /// Pages of the states, and how many of them stay on the device; nothing when all of it does.
    #[must_use]
    pub fn pages(&self) -> Option<(usize, usize)> {
        if let States::Paged(paged) = &self.states { Some(paged.count()) } else { None }
    }

    /// Bytes of pinned host memory that pages take.
    #[must_use]
    pub fn host_bytes(&self) -> usize {
        if let States::Paged(paged) = &self.states { paged.host_bytes() } else { 0 }
    }

    /// Whether the pages hold the f32 values ([`Paging::masters`]): then [`Optimizer::set_values`] comes before the first step,
    /// and the params of a step are copies of 16 bits, which it writes.
    #[must_use]
    pub fn holds_values(&self) -> bool {
        matches!(&self.states, States::Paged(paged) if paged.has_masters())
    }

    /// Takes the values (F32 \[len\]) into the pages.
    ///
    /// # Errors
    /// [`Error::Tensor`] when they do not fit.
    pub fn set_values(&mut self, values: &Tensor) -> Result<()> {
        values.expect_shape(self.config.name(), "values", [self.numel])?;
        match &mut self.states {
            States::Paged(paged) if paged.has_masters() => paged.set_masters(values),
            _ => Ok(()),
        }
    }

    /// The values in the pages, copied to the host; nothing when they are not there.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    pub fn values(&self) -> Result<Option<Tensor>> {
        match &self.states {
            States::Paged(paged) if paged.has_masters() => {
                let spec = Spec::new("values", DType::F32, self.numel);
                Ok(paged.gather(&[spec])?.pop().map(|(_, values)| values))
            }
            _ => Ok(None),
        }
    }

    /// One update of `params` (F32 \[len\]) with gradients `grad_scale` · `grads`; `grad_scale` is the clipping factor.
    ///
    /// # Errors
    /// [`Error::Option`] for a learning rate below 0 or not finite; [`Error::Tensor`] when the buffers do not fit or `params` is
    /// shared.
    pub fn step(&mut self, params: &mut Tensor, grads: &Tensor, lr: f64, grad_scale: f32) -> Result<()> {
        self.expect(params, grads, lr)?;
        let Some(memory) = &mut self.memory else {
            let step = self.steps + 1;
            self.update(Some((lr, step, grad_scale)), params, grads)?;
            self.steps = step;
            return Ok(());
        };
        memory.begin(lr, self.config.weight_decay(), grad_scale)?;
        memory.advance(None)?;
        self.update(None, params, grads)
    }

    /// On a GPU, the first part of a step that is captured: writes what changes from step to step. [`Optimizer::apply`] reads it.
    ///
    /// # Errors
    /// [`Error::Option`] for a learning rate below 0 or not finite.
    pub fn begin(&mut self, lr: f64) -> Result<()> {
        expect_at_least_zero(self.config.name(), "learning_rate", lr)?;
        let weight_decay = self.config.weight_decay();
        self.memory.as_mut().map_or(Ok(()), |memory| memory.begin(lr, weight_decay, 1.0))
    }

    /// On a GPU, the second part: clips by `max_norm` (0: not) and updates, without waiting. Gradients or `losses` that are not
    /// finite leave everything as it was, the number of steps as well; without a loss scale, or at its least, so do all steps
    /// after them until [`Optimizer::resume`]. On the CPU it does nothing: [`Optimizer::step`] is the whole step there.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the buffers do not fit or `params` is shared.
    pub fn apply(&mut self, params: &mut Tensor, grads: &Tensor, losses: Option<&Tensor>, max_norm: f64) -> Result<()> {
        self.expect(params, grads, 0.0)?;
        let Some(memory) = &mut self.memory else { return Ok(()) };
        memory.clip(grads, max_norm)?;
        memory.advance(losses)?;
        self.update(None, params, grads)
    }

    /// Steps begun after this change the parameters again, whatever those before were ([`nibble_tensor::ops::step_count`]).
    ///
    /// # Errors
    /// [`Error::Tensor`], what the device reports.
    pub fn resume(&mut self) -> Result<()> {
        self.memory.as_mut().map_or(Ok(()), |memory| Ok(memory.count.resume()?))
    }

    /// `host`: learning rate, step and factor; nothing on a GPU, whose kernels read them from memory.
    fn update(&mut self, host: Option<(f64, u32, f32)>, params: &mut Tensor, grads: &Tensor) -> Result<()> {
        let now = match (host, &self.memory) {
            (Some((lr, step, grad_scale)), _) => Now::Host { lr, step, grad_scale },
            (None, Some(memory)) => Now::Device(memory.values()),
            (None, None) => return Ok(()),
        };
        match &mut self.states {
            States::Paged(paged) => paged.update(&self.config, now, params, grads),
            States::Whole(plan, states) => {
                let states = states.iter_mut().map(|state| Ok(state.view_mut()?)).collect::<Result<Vec<_>>>()?;
                self.config.update(plan, now, params.view_mut()?, grads, states)
            }
        }
    }

    fn expect(&self, params: &Tensor, grads: &Tensor, lr: f64) -> Result<()> {
        let name = self.config.name();
        expect_at_least_zero(name, "learning_rate", lr)?;
        params.expect_shape(name, "params", [self.numel])?;
        Ok(grads.expect_shape(name, "grads", [self.numel])?)
    }

    /// Where [`Optimizer::apply`] leaves the gradient's norm, on a GPU: see [`nibble_tensor::ops::step`].
    #[must_use]
    pub fn report(&self) -> Option<&Tensor> {
        self.memory.as_ref().map(StepMemory::values)
    }

    /// Steps taken, those left out not counted; from a GPU it is read.
    ///
    /// # Errors
    /// [`Error::Tensor`], what the device reports.
    pub fn steps(&self) -> Result<u32> {
        self.memory.as_ref().map_or(Ok(self.steps), |memory| Ok(memory.count.steps()?))
    }

    /// The states under the names of torch (`exp_avg`, `exp_avg_sq`, `momentum_buffer`: as long as the parameters) or of
    /// bitsandbytes (`state1`, `absmax1`, ...: see [`nibble_tensor::ops::dynamic8`]). Where they are not in pages they share the
    /// optimizer's memory: they are to be dropped before the next step. From pages they are copied to the host's memory.
    ///
    /// # Errors
    /// [`Error::PageFile`], [`Error::Tensor`].
    pub fn state(&self) -> Result<Vec<(&'static str, Tensor)>> {
        match &self.states {
            States::Whole(_, states) => {
                Ok(self.specs.iter().zip(states).map(|(spec, state)| (spec.name, state.clone())).collect())
            }
            States::Paged(paged) => paged.gather(&self.specs),
        }
    }

    /// Continues from a saved state: what [`Optimizer::state`] and [`Optimizer::steps`] gave.
    ///
    /// # Errors
    /// [`Error::State`] with every missing, unknown or misshapen tensor; nothing is changed then.
    pub fn load_state(&mut self, steps: u32, state: &[(&str, &Tensor)]) -> Result<()> {
        let saved = fitting(self.config.name(), &self.specs, state)?;
        match &mut self.states {
            States::Whole(_, states) => {
                for (own, saved) in states.iter_mut().zip(saved) {
                    own.copy_rows(0, &saved.to_arena(own.arena())?)?;
                }
            }
            States::Paged(paged) => paged.scatter(&self.specs, &saved)?,
        }
        self.steps = steps;
        self.memory.as_mut().map_or(Ok(()), |memory| Ok(memory.count.load(steps)?))
    }
}

pub(crate) fn expect_at_least_zero(of: &'static str, option: &'static str, found: f64) -> Result<()> {
    if found.is_finite() && found >= 0.0 {
        Ok(())
    } else {
        Err(Error::Option { of, option, expected: "finite and at least 0", found })
    }
}

pub(crate) fn expect_beta(of: &'static str, option: &'static str, found: f64) -> Result<()> {
    if (0.0..1.0).contains(&found) {
        Ok(())
    } else {
        Err(Error::Option { of, option, expected: "at least 0 and below 1", found })
    }
}

/// The tensors of a saved state in the order of an optimizer's own, if they fit one to one.
fn fitting<'a>(optimizer: &'static str, own: &[Spec], saved: &[(&str, &'a Tensor)]) -> Result<Vec<&'a Tensor>> {
    let words = |tensor: &Tensor| format!("{} {}", tensor.dtype(), tensor.shape());
    let (mut found, mut mismatches) = (Vec::new(), Vec::new());
    for spec in own {
        let fits = |tensor: &Tensor| tensor.dims() == [spec.len] && tensor.dtype() == spec.dtype;
        match saved.iter().find(|(name, _)| *name == spec.name) {
            Some((_, tensor)) if fits(tensor) => found.push(*tensor),
            other => mismatches.push(StateMismatch {
                name: spec.name.to_owned(),
                expected: Some((spec.dtype, [spec.len].into())),
                found: other.map(|(_, tensor)| words(tensor)),
            }),
        }
    }
    for (name, tensor) in saved.iter().filter(|(name, _)| own.iter().all(|spec| spec.name != *name)) {
        mismatches.push(StateMismatch { name: (*name).to_owned(), expected: None, found: Some(words(tensor)) });
    }
    if mismatches.is_empty() { Ok(found) } else { Err(Error::State { optimizer, mismatches }) }
}
