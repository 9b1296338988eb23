//! `nibble plan`: what training takes and what fits, before anything is loaded.

mod html;
mod json;
mod sizes;
mod text;

use nibble_lora::AdapterConfig;
use nibble_model::{
    LoadOptions,
    config::ModelConfig,
    files::{Checkpoint, Hub},
};
use nibble_nf4::{Format, QuantConfig};
use nibble_tensor::{DType, cuda::CudaDevice};
use nibble_train::{
    TrainConfig,
    plan::{self, Gpu, Method, MethodPlan, Mode, Request, Streamed},
};

use crate::{
    args::{PlanArgs, Quant},
    assets, env,
    error::{CliError, Result, io_error},
    source::hub_name,
    ui,
};

/// Tokens of a document, unless asked otherwise.
const DEFAULT_LENGTH: usize = 1024;

/// A plan, as all its forms show it.
#[derive(Debug)]
pub(super) struct Shown {
    /// As it was asked for.
    model: String,
    /// Numbers of the model in a few words.
    describe: String,
    /// The positions that the model was made for.
    positions: usize,
    parameters: usize,
    gpu: Gpu,
    /// Bytes for tensors.
    room: usize,
    memory_limit: Option<usize>,
    target_modules: String,
    request: Request,
    methods: Vec<MethodPlan>,
}

/// # Errors
/// An unknown GPU, a model that is not there or not run, a page that cannot be written.
pub(crate) fn run(args: &PlanArgs) -> Result<()> {
    let quant = match args.quant {
        Quant::Nf4 => QuantConfig::default(),
        Quant::Fp4 => QuantConfig { format: Format::Fp4, ..QuantConfig::default() },
        Quant::None => {
            return Err(CliError::NoEffect { flag: "--quant none", with: "nibble plan, which shows LoRA beside QLoRA" });
        }
    };
    let load = |dtype| LoadOptions { quant: Some(quant), compute_dtype: dtype, max_positions: 0, blocks_on_host: 0 };
    let Some(model) = &args.model else {
        return sizes::show(load(DType::Bf16), args);
    };
    let gpu = gpu(args.gpu.as_deref())?;
    let config = config(model)?;
    let shown = shown(args, model, &config, gpu, load(dtype(&gpu)))?;
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&shown)).map_err(io_error("write", path))?;
        ui::fact("page", path.display());
    }
    if args.json { ui::line(json::of(&shown)) } else { ui::write(text::Text(&shown)) }
}

fn shown(args: &PlanArgs, model: &str, config: &ModelConfig, gpu: Gpu, load: LoadOptions) -> Result<Shown> {
    let positions = config.max_position_embeddings;
    let length = args.max_length.unwrap_or(DEFAULT_LENGTH.min(positions));
    if length > positions {
        return Err(CliError::MaxLength { limit: positions, found: length });
    }
    let plain = Request::new(load);
    let target_modules = Some(super::train::modules(&args.target_modules));
    let request = Request {
        adapter: AdapterConfig { r: args.lora_r, target_modules, ..plain.adapter },
        batch: args.batch_size,
        length,
        train: TrainConfig { optim: args.optim, ..plain.train },
        load,
    };
    let room = gpu.memory().saturating_sub(plan::RESERVED).min(args.memory_limit.unwrap_or(usize::MAX));
    // Full fine-tuning is shown to compare: left out where an optimizer does not take as many values.
    let methods = Method::ALL.iter().filter_map(|&method| match MethodPlan::new(config, &gpu, room, &request, method) {
        Err(_) if method == Method::Full => None,
        planned => Some(planned),
    });
    let parameters: usize = config.tensors().iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
    Ok(Shown {
        model: model.to_owned(),
        describe: crate::base::describe(config),
        positions,
        parameters,
        gpu,
        room,
        memory_limit: args.memory_limit,
        target_modules: args.target_modules.clone(),
        methods: methods.collect::<Result<_, _>>()?,
        request,
    })
}

