//! PEFT's `adapter_config.json`.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Error, Result};

/// No layer has more inputs or outputs that a rank could serve.
const MAX_RANK: usize = 1 << 16;

/// The method, as PEFT names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeftType {
    /// Low-rank adaptation.
    #[default]
    #[serde(rename = "LORA")]
    Lora,
}

/// Which modules get an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `all-linear`, or a regular expression that must match the whole path.
    Pattern(String),
    /// Names: the whole path or its end after a dot.
    Names(Vec<String>),
}

impl TargetModules {
    /// Every linear layer but the output head.
    pub const ALL_LINEAR: &str = "all-linear";
}

impl std::fmt::Display for TargetModules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pattern(pattern) => write!(f, "`{pattern}`"),
            Self::Names(names) => write!(f, "`{}`", names.join(",")),
        }
    }
}

/// Which biases train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of the layers with an adapter.
    LoraOnly,
}

/// First values of A and B.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// A ~ U(-1/√in, 1/√in) (Kaiming with a = √5), B = 0.
    #[default]
    Default,
    /// A ~ N(0, 1/r), B = 0.
    Gaussian,
    /// A and B both as a fresh linear layer: the adapter is not a no-op at the start (for tests).
    Random,
    /// A method that this crate does not act on.
    Other(String),
}

impl Serialize for InitLoraWeights {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_bool(true),
            Self::Random => serializer.serialize_bool(false),
            Self::Gaussian => serializer.serialize_str("gaussian"),
            Self::Other(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Value {
            Flag(bool),
            Name(String),
        }
        Ok(match Value::deserialize(deserializer)? {
            Value::Flag(true) => Self::Default,
            Value::Flag(false) => Self::Random,
            Value::Name(name) if name == "gaussian" => Self::Gaussian,
            Value::Name(name) => Self::Other(name),
        })
    }
}

/// A LoRA adapter's config, in PEFT's names. Fields that PEFT knows and this crate does not act on are refused when they
/// would change the result ([`AdapterConfig::validate`]); unknown fields are ignored, as PEFT does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// Overrides of `lora_alpha`: a path's end (or a regular expression for it) to alpha.
    #[serde(deserialize_with = "null_is_default")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// The base model's id or folder.
    pub base_model_name_or_path: Option<String>,
    /// Which biases train.
    pub bias: Bias,
    /// Modules left alone: names, or a regular expression.
    pub exclude_modules: Option<TargetModules>,
    /// Whether the base stores its weights transposed (GPT-2); not supported.
    pub fan_in_fan_out: bool,
    /// Written as true, as PEFT does.
    pub inference_mode: bool,
    /// First values.
    pub init_lora_weights: InitLoraWeights,
    /// The name of the list of layers in a path, for `layers_to_transform`.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Only these layers get adapters.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// α: the update is scaled by α / r (α / √r with `use_rslora`).
    pub lora_alpha: f64,
    /// Dropout on the adapter's input.
    pub lora_dropout: f64,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Vec<String>>,
    /// The method.
    pub peft_type: PeftType,
    /// Rank.
    pub r: usize,
    /// Overrides of `r`.
    #[serde(deserialize_with = "null_is_default")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Revision of the base model.
    pub revision: Option<String>,
    /// Which modules get an adapter.
    pub target_modules: Option<TargetModules>,
    /// Always `CAUSAL_LM` here.
    pub task_type: Option<String>,
    /// Weight-decomposed adaptation; refused for now.
    pub use_dora: bool,
    /// Scale by α / √r.
    pub use_rslora: bool,
    /// Bias on B; refused.
    #[serde(skip_serializing)]
    pub lora_bias: bool,
    /// Refused.
    #[serde(skip_serializing)]
    pub use_qalora: bool,
    /// Refused.
    #[serde(skip_serializing)]
    pub layer_replication: Option<serde_json::Value>,
    /// Refused.
    #[serde(skip_serializing)]
    pub trainable_token_indices: Option<serde_json::Value>,
    /// Refused.
    #[serde(skip_serializing)]
    pub target_parameters: Option<serde_json::Value>,
    /// Refused.
    #[serde(skip_serializing)]
    pub alora_invocation_tokens: Option<serde_json::Value>,
    /// Block-diagonal factors; refused.
    #[serde(skip_serializing)]
    pub use_bdlora: Option<serde_json::Value>,
    /// Routing between adapters; refused.
    #[serde(skip_serializing)]
    pub arrow_config: Option<serde_json::Value>,
    /// An SVD of the base; refused.
    #[serde(skip_serializing)]
    pub kasa_config: Option<serde_json::Value>,
    /// Sampled factors; refused.
    #[serde(skip_serializing)]
    pub monteclora_config: Option<serde_json::Value>,
    /// Compressed activations; refused.
    #[serde(skip_serializing)]
    pub velora_config: Option<serde_json::Value>,
    /// Embedding and head of a tied base train as one; refused where they train at all.
    #[serde(skip_serializing)]
    pub ensure_weight_tying: bool,
}

