//! `nibble train`: data, model, adapter, the run, the folder.

mod card;
mod host;
mod interrupt;
mod memory;
mod progress;
mod run;
mod settings;

use std::path::Path;

use nibble_data::{DataLoader, Dataset};
use nibble_lora::{AdapterFile, Init};
use nibble_train::{Trainer, plan::Setup};

pub(super) use interrupt::Interrupt;
use memory::Planned;
pub(super) use run::{Tuning, fine_tune, name_base};
use settings::Settings;
pub(super) use settings::modules;

use crate::{
    Ending,
    args::{OffloadWeights, TrainArgs},
    base::{Base, load_options, open_adapter, warn_of_other_base},
    dataset::Reader,
    error::{CliError, MAY_CHANGE, Result},
    machine::available_memory,
    output::Staging,
    ui,
};

/// # Errors
/// Whatever is wrong, before anything is loaded where it can be known by then.
pub(crate) fn run(args: &TrainArgs) -> Result<Ending> {
    let settings = Settings::from_args(args)?;
    let mut inputs = vec![Path::new(&args.model.model), &args.data.data];
    inputs.extend(args.adapter.as_deref().into_iter().chain(args.data.eval_data.as_deref()));
    let staging = Staging::new(&args.output.output, args.output.overwrite_output_dir, &inputs)?;
    let interrupt = Interrupt::install(staging.path())?;
    // What a run that is gone on with has left may be replaced by what it comes to: it is in memory by then.
    let adapter = args.adapter.as_deref().or(args.resume.as_deref()).map(open_adapter).transpose()?;
    let base = Base::open(&args.model.model)?;
    ui::fact("model", base.describe());
    if let Some(adapter) = &adapter {
        warn_of_other_base(adapter, base.name());
    }

    let mut reader = Reader::new(&base, args.data.data_format.as_deref(), args.data.max_length, args.data.train_on_prompt)?;
    let data = reader.read(&args.data.data)?;
    reader.report("data", &data);
    let eval = args.data.eval_data.as_deref().map(|path| reader.read(path)).transpose()?;
    if let Some(eval) = &eval {
        reader.report("eval data", eval);
    }

    let source = base.source.clone();
    let planned = plan(&settings, &base, &data, eval.as_ref(), &reader, adapter.as_ref())?;
    let held = planned.check()?;
    planned.check_host(available_memory())?;
    let nearest = |error: CliError| planned.with_nearest(error, &held);
    let mut trainer = prepare(&settings, &planned, base, data, adapter.as_ref()).map_err(nearest)?;
    ui::fact("memory", memory::line(&held));
    let tuning = Tuning {
        source: &source,
        adapter: &planned.adapter,
        reader: &reader,
        eval: eval.as_ref(),
        train: &settings.config,
        precision: &settings.precision,
        interrupt: &interrupt,
        model_flag: &args.model.model,
        output: &args.output.output,
        resume: args.resume.as_deref(),
    };
    let finished = fine_tune(&mut trainer, &tuning, staging).map_err(nearest)?;
    finished.report(&trainer);
    if finished.resumable {
        let place = args.output.output.display();
        ui::fact("resume", format_args!("the same settings and `--resume {place}` go on from here; {MAY_CHANGE}"));
    }
    tuning.usage().say();
    Ok(finished.ending)
}

/// The run, as far as its memory depends on it.
fn plan(
    settings: &Settings,
    base: &Base,
    data: &Dataset,
    eval: Option<&Dataset>,
    reader: &Reader,
    adapter: Option<&AdapterFile>,
) -> Result<Planned> {
    let longest = data.summary().longest.max(eval.map_or(0, |eval| eval.summary().longest));
    let loader = settings.loader.options(reader.max_length());
    let config = adapter.map(|file| &file.config).or(settings.adapter.as_ref()).cloned().unwrap_or_default();
    let mut planned = Planned {
        model: base.config.clone(),
        setup: Setup {
            load: load_options(&settings.precision, longest),
            adapter: Some(config.clone()),
            documents: memory::largest_batch(data, loader),
            evaluation: eval.map_or_else(Vec::new, |eval| memory::largest_in_order(eval, settings.config.eval_batch_size)),
            train: settings.config.clone(),
        },
        adapter: config,
        loader,
        batch: settings.loader.batch_size,
        accumulation: settings.config.gradient_accumulation_steps,
        device: settings.precision.device,
        memory_limit: settings.memory_limit,
    };
    planned.setup.load.blocks_on_host = match settings.offload_weights {
        OffloadWeights::Auto => planned.blocks_on_host()?,
        OffloadWeights::Blocks(count) => count.min(planned.model.num_hidden_layers),
    };
    Ok(planned)
}

/// Loads the model, puts the adapter on it, and says what is going to be trained.
fn prepare(settings: &Settings, planned: &Planned, base: Base, data: Dataset, adapter: Option<&AdapterFile>) -> Result<Trainer> {
    let load = &planned.setup.load;
    if load.blocks_on_host > 0 {
        let (count, all) = (load.blocks_on_host, planned.model.num_hidden_layers);
        ui::fact(
            "weights",
            format!("of {count} of {all} blocks in host memory; they cross the link twice a step while others run"),
        );
    }
    let init = adapter.map_or(Init::Random(settings.config.seed), Init::File);
    let arena = settings.precision.arena(settings.memory_limit)?;
    let name = base.name().to_owned();
    let mut model = base.load(&arena, load).map_err(|error| error.with_owners(&arena))?;
    let params = model.attach(&planned.adapter, init).map_err(|error| CliError::from(error).with_owners(&arena))?;
    let loader = DataLoader::new(data.into(), planned.loader)?;
    let trainer = Trainer::new(model, params, loader, settings.config.clone());
    let mut trainer = trainer.map_err(|error| CliError::from(error).with_owners(&arena))?;
    name_base(&mut trainer, &name, &settings.precision);
    let resume = settings.resume.as_deref();
    let done =
        resume.map(|folder| trainer.resume(folder)).transpose().map_err(|error| CliError::from(error).with_owners(&arena))?;
    run::show(&trainer, settings.precision, &planned.adapter, adapter.map(|adapter| (adapter.path(), done)), &settings.config);
    Ok(trainer)
}
