//! The described model types, and what each one's config class says where a file is silent.

use super::fields::Fields;
use crate::error::ConfigProblem;

/// A model type of transformers whose block can be said in [`Features`](super::Features).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// `llama`: Llama 2 and 3, SmolLM2, TinyLlama and most others.
    Llama,
    /// `mistral`: a window over every layer, where `sliding_window` is set.
    Mistral,
    /// `qwen2`: biases on the query, key and value projections.
    Qwen2,
    /// `qwen3`: a norm over each query and key head.
    Qwen3,
    /// `gemma`: norms scaled by 1 + w, scaled embeddings, tanh-GELU.
    Gemma,
    /// `gemma2`: Gemma with four norms a block, soft caps, and windows on every other layer.
    Gemma2,
    /// `gemma3_text`: Gemma 2 with head norms instead of caps, and a second rotary base.
    Gemma3,
    /// `phi3`: fused qkv and gate-up matrices.
    Phi3,
    /// `olmo2`: norms after attention and MLP only, and over whole queries and keys.
    Olmo2,
}

impl Family {
    /// Every described family.
    pub const ALL: [Self; 9] =
        [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Gemma, Self::Gemma2, Self::Gemma3, Self::Phi3, Self::Olmo2];

    /// The name in `model_type`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
        }
    }

    /// Reads `model_type`; none after a problem.
    pub(super) fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let model_type = fields.text("model_type");
        if fields.get("text_config").is_some() {
            let model_type = model_type.unwrap_or("no model_type").to_owned();
            fields.problem(ConfigProblem::Nested { model_type });
            return None;
        }
        let Some(model_type) = model_type else {
            if fields.get("model_type").is_none() {
                fields.missing("model_type", "the model's type");
            }
            return None;
        };
        let family = Self::ALL.into_iter().find(|family| family.model_type() == model_type);
        if family.is_none() {
            let known: Vec<_> = Self::ALL.iter().map(|family| family.model_type()).collect();
            let known = format!("`{}`", known.join("`, `"));
            fields.problem(ConfigProblem::Architecture { known, found: model_type.to_owned() });
        }
        family
    }

    /// `head_dim`, or what the family has where a file is silent: 128 for Qwen3, 256 for Gemma, else C / H.
    pub(super) fn head_dim(self, fields: &mut Fields<'_>, hidden: usize, heads: usize) -> usize {
        if let Some(head_dim) = fields.opt_size("head_dim") {
            return head_dim;
        }
        match self {
            Self::Qwen3 => 128,
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => 256,
            _ if heads == 0 || hidden.is_multiple_of(heads) => hidden / heads.max(1),
            _ => {
                let expected = format!("a multiple of {heads}");
                fields.contradiction("hidden_size", expected, "num_attention_heads", hidden.to_string());
                0
            }
        }
    }

    /// Whether a file without `tie_word_embeddings` has tied embeddings: it is left out where it is the class's
    /// default, which is true for Gemma alone.
    pub(super) const fn ties_by_default(self) -> bool {
        self.is_gemma()
    }

    pub(super) const fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma | Self::Gemma2 | Self::Gemma3)
    }
}
