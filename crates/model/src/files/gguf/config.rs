//! The `config.json` that a GGUF file's metadata amount to.

use serde_json::{Map, Value as Json, json};

use super::names::{head_count, required};
use super::{Gguf, Value};
use crate::config::{Rope, RopeScaling};
use crate::error::GgufProblem;
use crate::files::StoredType;

/// What the config takes from the tensors, since the metadata do not say it.
pub(in crate::files) struct Weights<'a> {
    /// The content of `rope_freqs.weight`.
    pub(in crate::files) factors: Option<Vec<f32>>,
    /// Whether there is a tensor of this Hugging Face name.
    pub(in crate::files) has: &'a dyn Fn(&str) -> bool,
    /// Its shape.
    pub(in crate::files) shape: &'a dyn Fn(&str) -> Option<Vec<usize>>,
    /// The element type of the matrices, as read.
    pub(in crate::files) dtype: StoredType,
}

type Result<T> = std::result::Result<T, GgufProblem>;

impl Gguf {
    /// The text of a `config.json` in the spelling that transformers of v4 and v5 read.
    pub(in crate::files) fn config_json(&self, weights: &Weights<'_>) -> Result<String> {
        self.refuse_what_is_not_run()?;
        let hidden = self.size("embedding_length")?;
        let heads = head_count(self, "attention.head_count")?;
        let head_dim = match self.optional("attention.key_length", "a size", Value::as_u64)? {
            Some(length) => length as usize,
            None => hidden / heads.max(1),
        };
        let theta = self.optional("rope.freq_base", "a number", Value::as_f64)?.unwrap_or(10_000.0);
        let rotary_dim = self.optional("rope.dimension_count", "a size", Value::as_u64)?.unwrap_or(head_dim as u64) as usize;

        let mut config = Map::new();
        let mut set = |key: &str, value: Json| drop(config.insert(key.to_owned(), value));
        let (class, model_type) = self.class();
        set("architectures", json!([class]));
        set("model_type", json!(model_type));
        set("hidden_size", json!(hidden));
        set("intermediate_size", json!(self.size("feed_forward_length")?));
        set("num_hidden_layers", json!(self.size("block_count")?));
        set("num_attention_heads", json!(heads));
        set("num_key_value_heads", json!(head_count(self, "attention.head_count_kv")?));
        set("head_dim", json!(head_dim));
        set("hidden_act", json!("silu"));
        let (key, eps) = self.of_arch("attention.layer_norm_rms_epsilon");
        set("rms_norm_eps", json!(required(key, eps, "a number", Value::as_f64)?));
        set("max_position_embeddings", json!(self.size("context_length")?));
        set("rope_theta", json!(theta));
        let rope = Rope { theta, rotary_dim, scaling: RopeScaling::None };
        if let Some(scaling) = self.rope_scaling(&rope, weights.factors.as_deref())? {
            set("rope_scaling", scaling);
        }
        if rotary_dim != head_dim {
            set("partial_rotary_factor", json!(rotary_dim as f64 / head_dim.max(1) as f64));
        }
        set("vocab_size", json!(self.vocab_size(weights)?));
        set("tie_word_embeddings", json!(!(weights.has)("lm_head.weight")));
        if model_type == "qwen3" || model_type == "llama" {
            set("attention_bias", json!((weights.has)("model.layers.0.self_attn.q_proj.bias")));
        }
        if model_type == "llama" {
            set("mlp_bias", json!((weights.has)("model.layers.0.mlp.down_proj.bias")));
        }
        if let Some(window) = self.window()? {
            set("sliding_window", json!(window));
        }
        for (key, from) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = self.metadata.get(&format!("tokenizer.ggml.{from}_token_id")).and_then(Value::as_u64) {
                set(key, json!(id));
            }
        }
        set("torch_dtype", json!(weights.dtype.torch_name()));
        let mut text = format!("{:#}", Json::Object(config));
        text.push('\n');
        Ok(text)
    }

    /// The class and model type: a `llama` file with a window is Mistral.
    fn class(&self) -> (&'static str, &'static str) {
        match self.architecture() {
            "qwen2" => ("Qwen2ForCausalLM", "qwen2"),
            "qwen3" => ("Qwen3ForCausalLM", "qwen3"),
            _ if matches!(self.window(), Ok(Some(_))) => ("MistralForCausalLM", "mistral"),
            _ => ("LlamaForCausalLM", "llama"),
        }
    }

    /// The window, where it is one: 0 says none.
    fn window(&self) -> Result<Option<u64>> {
        let window = self.optional("attention.sliding_window", "a size", Value::as_u64)?;
        Ok(window.filter(|&window| window > 0 && self.architecture() == "llama"))
    }

    fn refuse_what_is_not_run(&self) -> Result<()> {
        let zero = |value: &Value| value.as_u64() == Some(0) || value.as_f64() == Some(0.0);
        for key in ["expert_count", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale"] {
            let (key, value) = self.of_arch(key);
            if let Some(value) = value.filter(|value| !zero(value)) {
                return Err(GgufProblem::NotRun { key, found: value.brief() });
            }
        }
        let (key, length) = self.of_arch("attention.key_length");
        let (_, value_length) = self.of_arch("attention.value_length");
        if let (Some(length), Some(other)) = (length.and_then(Value::as_u64), value_length.and_then(Value::as_u64))
            && length != other
        {
            return Err(GgufProblem::NotRun { key, found: format!("{length} beside values of {other}") });
        }
        Ok(())
    }

    fn vocab_size(&self, weights: &Weights<'_>) -> Result<usize> {
        match (weights.shape)("model.embed_tokens.weight") {
            Some(shape) => Ok(shape.first().copied().unwrap_or(0)),
            None => self.size("vocab_size"),
        }
    }

    /// `rope_scaling` as a config spells it: from the scaling's type, or from the factors of Llama 3.1.
    fn rope_scaling(&self, rope: &Rope, factors: Option<&[f32]>) -> Result<Option<Json>> {
        if let Some(factors) = factors {
            return self.llama3(rope, factors).map(Some);
        }
        let (key, kind) = self.of_arch("rope.scaling.type");
        match kind.and_then(Value::as_str) {
            None | Some("none") => Ok(None),
            Some("linear") => {
                let (key, factor) = self.of_arch("rope.scaling.factor");
                let factor = required(key, factor, "a number", Value::as_f64)?;
                Ok(Some(json!({ "rope_type": "linear", "factor": factor })))
            }
            Some(other) => Err(GgufProblem::NotRun { key, found: format!("`{other}`") }),
        }
    }

    /// The Llama 3.1 scaling whose frequencies these factors are: low and high frequency factors are 1 and 4 in every
    /// published model, the length of the first training is in the metadata or 8192, and the largest factor is the divisor.
    fn llama3(&self, plain: &Rope, factors: &[f32]) -> Result<Json> {
        let told = self.optional("rope.scaling.original_context_length", "a size", Value::as_u64)?;
        let original = told.unwrap_or(8192) as usize;
        let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        };
        let scaled = Rope { scaling, ..plain.clone() }.inv_freq();
        let plain = plain.inv_freq();
        let close = |((&scaled, &plain), &factor): ((&f32, &f32), &f32)| (scaled * factor / plain - 1.0).abs() < 1e-4;
        if factors.len() != plain.len() || !scaled.iter().zip(&plain).zip(factors).all(close) {
            let found = "factors of no known scaling".to_owned();
            return Err(GgufProblem::Tensor { name: "rope_freqs.weight".to_owned(), expected: "Llama 3.1's factors", found });
        }
        Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }))
    }

    fn size(&self, key: &str) -> Result<usize> {
        let (key, value) = self.of_arch(key);
        required(key, value, "a size", Value::as_u64).map(|size| size as usize)
    }

    fn optional<T>(&self, key: &str, expected: &'static str, as_type: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let (key, value) = self.of_arch(key);
        value.map(|value| required(key, Some(value), expected, as_type)).transpose()
    }
}
