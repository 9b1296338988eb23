//! From a checkpoint to a model, tensor by tensor.

use std::collections::HashMap;

use half::bf16;
use nibble_autograd::{Leaf, Offload};
use nibble_lora::{Linear, Weight};
use nibble_nf4::QuantConfig;
use nibble_tensor::{
    Arena, DType, Device, HostPool, Owner, Rng, Tensor,
    cuda::Pinned,
    ops::{self, attention, glu, rms_norm, rope::RopeTable},
};

use crate::{
    Result, Transformer,
    block::{Block, Shared},
    checkpointing::is_of_spread,
    config::{Activation, ModelConfig, QkNorm, Role},
    files::{Checkpoint, StoredType},
    prefetch::{BUFFER_BYTES, Prefetch},
};

/// How a checkpoint is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// The blocks' linears are kept in this format; `None`: as stored, like embedding, head and norms. On a GPU matrices that are
    /// not quantised are converted to the type of 16-bit activations.
    pub quant: Option<QuantConfig>,
    /// The type of activations.
    pub compute_dtype: DType,
    /// The longest document, in tokens, that rope's table is made for (at most the model's own limit).
    pub max_positions: usize,
    /// Blocks, spread evenly, whose 4-bit codes stay in host memory and come to the device while blocks before them run.
    /// Training keeps no more of these than their inputs.
    pub blocks_on_host: usize,
}

impl Transformer {
    /// Loads the model of a checkpoint into memory of `arena`. Every tensor is read, quantised and released before the next:
    /// the 16-bit model is never in memory. `progress` is called with (tensors done, tensors in all).
    ///
    /// # Errors
    /// What is wrong with the config, all mismatches between config and tensors at once, out of memory.
    pub fn load(
        checkpoint: &Checkpoint,
        arena: &Arena,
        options: &LoadOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let config = checkpoint.config()?;
        checkpoint.check(&config)?;
        let Device::Cuda(device) = arena.device() else {
            return Self::build(config, Source::Checkpoint(checkpoint, None), arena, options, progress);
        };
        std::thread::scope(|scope| {
            let ahead = Prefetch::start(scope, checkpoint, &config, move || Ok(Pinned::new(device, BUFFER_BYTES)?));
            Self::build(config, Source::Checkpoint(checkpoint, Some(ahead)), arena, options, progress)
        })
    }

    /// A model of made-up weights, for benches: speed and memory do not depend on the values.
    ///
    /// # Errors
    /// Out of memory.
    pub fn random(config: ModelConfig, arena: &Arena, options: &LoadOptions, seed: u64) -> Result<Self> {
        let shapes = config.tensors().into_iter().map(|spec| (spec.name, (spec.shape, spec.role))).collect();
        Self::build(config, Source::Random(shapes, Rng::new(seed)), arena, options, &mut |_, _| {})
    }

    /// A model of weights with unspecified content, in memory as if it were loaded: to find out what a step takes.
    ///
    /// # Errors
    /// Out of memory.
    pub fn empty(config: ModelConfig, arena: &Arena, options: &LoadOptions) -> Result<Self> {
        let stored = match config.dtype {
            Some(StoredType::F32) => DType::F32,
            Some(StoredType::F16) => DType::F16,
            _ => DType::Bf16,
        };
        let shapes = config.tensors().into_iter().map(|spec| (spec.name, spec.shape)).collect();
        Self::build(config, Source::Empty(shapes, stored), arena, options, &mut |_, _| {})
    }

    fn build(
        config: ModelConfig,
        source: Source<'_>,
        arena: &Arena,
        options: &LoadOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let total = config.tensors().len();
        let host = HostPool::new(arena.device());
        let mut loader = Loader { source, arena, host: &host, options, done: 0, total, progress };
        let embed_tokens = loader.leaf("model.embed_tokens.weight")?;
        let blocks = (0..config.num_hidden_layers).map(|i| loader.block(&config, i)).collect::<Result<_>>()?;
        let norm = loader.leaf("model.norm.weight")?;
        let lm_head = if config.tie_word_embeddings { None } else { Some(loader.leaf("lm_head.weight")?) };
        let shared = Shared {
            norm: rms_norm::Config { eps: config.rms_norm_eps, offset: if config.features.norm_offset { 1.0 } else { 0.0 } },
            activation: match config.features.activation {
                Activation::Silu => glu::Activation::Silu,
                Activation::Gelu => glu::Activation::Gelu,
                Activation::GeluTanh => glu::Activation::GeluTanh,
            },
            rope: RopeTable::new(arena, &config.rope.inv_freq(), 1.0, options.max_positions.min(config.max_position_embeddings))?,
            head_dim: config.head_dim,
        };
        let dtype = options.compute_dtype;
        let (arena, smallest_on_host) = (arena.clone(), Offload::smallest_on(arena.device()));
        Ok(Self { config, arena, host, smallest_on_host, dtype, embed_tokens, blocks, shared, norm, lm_head })
    }
}

