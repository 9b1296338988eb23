//! The base model on the way into memory: opened, its tokenizer read, then loaded.

use std::path::Path;

use nibble_data::Tokenizer;
use nibble_lora::AdapterFile;
use nibble_model::{
    LoadOptions, Transformer,
    config::ModelConfig,
    files::{Checkpoint, GgufVocab},
};
use nibble_nf4::{Format, QuantConfig};
use nibble_tensor::{
    Arena, DType, Device,
    cuda::{CudaDevice, OpenOptions, libraries},
};

use crate::{
    args::{ComputeDtype, DeviceName, PrecisionArgs, Quant},
    env,
    error::{CliError, Result},
    source::{ModelSource, only_gguf},
    ui,
};

/// How a model is held and computed: what [`PrecisionArgs`] amount to on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Precision {
    /// The format of the frozen linears; none: as stored.
    pub(crate) quant: Option<QuantConfig>,
    /// The type of activations.
    pub(crate) compute_dtype: DType,
    /// Where.
    pub(crate) device: Device,
}

impl Precision {
    /// Decides what was left open.
    ///
    /// # Errors
    /// [`CliError::NoEffect`] for details of a format that is not used; what is missing for `--device cuda`.
    pub(crate) fn from_args(args: &PrecisionArgs) -> Result<Self> {
        let quant = quant_config(args.quant, args.double_quant, args.quant_block_size)?;
        let device = device(args.device)?;
        let compute_dtype = match args.compute_dtype {
            ComputeDtype::Bf16 => DType::Bf16,
            ComputeDtype::F16 => DType::F16,
            ComputeDtype::F32 => DType::F32,
            ComputeDtype::Auto => natural_dtype(device),
        };
        if let (Device::Cuda(gpu), DType::Bf16) = (device, compute_dtype)
            && gpu.info().capability.major < 8
        {
            return Err(CliError::NoBf16 { device: gpu.info().name.clone() });
        }
        Ok(Self { quant, compute_dtype, device })
    }

    /// Memory of the device, at most `limit` bytes of it.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn arena(&self, limit: Option<usize>) -> Result<Arena> {
        Ok(Arena::on(self.device, limit.unwrap_or(usize::MAX))?)
    }

    /// One line about it.
    pub(crate) fn describe(&self) -> String {
        let why = match self.device {
            Device::Cuda(gpu) => gpu.info().name.clone(),
            _ if multiplies_bf16() => "the CPU has avx512_bf16".to_owned(),
            _ => "the CPU has no avx512_bf16".to_owned(),
        };
        format!("{} on {} ({why})", self.compute_dtype, self.device)
    }
}

/// QLoRA's format, on the best device there is.
impl Default for Precision {
    fn default() -> Self {
        let device = best_device();
        Self { quant: Some(QuantConfig::default()), compute_dtype: natural_dtype(device), device }
    }
}

fn device(name: DeviceName) -> Result<Device> {
    match name {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Cuda => open_gpu(),
        DeviceName::Auto => Ok(best_device()),
    }
}

/// The first GPU if one can be used; else the CPU, and where there is a GPU one line that says why not.
fn best_device() -> Device {
    if CudaDevice::count() == 0 {
        return Device::Cpu;
    }
    open_gpu().unwrap_or_else(|error| {
        ui::warn(format_args!("computing on the CPU: {error}"));
        Device::Cpu
    })
}

/// The first GPU, if everything that it needs is there.
pub(crate) fn open_gpu() -> Result<Device> {
    let libraries = libraries::find(&env::search_paths());
    let gpu = CudaDevice::open(0, &OpenOptions { libraries, cache: Some(env::nibble_cache().join("kernels")) })?;
    gpu.check()?;
    Ok(Device::Cuda(gpu))
}

/// bf16 where the hardware multiplies it; else f16 on a GPU, f32 on a CPU.
fn natural_dtype(device: Device) -> DType {
    match device {
        Device::Cuda(gpu) if gpu.info().capability.major < 8 => DType::F16,
        Device::Cpu if !multiplies_bf16() => DType::F32,
        _ => DType::Bf16,
    }
}

