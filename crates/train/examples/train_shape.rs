//! Training steps on made-up weights of a named model, for a side-by-side run with other stacks: tokens/s, share of the speed of
//! light, peak memory.
//!
//! `cargo run --release -p nibble-train --example train_shape -- SHAPE [--batch 4] [--length 2048] [--steps 8] [--rank 16]
//! [--checkpointing none|selective|full|offload|auto] [--memory 24] [--dtype bf16|f16|f32] [--quant nf4|fp4|none] [--device cuda|cpu|plan] [--flops 790e12] [--profile 1] [--generate 128]`
//!
//! SHAPE: `llama3-8b`, `qwen2.5-1.5b`, `smollm2-135m`, `mistral-7b`, `llama2-13b`, `llama2-70b`. LoRA on all linears, labels on all tokens. The
//! speed of light: the floating-point operations that the step needs (no recomputation, no weight gradients of the base) at the
//! rate given by `--flops`. `--memory`: GB that the arena may hold. `--optim paged_adamw_8bit --optim-memory 0.1 --page-masters 1`: states
//! and f32 values in pages, but for so many GB. `--vary 24`: micro-batches of one document, whose lengths are from a list of so many between an
//! eighth of `--length` and all of it, in an order of their own in each pass over it; memory is told after 100 steps and at the end.
//!
//! Ends with the peak that was predicted and the one that was measured; `--device plan` predicts alone.
#![allow(clippy::print_stdout)]

mod common;

use std::{collections::HashMap, sync::Arc, time::Instant};

use common::{Result, arena, random_data, shape};
use nibble_data::{DataLoader, LoaderOptions, Packer};
use nibble_lora::{AdapterConfig, Init, TargetModules};
use nibble_model::{Checkpointing, GenerateOptions, LoadOptions, Session, Transformer, config::ModelConfig};
use nibble_nf4::{Format, QuantConfig};
use nibble_optim::Paging;
use nibble_tensor::{
    Arena, DType, Device, Rng,
    cuda::{DeviceInfo, KernelTime},
};
use nibble_train::{
    TrainConfig, Trainer,
    plan::{self, Place, Setup},
};

const OPTIONS: [&str; 17] = [
    "vary",
    "optim-memory",
    "page-masters",
    "blocks-on-host",
    "optim",
    "memory",
    "batch",
    "length",
    "steps",
    "rank",
    "checkpointing",
    "dtype",
    "quant",
    "device",
    "flops",
    "profile",
    "generate",
];

struct Options(HashMap<String, String>);

impl Options {
    fn get<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T> {
        match self.0.get(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("`--{name} {text}` cannot be read").into()),
        }
    }
}

fn options() -> Result<(String, Options)> {
    let mut args = std::env::args().skip(1);
    let name = args.next().ok_or("usage: train_shape SHAPE [--option value ...]")?;
    let mut options = HashMap::new();
    while let Some(flag) = args.next() {
        let key = flag.strip_prefix("--").ok_or_else(|| format!("`{flag}` is no option"))?.to_owned();
        if !OPTIONS.contains(&&key[..]) {
            return Err(format!("unknown option `{flag}`: one of --{}", OPTIONS.join(", --")).into());
        }
        options.insert(key, args.next().ok_or_else(|| format!("`{flag}` needs a value"))?);
    }
    Ok((name, Options(options)))
}

/// Floating-point operations that a token needs: forward and input gradients of the linears and the head, attention's products
/// over half of the pairs.
fn flops_per_token(config: &ModelConfig, length: usize) -> f64 {
    let linears: usize = config
        .tensors()
        .iter()
        .filter(|spec| spec.layer.is_some() && spec.shape.len() == 2)
        .map(|spec| spec.shape.iter().product::<usize>())
        .sum();
    let head = config.vocab_size * config.hidden_size;
    let attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length;
    4.0 * (linears + head) as f64 + 2.0 * 3.5 * attention as f64
}

fn dtype(name: &str) -> Result<DType> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::Bf16),
        other => Err(format!("unknown `--dtype {other}`: bf16, f16 or f32").into()),
    }
}

