//! `nibble quickstart`: from nothing to a fine-tuned model in under two minutes.

mod find;

use std::path::PathBuf;

use nibble_autograd::ParamStore;
use nibble_data::{DataLoader, LoaderOptions, Packer};
use nibble_lora::{AdapterConfig, Init, TargetModules};
use nibble_model::{GenerateOptions, Transformer};
use nibble_optim::ScheduleName;
use nibble_tensor::Arena;
use nibble_train::{EvalStats, TrainConfig, Trainer, evaluate};

use super::{
    generate::{Encoder, Speaker, end_ids},
    train::{Interrupt, Tuning, fine_tune, name_base},
};
use crate::{
    Ending,
    args::QuickstartArgs,
    assets,
    base::{Base, Precision, load_options},
    dataset::Reader,
    error::Result,
    output::Staging,
    source::ModelSource,
    ui,
};

/// Questions of the held-out rows.
const PROMPTS: [&str; 3] = [
    "What does the noun \"demand\" mean?",
    "List words that mean the same as the adverb \"conclusively\".",
    "What kind of thing is a emblem?",
];
/// Tokens of an answer at most.
const ANSWER: usize = 40;
/// Held-out rows that the loss is measured on.
const EVAL_ROWS: usize = 64;
/// Documents of a step.
const BATCH: usize = 8;
/// Parameters below which a model takes, and needs, larger steps.
const SMALL: usize = 20_000_000;
/// Parameters times tokens that two cores train on in about a minute.
const WORK: usize = 1_500_000_000_000;

/// # Errors
/// An output folder that is taken, a model that is asked for and not there.
pub(crate) fn run(args: &QuickstartArgs) -> Result<Ending> {
    let staging = Staging::new(&args.output, args.overwrite_output_dir, &[])?;
    let interrupt = Interrupt::install(staging.path())?;
    let found = find::model(args.model.as_deref(), args.offline)?;
    let base = Base::from_source(found.source.clone())?;
    ui::fact("model", base.describe());
    let learner = Learner::load(base, found.flag)?;
    let arena = learner.arena.clone();
    learn(args, &found.source, learner, &interrupt, staging).map_err(|error| error.with_owners(&arena))
}

/// Asks, trains and asks again.
fn learn(
    args: &QuickstartArgs,
    source: &ModelSource,
    mut learner: Learner,
    interrupt: &Interrupt,
    staging: Staging,
) -> Result<Ending> {
    let before = learner.measure(&learner.model, &ParamStore::empty(&learner.arena)?)?;
    let EvalStats { loss, perplexity, .. } = before.stats;
    ui::fact("before", format_args!("loss {loss:.3} on {EVAL_ROWS} held-out rows, perplexity {perplexity:.1}; its answers:"));
    for (prompt, answer) in PROMPTS.iter().zip(&before.answers) {
        ui::say(format_args!("  {prompt}\n    {}", one_line(answer)));
    }
    let (adapter, config) = (adapter_config(), learner.train_config(args.max_steps));
    let params = learner.model.attach(&adapter, Init::Random(config.seed))?;
    let options = LoaderOptions { packer: Packer::Documents { batch_size: BATCH }, seed: config.seed, shuffle: true };
    let loader = DataLoader::new(learner.train.clone().into(), options)?;
    let mut trainer = Trainer::new(learner.model.clone(), params, loader, config.clone())?;
    name_base(&mut trainer, &source.name, &learner.precision);
    let plan = trainer.plan();
    ui::fact(
        "training",
        format_args!(
            "{} parameters of an adapter, {} steps of {BATCH} rows, the model frozen in NF4, {}",
            ui::count(plan.trainable_parameters),
            plan.max_steps,
            learner.precision.describe()
        ),
    );
    let tuning = Tuning {
        source,
        adapter: &adapter,
        reader: &learner.reader,
        eval: Some(&learner.eval),
        train: &config,
        precision: &learner.precision,
        interrupt,
        model_flag: &learner.flag,
        output: &args.output,
        resume: None,
    };
    let finished = fine_tune(&mut trainer, &tuning, staging)?;
    finished.report(&trainer);
    if finished.ending == Ending::Done {
        let after = Measured {
            answers: learner.answers(trainer.model(), trainer.params())?,
            stats: finished.evaluation.unwrap_or(before.stats),
        };
        show(&before, &after)?;
    }
    tuning.usage().say();
    Ok(finished.ending)
}

/// What a model says and how well it predicts.
struct Measured {
    answers: Vec<String>,
    stats: EvalStats,
}

