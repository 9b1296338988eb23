//! Puts adapters beside the linears that a config targets.

use std::path::PathBuf;

use nibble_autograd::{Leaf, Param, ParamStoreBuilder};
use nibble_tensor::{Rng, Shape};

use crate::{
    Adapter, AdapterConfig, AdapterFile, Bias, Error, InitLoraWeights, Linear, Lora, Mismatch, PREFIX, Result, target::Targets,
};

/// Where first values come from.
#[derive(Clone, Copy, Debug)]
pub enum Init<'a> {
    /// From the config's `init_lora_weights` and a seed.
    Random(u64),
    /// From a saved adapter.
    File(&'a AdapterFile),
    /// Nothing but zeros: where only sizes count.
    Zeros,
}

/// Gives each of `linears` that `config` selects an adapter whose values go into `builder`.
///
/// The A of all layers come first, then the B: layers that share an input have their A side by side, so that they are one
/// matrix.
///
/// # Errors
/// [`Error::NoTarget`] when nothing is selected, [`Error::Pattern`], [`Error::Unsupported`], and [`Error::Mismatches`] when a
/// file's tensors do not fit.
pub fn attach(
    config: &AdapterConfig,
    linears: &mut [&mut Linear],
    init: Init<'_>,
    builder: &mut ParamStoreBuilder,
) -> Result<()> {
    config.validate()?;
    let targets = Targets::new(config)?;
    let selected: Vec<usize> = (0..linears.len()).filter(|&i| targets.selects(&linears[i].path)).collect();
    if selected.is_empty() && config.modules_to_save.as_ref().is_none_or(Vec::is_empty) {
        return Err(no_target(config, linears));
    }
    let mut values = Values { config, init, mismatches: Vec::new() };
    let mut a = Vec::with_capacity(selected.len());
    for &i in &selected {
        let (path, (_, inputs)) = (&linears[i].path, linears[i].sizes());
        let rank = targets.rank(path);
        a.push(values.add(builder, &format!("{PREFIX}{path}.lora_A.weight"), [rank, inputs], i));
    }
    for (&i, a) in selected.iter().zip(a) {
        let linear = &mut *linears[i];
        let ((outputs, _), rank) = (linear.sizes(), a.shape.dims()[0]);
        let b = values.add(builder, &format!("{PREFIX}{}.lora_B.weight", linear.path), [outputs, rank], i);
        let scale = config.scaling(rank, targets.alpha(&linear.path)) as f32;
        linear.adapter = Some(Adapter::Lora(Lora { a, b, scale, dropout: config.lora_dropout as f32 }));
    }
    for (i, linear) in linears.iter_mut().enumerate() {
        let trains = match config.bias {
            Bias::None => false,
            Bias::LoraOnly => selected.contains(&i),
            Bias::All => true,
        };
        if let Some(Leaf::Frozen(bias)) = linear.bias.as_ref().filter(|_| trains) {
            let frozen = bias.to_f32_vec()?;
            let param = values.add_or(builder, &format!("{PREFIX}{}.bias", linear.path), bias.shape(), |_| frozen);
            linear.bias = Some(Leaf::Param(param));
        }
    }
    values.finish()
}

fn no_target(config: &AdapterConfig, linears: &[&mut Linear]) -> Error {
    let mut available: Vec<String> =
        linears.iter().filter_map(|linear| linear.path.rsplit('.').next().map(str::to_owned)).collect();
    available.sort();
    available.dedup();
    let target_modules = config.target_modules.as_ref().map_or_else(|| "null".to_owned(), ToString::to_string);
    Error::NoTarget { target_modules, available }
}

/// First values, and what of them did not fit.
struct Values<'a> {
    config: &'a AdapterConfig,
    init: Init<'a>,
    mismatches: Vec<Mismatch>,
}

impl Values<'_> {
    fn add(&mut self, builder: &mut ParamStoreBuilder, name: &str, shape: [usize; 2], layer: usize) -> Param {
        let init = self.config.init_lora_weights.clone();
        self.add_or(builder, name, shape.into(), |seed| random(&init, name, shape, Rng::new(seed).stream(layer as u64)))
    }

    fn add_or(
        &mut self,
        builder: &mut ParamStoreBuilder,
        name: &str,
        shape: Shape,
        fresh: impl FnOnce(u64) -> Vec<f32>,
    ) -> Param {
        let values = match self.init {
            Init::Random(seed) => fresh(seed),
            Init::File(file) => self.saved(file, name, shape),
            Init::Zeros => Vec::new(),
        };
        builder.add(name, shape, values)
    }

    fn saved(&mut self, file: &AdapterFile, name: &str, expected: Shape) -> Vec<f32> {
        match file.get(name) {
            None => self.mismatches.push(Mismatch::Missing { name: name.to_owned(), expected }),
            Some((found, values)) if found == expected.dims() => return values.to_vec(),
            Some((found, _)) => self.mismatches.push(Mismatch::Shape { name: name.to_owned(), expected, found: found.to_vec() }),
        }
        Vec::new()
    }

    fn finish(self) -> Result<()> {
        if self.mismatches.is_empty() {
            return Ok(());
        }
        let path = match self.init {
            Init::File(file) => file.path().to_path_buf(),
            Init::Random(_) | Init::Zeros => PathBuf::new(),
        };
        Err(Error::Mismatches { path, mismatches: self.mismatches })
    }
}

/// Fresh values of A [R, in] or B [out, R] (PEFT's `reset_lora_parameters`).
fn random(init: &InitLoraWeights, name: &str, [rows, cols]: [usize; 2], rng: Rng) -> Vec<f32> {
    let is_a = name.ends_with("lora_A.weight");
    let rng = rng.stream(u64::from(is_a));
    let uniform = |bound: f32| (0..(rows * cols) as u64).map(|n| (2.0 * rng.uniform(n) - 1.0) * bound).collect();
    match init {
        InitLoraWeights::Random => uniform(1.0 / (cols as f32).sqrt()),
        _ if !is_a => vec![0.0; rows * cols],
        InitLoraWeights::Gaussian => (0..(rows * cols) as u64).map(|n| rng.normal(n) / rows as f32).collect(),
        _ => uniform(1.0 / (cols as f32).sqrt()),
    }
}