/// The format of the frozen linears that three flags ask for.
///
/// # Errors
/// [`CliError::NoEffect`] for details of a format that is not used.
pub(crate) fn quant_config(quant: Quant, double_quant: Option<bool>, block_size: Option<usize>) -> Result<Option<QuantConfig>> {
    let format = match quant {
        Quant::Nf4 => Format::Nf4,
        Quant::Fp4 => Format::Fp4,
        Quant::None => {
            let details = [("--double-quant", double_quant.is_some()), ("--quant-block-size", block_size.is_some())];
            return match details.into_iter().find(|(_, given)| *given) {
                Some((flag, _)) => Err(CliError::NoEffect { flag, with: "--quant none" }),
                None => Ok(None),
            };
        }
    };
    Ok(Some(QuantConfig { format, block_size: block_size.unwrap_or(64), double_quant: double_quant.unwrap_or(true) }))
}

#[cfg(target_arch = "x86_64")]
fn multiplies_bf16() -> bool {
    std::arch::is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn multiplies_bf16() -> bool {
    false
}

/// A model's files, open.
#[derive(Debug)]
pub(crate) struct Base {
    /// Where they are.
    pub(crate) source: ModelSource,
    /// What the model is.
    pub(crate) config: ModelConfig,
    checkpoint: Checkpoint,
}

impl Base {
    /// Opens a model by the name it was asked for.
    ///
    /// # Errors
    /// What is wrong with the name, the files or the config.
    pub(crate) fn open(model: &str) -> Result<Self> {
        Self::from_source(ModelSource::resolve(model)?)
    }

    /// Opens a model's files.
    ///
    /// # Errors
    /// What is wrong with the files or the config.
    pub(crate) fn from_source(source: ModelSource) -> Result<Self> {
        let checkpoint = Checkpoint::open(&source.path)?;
        let config = checkpoint.config()?;
        Ok(Self { source, config, checkpoint })
    }

    /// The tokenizer: the folder's, or the one a GGUF file carries.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        let folder = self.source.tokenizer_folder();
        if let Some(folder) = folder.filter(|folder| folder.join("tokenizer.json").is_file()) {
            return Ok(Tokenizer::from_folder(folder)?);
        }
        match self.checkpoint.gguf() {
            Some(gguf) => {
                let problem = |problem| nibble_model::Error::Gguf { path: self.checkpoint.path().to_path_buf(), problem };
                Ok(Tokenizer::from_gguf(&vocabulary(gguf.vocab().map_err(problem)?))?)
            }
            None => Ok(Tokenizer::from_folder(folder.unwrap_or(&self.source.path))?),
        }
    }

    /// Loads the weights and closes the files.
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub(crate) fn load(self, arena: &Arena, options: &LoadOptions) -> Result<Transformer> {
        let bar = ui::Bar::new("loading", self.config.tensors().len());
        let model = Transformer::load(&self.checkpoint, arena, options, &mut |done, _| bar.set(done, "tensors"));
        bar.finish();
        Ok(model?)
    }

    /// What `base_model_name_or_path` is to say.
    pub(crate) fn name(&self) -> &str {
        &self.source.name
    }

    /// One line about it.
    pub(crate) fn describe(&self) -> String {
        format!("{} ({})", self.source.name, describe(&self.config))
    }
}

/// Family, blocks and parameters of a model.
pub(crate) fn describe(config: &ModelConfig) -> String {
    let parameters: usize = config.tensors().iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
    let family = format!("{:?}", config.family).to_lowercase();
    let ModelConfig { num_hidden_layers, .. } = config;
    let millions = parameters as f64 / 1e6;
    format!("{family}, {num_hidden_layers} blocks, {millions:.1} M parameters")
}

/// How a checkpoint is loaded for texts of up to `max_positions` tokens.
pub(crate) fn load_options(precision: &Precision, max_positions: usize) -> LoadOptions {
    LoadOptions { quant: precision.quant, compute_dtype: precision.compute_dtype, max_positions, blocks_on_host: 0 }
}

