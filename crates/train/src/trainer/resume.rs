//! What a run needs beside its adapter to go on as if it had not ended: `training_state.safetensors`.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::Path,
};

use nibble_data::{Example, IGNORE_INDEX, LoaderOptions, LoaderState};
use nibble_tensor::{Arena, DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::Trainer;
use crate::{
    Error, Result,
    error::{ResumeMismatch, ResumeProblem},
};

/// The file, in an adapter's folder.
const FILE: &str = "training_state.safetensors";
/// The key of its metadata.
const KEY: &str = "nibble";

/// A place between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Position {
    /// Steps done.
    pub(super) step: usize,
    /// Tokens of them.
    pub(super) tokens: usize,
    /// Of the data.
    pub(super) data: LoaderState,
}

/// What the file says beside its tensors, the optimizer's states.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    position: Position,
    /// Updates of the optimizer.
    updates: u32,
    loss_scale: Option<(f32, u32)>,
    /// What the steps depend on.
    run: BTreeMap<String, String>,
}

impl Trainer {
    /// Steps that are left, one without a number among them.
    #[must_use]
    pub fn steps_left(&self) -> usize {
        self.max_steps.saturating_sub(self.done.step)
    }

    /// What the steps depend on beside what the trainer knows, such as the base's name: [`Trainer::resume`] expects the same.
    pub fn depends_on(&mut self, name: &str, value: impl Into<String>) {
        self.named.insert(name.to_owned(), value.into());
    }

    /// Writes what a run that has been ended needs beside its adapter to go on: states of the optimizer, place in data and schedule,
    /// loss scale. The file is whole or not there.
    ///
    /// # Errors
    /// [`Error::Io`], what reading the states returns.
    pub fn save_state(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let io = |source| Error::Io { path: path.clone(), source };
        let host = Arena::new(Device::Cpu);
        // On the host already, a state is written from where it lies.
        let here = |state: Tensor| if state.device() == Device::Cpu { Ok(state) } else { state.to_arena(&host) };
        let states = self.optimizer.state()?.into_iter().map(|(name, state)| Ok((name, here(state)?)));
        let states = states.collect::<Result<Vec<_>>>()?;
        let views = states.iter().map(|(name, state)| Ok((*name, State::of(state)?))).collect::<Result<Vec<_>>>()?;
        let (position, updates) = (self.done, self.optimizer.steps()?);
        let saved = Saved { position, updates, loss_scale: self.loss_scale()?, run: self.run() };
        let text = serde_json::to_string(&saved).map_err(|error| io(error.into()))?;
        let metadata = HashMap::from([(KEY.to_owned(), text)]);
        // It writes beside the path and renames.
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(|error| io(std::io::Error::other(error)))?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            // A temporary file is private to its owner; what is written here is to be shared.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).map_err(io)?;
        }
        Ok(())
    }

    /// Goes on from what [`Trainer::save_state`] left in `folder`, before the first step; the trained values are those saved with it.
    /// Gives the steps that are done.
    ///
    /// # Errors
    /// [`Error::Resume`] when there is no such file, it is damaged, or the run was another one.
    pub fn resume(&mut self, folder: &Path) -> Result<usize> {
        let path = folder.join(FILE);
        let problem = |problem| Error::Resume { path: path.clone(), problem };
        let file = std::fs::read(&path).map_err(|source| problem(ResumeProblem::Io(source)))?;
        let damaged = || problem(ResumeProblem::Damaged);
        let (_, header) = SafeTensors::read_metadata(&file).map_err(|_| damaged())?;
        let text = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY)).ok_or_else(damaged)?;
        let saved: Saved = serde_json::from_str(text).map_err(|_| damaged())?;
        let mismatches = mismatches(&self.run(), &saved.run);
        if !mismatches.is_empty() {
            return Err(problem(ResumeProblem::OtherRun(mismatches)));
        }
        if saved.position.step >= self.max_steps || saved.loss_scale.is_some() != self.loss_scale.is_some() {
            return Err(damaged());
        }
        let host = Arena::new(Device::Cpu);
        let states = SafeTensors::deserialize(&file).map_err(|_| damaged())?;
        let states = states.tensors().into_iter().map(|(name, view)| Ok((name, tensor(&host, &view).ok_or_else(damaged)??)));
        let states = states.collect::<Result<Vec<_>>>()?;
        let states: Vec<(&str, &Tensor)> = states.iter().map(|(name, state)| (&name[..], state)).collect();
        self.data.resume(saved.position.data)?;
        self.optimizer.load_state(saved.updates, &states)?;
        saved.loss_scale.map_or(Ok(()), |scale| self.load_loss_scale(scale))?;
        self.step = saved.position.step;
        self.done = saved.position;
        Ok(self.step)
    }

    /// What the steps of a run depend on beside the trained values, in words. How memory is saved is no part of it.
    fn run(&self) -> BTreeMap<String, String> {
        let config = &self.config;
        let examples = self.data.dataset().examples();
        let tokens: usize = examples.iter().map(|example| example.tokens.len()).sum();
        let labels = examples.iter().flat_map(|example| &example.labels).filter(|&&label| label != IGNORE_INDEX).count();
        let LoaderOptions { packer, seed: order, shuffle } = self.data.options();
        let all = [
            ("max_steps", self.max_steps.to_string()),
            ("gradient_accumulation_steps", config.gradient_accumulation_steps.to_string()),
            ("learning_rate", config.learning_rate.to_string()),
            ("lr_scheduler_type", config.lr_scheduler_type.to_string()),
            ("lr_scheduler_kwargs", format!("{:?}", config.lr_scheduler_kwargs)),
            ("warmup_steps", config.warmup(self.max_steps).to_string()),
            ("weight_decay", config.weight_decay.to_string()),
            ("max_grad_norm", config.max_grad_norm.to_string()),
            ("optim", config.optim.arithmetic().to_string()),
            ("optim_args", config.optim_args.clone()),
            ("seed", config.seed.to_string()),
            ("compute_dtype", self.model.compute_dtype().to_string()),
            ("batches", format!("{packer:?}")),
            ("shuffle", if shuffle { order.to_string() } else { "none".to_owned() }),
            ("examples", examples.len().to_string()),
            ("tokens", tokens.to_string()),
            ("labels", labels.to_string()),
            ("data", format!("{:016x}", fingerprint(examples))),
        ];
        let all = all.into_iter().map(|(name, value)| (name.to_owned(), value));
        all.chain(self.named.clone()).collect()
    }
}

