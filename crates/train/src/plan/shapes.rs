//! Models of the usual sizes, for the table of what fits where.

use nibble_model::config::ModelConfig;

use crate::Result;

/// Name, family; hidden size, intermediate size, layers, heads, key/value heads, vocabulary; positions; tied embeddings.
type Shape = (&'static str, &'static str, [usize; 6], usize, bool);

/// One well-known model of each size: Qwen2.5-1.5B, Llama-2-7B and -13B, LLaMA-30B, Llama-2-70B.
const SHAPES: [Shape; 5] = [
    ("1.5B", "qwen2", [1536, 8960, 28, 12, 2, 151_936], 32_768, true),
    ("7B", "llama", [4096, 11_008, 32, 32, 32, 32_000], 4096, false),
    ("13B", "llama", [5120, 13_824, 40, 40, 40, 32_000], 4096, false),
    ("30B", "llama", [6656, 17_920, 60, 52, 52, 32_000], 2048, false),
    ("70B", "llama", [8192, 28_672, 80, 64, 8, 32_000], 4096, false),
];

/// The sizes that [`named_size`] knows.
pub const NAMED_SIZES: [&str; 5] = ["1.5B", "7B", "13B", "30B", "70B"];

/// The config of a model of a usual size.
///
/// # Errors
/// None: the configs are complete.
pub fn named_size(name: &str) -> Result<Option<ModelConfig>> {
    let Some(&(_, family, sizes, positions, tied)) = SHAPES.iter().find(|shape| shape.0 == name) else { return Ok(None) };
    let [hidden, intermediate, layers, heads, kv_heads, vocab] = sizes;
    let architecture = if family == "qwen2" { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" };
    let config = serde_json::json!({
        "architectures": [architecture], "model_type": family, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    });
    Ok(Some(ModelConfig::from_json(&config.to_string(), name)?))
}
