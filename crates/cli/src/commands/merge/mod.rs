//! `nibble merge`: one model out of a base and an adapter, tensor by tensor.

mod layers;
mod report;
mod tensors;

use std::{
    fs,
    path::{Path, PathBuf},
};

use nibble_lora::AdapterFile;
use nibble_model::{
    config::{ConfigChanges, ModelConfig},
    files::{Checkpoint, SafetensorsWriter, StoredType, TensorPlan, WriteOptions},
};
use nibble_nf4::QuantConfig;

use crate::{
    args::{MergeArgs, MergeBase, MergeDtype, Quant},
    base::{self, Base},
    error::{CliError, Result, io_error},
    output::{Staging, copy_tokenizer},
    ui,
};
use layers::Layers;
use tensors::Merger;

/// What of the result goes beyond what was trained or read.
#[derive(Debug, thiserror::Error)]
enum MergeError {
    /// A weight that is no number, which would spread through the model.
    #[error("merge `{name}`: expected finite weights, found {found} in {file}")]
    NonFinite { name: String, found: f32, file: &'static str },
    /// A sum beyond the range of the type it is written in.
    #[error("merge `{name}`: {found:e} is beyond the range of {dtype}")]
    Range { name: String, found: f32, dtype: StoredType },
    /// The weights cannot be quantised.
    #[error("quantize `{name}`: {source}")]
    Quantize { name: String, source: nibble_nf4::Error },
}

impl From<MergeError> for CliError {
    fn from(error: MergeError) -> Self {
        let hint = match &error {
            MergeError::Range { .. } => Some("write `--dtype bf16` or `--dtype f32`".to_owned()),
            MergeError::NonFinite { .. } => Some("the file is damaged, or its training diverged; take an earlier one".to_owned()),
            MergeError::Quantize { .. } => None,
        };
        Self::Command { source: Box::new(error), hint }
    }
}

/// A tensor of the result.
#[derive(Debug)]
struct Output {
    plan: TensorPlan,
    /// The tensor of the checkpoint that it is made from: its own, or for the head of an untied model the embedding's.
    from: String,
    is_linear: bool,
}

/// Merges.
///
/// # Errors
/// What is wrong with the model, the adapter or the output folder, before anything is written; weights that are no numbers.
pub(crate) fn run(args: &MergeArgs) -> Result<()> {
    let quant = quant_config(args)?;
    let staging =
        Staging::new(&args.output, args.overwrite_output_dir, &[Path::new(&args.model.model), Path::new(&args.adapter)])?;
    let adapter = base::open_adapter(&args.adapter)?;
    let base = Base::open(&args.model.model)?;
    base::warn_of_other_base(&adapter, base.name());
    let checkpoint = Checkpoint::open(&base.source.path)?;
    checkpoint.check(&base.config)?;
    let layers = Layers::new(&base.config, &checkpoint, &adapter)?;
    say_plan(args, &base, &adapter, &layers);
    drop(adapter);

    let unties = base.config.tie_word_embeddings
        && ["lm_head.weight", "model.embed_tokens.weight"].iter().any(|name| layers.replacement(name).is_some());
    let outputs = outputs(&base.config, &checkpoint, args.dtype, unties)?;
    let measured = write(&outputs, &checkpoint, &layers, quant, args.base, staging.path())?;
    write_config(&base, &checkpoint, args.dtype, unties, staging.path())?;
    write_texts(&base, staging.path())?;
    let place = staging.commit()?;
    report::say(&measured, args, quant, unties);
    finish(&place)
}

/// The format that the adapter was trained beside.
fn quant_config(args: &MergeArgs) -> Result<Option<QuantConfig>> {
    if args.quant == Quant::None && args.base == MergeBase::Dequantized {
        return Err(CliError::NoEffect { flag: "--base dequantized", with: "--quant none" });
    }
    base::quant_config(args.quant, args.double_quant, args.quant_block_size)
}

fn say_plan(args: &MergeArgs, base: &Base, adapter: &AdapterFile, layers: &Layers) {
    let (adapted, linears) = layers.counts();
    ui::fact("model", base.describe());
    let whole = adapter.config.modules_to_save.iter().flatten().map(String::as_str).collect::<Vec<_>>();
    let whole = if whole.is_empty() { String::new() } else { format!(", whole: {}", whole.join(", ")) };
    let r = adapter.config.r;
    ui::fact("adapter", format_args!("{}: rank {r} on {adapted} of {linears} linear layers{whole}", args.adapter.display()));
}

/// Every tensor of the result, in the model's order.
fn outputs(config: &ModelConfig, checkpoint: &Checkpoint, dtype: MergeDtype, unties: bool) -> Result<Vec<Output>> {
    let mut outputs = Vec::new();
    for spec in config.tensors() {
        let is_linear = spec.role == nibble_model::config::Role::Linear;
        let dtype = output_type(dtype, checkpoint.info(&spec.name)?.dtype);
        let plan = TensorPlan { name: spec.name.clone(), dtype, shape: spec.shape };
        outputs.push(Output { plan, from: spec.name, is_linear });
    }
    if unties {
        let from = outputs[0].from.clone();
        let plan = TensorPlan { name: "lm_head.weight".to_owned(), ..outputs[0].plan.clone() };
        outputs.push(Output { plan, from, is_linear: false });
    }
    Ok(outputs)
}

fn output_type(asked: MergeDtype, found: StoredType) -> StoredType {
    match asked {
        MergeDtype::F32 => StoredType::F32,
        MergeDtype::Bf16 => StoredType::BF16,
        MergeDtype::F16 => StoredType::F16,
        // Sums are made in f32; no model is kept wider.
        MergeDtype::Same if found == StoredType::F64 => StoredType::F32,
        MergeDtype::Same => found,
    }
}

fn write(
    outputs: &[Output],
    checkpoint: &Checkpoint,
    layers: &Layers,
    quant: Option<QuantConfig>,
    base: MergeBase,
    folder: &Path,
) -> Result<tensors::Measured> {
    let plan: Vec<TensorPlan> = outputs.iter().map(|output| output.plan.clone()).collect();
    let writer = SafetensorsWriter::create(folder, &plan, &WriteOptions::default())?;
    let mut merger = Merger::new(checkpoint, layers, quant, base, writer);
    let bar = ui::Bar::new("merging", outputs.len());
    for (i, output) in outputs.iter().enumerate() {
        merger.tensor(output)?;
        checkpoint.release(&output.from)?;
        bar.set(i + 1, "tensors");
    }
    bar.finish();
    merger.finish()
}

fn write_config(base: &Base, checkpoint: &Checkpoint, dtype: MergeDtype, unties: bool, folder: &Path) -> Result<()> {
    let found = checkpoint.info("model.embed_tokens.weight")?.dtype;
    let written = output_type(dtype, found);
    let changes = ConfigChanges {
        dtype: (dtype != MergeDtype::Same || written != found).then_some(written),
        tie_word_embeddings: unties.then_some(false),
        vocab_size: None,
    };
    let path = folder.join("config.json");
    fs::write(&path, base.config.to_json(changes)).map_err(io_error("write", path))
}

/// Tokenizer and generation settings: copied, or written from what a GGUF file carries. A model may have none.
fn write_texts(base: &Base, folder: &Path) -> Result<()> {
    let from = base.source.tokenizer_folder();
    let copied = from.map_or(Ok(0), |from| copy_tokenizer(from, folder))?;
    if copied == 0 {
        match base.tokenizer() {
            Ok(tokenizer) => tokenizer.save(folder)?,
            Err(_) => ui::warn("the model has no tokenizer files, so the result has none"),
        }
    }
    let (name, to) = ("generation_config.json", folder.join("generation_config.json"));
    if let Some(from) = from.map(|from| from.join(name)).filter(|from| from.is_file()) {
        // Not `fs::copy`: a file of the cache may be read-only, and the copy would be too.
        let bytes = fs::read(&from).map_err(io_error("read", from))?;
        fs::write(&to, bytes).map_err(io_error("write", to))?;
    }
    Ok(())
}

fn finish(place: &PathBuf) -> Result<()> {
    let sizes = fs::read_dir(place).map_err(io_error("list", place))?.filter_map(|entry| entry.ok()?.metadata().ok());
    let (files, bytes) = sizes.fold((0, 0), |(files, bytes), meta| (files + 1, bytes + meta.len() as usize));
    ui::fact("wrote", format_args!("{}: {files} files, {}", place.display(), ui::bytes(bytes)));
    ui::say(format_args!("next: nibble generate --model {} --prompt '...'", place.display()));
    Ok(())
}
