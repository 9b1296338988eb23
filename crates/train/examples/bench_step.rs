//! Training steps on random tokens: seconds, tokens/s and the process's peak memory, for a side-by-side run with other stacks.
//!
//! `cargo run --release -p nibble-train --example bench_step -- MODEL [f32|bf16] [BATCH] [LENGTH] [STEPS] [none|selective|full] [nf4|none]`
//!
//! LoRA r 16 on all linears, labels on all tokens, AdamW: one micro-batch a step, as in the reference stack's usual benchmark.
#![allow(clippy::print_stdout)]

use std::{path::Path, sync::Arc, time::Instant};

use nibble_data::{DataLoader, Dataset, DatasetOptions, LoaderOptions, Packer};
use nibble_lora::{AdapterConfig, Init, TargetModules};
use nibble_model::{Checkpointing, LoadOptions, Transformer, files::Checkpoint};
use nibble_nf4::QuantConfig;
use nibble_tensor::{Arena, DType, Device, Rng};
use nibble_train::{TrainConfig, Trainer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let get = |i: usize, default: &str| args.get(i).cloned().unwrap_or_else(|| default.to_owned());
    let path =
        args.first().ok_or("usage: bench_step MODEL [f32|bf16] [BATCH] [LENGTH] [STEPS] [none|selective|full] [nf4|none]")?;
    let compute_dtype = if get(1, "f32") == "bf16" { DType::Bf16 } else { DType::F32 };
    let (batch, length, steps): (usize, usize, usize) = (get(2, "1").parse()?, get(3, "512").parse()?, get(4, "6").parse()?);
    let checkpointing = match &get(5, "selective")[..] {
        "full" => Checkpointing::Full,
        "selective" => Checkpointing::Selective,
        _ => Checkpointing::None,
    };
    let quant = (get(6, "nf4") == "nf4").then(|| QuantConfig { double_quant: true, ..QuantConfig::default() });

    let begin = Instant::now();
    let arena = Arena::new(Device::Cpu);
    let options = LoadOptions { quant, compute_dtype, max_positions: length, blocks_on_host: 0 };
    let mut model = Transformer::load(&Checkpoint::open(Path::new(path))?, &arena, &options, &mut |_, _| {})?;
    let config = AdapterConfig {
        r: 16,
        lora_alpha: 32.0,
        target_modules: Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned())),
        ..AdapterConfig::default()
    };
    let params = model.attach(&config, Init::Random(0))?;
    println!("load, quantise, attach: {:.2} s, {:.0} MB", begin.elapsed().as_secs_f64(), peak_memory_mb());
    let data = random_data(model.config().vocab_size, batch * steps, length)?;
    let loader = LoaderOptions { packer: Packer::Documents { batch_size: batch }, seed: 0, shuffle: false };
    let config = TrainConfig { checkpointing, max_steps: Some(steps), ..TrainConfig::default() };
    let mut trainer = Trainer::new(model, params, DataLoader::new(Arc::new(data), loader)?, config)?;
    let mut rates = Vec::new();
    for step in 0..steps {
        let stats = trainer.step()?;
        let rate = stats.tokens as f64 / stats.seconds;
        println!("step {step}: {:.3} s, {rate:.1} tokens/s, loss {:.4}, norm {:.3}", stats.seconds, stats.loss, stats.grad_norm);
        if step > 0 {
            rates.push(rate);
        }
    }
    rates.sort_by(f64::total_cmp);
    let stats = arena.stats();
    println!(
        "{} tokens/s (median of warm steps), peak memory {:.0} MB (arena {:.0} MB)",
        rates.get(rates.len() / 2).map_or(0, |rate| *rate as u64),
        peak_memory_mb(),
        stats.peak as f64 / 1e6
    );
    Ok(())
}

fn random_data(vocab: usize, rows: usize, length: usize) -> Result<Dataset, Box<dyn std::error::Error>> {
    let rng = Rng::new(0);
    let rows = (0..rows as u64).map(|row| {
        let ids: Vec<u64> = (0..length as u64).map(|i| rng.stream(row).bits(i) % vocab as u64).collect();
        serde_json::json!({ "input_ids": ids })
    });
    let options = DatasetOptions { vocab_size: Some(vocab), ..DatasetOptions::default() };
    Ok(Dataset::from_tokenized_rows(rows, &options)?)
}

/// The most memory this process had resident, in MB.
fn peak_memory_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).map_or(0.0, |kib| kib * 1.024 / 1000.0)
}