/// A value or a list of them, as PEFT's files have either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All of them.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// Whether an optional field asks for anything.
fn says_something(value: &serde_json::Value) -> bool {
    !value.is_null() && value.as_bool() != Some(false) && value.as_array().is_none_or(|list| !list.is_empty())
}

fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Default for AdapterConfig {
    /// PEFT's defaults (r 8, α 8, no dropout, no rsLoRA).
    fn default() -> Self {
        Self {
            alpha_pattern: BTreeMap::new(),
            base_model_name_or_path: None,
            bias: Bias::None,
            exclude_modules: None,
            fan_in_fan_out: false,
            inference_mode: false,
            init_lora_weights: InitLoraWeights::Default,
            layers_pattern: None,
            layers_to_transform: None,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            modules_to_save: None,
            peft_type: PeftType::Lora,
            r: 8,
            rank_pattern: BTreeMap::new(),
            revision: None,
            target_modules: None,
            task_type: Some("CAUSAL_LM".to_owned()),
            use_dora: false,
            use_rslora: false,
            lora_bias: false,
            use_qalora: false,
            layer_replication: None,
            trainable_token_indices: None,
            target_parameters: None,
            alora_invocation_tokens: None,
            use_bdlora: None,
            arrow_config: None,
            kasa_config: None,
            monteclora_config: None,
            velora_config: None,
            ensure_weight_tying: false,
        }
    }
}

