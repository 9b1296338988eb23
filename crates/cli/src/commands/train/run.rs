//! The run itself, and its result: shared by `train` and `quickstart`.

use std::path::{Path, PathBuf};

use nibble_autograd::ParamStore;
use nibble_data::Dataset;
use nibble_lora::{AdapterConfig, TargetModules, save_adapter};
use nibble_nf4::QuantConfig;
use nibble_tensor::Arena;
use nibble_train::{EvalStats, Outcome, TrainConfig, Trainer};

use super::{
    card::{Card, UsageLines},
    interrupt::Interrupt,
    progress::Progress,
};
use crate::{
    Ending,
    base::{Precision, last_part},
    dataset::Reader,
    error::{CliError, Result, io_error},
    output::{Staging, copy_tokenizer},
    source::ModelSource,
    ui,
};

/// What a run needs besides its trainer.
pub(in crate::commands) struct Tuning<'a> {
    /// The base model.
    pub(in crate::commands) source: &'a ModelSource,
    /// The adapter's config.
    pub(in crate::commands) adapter: &'a AdapterConfig,
    /// Whose tokenizer goes into the folder.
    pub(in crate::commands) reader: &'a Reader,
    /// Held-out data.
    pub(in crate::commands) eval: Option<&'a Dataset>,
    /// The loop's settings, for the model card.
    pub(in crate::commands) train: &'a TrainConfig,
    /// How the base is held.
    pub(in crate::commands) precision: &'a Precision,
    /// Ctrl-C.
    pub(in crate::commands) interrupt: &'a Interrupt,
    /// `--model`, as given.
    pub(in crate::commands) model_flag: &'a str,
    /// `--output`, as given.
    pub(in crate::commands) output: &'a Path,
    /// The folder of the run that is gone on with.
    pub(in crate::commands) resume: Option<&'a Path>,
}

/// A run that ended, its folder written.
pub(in crate::commands) struct Finished {
    /// Whether all steps were done.
    pub(in crate::commands) ending: Ending,
    /// How it ended.
    pub(in crate::commands) outcome: Outcome,
    /// Seconds of the steps alone.
    spent: f64,
    /// The last evaluation.
    pub(in crate::commands) evaluation: Option<EvalStats>,
    /// The folder.
    pub(in crate::commands) place: PathBuf,
    /// Whether `--resume` goes on from there.
    pub(in crate::commands) resumable: bool,
}

impl Finished {
    /// What was done, in what time, with how much memory.
    pub(in crate::commands) fn report(&self, trainer: &Trainer) {
        let Outcome { steps, seconds, tokens, train_loss, .. } = self.outcome;
        let rate = tokens as f64 / self.spent.max(1e-9);
        let time = ui::duration(seconds);
        ui::fact("trained", format_args!("{steps} steps in {time}, {rate:.0} tokens/s, mean loss {train_loss:.4}"));
        if let Some(EvalStats { loss, perplexity, tokens }) = self.evaluation {
            ui::fact("eval", format_args!("loss {loss:.4}, perplexity {perplexity:.3}, {} tokens", ui::count(tokens)));
        }
        show_memory(trainer.model().arena());
        ui::fact("saved", self.place.display());
    }
}

impl Tuning<'_> {
    /// The commands that use the result.
    pub(in crate::commands) fn usage(&self) -> UsageLines<'_> {
        UsageLines {
            model: self.model_flag,
            source: self.source,
            adapter: self.output,
            saves_modules: self.adapter.modules_to_save.is_some(),
        }
    }
}

/// Who held the memory at its peak: a line each, the most first; small ones together.
fn show_memory(arena: &Arena) {
    let mut owners = arena.at_peak();
    owners.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let all: usize = owners.iter().map(|(_, bytes)| bytes).sum();
    ui::fact("peak", format_args!("{} of memory", ui::bytes(all)));
    let (large, small): (Vec<_>, Vec<_>) = owners.into_iter().partition(|(_, bytes)| bytes * 100 >= all);
    for (owner, bytes) in &large {
        ui::fact("", format_args!("{:<28} {:>9} {:>8}", owner.to_string(), ui::bytes(*bytes), ui::percent(*bytes, all)));
    }
    let rest: usize = small.iter().map(|(_, bytes)| bytes).sum();
    if rest > 0 {
        ui::fact("", format_args!("{:<28} {:>9} {:>8}", "all others", ui::bytes(rest), ui::percent(rest, all)));
    }
}

/// Says what is trained, and how.
///
/// `from`: the adapter's folder, and the steps done where the run is gone on with.
pub(super) fn show(
    trainer: &Trainer,
    precision: Precision,
    adapter: &AdapterConfig,
    from: Option<(&Path, Option<usize>)>,
    config: &TrainConfig,
) {
    let plan = trainer.plan();
    ui::fact("base", format_args!("{}, {}", quantisation(precision.quant), precision.describe()));
    match from {
        Some((from, Some(done))) => ui::fact("resume", format_args!("goes on with `{}` after step {done}", from.display())),
        Some((from, None)) => ui::fact(
            "adapter",
            format_args!("continues `{}`: its own config decides; optimizer and schedule begin anew", from.display()),
        ),
        None => {}
    }
    let targets = target_names(trainer.params());
    let AdapterConfig { r, lora_alpha, .. } = adapter;
    let kind = if adapter.use_rslora { "rsLoRA" } else { "LoRA" };
    ui::fact("adapter", format_args!("{kind} r {r}, alpha {lora_alpha}, on {}", targets.join(", ")));
    if let Some(modules) = &adapter.modules_to_save {
        ui::fact("whole", modules.join(", "));
    }
    let (trained, all) = (plan.trainable_parameters, plan.base_parameters + plan.trainable_parameters);
    ui::fact("trains", format_args!("{} of {} parameters ({})", ui::count(trained), ui::count(all), ui::percent(trained, all)));
    let accumulated = config.gradient_accumulation_steps;
    ui::fact(
        "steps",
        format_args!(
            "{}, {} an epoch, about {} documents a step ({accumulated} forward passes), {} at {:.1e}",
            plan.max_steps, plan.steps_per_epoch, plan.effective_batch_size, config.optim, config.learning_rate
        ),
    );
}