fn main() -> Result<()> {
    let (name, options) = options()?;
    let (batch, length, steps): (usize, usize, usize) =
        (options.get("batch", 4)?, options.get("length", 2048)?, options.get("steps", 8)?);
    let device: String = options.get("device", "cuda".into())?;
    let compute_dtype = dtype(&options.get::<String>("dtype", "bf16".into())?)?;
    let checkpointing = match &options.get::<String>("checkpointing", "selective".into())?[..] {
        "none" => Checkpointing::None,
        "full" => Checkpointing::Full,
        "selective" => Checkpointing::Selective,
        "offload" => Checkpointing::Offload,
        "auto" => Checkpointing::Auto,
        other => return Err(format!("unknown `--checkpointing {other}`: none, selective, full, offload or auto").into()),
    };
    let quant = match &options.get::<String>("quant", "nf4".into())?[..] {
        "none" => None,
        "fp4" => Some(QuantConfig { format: Format::Fp4, ..QuantConfig::default() }),
        "nf4" => Some(QuantConfig::default()),
        other => return Err(format!("unknown `--quant {other}`: nf4, fp4 or none").into()),
    };
    let mut config = shape(&name)?;
    // Contexts beyond those that the model was made for are timed as well.
    config.max_position_embeddings = config.max_position_embeddings.max(length);
    let flops = flops_per_token(&config, length);
    let vocab = config.vocab_size;
    let adapter = AdapterConfig {
        r: options.get("rank", 16)?,
        lora_alpha: 32.0,
        target_modules: Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned())),
        ..AdapterConfig::default()
    };
    let load = LoadOptions { quant, compute_dtype, max_positions: length, blocks_on_host: options.get("blocks-on-host", 0)? };
    let optim = options.get("optim", TrainConfig::default().optim)?;
    let optim_memory: f64 = options.get("optim-memory", f64::INFINITY)?;
    let optim_paging = Paging {
        device_memory: optim_memory.is_finite().then_some((optim_memory * 1e9) as usize),
        masters: options.get("page-masters", 0)? == 1,
        ..Paging::default()
    };
    let train = TrainConfig { checkpointing, optim, optim_paging, max_steps: Some(steps + 1), ..TrainConfig::default() };
    let setup =
        Setup { load, adapter: Some(adapter.clone()), documents: Vec::new(), evaluation: Vec::new(), train: train.clone() };
    let setup = setup.with_documents(batch, length);
    let limit = (options.get("memory", f64::INFINITY)? * 1e9) as usize;
    if device == "plan" {
        return print_plan(&config, &setup, limit);
    }
    let arena = arena(&device, limit)?;
    let begin = Instant::now();
    let mut model = Transformer::random(config.clone(), &arena, &load, 0)?;
    let params = model.attach(&adapter, Init::Random(0))?;
    let base = arena.stats().live;
    println!("base and adapters: {:.2} s, {:.3} GB", begin.elapsed().as_secs_f64(), base as f64 / 1e9);
    let vary: usize = options.get("vary", 0)?;
    let lengths = if vary > 0 { varied(vary, length) } else { vec![length; batch * 2] };
    let data = random_data(vocab, &lengths)?;
    let loader = LoaderOptions { packer: Packer::Documents { batch_size: batch }, seed: 0, shuffle: vary > 0 };
    let mut trainer = Trainer::new(model, params, DataLoader::new(Arc::new(data), loader)?, train)?;
    let mut rates = Vec::new();
    for step in 0..steps {
        let begin = Instant::now();
        let stats = trainer.step()?;
        let seconds = begin.elapsed().as_secs_f64();
        let rate = stats.tokens as f64 / seconds;
        if vary > 0 {
            if step + 1 == VARIED || step + 1 == steps {
                print_growth(&arena, step + 1)?;
            }
            continue;
        }
        println!("step {step}: {:.1} ms, {rate:.0} tokens/s, loss {:.4}, norm {:.4}", seconds * 1e3, stats.loss, stats.grad_norm);
        if step > 2 {
            rates.push(rate);
        }
    }
    if let (Device::Cuda(device), 1) = (arena.device(), options.get("profile", 0)?) {
        device.start_profile();
        trainer.step()?;
        print_profile(&device.end_profile()?);
    }
    let new: usize = options.get("generate", 0)?;
    if new > 0 {
        let profile = options.get("profile", 0)? == 1;
        generate(&trainer, new.min(length / 2), profile)?;
    }
    print_memory(&arena)?;
    print_difference(&arena, &config, &setup, limit)?;
    rates.sort_by(f64::total_cmp);
    let median = rates.get(rates.len() / 2).copied().unwrap_or_default();
    let light = options.get("flops", 790e12)? / flops;
    println!(
        "RESULT {name} {batch} x {length} {checkpointing:?}: {median:.0} tokens/s, {:.0} % of the speed of light, {:.2} GB live, {:.2} GB taken, {:.2} GB of the host",
        100.0 * median / light,
        arena.stats().peak as f64 / 1e9,
        arena.device_bytes().unwrap_or_default() as f64 / 1e9,
        trainer.model().host().bytes() as f64 / 1e9
    );
    Ok(())
}

