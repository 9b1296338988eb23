//! The error of the command line: what the libraries say, plus a hint where there is something to do.

use std::{
    error::Error as StdError,
    io,
    path::{Path, PathBuf},
};

use nibble_data::Error as DataError;
use nibble_lora::{AdapterConfig, Error as LoraError, Mismatch};
use nibble_model::{
    Error as ModelError,
    error::{GgufProblem, HubProblem},
};
use nibble_optim::{Error as OptimError, OptimizerName};
use nibble_tensor::{Arena, Error as TensorError};
use nibble_train::{Error as TrainError, ResumeProblem};

use crate::ui;

/// Of those that hold memory, so many are listed.
const MOST_OWNERS: usize = 8;

/// What to do where the host has too little memory for what a GPU leaves with it.
const HOST_HINT: &str = "leave less on the host: `--gradient-checkpointing full` instead of `offload`, fewer blocks with `--offload-weights`, \
                         more `--optim-device-memory`; or raise the limits of locked memory (`ulimit -l`) and of the container";

/// What a run that is gone on with may have otherwise.
pub(crate) const MAY_CHANGE: &str = "only `--gradient-checkpointing`, `--offload-weights`, `--memory-limit`, evaluation and pages (`paged_` before the \
                                     optimizer's name) may be others";

/// What a command returns.
pub(crate) type Result<T, E = CliError> = std::result::Result<T, E>;