/// Where the tensors come from.
enum Source<'a> {
    /// With what is read ahead of it, for a GPU.
    Checkpoint(&'a Checkpoint, Option<Prefetch<Pinned>>),
    /// Made up, by name.
    Random(HashMap<String, (Vec<usize>, Role)>, Rng),
    /// Memory alone, by name, in the type that it is stored in.
    Empty(HashMap<String, Vec<usize>>, DType),
}

/// The standard deviation of made-up weights, as transformers initialises them.
const RANDOM_STD: f32 = 0.02;

struct Loader<'a> {
    source: Source<'a>,
    arena: &'a Arena,
    host: &'a HostPool,
    options: &'a LoadOptions,
    done: usize,
    total: usize,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl Loader<'_> {
    fn block(&mut self, config: &ModelConfig, index: usize) -> Result<Block> {
        let features = &config.features;
        let at = |part: &str| format!("model.layers.{index}.{part}");
        let on_host = is_of_spread(index, self.options.blocks_on_host.min(config.num_hidden_layers), config.num_hidden_layers);
        // In the order of `ModelConfig::tensors`, in which they are read ahead.
        Ok(Block {
            input_norm: self.leaf(&at("input_layernorm.weight"))?,
            q_proj: self.linear(at("self_attn.q_proj"), features.qkv_bias, on_host)?,
            k_proj: self.linear(at("self_attn.k_proj"), features.qkv_bias, on_host)?,
            v_proj: self.linear(at("self_attn.v_proj"), features.qkv_bias, on_host)?,
            head_norms: match features.qk_norm {
                QkNorm::None | QkNorm::Full => None,
                QkNorm::Head => Some([self.leaf(&at("self_attn.q_norm.weight"))?, self.leaf(&at("self_attn.k_norm.weight"))?]),
            },
            o_proj: self.linear(at("self_attn.o_proj"), features.o_bias, on_host)?,
            post_attention_norm: self.leaf(&at("post_attention_layernorm.weight"))?,
            gate_proj: self.linear(at("mlp.gate_proj"), features.mlp_bias, on_host)?,
            up_proj: self.linear(at("mlp.up_proj"), features.mlp_bias, on_host)?,
            down_proj: self.linear(at("mlp.down_proj"), features.mlp_bias, on_host)?,
            attention: attention::Config {
                scale: features.query_scale,
                window: features.windows[index],
                softcap: features.attn_softcap,
            },
        })
    }

    /// A frozen tensor as stored (rounded to bf16 where stored in a block format).
    fn leaf(&mut self, name: &str) -> Result<Leaf> {
        let _scope = self.arena.scope(Owner::Embeddings);
        let mut tensor = self.in_compute_dtype(name)?;
        if tensor.dims().len() == 1 {
            // Norms compute with f32 weights: widened once, not in each step.
            tensor = tensor.to_dtype(DType::F32)?;
        }
        self.finish(name)?;
        Ok(Leaf::Frozen(tensor))
    }

    fn linear(&mut self, path: String, has_bias: bool, on_host: bool) -> Result<Linear> {
        let _scope = self.arena.scope(Owner::BaseWeights);
        let name = format!("{path}.weight");
        let weight = match self.options.quant {
            None => Weight::Dense(self.in_compute_dtype(&name)?),
            Some(quant) => self.quantized(&name, &quant)?,
        };
        self.finish(&name)?;
        let bias = if has_bias {
            let name = format!("{path}.bias");
            let bias = self.dense(&name)?;
            self.finish(&name)?;
            Some(bias)
        } else {
            None
        };
        let linear = Linear::new(path, weight, bias);
        if on_host { Ok(linear.send_base(self.host)?) } else { Ok(linear) }
    }

    fn quantized(&mut self, name: &str, quant: &QuantConfig) -> Result<Weight> {
        let checkpoint = match &self.source {
            Source::Checkpoint(checkpoint, _) => *checkpoint,
            Source::Random(shapes, rng) => {
                let (shape, _) = &shapes[name];
                return Ok(Weight::random(self.arena, [shape[0], shape[1]], quant, RANDOM_STD, *rng)?);
            }
            Source::Empty(shapes, _) => {
                // A device quantises what it was sent.
                let shape = [shapes[name][0], shapes[name][1]];
                let dense = self.dense(name)?;
                let weight = Weight::empty(self.arena, shape, quant)?;
                drop(dense);
                return Ok(weight);
            }
        };
        if self.arena.device() != Device::Cpu {
            // The device quantises faster than the host, to the same bits.
            let tensor = self.dense(name)?;
            return ops::quantize::forward(&tensor, quant).map_err(|error| match error {
                nibble_tensor::Error::Quantization(source) => crate::Error::Quantize { name: name.to_owned(), source },
                other => other.into(),
            });
        }
        let info = checkpoint.info(name)?;
        let numel: usize = info.shape.iter().product();
        let blocks = if info.dtype == StoredType::BF16 {
            let mut values = vec![bf16::ZERO; numel];
            checkpoint.read_bf16(name, &mut values)?;
            nibble_nf4::quantize(&values, quant)
        } else {
            let mut values = vec![0.0f32; numel];
            checkpoint.read_f32(name, &mut values)?;
            nibble_nf4::quantize(&values, quant)
        };
        let blocks = blocks.map_err(|source| crate::Error::Quantize { name: name.to_owned(), source })?;
        Ok(Weight::from_blocks(self.arena, &blocks, [info.shape[0], info.shape[1]])?)
    }

    fn dense(&mut self, name: &str) -> Result<Tensor> {
        let checkpoint = match &self.source {
            Source::Checkpoint(checkpoint, _) => *checkpoint,
            Source::Random(shapes, rng) => return random_dense(self.arena, &shapes[name], *rng),
            Source::Empty(shapes, stored) => {
                return Ok(match shapes[name][..] {
                    [rows, cols] => Tensor::empty(self.arena, *stored, [rows, cols])?,
                    ref other => Tensor::empty(self.arena, *stored, [other.iter().product()])?,
                });
            }
        };
        let info = checkpoint.info(name)?;
        let numel: usize = info.shape.iter().product();
        let shaped = |tensor: Tensor| match info.shape[..] {
            [rows, cols] => tensor.reshape([rows, cols]),
            _ => Ok(tensor),
        };
        if let Some(tensor) = self.read_ahead(name, info.dtype, numel)? {
            return Ok(shaped(tensor)?);
        }
        let on_host = self.arena.device() == Device::Cpu;
        let host = if on_host { self.arena.clone() } else { Arena::new(Device::Cpu) };
        let mut tensor = match info.dtype {
            StoredType::BF16 => {
                let mut tensor = Tensor::empty(&host, DType::Bf16, [numel])?;
                checkpoint.read_bf16(name, tensor.as_mut_slice::<bf16>()?)?;
                tensor
            }
            stored => {
                let mut tensor = Tensor::empty(&host, DType::F32, [numel])?;
                checkpoint.read_f32(name, tensor.as_mut_slice::<f32>()?)?;
                if stored == StoredType::F16 { tensor.to_dtype(DType::F16)? } else { tensor }
            }
        };
        if !on_host {
            tensor = tensor.to_arena(self.arena)?;
        }
        Ok(shaped(tensor)?)
    }

    /// A matrix in the type of 16-bit activations, so that it is not converted in each product: on the CPU, whose products read any
    /// type, only one in bf16 where activations are f16. For f32 activations as stored: wider it would take twice the memory.
    fn in_compute_dtype(&mut self, name: &str) -> Result<Tensor> {
        let tensor = self.dense(name)?;
        let (compute, on_host) = (self.options.compute_dtype, self.arena.device() == Device::Cpu);
        let is_read_as_stored = on_host && (tensor.dtype(), compute) != (DType::Bf16, DType::F16);
        if compute == DType::F32 || is_read_as_stored || tensor.dims().len() != 2 {
            return Ok(tensor);
        }
        Ok(tensor.to_dtype(compute)?)
    }

    /// A tensor on the GPU, if it is the one that was read ahead.
    fn read_ahead(&mut self, name: &str, stored: StoredType, numel: usize) -> Result<Option<Tensor>> {
        let Source::Checkpoint(_, Some(ahead)) = &mut self.source else { return Ok(None) };
        let dtype = match stored {
            StoredType::BF16 => DType::Bf16,
            StoredType::F16 => DType::F16,
            _ => DType::F32,
        };
        let mut tensor = Tensor::empty(self.arena, dtype, [numel])?;
        let found = ahead.tensor(name, |at, len, buffer| Ok(buffer.send_part(&mut tensor, at, len)?))?;
        Ok(found.then_some(tensor))
    }

    fn finish(&mut self, name: &str) -> Result<()> {
        if let Source::Checkpoint(checkpoint, _) = &self.source {
            checkpoint.release(name)?;
        }
        self.done += 1;
        (self.progress)(self.done, self.total);
        Ok(())
    }
}