/// The same without a device: what the step would take on an H200, or on one with no more memory than `limit`.
fn print_plan(config: &ModelConfig, setup: &Setup, limit: usize) -> Result<()> {
    let begin = Instant::now();
    let gpu = plan::find_gpu("H200").ok_or("no such GPU")?;
    let found = plan::footprint(config, &gpu.device(gpu.memory().min(limit)), setup)?;
    for (owner, bytes) in &found.owners {
        println!("MEMORY {owner}: {:.4} GB", *bytes as f64 / 1e9);
    }
    println!(
        "PLAN {} tokens {:?}: {:.3} GB live, {:.3} GB taken, about {:.0} tokens/s; planned in {:.1} ms",
        setup.tokens(),
        setup.train.checkpointing,
        found.peak as f64 / 1e9,
        found.device as f64 / 1e9,
        plan::tokens_per_second(config, gpu, setup).unwrap_or_default(),
        begin.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}

/// Steps after which memory is told first, where lengths change: each has come a few times then.
const VARIED: usize = 100;

/// So many lengths between an eighth of `longest` and all of it, one of them the longest.
fn varied(count: usize, longest: usize) -> Vec<usize> {
    let rng = Rng::new(1);
    let shortest = (longest / 8).max(2);
    let other = |i: u64| shortest + (rng.bits(i) % (longest - shortest + 1) as u64) as usize;
    std::iter::once(longest).chain((1..count as u64).map(other)).collect()
}

/// The memory held so far: of the arena, of the device as its driver says, and of this process on the host.
fn print_growth(arena: &Arena, steps: usize) -> Result<()> {
    let used = if let Device::Cuda(device) = arena.device() { device.used_memory()? } else { 0 };
    let stats = arena.stats();
    println!(
        "GROWTH after {steps} steps: peak {} bytes, arena {} bytes, {} requests to the system, device in use {used} bytes, host {:.1} MB",
        stats.peak,
        arena.device_bytes().unwrap_or(stats.live + stats.free),
        stats.system_allocations,
        resident() as f64 / 1e6
    );
    Ok(())
}

/// Bytes of memory that this process holds, where the system tells (Linux).
fn resident() -> usize {
    const PAGE: usize = 4096;
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * PAGE
}

/// What was predicted beside what was measured. `auto` is predicted for a device with no more memory than `limit`, which fits a little less
/// than an arena of that limit, and so may choose another mix.
fn print_difference(arena: &Arena, config: &ModelConfig, setup: &Setup, limit: usize) -> Result<()> {
    let predicted = match arena.device() {
        Device::Cuda(device) => {
            let (info, auto) = (device.info(), setup.train.checkpointing == Checkpointing::Auto);
            let memory = if auto { info.memory.min(limit) } else { info.memory };
            match plan::footprint(config, &DeviceInfo { memory, ..info.clone() }, setup) {
                Err(error) if error.is_out_of_memory() => {
                    println!("PREDICTED that a device of that memory is too small: {error}");
                    return Ok(());
                }
                found => found?,
            }
        }
        _ => Place::Cpu.needed(config, setup)?,
    };
    let measured = arena.stats().peak as f64;
    println!(
        "PREDICTED {:.4} GB live, measured {:.4} GB: {:+.2} %",
        predicted.peak as f64 / 1e9,
        measured / 1e9,
        100.0 * (predicted.peak as f64 / measured - 1.0)
    );
    Ok(())
}

/// Who held how much when tensors held the most, and how much of what the driver says that is.
fn print_memory(arena: &Arena) -> Result<()> {
    let owners = arena.at_peak();
    for (owner, bytes) in &owners {
        println!("MEMORY {owner}: {:.4} GB", *bytes as f64 / 1e9);
    }
    let sum: usize = owners.iter().map(|(_, bytes)| bytes).sum();
    let used = if let Device::Cuda(device) = arena.device() { device.used_memory()? } else { arena.stats().peak };
    let share = 100.0 * sum as f64 / used as f64;
    println!("MEMORY all owners: {:.4} GB, {share:.2} % of {:.4} GB in use", sum as f64 / 1e9, used as f64 / 1e9);
    Ok(())
}

/// Greedy tokens after a prompt of as many, one at a time; with `profile` also where the time of eight more goes.
fn generate(trainer: &Trainer, new: usize, profile: bool) -> Result<()> {
    const PROFILED: usize = 8;
    let mut session = Session::new(trainer.model(), trainer.params(), 2 * new + 2 * PROFILED)?;
    let prompt: Vec<u32> = (0..new as u32).collect();
    let mut times = Vec::new();
    let options = GenerateOptions { max_new_tokens: new, ..GenerateOptions::default() };
    session.generate(&prompt, &options, |_| {
        times.push(Instant::now());
        true
    })?;
    if let [first, .., last] = times[..] {
        let rate = (times.len() - 1) as f64 / (last - first).as_secs_f64();
        println!("generation after {new} tokens: {rate:.0} tokens/s");
    }
    if let (Device::Cuda(device), true) = (trainer.model().arena().device(), profile) {
        device.start_profile();
        session.generate(&[0], &GenerateOptions { max_new_tokens: PROFILED, ..GenerateOptions::default() }, |_| true)?;
        println!("{PROFILED} tokens:");
        print_profile(&device.end_profile()?);
    }
    Ok(())
}

/// Kernels by their time in one step, with their names' types and sizes.
fn print_profile(kernels: &[KernelTime]) {
    let total: f64 = kernels.iter().map(|kernel| kernel.milliseconds).sum();
    println!("kernel by kernel: {total:.2} ms");
    for KernelTime { name, calls, milliseconds } in kernels.iter().take(48) {
        println!(
            "{milliseconds:9.3} ms {:5.1} % {calls:6} x {:9.1} us  {name}",
            100.0 * milliseconds / total,
            1e3 * milliseconds / *calls as f64
        );
    }
}