impl Shown {
    /// The mode to show of a method: the fastest that fits, else the one that takes the least.
    fn mode<'a>(&self, method: &'a MethodPlan) -> (&'a Mode, bool) {
        match method.fastest(self.room) {
            Some(mode) => (mode, true),
            // invariant: a plan has every kind of checkpointing
            None => (method.modes.iter().min_by_key(|mode| mode.footprint.device).expect("modes"), false),
        }
    }

    /// The command that trains so; full fine-tuning has none.
    fn command(&self, method: Method, mode: &Mode) -> Option<String> {
        if method == Method::Full {
            return None;
        }
        let Request { batch, length, adapter, train, load } = &self.request;
        let fp4 = load.quant.is_some_and(|quant| quant.format == Format::Fp4);
        let quant = match method {
            Method::Lora => " --quant none",
            _ if fp4 => " --quant fp4",
            _ => "",
        };
        let targets = if self.target_modules == "all-linear" {
            String::new()
        } else {
            format!(" --target-modules '{}'", self.target_modules)
        };
        let host = mode.streamed.map_or_else(String::new, |streamed| format!(" --offload-weights {}", streamed.blocks));
        let limit = self.memory_limit.map_or_else(String::new, |bytes| format!(" --memory-limit {bytes}B"));
        Some(format!(
            "nibble train --model {} --data rows.jsonl --output my-adapter --max-length {length} --batch-size {batch} --lora-r {}{targets} \
             --optim {} --gradient-checkpointing {}{host}{quant}{limit}",
            self.model, adapter.r, train.optim, mode.name
        ))
    }
}

/// The GPU that `--gpu` means.
fn gpu(name: Option<&str>) -> Result<Gpu> {
    let Some(name) = name else {
        return Ok(CudaDevice::describe(0).map_or_else(|_| Gpu::of_memory(24 << 30), |info| Gpu::of_device(&info)));
    };
    // A number alone is part of a name.
    if let (true, Ok(bytes)) = (name.ends_with(char::is_alphabetic), crate::args::parse_bytes(name)) {
        return Ok(Gpu::of_memory(bytes));
    }
    let unknown = || CliError::UnknownGpu { name: name.to_owned(), nearest: plan::nearest_gpu(name) };
    plan::find_gpu(name).copied().ok_or_else(unknown)
}

/// bf16 where the hardware multiplies it, else f16, as `train` decides.
fn dtype(gpu: &Gpu) -> DType {
    if gpu.capability.0 >= 8 { DType::Bf16 } else { DType::F16 }
}

/// A model's config, and nothing else of it.
fn config(model: &str) -> Result<ModelConfig> {
    let path = env::expand(model);
    if path.is_dir() && path.join("config.json").is_file() {
        return Ok(ModelConfig::read(&path.join("config.json"))?);
    }
    if path.exists() {
        return Ok(Checkpoint::open(&path)?.config()?);
    }
    if model == assets::TINY_MODEL {
        return Ok(ModelConfig::read(&assets::unpack_tiny_model()?.join("config.json"))?);
    }
    let Some(name) = hub_name(model) else { return Err(CliError::ModelNotFound { model: model.to_owned() }) };
    let hub = Hub::new(env::hub_options())?;
    if let Some(file) = &name.file {
        let (config, bytes) = hub.fetch_gguf_config(&name)?;
        let read = if bytes > 0 { format!("the first {} of", ui::bytes(bytes as usize)) } else { "the cached".to_owned() };
        ui::fact("read", format!("the header of {file}: {read} file"));
        return Ok(config);
    }
    let mut bar = ui::Download::new();
    let path = hub.fetch_config(&name, &mut |progress| bar.update(progress.file, progress.bytes, progress.total))?;
    bar.finish();
    Ok(ModelConfig::read(&path)?)
}

/// What weights on the host cost, in words.
fn cost(streamed: &Streamed) -> String {
    let Streamed { blocks, of, host_bytes, step_bytes, link_seconds } = *streamed;
    let time =
        link_seconds.map_or_else(String::new, |seconds| format!(", which takes its link {seconds:.2} s beside the kernels"));
    format!(
        "the weights of {blocks} of {of} blocks wait in {} of host memory; {} cross to the GPU each step{time}",
        gigabytes(host_bytes),
        gigabytes(step_bytes)
    )
}

/// Gigabytes with a digit or two.
fn gb(bytes: usize) -> String {
    let gb = bytes as f64 / 1e9;
    if gb < 10.0 { format!("{gb:.2}") } else { format!("{gb:.1}") }
}

/// `25.8 GB`.
fn gigabytes(bytes: usize) -> String {
    format!("{} GB", gb(bytes))
}