/// Opens an adapter's folder.
///
/// # Errors
/// [`CliError::NotAnAdapter`], and what is wrong with its files.
pub(crate) fn open_adapter(path: &Path) -> Result<AdapterFile> {
    if !nibble_lora::is_adapter(path) {
        let found = if path.is_dir() {
            "a folder without it"
        } else if path.exists() {
            "a file"
        } else {
            "nothing"
        };
        return Err(CliError::NotAnAdapter { path: path.to_path_buf(), found });
    }
    Ok(AdapterFile::open(path)?)
}

/// Warns if an adapter names another model than this one.
pub(crate) fn warn_of_other_base(adapter: &AdapterFile, base: &str) {
    if let Some(trained_on) = other_base(adapter.config.base_model_name_or_path.as_deref(), base) {
        ui::warn(format_args!("the adapter was trained on `{trained_on}`; it is now put on `{base}`"));
    }
}

/// The model an adapter names, unless its last part is that of `base`: folders are moved and copied.
fn other_base<'a>(trained_on: Option<&'a str>, base: &str) -> Option<&'a str> {
    trained_on.filter(|name| !name.is_empty() && last_part(name) != last_part(base))
}

/// What stays of a model's name when it is moved or copied.
pub(crate) fn last_part(name: &str) -> &str {
    name.trim_end_matches('/').rsplit(['/', '\\']).next().unwrap_or_default()
}

/// The vocabulary of a GGUF file as the tokenizer takes it.
fn vocabulary(vocab: GgufVocab) -> nibble_data::GgufVocab {
    // By name and without `..`: a field that one side gets later does not go missing here.
    let GgufVocab {
        model,
        pre,
        tokens,
        scores,
        token_types,
        merges,
        bos_id,
        eos_id,
        eot_id,
        unk_id,
        pad_id,
        add_bos,
        add_eos,
        add_space_prefix,
        chat_template,
    } = vocab;
    nibble_data::GgufVocab {
        model,
        pre,
        tokens,
        scores: Some(scores).filter(|scores| !scores.is_empty()),
        token_types: Some(token_types).filter(|types| !types.is_empty()),
        merges: Some(merges).filter(|merges| !merges.is_empty()),
        bos_id,
        eos_id,
        eot_id,
        unk_id,
        pad_id,
        add_bos,
        add_eos,
        add_space_prefix,
        chat_template,
    }
}

/// The only GGUF file of a folder, or the path itself: for llama.cpp, which takes no folder of one.
pub(crate) fn weights_path(source: &ModelSource) -> std::path::PathBuf {
    only_gguf(&source.path).unwrap_or_else(|| source.path.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(quant: Quant) -> PrecisionArgs {
        PrecisionArgs {
            quant,
            double_quant: None,
            quant_block_size: None,
            compute_dtype: ComputeDtype::F32,
            device: DeviceName::Cpu,
        }
    }

    #[test]
    fn the_defaults_are_qlora() {
        let precision = Precision::from_args(&args(Quant::Nf4)).unwrap();
        assert_eq!(precision.quant, Some(QuantConfig::default()));
        assert_eq!(precision.compute_dtype, DType::F32);
    }

    #[test]
    fn details_of_a_format_that_is_not_used_are_refused() {
        let error = Precision::from_args(&PrecisionArgs { double_quant: Some(true), ..args(Quant::None) }).unwrap_err();
        assert_eq!(error.to_string(), "`--double-quant` has no effect with `--quant none`");
        assert!(Precision::from_args(&PrecisionArgs { quant_block_size: Some(64), ..args(Quant::None) }).is_err());
    }

    #[test]
    fn a_moved_base_is_the_same_and_another_is_named() {
        assert_eq!(other_base(Some("org/name"), "/models/name"), None);
        assert_eq!(other_base(Some("org/name/"), "name"), None);
        assert_eq!(other_base(None, "name"), None);
        assert_eq!(other_base(Some("org/name"), "org/other"), Some("org/name"));
    }
}
