//! Plans against the device: predicted and measured peaks of five shapes in four kinds of checkpointing, as a table in Markdown.
//!
//! `cargo run --release -p nibble-train --example plan_measured -- [--device cuda|cpu|plan] [--only SHAPE]`
//!
//! Two steps each (on a GPU the second is the one that is captured), on made-up weights in NF4 with adapters of rank 16 on all linears. Peak: what tensors
//! hold at once. In use: what the driver says the whole process takes, against the plan's with what it sets aside for context and libraries.
//! `--device plan`: the predictions alone. Ends with 1 if a peak is off by more than 5 %.
#![allow(clippy::print_stdout)]

mod common;

use std::{process::ExitCode, sync::Arc};

use common::{Result, gpu, random_data, shape};
use nibble_data::{DataLoader, LoaderOptions, Packer};
use nibble_lora::{AdapterConfig, Init, TargetModules};
use nibble_model::{LoadOptions, Transformer, config::ModelConfig};
use nibble_nf4::QuantConfig;
use nibble_tensor::{Arena, DType, Device};
use nibble_train::{
    TrainConfig, Trainer,
    plan::{self, Footprint, MODES, Place, RESERVED, Setup},
};

/// Shapes with their micro-batch: documents, and tokens of each.
const CASES: [(&str, usize, usize); 5] =
    [("smollm2-135m", 8, 512), ("qwen2.5-1.5b", 4, 512), ("llama3-8b", 2, 1024), ("mistral-7b", 2, 1024), ("llama2-13b", 1, 512)];
/// Share that a prediction may be off by.
const MOST: f64 = 0.05;
const STEPS: usize = 2;

fn option(name: &str, default: &str) -> String {
    let args: Vec<String> = std::env::args().collect();
    let at = args.iter().position(|arg| arg == name);
    at.and_then(|at| args.get(at + 1)).cloned().unwrap_or_else(|| default.to_owned())
}

fn setup(length: usize, batch: usize) -> Setup {
    let target_modules = Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned()));
    let setup = Setup {
        load: LoadOptions {
            quant: Some(QuantConfig::default()),
            compute_dtype: DType::Bf16,
            max_positions: length,
            blocks_on_host: 0,
        },
        adapter: Some(AdapterConfig { r: 16, lora_alpha: 32.0, target_modules, ..AdapterConfig::default() }),
        documents: Vec::new(),
        evaluation: Vec::new(),
        train: TrainConfig { max_steps: Some(STEPS), ..TrainConfig::default() },
    };
    setup.with_documents(batch, length)
}

/// What a run of `setup` took: bytes that tensors held at once, and bytes in use on the device.
fn measure(model: &Transformer, setup: &Setup) -> Result<(usize, Option<usize>)> {
    let (arena, mut model) = (model.arena().clone(), model.clone());
    let Some(adapter) = &setup.adapter else { return Err("no adapter".into()) };
    let params = model.attach(adapter, Init::Random(0))?;
    let lengths: Vec<usize> = setup.documents.iter().map(|document| document.tokens).collect();
    let data = Arc::new(random_data(model.config().vocab_size, &lengths)?);
    let loader = LoaderOptions { packer: Packer::Documents { batch_size: lengths.len() }, seed: 0, shuffle: false };
    let mut trainer = Trainer::new(model, params, DataLoader::new(data, loader)?, setup.train.clone())?;
    for _ in 0..STEPS {
        trainer.step()?;
    }
    let used = if let Device::Cuda(gpu) = arena.device() { Some(gpu.used_memory()?) } else { None };
    Ok((arena.stats().peak, used))
}

/// The lines of one shape, and whether all are near enough. Kinds come in the order of what they keep, the least first: the peak of an
/// arena is then that of the kind that ran last, and the weights are made once.
fn shape_lines(name: &str, (batch, length): (usize, usize), device: Option<Device>) -> Result<bool> {
    let (config, base) = (shape(name)?, setup(length, batch));
    let arena = device.map(|device| Arena::on(device, usize::MAX)).transpose()?;
    let model = arena.map(|arena| Transformer::random(config.clone(), &arena, &base.load, 0)).transpose()?;
    let mut near = true;
    for (kind, checkpointing) in MODES.into_iter().rev() {
        let mut setup = base.clone();
        setup.train.checkpointing = checkpointing;
        let found = predict(&config, device, &setup)?;
        let measured = model.as_ref().map(|model| measure(model, &setup)).transpose()?;
        let off = measured.map_or(0.0, |(peak, _)| found.peak as f64 / peak as f64 - 1.0);
        near &= off.abs() <= MOST;
        println!("| {name} | {batch} x {length} | {kind} | {} |", cells(&found, measured));
    }
    Ok(near)
}

/// The plan for a device; without one, for an H200.
fn predict(config: &ModelConfig, device: Option<Device>, setup: &Setup) -> Result<Footprint> {
    Ok(match device {
        Some(Device::Cuda(gpu)) => plan::footprint(config, gpu.info(), setup)?,
        Some(_) => Place::Cpu.needed(config, setup)?,
        None => {
            let h200 = plan::find_gpu("H200").ok_or("no such GPU")?;
            plan::footprint(config, &h200.device(h200.memory()), setup)?
        }
    })
}

/// Predicted, measured and difference, of the peak and of what is in use.
fn cells(found: &Footprint, measured: Option<(usize, Option<usize>)>) -> String {
    let pair = |predicted: usize, measured: Option<usize>| match measured {
        Some(measured) => {
            let off = 100.0 * (predicted as f64 / measured as f64 - 1.0);
            format!("{:.3} | {:.3} | {off:+.2}", predicted as f64 / 1e9, measured as f64 / 1e9)
        }
        None => format!("{:.3} | - | -", predicted as f64 / 1e9),
    };
    let (peak, used) = measured.unzip();
    format!("{} | {}", pair(found.peak, peak), pair(found.device + RESERVED, used.flatten()))
}

fn main() -> Result<ExitCode> {
    let (only, name) = (option("--only", ""), option("--device", "cuda"));
    let device = match &name[..] {
        "plan" => None,
        "cpu" => Some(Device::Cpu),
        _ => Some(Device::Cuda(gpu()?)),
    };
    let on = device.map_or_else(|| "planned for an H200".to_owned(), |device| device.to_string());
    println!("{on}: NF4, rank 16 on all linears, bf16, AdamW with f32 states; GB\n");
    println!("| model | step | checkpointing | predicted peak | measured | off by % | predicted in use | driver | off by % |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut near = true;
    for (name, batch, length) in CASES.into_iter().filter(|case| only.is_empty() || case.0 == only) {
        near &= shape_lines(name, (batch, length), device)?;
    }
    Ok(if near { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