impl AdapterConfig {
    /// Reads and validates `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], [`Error::Unsupported`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        let config: Self = serde_json::from_str(&text).map_err(|source| Error::Json { path: path.to_path_buf(), source })?;
        config.validate()?;
        Ok(config)
    }

    /// Refuses what would train or compute something else than the config says.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first such field.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field, value: &dyn std::fmt::Display, expected| {
            Err(Error::Unsupported { field, value: value.to_string(), expected })
        };
        if let Some(r) = self.rank_pattern.values().copied().chain([self.r]).find(|r| !(1..=MAX_RANK).contains(r)) {
            return refuse("r", &r, "from 1 to 65536");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return refuse("lora_dropout", &self.lora_dropout, "at least 0 and below 1");
        }
        if !self.lora_alpha.is_finite() || self.alpha_pattern.values().any(|alpha| !alpha.is_finite()) {
            return refuse("lora_alpha", &self.lora_alpha, "a finite number");
        }
        let flags = [
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("use_dora", self.use_dora),
            ("lora_bias", self.lora_bias),
            ("use_qalora", self.use_qalora),
            ("ensure_weight_tying", self.ensure_weight_tying && self.may_touch_tied()),
        ];
        if let Some((field, _)) = flags.into_iter().find(|(_, set)| *set) {
            return refuse(field, &true, "false");
        }
        let values = [
            ("layer_replication", &self.layer_replication),
            ("trainable_token_indices", &self.trainable_token_indices),
            ("target_parameters", &self.target_parameters),
            ("alora_invocation_tokens", &self.alora_invocation_tokens),
            ("use_bdlora", &self.use_bdlora),
            ("arrow_config", &self.arrow_config),
            ("kasa_config", &self.kasa_config),
            ("monteclora_config", &self.monteclora_config),
            ("velora_config", &self.velora_config),
        ];
        for (field, value) in values {
            if let Some(value) = value.as_ref().filter(|value| says_something(value)) {
                return refuse(field, value, "null");
            }
        }
        if let InitLoraWeights::Other(name) = &self.init_lora_weights {
            // Of a saved adapter only the values matter, unless its method changed the base weights too.
            let leaves_base = ["eva", "orthogonal"].contains(&name.as_str());
            if !(self.inference_mode && leaves_base) {
                return refuse("init_lora_weights", name, "true, false or \"gaussian\", which leave the base as it is");
            }
        }
        Ok(())
    }

    /// Whether modules that a base may share, its embedding and its head, are saved or get an adapter.
    fn may_touch_tied(&self) -> bool {
        let is_tied = |name: &String| ["embed_tokens", "lm_head"].contains(&name.rsplit('.').next().unwrap_or(name));
        let targeted = match &self.target_modules {
            Some(TargetModules::Names(names)) => names.iter().any(is_tied),
            // A regular expression may name anything.
            Some(TargetModules::Pattern(pattern)) => pattern != TargetModules::ALL_LINEAR,
            None => false,
        };
        targeted || self.modules_to_save.iter().flatten().any(is_tied)
    }

    /// s of a layer with this rank and alpha.
    #[must_use]
    pub fn scaling(&self, rank: usize, alpha: f64) -> f64 {
        if self.use_rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 }
    }

    /// The file's text, as PEFT writes it (sorted keys, two spaces), with `inference_mode` true.
    #[must_use]
    pub fn to_json(&self) -> String {
        let saved = Self { inference_mode: true, ..self.clone() };
        let map: BTreeMap<String, serde_json::Value> =
            serde_json::to_value(saved).ok().and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default();
        serde_json::to_string_pretty(&map).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_survives_its_file() {
        let config = AdapterConfig {
            r: 16,
            lora_alpha: 32.0,
            target_modules: Some(TargetModules::Names(vec!["q_proj".into(), "v_proj".into()])),
            rank_pattern: [("q_proj".to_owned(), 4)].into(),
            layers_to_transform: Some(OneOrMany::Many(vec![0, 2])),
            use_rslora: true,
            inference_mode: true,
            ..AdapterConfig::default()
        };
        let back: AdapterConfig = serde_json::from_str(&config.to_json()).unwrap();
        assert_eq!(back, config);
    }

    #[test]
    fn nulls_and_unknown_fields_are_taken_as_peft_takes_them() {
        let config: AdapterConfig = serde_json::from_str(
            r#"{"peft_type":"LORA","rank_pattern":null,"loftq_config":{},"target_modules":"all-linear","r":4}"#,
        )
        .unwrap();
        assert_eq!((config.r, config.rank_pattern.len()), (4, 0));
        config.validate().unwrap();
    }

    #[test]
    fn what_would_compute_something_else_is_refused_by_name() {
        for text in [
            r#"{"use_dora":true}"#,
            r#"{"lora_bias":true}"#,
            r#"{"r":0}"#,
            r#"{"r":100000000000}"#,
            r#"{"lora_dropout":1.0}"#,
            r#"{"init_lora_weights":"pissa"}"#,
            r#"{"init_lora_weights":"pissa","inference_mode":true}"#,
            r#"{"use_bdlora":{"nblocks":2}}"#,
            r#"{"arrow_config":{"top_k":3}}"#,
            r#"{"kasa_config":{"beta":1e-4}}"#,
            r#"{"monteclora_config":{"num_samples":8}}"#,
            r#"{"velora_config":{"num_groups":32}}"#,
            r#"{"ensure_weight_tying":true,"modules_to_save":["embed_tokens"]}"#,
            r#"{"ensure_weight_tying":true,"target_modules":["q_proj","lm_head"]}"#,
            r#"{"ensure_weight_tying":true,"target_modules":".*"}"#,
        ] {
            let config: AdapterConfig = serde_json::from_str(text).unwrap();
            let field = text[2..].split('"').next().unwrap();
            assert!(config.validate().unwrap_err().to_string().contains(field), "{text}");
        }
    }

    #[test]
    fn variants_that_are_named_and_not_used_are_taken() {
        for text in [
            r#"{"use_bdlora":null,"arrow_config":null,"kasa_config":null,"monteclora_config":null,"velora_config":null}"#,
            r#"{"use_bdlora":false,"ensure_weight_tying":false,"modules_to_save":["lm_head"]}"#,
            r#"{"ensure_weight_tying":true,"target_modules":"all-linear"}"#,
            r#"{"ensure_weight_tying":true,"target_modules":["q_proj"]}"#,
        ] {
            let config: AdapterConfig = serde_json::from_str(text).unwrap();
            config.validate().unwrap();
        }
    }

    #[test]
    fn scaling_is_alpha_over_r_or_over_its_root() {
        let mut config = AdapterConfig::default();
        assert_eq!(config.scaling(16, 32.0), 2.0);
        config.use_rslora = true;
        assert_eq!(config.scaling(16, 32.0), 8.0);
    }
}