/// A made-up tensor in bf16; the weights of norms are 1.
fn random_dense(arena: &Arena, (shape, role): &(Vec<usize>, Role), rng: Rng) -> Result<Tensor> {
    let numel: usize = shape.iter().product();
    let pattern: Vec<bf16> = match role {
        Role::Norm => vec![bf16::ONE],
        _ => (0..numel.min(1 << 18) as u64).map(|n| bf16::from_f32(RANDOM_STD * rng.normal(n))).collect(),
    };
    let pattern: Vec<bf16> = pattern.iter().copied().cycle().take(numel.min(1 << 18)).collect();
    Ok(match shape[..] {
        [rows, cols] => Tensor::tiled(arena, &pattern, [rows, cols])?,
        _ => Tensor::tiled(arena, &pattern, [numel])?,
    })
}

#[cfg(test)]
mod tests {
    use nibble_tensor::cuda::{ComputeCapability, CudaDevice, DeviceInfo};

    use super::*;

    /// A model of a checkpoint stored in `stored`, on a GPU that only counts or on the CPU.
    fn loaded(stored: StoredType, compute_dtype: DType, on_gpu: bool) -> Transformer {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64, "tie_word_embeddings": false, "hidden_act": "silu", "torch_dtype": stored.torch_name(),
        });
        let config = ModelConfig::from_json(&config.to_string(), "made").unwrap();
        let (capability, name) = (ComputeCapability::new(9, 0), "a GPU of the loader's tests".to_owned());
        let info = DeviceInfo { ordinal: 0, name, capability, memory: 1 << 30, multiprocessors: 132, driver: 12_090 };
        let device = if on_gpu { Device::Cuda(CudaDevice::dry(&info)) } else { Device::Cpu };
        let options = LoadOptions { quant: None, compute_dtype, max_positions: 64, blocks_on_host: 0 };
        Transformer::empty(config, &Arena::on(device, usize::MAX).unwrap(), &options).unwrap()
    }

    #[test]
    fn matrices_are_of_the_type_that_products_read_them_in() {
        for (stored, compute, on_gpu, expected) in [
            (StoredType::F32, DType::Bf16, true, DType::Bf16),
            (StoredType::F16, DType::Bf16, true, DType::Bf16),
            (StoredType::F32, DType::F16, true, DType::F16),
            (StoredType::BF16, DType::F16, true, DType::F16),
            (StoredType::F32, DType::F32, true, DType::F32),
            (StoredType::BF16, DType::F32, true, DType::Bf16),
            (StoredType::F32, DType::Bf16, false, DType::F32),
            (StoredType::BF16, DType::F16, false, DType::F16),
        ] {
            let model = loaded(stored, compute, on_gpu);
            for (name, leaf) in [("embedding", &model.embed_tokens), ("head", model.head())] {
                let Leaf::Frozen(tensor) = leaf else { panic!("{name} is trained") };
                assert_eq!(tensor.dtype(), expected, "{name} of {stored:?} for {compute}");
            }
            for linear in model.linears() {
                let (out, inputs) = linear.sizes();
                assert_eq!(linear.base_bytes(), out * inputs * expected.size(), "{stored:?} for {compute}");
            }
        }
    }
}