fn show(before: &Measured, after: &Measured) -> Result<()> {
    for (i, prompt) in PROMPTS.iter().enumerate() {
        let expected = assets::eval_rows().find(|row| row["instruction"] == *prompt);
        let expected = expected.as_ref().and_then(|row| row["output"].as_str()).unwrap_or_default();
        let [before, after] = [&before.answers[i], &after.answers[i]].map(|answer| one_line(answer));
        ui::line(format_args!("\n{prompt}\n  before      {before}\n  after       {after}\n  WordNet     {expected}"))?;
    }
    let (was, is) = (before.stats, after.stats);
    ui::line(format_args!(
        "\nheld-out rows: loss {:.3} before, {:.3} after (perplexity {:.1}, {:.1})",
        was.loss, is.loss, was.perplexity, is.perplexity
    ))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn adapter_config() -> AdapterConfig {
    AdapterConfig {
        r: 16,
        lora_alpha: 32.0,
        target_modules: Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned())),
        ..AdapterConfig::default()
    }
}

/// A model with its questions and rows.
struct Learner {
    flag: String,
    reader: Reader,
    train: nibble_data::Dataset,
    eval: nibble_data::Dataset,
    prompts: Vec<Vec<u32>>,
    options: GenerateOptions,
    precision: Precision,
    arena: Arena,
    model: Transformer,
}

impl Learner {
    fn load(base: Base, flag: String) -> Result<Self> {
        let reader = Reader::new(&base, None, None, false)?;
        let train = reader.rows(assets::train_rows())?;
        let eval = reader.rows(assets::eval_rows().take(EVAL_ROWS))?;
        reader.report("data", &train);
        let tokenizer = base.tokenizer()?;
        let stop = end_ids(&tokenizer, &base);
        let options = GenerateOptions { max_new_tokens: ANSWER, stop, ..GenerateOptions::default() };
        let encoder = Encoder::chat(&tokenizer, None)?;
        let prompts = PROMPTS.iter().map(|prompt| encoder.encode(prompt)).collect::<Result<Vec<_>>>()?;
        let longest_prompt = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let positions = train.summary().longest.max(eval.summary().longest).max(longest_prompt + ANSWER);
        let precision = Precision::default();
        let arena = precision.arena(None)?;
        let model = base.load(&arena, &load_options(&precision, positions)).map_err(|error| error.with_owners(&arena))?;
        Ok(Self { flag, reader, train, eval, prompts, options, precision, arena, model })
    }

    /// As many steps as fit into about a minute, by the model's size and the rows' lengths: a clock would make another result
    /// of every run.
    fn train_config(&self, max_steps: Option<usize>) -> TrainConfig {
        let summary = self.train.summary();
        let tokens_a_step = (BATCH * summary.tokens / summary.examples.max(1)).max(1);
        let epoch = summary.examples.div_ceil(BATCH);
        let by_work = WORK / self.model.num_parameters().max(1) / tokens_a_step;
        TrainConfig {
            max_steps: Some(max_steps.unwrap_or_else(|| by_work.clamp(8, epoch.max(8)))),
            learning_rate: if self.model.num_parameters() < SMALL { 3e-3 } else { 1e-3 },
            lr_scheduler_type: ScheduleName::Cosine,
            warmup_ratio: 0.1,
            logging_steps: 5,
            eval_batch_size: BATCH,
            ..TrainConfig::default()
        }
    }

    fn measure(&self, model: &Transformer, params: &ParamStore) -> Result<Measured> {
        let stats = evaluate(model, params, &self.eval, BATCH)?;
        Ok(Measured { answers: self.answers(model, params)?, stats })
    }

    fn answers(&self, model: &Transformer, params: &ParamStore) -> Result<Vec<String>> {
        // The rows were rendered, so there is a tokenizer.
        let Some(tokenizer) = self.reader.tokenizer() else { return Ok(Vec::new()) };
        let speaker = Speaker { model, params, tokenizer, options: &self.options };
        let bar = ui::Bar::new("asking", self.prompts.len());
        let mut answers = Vec::new();
        for prompt in &self.prompts {
            answers.push(speaker.answer(prompt, |_| Ok(()))?.text);
            bar.set(answers.len(), "answers");
        }
        bar.finish();
        Ok(answers)
    }
}

/// A model that was found, and how `--model` names it.
struct Found {
    source: ModelSource,
    flag: String,
}

impl Found {
    fn file(path: PathBuf) -> Self {
        let name = path.to_string_lossy().into_owned();
        Self { source: ModelSource { path, name: name.clone(), revision: None }, flag: name }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_questions_are_held_out() {
        for prompt in PROMPTS {
            assert!(assets::eval_rows().any(|row| row["instruction"] == prompt), "{prompt}");
            assert!(assets::train_rows().all(|row| row["instruction"] != prompt), "{prompt}");
        }
    }
}
