//! A model described as plain data, read from its `config.json`.
//!
//! Both spellings are read: transformers v4 (`torch_dtype`, `rope_theta`, `rope_scaling`) and v5 (`dtype`,
//! `rope_parameters`, `layer_types`). Defaults of absent fields are those of the family's config class in
//! transformers. Every problem of a file is reported at once.

mod family;
mod features;
mod fields;
mod rope;
mod tensors;

use std::path::Path;

use serde_json::{Map, Value};

pub use family::Family;
pub use features::{Activation, Features, NormPlacement, QkNorm};
pub use rope::{Rope, RopeScaling};
pub use tensors::{Role, TensorSpec};

use crate::error::{ConfigProblem, Error, Result};
use crate::files::StoredType;
use fields::Fields;

/// A decoder-only transformer, as its `config.json` describes it. C, H, D and V are hidden size, heads, head size and
/// vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The model type, of the ones described here.
    pub family: Family,
    /// C, the width of the residual stream.
    pub hidden_size: usize,
    /// The width inside the gated MLP.
    pub intermediate_size: usize,
    /// The number of blocks.
    pub num_hidden_layers: usize,
    /// H, the number of query heads.
    pub num_attention_heads: usize,
    /// The number of key and value heads; it divides H.
    pub num_key_value_heads: usize,
    /// D, the size of a head; H · D need not be C.
    pub head_dim: usize,
    /// V, the rows of the embedding.
    pub vocab_size: usize,
    /// ε in x / √(mean x² + ε).
    pub rms_norm_eps: f32,
    /// The longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the output projection is the embedding's matrix.
    pub tie_word_embeddings: bool,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end one: none, one, or several (`config.json` has an integer or a list).
    pub eos_token_ids: Vec<u32>,
    /// The token that fills up batches.
    pub pad_token_id: Option<u32>,
    /// The element type that the weights were saved in, where it is told.
    pub dtype: Option<StoredType>,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Rotary position embedding of the layers with a window, where it differs (Gemma 3).
    pub rope_local: Option<Rope>,
    /// What the family does differently from the common block.
    pub features: Features,
    /// Fields that were read and set aside, with the reason.
    pub notes: Vec<Note>,
    raw: Map<String, Value>,
    text: String,
}

/// A field that has no effect on what is computed here, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The field.
    pub field: &'static str,
    /// Its value, as JSON.
    pub value: String,
    /// Why it is set aside.
    pub reason: &'static str,
}

/// What a model that is saved again has in other form than the one that was loaded. The default changes nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConfigChanges {
    /// The element type of the weights now.
    pub dtype: Option<StoredType>,
    /// Whether the embeddings are tied now.
    pub tie_word_embeddings: Option<bool>,
    /// The rows of the embedding now.
    pub vocab_size: Option<usize>,
}

impl ModelConfig {
    /// Reads a `config.json` that will be run.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json), and when the file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io { op: "read", path: path.to_owned(), source })?;
        Self::from_json(&text, &path.display().to_string())
    }

    /// Reads the text of a `config.json` that will be run; `model` names it in errors.
    ///
    /// # Errors
    /// [`Error::Json`] when the text is no JSON; [`Error::Config`] with every field that is missing, malformed or
    /// contradictory, and every feature that is not run yet.
    pub fn from_json(text: &str, model: &str) -> Result<Self> {
        let config = Self::describe(text, model)?;
        let problems: Vec<_> = config
            .not_run()
            .into_iter()
            .map(|feature| ConfigProblem::NotRun { family: config.family.model_type(), feature })
            .collect();
        if problems.is_empty() { Ok(config) } else { Err(Error::Config { model: model.to_owned(), problems }) }
    }

    /// Reads a config as data, whether or not the transformer runs all of its features.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json), but for the features that are not run yet.
    pub fn describe(text: &str, model: &str) -> Result<Self> {
        let raw: Map<String, Value> = serde_json::from_str(text).map_err(|source| Error::Json { path: model.into(), source })?;
        let refuse = |problems| Error::Config { model: model.to_owned(), problems };
        let mut fields = Fields::new(&raw);
        let Some(family) = Family::read(&mut fields) else {
            return Err(refuse(fields.into_problems()));
        };
        let config = Self::assemble(family, &mut fields, text);
        let problems = fields.into_problems();
        if problems.is_empty() { Ok(config) } else { Err(refuse(problems)) }
    }

    fn assemble(family: Family, fields: &mut Fields<'_>, text: &str) -> Self {
        let num_attention_heads = fields.size("num_attention_heads");
        let hidden_size = fields.size("hidden_size");
        let num_hidden_layers = fields.layers("num_hidden_layers");
        let head_dim = family.head_dim(fields, hidden_size, num_attention_heads);
        let num_key_value_heads = fields.size_or("num_key_value_heads", num_attention_heads);
        if num_key_value_heads != 0 && !num_attention_heads.is_multiple_of(num_key_value_heads) {
            fields.contradiction(
                "num_key_value_heads",
                format!("a divisor of {num_attention_heads}"),
                "num_attention_heads",
                num_key_value_heads.to_string(),
            );
        }
        let (rope, rope_local) = rope::read(family, fields, head_dim);
        let features = features::read(family, fields, num_hidden_layers, hidden_size, head_dim);
        fields.refuse_quantized();
        Self {
            family,
            hidden_size,
            intermediate_size: fields.size("intermediate_size"),
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size"),
            rms_norm_eps: fields.positive("rms_norm_eps") as f32,
            max_position_embeddings: fields.size("max_position_embeddings"),
            tie_word_embeddings: fields.flag_or("tie_word_embeddings", family.ties_by_default()),
            bos_token_id: fields.token("bos_token_id"),
            eos_token_ids: fields.tokens("eos_token_id"),
            pad_token_id: fields.token("pad_token_id"),
            dtype: fields.dtype(),
            rope,
            rope_local,
            features,
            notes: fields.notes(),
            raw: fields.raw().clone(),
            text: text.to_owned(),
        }
    }

    /// The features of this config that the transformer does not run yet, each said in words.
    #[must_use]
    pub fn not_run(&self) -> Vec<&'static str> {
        let mut found = self.features.not_run();
        if self.rope_local.is_some() {
            found.push("another rotary base in layers with a window");
        }
        if self.rope.rotary_dim != self.head_dim {
            found.push("a partial rotary embedding");
        }
        found
    }

    /// The fields of the file, as read.
    #[must_use]
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// The text of a `config.json` for the same model saved again: character for character the one that was read, unless
    /// something changed. A change touches its own field (under the spelling the file has) and drops
    /// `quantization_config`, since what is saved is not quantised.
    #[must_use]
    pub fn to_json(&self, changes: ConfigChanges) -> String {
        let mut raw = self.raw.clone();
        // shift_remove keeps the other fields' order.
        raw.shift_remove("quantization_config");
        if let Some(dtype) = changes.dtype {
            let key = if raw.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            raw.insert(key.to_owned(), Value::from(dtype.torch_name()));
        }
        if let Some(tied) = changes.tie_word_embeddings
            && tied != self.tie_word_embeddings
        {
            raw.insert("tie_word_embeddings".to_owned(), Value::from(tied));
        }
        if let Some(rows) = changes.vocab_size {
            raw.insert("vocab_size".to_owned(), Value::from(rows));
        }
        if raw == self.raw {
            return self.text.clone();
        }
        let mut text = format!("{:#}", Value::Object(raw));
        text.push('\n');
        text
    }
}
