//! An adapter on the layers of a model whose weights stay in their file.

use nibble_autograd::{Param, ParamStore, ParamStoreBuilder};
use nibble_lora::{AdapterFile, Init, Linear, Mismatch, PREFIX, Weight};
use nibble_model::{
    config::{ModelConfig, Role},
    files::Checkpoint,
};
use nibble_nf4::{Format, QuantConfig};
use nibble_tensor::{Absmax, Arena, BlockWeight, DType, Tensor};

use crate::error::Result;

/// The layers that an adapter is on, and its values.
#[derive(Debug)]
pub(super) struct Layers {
    linears: Vec<Linear>,
    params: ParamStore,
}

impl Layers {
    /// Puts the adapter on the model's linears, of which only sizes and biases are read.
    ///
    /// # Errors
    /// When the adapter does not fit, with every mismatch.
    pub(super) fn new(config: &ModelConfig, checkpoint: &Checkpoint, adapter: &AdapterFile) -> Result<Self> {
        let arena = Arena::new(nibble_tensor::Device::Cpu);
        let specs = config.tensors();
        let mut linears = Vec::new();
        for spec in specs.iter().filter(|spec| spec.role == Role::Linear) {
            let path = spec.name.trim_end_matches(".weight");
            let bias = format!("{path}.bias");
            let bias = if specs.iter().any(|spec| spec.name == bias) { Some(read(&arena, checkpoint, &bias)?) } else { None };
            linears.push(Linear::new(path, sizes_only(&arena, [spec.shape[0], spec.shape[1]])?, bias));
        }
        let mut builder = ParamStoreBuilder::default();
        nibble_lora::attach(&adapter.config, &mut linears.iter_mut().collect::<Vec<_>>(), Init::File(adapter), &mut builder)?;
        modules_to_save(config, adapter, &mut builder)?;
        let params = builder.build(&arena)?;
        adapter.expect_all_used(&params)?;
        Ok(Self { linears, params })
    }

    /// The layer with this weight, if it has an adapter.
    pub(super) fn adapted(&self, weight: &str) -> Option<&Linear> {
        let path = weight.strip_suffix(".weight")?;
        self.linears.iter().find(|linear| linear.path == path && linear.adapter.is_some())
    }

    /// What takes the place of a tensor of the checkpoint: a module trained whole, or a trained bias.
    pub(super) fn replacement(&self, tensor: &str) -> Option<&Param> {
        self.params.params().iter().find(|param| param.name.strip_prefix(PREFIX) == Some(tensor))
    }

    /// The adapter's values.
    pub(super) fn params(&self) -> &ParamStore {
        &self.params
    }

    /// Layers with an adapter, of how many.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.linears.iter().filter(|linear| linear.adapter.is_some()).count(), self.linears.len())
    }
}

/// A weight that only knows its sizes: nothing is multiplied by it.
fn sizes_only(arena: &Arena, shape: [usize; 2]) -> Result<Weight> {
    let packed = Tensor::empty(arena, DType::U8, [0])?;
    let absmax = Absmax::Plain(Tensor::empty(arena, DType::F32, [0])?);
    let config = QuantConfig { format: Format::Nf4, double_quant: false, ..QuantConfig::default() };
    Ok(Weight::Nf4(BlockWeight { shape: shape.into(), config, packed, absmax }))
}

fn read(arena: &Arena, checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let mut values = vec![0.0; checkpoint.info(name)?.shape.iter().product()];
    checkpoint.read_f32(name, &mut values)?;
    Ok(Tensor::from_slice(arena, &values, [values.len()])?)
}

/// The embedding and the head, where the adapter has them whole.
fn modules_to_save(config: &ModelConfig, adapter: &AdapterFile, builder: &mut ParamStoreBuilder) -> Result<()> {
    for module in adapter.config.modules_to_save.iter().flatten() {
        let path = match module.rsplit('.').next() {
            Some("lm_head") => "lm_head",
            Some("embed_tokens") => "model.embed_tokens",
            _ => return Err(nibble_model::Error::ModuleToSave { module: module.clone() }.into()),
        };
        let name = format!("{PREFIX}{path}.weight");
        let expected = [config.vocab_size, config.hidden_size];
        let mismatch = match adapter.get(&name) {
            Some((shape, values)) if shape == expected => {
                builder.add(name, expected, values.to_vec());
                continue;
            }
            Some((found, _)) => Mismatch::Shape { name, expected: expected.into(), found: found.to_vec() },
            None => Mismatch::Missing { name, expected: expected.into() },
        };
        let (path, mismatches) = (adapter.path().to_path_buf(), vec![mismatch]);
        return Err(nibble_lora::Error::Mismatches { path, mismatches }.into());
    }
    Ok(())
}