/// Where a run is not the one that was saved.
fn mismatches(own: &BTreeMap<String, String>, saved: &BTreeMap<String, String>) -> Vec<ResumeMismatch> {
    let names: std::collections::BTreeSet<&String> = own.keys().chain(saved.keys()).collect();
    let value = |of: &BTreeMap<String, String>, name: &String| of.get(name).cloned().unwrap_or_else(|| "nothing".to_owned());
    let differs = names.into_iter().filter(|&name| own.get(name) != saved.get(name));
    differs.map(|name| ResumeMismatch { name: name.clone(), expected: value(saved, name), found: value(own, name) }).collect()
}

/// FNV-1a over lengths, tokens and labels, a word each: rows that were edited are others, whatever their number and length.
fn fingerprint(examples: &[Example]) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let words = examples.iter().flat_map(|Example { tokens, labels, .. }| {
        let labels = labels.iter().map(|&label| u64::from(label.cast_unsigned()));
        std::iter::once(tokens.len() as u64).chain(tokens.iter().map(|&token| token.into())).chain(labels)
    });
    words.fold(BASIS, |hash, word| (hash ^ word).wrapping_mul(PRIME))
}

/// A state in the host's memory, as the file takes it.
struct State<'a> {
    dtype: Dtype,
    shape: [usize; 1],
    bytes: &'a [u8],
}

impl<'a> State<'a> {
    fn of(state: &'a Tensor) -> Result<Self> {
        let (dtype, bytes) = match state.dtype() {
            DType::U8 => (Dtype::U8, state.as_slice::<u8>()?),
            _ => (Dtype::F32, bytemuck::cast_slice(state.as_slice::<f32>()?)),
        };
        Ok(Self { dtype, shape: [state.numel()], bytes })
    }
}

impl View for State<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes.into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A state of the file; nothing for a type that no state has.
fn tensor(host: &Arena, view: &TensorView<'_>) -> Option<Result<Tensor>> {
    let made = match view.dtype() {
        Dtype::U8 => Tensor::from_slice(host, view.data(), [view.data().len()]),
        Dtype::F32 => {
            let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            Tensor::from_slice(host, &values, [values.len()])
        }
        _ => return None,
    };
    Some(made.map_err(Error::from))
}
