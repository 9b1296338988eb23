//! What examples share: the shapes of named models with made-up weights, memory of a device, and made-up data.
#![allow(dead_code, reason = "each example uses a part of it")]

use nibble_data::{Dataset, DatasetOptions};
use nibble_model::config::ModelConfig;
use nibble_tensor::{
    Arena, Device, Rng,
    cuda::{
        CudaDevice, OpenOptions,
        libraries::{self, SearchPaths},
    },
};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Name and kind; hidden, intermediate, layers, heads, key/value heads, vocabulary; theta, positions, eps, tied.
type Named = (&'static str, &'static str, [usize; 6], f64, usize, f64, bool);

const SHAPES: [Named; 6] = [
    ("llama3-8b", "Llama", [4096, 14336, 32, 32, 8, 128_256], 500_000.0, 131_072, 1e-5, false),
    ("qwen2.5-1.5b", "Qwen2", [1536, 8960, 28, 12, 2, 151_936], 1_000_000.0, 32_768, 1e-6, true),
    ("smollm2-135m", "Llama", [576, 1536, 30, 9, 3, 49_152], 100_000.0, 8192, 1e-5, true),
    ("mistral-7b", "Mistral", [4096, 14336, 32, 32, 8, 32_000], 10_000.0, 32_768, 1e-5, false),
    ("llama2-13b", "Llama", [5120, 13_824, 40, 40, 40, 32_000], 10_000.0, 4096, 1e-5, false),
    ("llama2-70b", "Llama", [8192, 28672, 80, 64, 8, 32_000], 10_000.0, 4096, 1e-5, false),
];

/// The config of a named model.
pub(crate) fn shape(name: &str) -> Result<ModelConfig> {
    let known = || SHAPES.map(|shape| shape.0).join(", ");
    let found = SHAPES.iter().find(|shape| shape.0 == name);
    let &(_, kind, sizes, theta, positions, eps, tied) =
        found.ok_or_else(|| format!("unknown shape `{name}`: one of {}", known()))?;
    let [hidden, intermediate, layers, heads, kv_heads, vocab] = sizes;
    let config = serde_json::json!({
        "architectures": [format!("{kind}ForCausalLM")], "model_type": kind.to_lowercase(), "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "rope_theta": theta, "max_position_embeddings": positions,
        "rms_norm_eps": eps, "tie_word_embeddings": tied, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "sliding_window": null,
    });
    Ok(ModelConfig::from_json(&config.to_string(), name)?)
}

/// The first GPU.
pub(crate) fn gpu() -> Result<CudaDevice> {
    let folders = std::env::var_os("LD_LIBRARY_PATH").map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
    let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
    Ok(CudaDevice::open(0, &OpenOptions { libraries, cache: None })?)
}

/// An arena of at most `limit` bytes.
pub(crate) fn arena(device: &str, limit: usize) -> Result<Arena> {
    Ok(if device == "cpu" { Arena::with_limit(Device::Cpu, limit) } else { Arena::on(Device::Cuda(gpu()?), limit)? })
}

/// Documents of made-up tokens, of these lengths.
pub(crate) fn random_data(vocab: usize, lengths: &[usize]) -> Result<Dataset> {
    let rng = Rng::new(0);
    let rows = lengths.iter().zip(0..).map(|(&length, row)| {
        let ids: Vec<u64> = (0..length as u64).map(|i| rng.stream(row).bits(i) % vocab as u64).collect();
        serde_json::json!({ "input_ids": ids })
    });
    let options = DatasetOptions { vocab_size: Some(vocab), ..DatasetOptions::default() };
    Ok(Dataset::from_tokenized_rows(rows, &options)?)
}