fn quantisation(quant: Option<QuantConfig>) -> String {
    match quant {
        None => "linears as stored".to_owned(),
        Some(QuantConfig { format, block_size, double_quant }) => {
            let format = format!("{format:?}").to_lowercase();
            let double = if double_quant { ", double-quantised" } else { "" };
            format!("linears in {format}, blocks of {block_size}{double}")
        }
    }
}

/// Has a run that is gone on with expect the same base.
pub(in crate::commands) fn name_base(trainer: &mut Trainer, name: &str, precision: &Precision) {
    trainer.depends_on("model", last_part(name));
    trainer.depends_on("quant", quantisation(precision.quant));
}

/// Trains, and writes the folder, whatever ended the run.
///
/// # Errors
/// A run that broke: what it learned before is saved. A folder that cannot be written.
pub(in crate::commands) fn fine_tune(trainer: &mut Trainer, tuning: &Tuning<'_>, staging: Staging) -> Result<Finished> {
    let mut progress = Progress::new(staging.path(), tuning.resume, trainer.plan().max_steps, tuning.interrupt)?;
    tuning.interrupt.begin_training();
    let ended = trainer.train(tuning.eval, &mut progress);
    let arena = trainer.model().arena();
    let ended = ended.map_err(|error| CliError::from(error).with_owners(arena));
    progress.memory(&arena.at_peak());
    let ended = progress.finish(ended);
    let ended = match ended {
        Err(error) if progress.learned == 0 => return Err(error),
        ended => ended,
    };
    let saved = save(trainer, tuning, staging, &progress).map(|place| (save_state(trainer, &place), place));
    let (outcome, (resumable, place)) = match (ended, saved) {
        (Ok(outcome), saved) => (outcome, saved?),
        (Err(source), Ok((resumable, saved))) => return Err(CliError::Stopped { source: Box::new(source), saved, resumable }),
        (Err(source), Err(also)) => return Err(CliError::Lost { source: Box::new(source), also: Box::new(also) }),
    };
    let ending = if outcome.stopped_early { Ending::Interrupted } else { Ending::Done };
    Ok(Finished { ending, outcome, spent: progress.spent, evaluation: progress.evaluation, place, resumable })
}

/// What `--resume` needs, where steps are left; gives whether it is there. The adapter, which matters most, is in its place by then.
fn save_state(trainer: &Trainer, place: &Path) -> bool {
    if trainer.steps_left() == 0 {
        return false;
    }
    let done = trainer.save_state(place);
    if let Err(error) = &done {
        ui::warn(format_args!("the run cannot be resumed: {error}"));
    }
    done.is_ok()
}

fn save(trainer: &mut Trainer, tuning: &Tuning<'_>, staging: Staging, progress: &Progress) -> Result<PathBuf> {
    trainer.gather_params()?;
    let folder = staging.path();
    let config = saved_config(tuning.adapter, tuning.source, trainer.params());
    save_adapter(folder, &config, trainer.params())?;
    save_tokenizer(tuning, folder)?;
    let card = Card {
        adapter: &config,
        train: tuning.train,
        quantisation: quantisation(tuning.precision.quant),
        last: progress.last,
        evaluation: progress.evaluation,
        usage: tuning.usage(),
    };
    let path = folder.join("README.md");
    std::fs::write(&path, card.to_string()).map_err(io_error("write", path))?;
    staging.commit()
}

/// The model's own files unchanged; where it has none (GGUF), the same written anew.
fn save_tokenizer(tuning: &Tuning<'_>, folder: &Path) -> Result<()> {
    let Some(tokenizer) = tuning.reader.tokenizer() else { return Ok(()) };
    let from = tuning.source.tokenizer_folder().filter(|from| from.join("tokenizer.json").is_file());
    match from {
        Some(from) => copy_tokenizer(from, folder).map(drop),
        None => Ok(tokenizer.save(folder)?),
    }
}

/// The config as PEFT would have it: the base's name, and `all-linear` written out.
fn saved_config(config: &AdapterConfig, source: &ModelSource, params: &ParamStore) -> AdapterConfig {
    let mut saved = config.clone();
    saved.base_model_name_or_path = Some(source.name.clone());
    saved.revision.clone_from(&source.revision);
    if config.target_modules == Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned())) {
        saved.target_modules = Some(TargetModules::Names(target_names(params)));
    }
    saved
}

/// Last parts of the paths of layers with an adapter, sorted.
fn target_names(params: &ParamStore) -> Vec<String> {
    let names = params.params().iter().filter_map(|param| param.name.strip_suffix(".lora_A.weight")?.rsplit('.').next());
    let names: std::collections::BTreeSet<&str> = names.collect();
    names.into_iter().map(str::to_owned).collect()
}