/// Why a command ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// A model that looks like a path, and is not there.
    #[error("open model `{model}`: no such file or folder")]
    ModelNotFound { model: String },
    /// An adapter's folder that is none.
    #[error("open adapter `{}`: expected a folder with `adapter_config.json`, found {found}", path.display())]
    NotAnAdapter { path: PathBuf, found: &'static str },
    /// An output folder with something in it.
    #[error("write `{}`: expected a new or empty folder, found {entries} entries in it", path.display())]
    OutputExists { path: PathBuf, entries: usize },
    /// An output folder that is a file.
    #[error("write `{}`: expected a folder, found a file", path.display())]
    OutputIsFile { path: PathBuf },
    /// An output folder that something is read from.
    #[error("replace `{}`: it holds `{}`, which this run reads", path.display(), input.display())]
    OutputHoldsInput { path: PathBuf, input: PathBuf },
    /// An output folder with something else in it than a result.
    #[error("replace `{}`: expected a result of an earlier run, found neither `adapter_config.json` nor `config.json` in it", path.display())]
    OutputIsOther { path: PathBuf },
    /// Flags that say what an adapter's own config says already.
    #[error("train: {} cannot be given with `{with} {}`, whose own config decides", listed(flags), adapter.display())]
    AdapterFlags { flags: Vec<&'static str>, with: &'static str, adapter: PathBuf },
    /// A flag that would change nothing.
    #[error("`{flag}` has no effect with `{with}`")]
    NoEffect { flag: &'static str, with: &'static str },
    /// A flag of paged optimizers with another.
    #[error("`{flag}` has no effect with `--optim {optim}`, whose states have no pages")]
    NotPaged { flag: &'static str, optim: OptimizerName },
    /// `--compute-dtype bf16` on a GPU that has none.
    #[error("`--compute-dtype bf16`: {device} computes in float16 and float32 only")]
    NoBf16 { device: String },
    /// A GPU that is not in the table.
    #[error("unknown GPU `{name}`: the nearest is `{nearest}`")]
    UnknownGpu { name: String, nearest: &'static str },
    /// A run that needs more memory than there is: known before anything is loaded.
    #[error("train: the run needs about {}, found {}{}{}", ui::bytes(*needed), ui::bytes(*room), of_limit(*limited), held(owners))]
    DoesNotFit { needed: usize, room: usize, limited: bool, owners: Vec<(String, usize)>, nearest: Option<String> },
    /// A run that leaves more with the host than it has: known before anything is loaded.
    #[error("train: the run keeps about {} in host memory, found {} available{}", ui::bytes(*needed), ui::bytes(*room), held(owners))]
    HostDoesNotFit { needed: usize, room: usize, owners: Vec<(String, usize)> },
    /// Memory that ran out in a run.
    #[error("{source}{}", held(owners))]
    OutOfMemory { source: Box<CliError>, owners: Vec<(String, usize)>, nearest: Option<String> },
    /// More positions than the model has.
    #[error("`--max-length`: expected at most {limit}, the positions of the model, found {found}")]
    MaxLength { limit: usize, found: usize },
    /// A line of a prompt file that is JSON without a prompt.
    #[error("read prompts `{}`:{line}: expected a text in \"prompt\", found {found}", path.display())]
    Prompt { path: PathBuf, line: usize, found: &'static str },
    /// A prompt file without prompts.
    #[error("read prompts `{}`: expected a prompt a line, found none", path.display())]
    NoPrompts { path: PathBuf },
    /// A run that broke; what it had learned until then is kept.
    #[error("{source}")]
    Stopped { source: Box<CliError>, saved: PathBuf, resumable: bool },
    /// A run that broke, and what it had learned until then could not be kept.
    #[error("{source}\nwhat was learned is lost: {also}")]
    Lost { source: Box<CliError>, also: Box<CliError> },
    /// A file or folder the system refuses.
    #[error("{op} `{}`: {source}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    /// Standard output or input.
    #[error("write the result: {0}")]
    Stdout(io::Error),
    /// An error of a command's own.
    #[error("{source}")]
    Command { source: Box<dyn StdError + Send + Sync>, hint: Option<String> },
    /// From the model's files, loading and generation.
    #[error(transparent)]
    Model(Box<ModelError>),
    /// From tokenizers, templates and datasets.
    #[error(transparent)]
    Data(#[from] DataError),
    /// From adapters.
    #[error(transparent)]
    Adapter(#[from] LoraError),
    /// From training and evaluation.
    #[error(transparent)]
    Train(Box<TrainError>),
    /// From an op.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

// Boxed: they are large, and every result of the program would be.
impl From<ModelError> for CliError {
    fn from(error: ModelError) -> Self {
        Self::Model(Box::new(error))
    }
}

impl From<TrainError> for CliError {
    fn from(error: TrainError) -> Self {
        Self::Train(Box::new(error))
    }
}

impl CliError {
    /// What to do about it, where that is known.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::ModelNotFound { .. } => {
                Some("`--model` takes a folder, a .gguf file or a name on the Hub such as `org/name`".into())
            }
            Self::OutputExists { .. } => Some("choose another `--output`, or replace it with `--overwrite-output-dir`".into()),
            Self::OutputHoldsInput { .. } | Self::OutputIsOther { .. } => Some("choose another `--output`".into()),
            Self::AdapterFlags { with, .. } => {
                Some(format!("leave them away to train the adapter further, or `{with}` to start afresh"))
            }
            Self::DoesNotFit { nearest: Some(flags), .. } | Self::OutOfMemory { nearest: Some(flags), .. } => {
                Some(format!("what fits: `{flags}`"))
            }
            Self::DoesNotFit { nearest: None, .. } => Some(
                "nothing near it fits: a smaller model, or more memory; `nibble plan --model MODEL` shows what there is".into(),
            ),
            Self::HostDoesNotFit { .. } => Some(HOST_HINT.into()),
            Self::OutOfMemory { source, .. } | Self::Lost { source, .. } => source.hint(),
            Self::UnknownGpu { .. } => Some("any GPU can be given by its memory: `--gpu 24GiB`".into()),
            Self::NotPaged { .. } => Some("`paged_adamw_8bit`, `paged_adamw_32bit` and `paged_lion_8bit` have pages".into()),
            Self::NoBf16 { .. } => Some("use `--compute-dtype f16`".into()),
            Self::Stopped { source, saved, resumable } => Some(stopped_hint(source, saved, *resumable)),
            Self::Command { hint, .. } => hint.clone(),
            Self::Model(error) => model_hint(error),
            Self::Data(error) => data_hint(error),
            Self::Adapter(error) => adapter_hint(error),
            Self::Train(error) => train_hint(error),
            Self::Tensor(error) => tensor_hint(error),
            _ => None,
        }
    }

    /// The same with who held the memory of `arena` at its peak, if it is that its memory ran out and nobody has said it yet.
    pub(crate) fn with_owners(self, arena: &Arena) -> Self {
        let told = matches!(self, Self::OutOfMemory { .. } | Self::Stopped { .. } | Self::Lost { .. });
        if told || matches!(self.out_of_memory(), None | Some(TensorError::OutOfHostMemory { .. })) {
            return self;
        }
        let mut owners = arena.at_peak();
        owners.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let owners = owners.into_iter().take(MOST_OWNERS).filter(|(_, bytes)| *bytes > 0);
        let owners = owners.map(|(owner, bytes)| (owner.to_string(), bytes)).collect();
        Self::OutOfMemory { source: Box::new(self), owners, nearest: None }
    }

    /// Where the nearest run that fits goes, of memory that ran out.
    pub(crate) fn nearest_mut(&mut self) -> Option<&mut Option<String>> {
        match self {
            Self::OutOfMemory { nearest, .. } => Some(nearest),
            Self::Stopped { source, .. } | Self::Lost { source, .. } => source.nearest_mut(),
            _ => None,
        }
    }

    /// What was asked for when the memory ran out, if it is that.
    pub(crate) fn out_of_memory(&self) -> Option<&TensorError> {
        match self {
            Self::OutOfMemory { source, .. } | Self::Stopped { source, .. } | Self::Lost { source, .. } => source.out_of_memory(),
            Self::Tensor(error) | Self::Adapter(LoraError::Tensor(error)) => Some(error).filter(|error| error.is_out_of_memory()),
            Self::Model(error) => match &**error {
                ModelError::Tensor(error) | ModelError::Adapter(LoraError::Tensor(error)) => {
                    Some(error).filter(|error| error.is_out_of_memory())
                }
                _ => None,
            },
            Self::Train(error) => error.out_of_memory(),
            _ => None,
        }
    }

    /// 3 when memory ran out, else 2.
    pub(crate) fn exit_code(&self) -> u8 {
        if matches!(self, Self::DoesNotFit { .. } | Self::HostDoesNotFit { .. }) || self.out_of_memory().is_some() {
            3
        } else {
            2
        }
    }

    /// Whether the reader of standard output went away, which is no failure.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Stdout(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Makes an [`CliError::Io`].
pub(crate) fn io_error(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> CliError {
    let path = path.into();
    move |source| CliError::Io { op, path, source }
}

/// Whose the limit is.
fn of_limit(limited: bool) -> &'static str {
    if limited { " (`--memory-limit`)" } else { " free" }
}

/// A line for each that holds memory.
fn held(owners: &[(String, usize)]) -> String {
    let line = |(name, bytes): &(String, usize)| format!("\n  {name}: {}", ui::bytes(*bytes));
    owners.iter().map(line).collect::<Vec<_>>().concat()
}

fn listed(flags: &[&str]) -> String {
    flags.iter().map(|flag| format!("`{flag}`")).collect::<Vec<_>>().join(", ")
}

/// Where the adapter of a run that broke is, and what to do about the rest.
fn stopped_hint(source: &CliError, saved: &Path, resumable: bool) -> String {
    let saved = saved.display();
    let kept = format!("the adapter as it was before that is in `{saved}`");
    // The same steps would have no number again.
    let again = matches!(source, CliError::Train(error) if matches!(**error, TrainError::NonFinite { .. } | TrainError::NonFiniteEval { .. }));
    let goes_on = format!("the same settings and `--resume {saved}` go on from there; {MAY_CHANGE}");
    let parts = [Some(kept), source.hint(), Some(goes_on).filter(|_| resumable && !again)];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

fn train_hint(error: &TrainError) -> Option<String> {
    match error {
        TrainError::NonFinite { .. } | TrainError::NonFiniteEval { .. } => {
            Some("try a lower `--learning-rate`, or `--max-grad-norm 0.3`".into())
        }
        TrainError::Resume { problem: ResumeProblem::OtherRun(_), .. } => Some(
            "give the same settings, or train its adapter further with `--adapter`, where optimizer and schedule begin anew"
                .into(),
        ),
        TrainError::Resume { .. } => Some("its adapter can be trained further with `--adapter`".into()),
        TrainError::NothingTrains => Some("choose `--target-modules all-linear`".into()),
        TrainError::TooLong { .. } => Some("cut long rows with `--max-length`".into()),
        TrainError::Optim(OptimError::PageFile { .. }) => {
            Some("give `--optim-page-file` a new file on a disk with more room, or take an 8-bit optimizer".into())
        }
        TrainError::Optim(OptimError::DeviceMemory { .. }) => {
            Some("give `--optim-device-memory` more; without it, half of what is free is taken".into())
        }
        TrainError::Optim(OptimError::NoPageFile) => Some("name one with `--optim-page-file`".into()),
        TrainError::Data(error) => data_hint(error),
        TrainError::Model(error) => model_hint(error),
        TrainError::Adapter(error) => adapter_hint(error),
        TrainError::Tensor(error) | TrainError::Optim(OptimError::Tensor(error)) => tensor_hint(error),
        _ => None,
    }
}

fn model_hint(error: &ModelError) -> Option<String> {
    match error {
        ModelError::Adapter(error) => adapter_hint(error),
        ModelError::Tensor(error) => tensor_hint(error),
        ModelError::NoCheckpoint { .. } => {
            Some("weights are read from safetensors and GGUF files; convert a `pytorch_model.bin` with transformers' `save_pretrained`".into())
        }
        ModelError::Hub { problem, .. } => hub_hint(problem),
        ModelError::Gguf { problem: GgufProblem::Metadata { .. }, .. } => {
            Some("the file may come from an old converter; a fresh one is made by llama.cpp's convert_hf_to_gguf.py".into())
        }
        ModelError::TooLong { .. } => Some("shorten the prompt, or ask for fewer `--max-new-tokens`".into()),
        ModelError::ModuleToSave { .. } => Some("give other modules to `--target-modules`: they get an adapter".into()),
        _ => None,
    }
}

fn hub_hint(problem: &HubProblem) -> Option<String> {
    match problem {
        HubProblem::Offline { .. } => Some("unset HF_HUB_OFFLINE, or give the folder of the model".into()),
        HubProblem::Network { .. } => {
            Some("check the connection, set HTTPS_PROXY or HF_ENDPOINT, or give a folder or a .gguf file; `nibble doctor` tests the Hub".into())
        }
        HubProblem::Denied { has_token: false, .. } => Some("set HF_TOKEN to a token from https://huggingface.co/settings/tokens".into()),
        HubProblem::NotFound { what: "file", .. } => Some("the names of files are on the model's page, under Files".into()),
        HubProblem::NotFound { .. } => {
            Some("check the name; there is no local file or folder of it either, and a private model needs HF_TOKEN".into())
        }
        HubProblem::NoWeights { found } => found
            .iter()
            .find(|file| file.to_ascii_lowercase().ends_with(".gguf"))
            .map(|file| format!("name one of its files: `--model org/name/{file}`")),
        _ => None,
    }
}

fn data_hint(error: &DataError) -> Option<String> {
    match error {
        DataError::NoTokenizerFile { .. } => Some(
            "transformers writes it: AutoTokenizer.from_pretrained(...).save_pretrained(folder); rows with `input_ids` need none"
                .into(),
        ),
        DataError::AllDropped { prompt_over_max_length: 1.., .. } | DataError::OverBudget { .. } => {
            Some("raise `--max-length`".into())
        }
        DataError::AllDropped { .. } => {
            Some("rows without an answer teach nothing; `--train-on-prompt` learns the prompts too".into())
        }
        DataError::UnknownFormat { .. } | DataError::MissingColumns { .. } => {
            Some("rename the columns, or name the format with `--data-format`".into())
        }
        DataError::TokenOutOfRange { .. } => Some("the rows were tokenised for another model".into()),
        DataError::Row { source, .. } => data_hint(source),
        _ => None,
    }
}

fn tensor_hint(error: &TensorError) -> Option<String> {
    match error {
        TensorError::NoDevice { .. } | TensorError::Cuda { .. } | TensorError::Kernel { .. } => {
            Some("`--device cpu` needs no GPU; `nibble doctor` shows what this machine has".into())
        }
        TensorError::OutOfHostMemory { .. } => Some(HOST_HINT.into()),
        TensorError::OutOfMemory { .. } | TensorError::DriverOutOfMemory { .. } => {
            Some("try `--gradient-checkpointing`, a smaller `--batch-size`, or a smaller `--max-length`".into())
        }
        _ => None,
    }
}

fn adapter_hint(error: &LoraError) -> Option<String> {
    let LoraError::Mismatches { path, mismatches } = error else { return None };
    let config = AdapterConfig::read(&path.join("adapter_config.json")).ok();
    let rank = mismatches.iter().find_map(other_rank);
    if let Some((expected, found)) = rank {
        return Some(format!("it was trained with `--lora-r {found}`, and its adapter_config.json says r = {expected}"));
    }
    let base = config.and_then(|config| config.base_model_name_or_path);
    Some(base.map_or_else(|| "it was trained on another model".into(), |base| format!("it was trained on `{base}`")))
}

/// The rank asked for and the rank found, where they alone differ.
fn other_rank(mismatch: &Mismatch) -> Option<(usize, usize)> {
    let Mismatch::Shape { name, expected, found } = mismatch else { return None };
    let (rank, other) = if name.ends_with("lora_A.weight") { (0, 1) } else { (1, 0) };
    let (expected, found) = (expected.dims(), &found[..]);
    let only_rank = name.contains(".lora_") && found.len() == 2 && expected[other] == found[other];
    only_rank.then(|| (expected[rank], found[rank]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mismatch(name: &str, expected: [usize; 2], found: [usize; 2]) -> CliError {
        let mismatches = vec![Mismatch::Shape { name: name.into(), expected: expected.into(), found: found.to_vec() }];
        CliError::Adapter(LoraError::Mismatches { path: "no/such/adapter".into(), mismatches })
    }

    #[test]
    fn another_rank_is_told_from_another_model() {
        let rank = mismatch("m.q_proj.lora_A.weight", [16, 64], [8, 64]).hint().unwrap();
        assert!(rank.contains("`--lora-r 8`"), "{rank}");
        let rank = mismatch("m.q_proj.lora_B.weight", [64, 16], [64, 4]).hint().unwrap();
        assert!(rank.contains("`--lora-r 4`"), "{rank}");
        let model = mismatch("m.q_proj.lora_A.weight", [8, 64], [8, 96]).hint().unwrap();
        assert!(model.contains("another model"), "{model}");
    }

    #[test]
    fn a_hint_is_found_through_the_layers_of_errors() {
        let oom = || TensorError::OutOfMemory { device: "cpu".into(), requested: 8, live: 8, limit: 8 };
        let direct = CliError::Tensor(oom()).hint();
        assert!(direct.as_deref().is_some_and(|hint| hint.contains("--gradient-checkpointing")));
        assert_eq!(CliError::from(TrainError::Model(ModelError::Tensor(oom()))).hint(), direct);
        assert_eq!(CliError::from(TrainError::Optim(OptimError::Tensor(oom()))).hint(), direct);
    }

    #[test]
    fn memory_that_runs_out_anywhere_is_exit_code_3() {
        let device = || TensorError::OutOfMemory { device: "cpu".into(), requested: 8, live: 8, limit: 8 };
        let host = || TensorError::OutOfHostMemory { requested: 8 };
        for oom in [device as fn() -> TensorError, host] {
            let adapter = || LoraError::Tensor(oom());
            for error in [
                CliError::Tensor(oom()),
                CliError::Adapter(adapter()),
                ModelError::Tensor(oom()).into(),
                ModelError::Adapter(adapter()).into(),
                TrainError::Tensor(oom()).into(),
                TrainError::Optim(OptimError::Tensor(oom())).into(),
                TrainError::Model(ModelError::Adapter(adapter())).into(),
                CliError::Stopped { source: Box::new(CliError::Tensor(oom())), saved: "out".into(), resumable: true },
                CliError::Lost {
                    source: Box::new(CliError::Tensor(oom())),
                    also: Box::new(CliError::NoPrompts { path: "p".into() }),
                },
            ] {
                assert_eq!(error.exit_code(), 3, "{error:?}");
            }
        }
        let source = Box::new(CliError::NoPrompts { path: "p".into() });
        let full = CliError::Stopped { source, saved: "out".into(), resumable: true };
        assert_eq!(full.exit_code(), 2);
    }

    #[test]
    fn who_held_the_memory_is_told_once() {
        let arena = Arena::new(nibble_tensor::Device::Cpu);
        let _held = nibble_tensor::Tensor::zeros(&arena, nibble_tensor::DType::F32, [1024]).unwrap();
        let oom = CliError::Tensor(TensorError::OutOfMemory { device: "cpu".into(), requested: 8, live: 8, limit: 8 });
        let told = oom.with_owners(&arena);
        assert!(matches!(&told, CliError::OutOfMemory { owners, .. } if owners.len() == 1));
        let again = told.to_string();
        assert_eq!(told.with_owners(&arena).to_string(), again);
        assert!(matches!(CliError::NoPrompts { path: "p".into() }.with_owners(&arena), CliError::NoPrompts { .. }));
    }

    #[test]
    fn host_memory_that_runs_out_is_not_blamed_on_the_gpu() {
        let arena = Arena::new(nibble_tensor::Device::Cpu);
        let error = CliError::Tensor(TensorError::OutOfHostMemory { requested: 8 }).with_owners(&arena);
        assert!(matches!(error, CliError::Tensor(_)), "those that hold the device's memory have no part in it");
        assert_eq!(error.to_string(), "out of host memory: 8 bytes asked to be locked for copies to the GPU and back");
        let hint = error.hint().unwrap();
        assert!(hint.contains("ulimit -l") && !hint.contains("--device cpu"), "{hint}");
    }
}
