//! The tokenizer that a GGUF file carries, as plain data.

use super::names::required;
use super::{Gguf, Value};
use crate::error::GgufProblem;

/// A vocabulary as `tokenizer.ggml.*` holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufVocab {
    /// `model`: `llama` (SentencePiece) or `gpt2` (byte-level BPE).
    pub model: String,
    /// `pre`: the name of the pre-tokenizer.
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `scores`, by id; empty where there are none.
    pub scores: Vec<f32>,
    /// `token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; empty where there are none.
    pub token_types: Vec<i32>,
    /// `merges`, best first, as `left right`.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos_id: Option<u32>,
    /// `eos_token_id`.
    pub eos_id: Option<u32>,
    /// `eot_token_id`: the end of a turn.
    pub eot_id: Option<u32>,
    /// `unknown_token_id`.
    pub unk_id: Option<u32>,
    /// `padding_token_id`.
    pub pad_id: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`: Jinja.
    pub chat_template: Option<String>,
}

type Result<T> = std::result::Result<T, GgufProblem>;

impl Gguf {
    /// The vocabulary.
    ///
    /// # Errors
    /// [`GgufProblem::Metadata`] when the tokens are missing, a value is of another kind, or the lists' lengths differ.
    pub fn vocab(&self) -> Result<GgufVocab> {
        let tokens = self.list("tokens", "strings", as_string)?;
        if tokens.is_empty() {
            let key = "tokenizer.ggml.tokens".to_owned();
            return Err(GgufProblem::Metadata { key, expected: "strings", found: "nothing".to_owned() });
        }
        let scores = self.list("scores", "a float a token", as_f32)?;
        let token_types = self.list("token_type", "an integer a token", as_i32)?;
        for (key, found) in [("scores", scores.len()), ("token_type", token_types.len())] {
            if found != 0 && found != tokens.len() {
                let key = format!("tokenizer.ggml.{key}");
                return Err(GgufProblem::Metadata { key, expected: "one entry a token", found: found.to_string() });
            }
        }
        Ok(GgufVocab {
            model: self.entry("model", "a string", as_string)?.unwrap_or_default(),
            pre: self.entry("pre", "a string", as_string)?,
            tokens,
            scores,
            token_types,
            merges: self.list("merges", "strings", as_string)?,
            bos_id: self.entry("bos_token_id", "a token id", as_id)?,
            eos_id: self.entry("eos_token_id", "a token id", as_id)?,
            eot_id: self.entry("eot_token_id", "a token id", as_id)?,
            unk_id: self.entry("unknown_token_id", "a token id", as_id)?,
            pad_id: self.entry("padding_token_id", "a token id", as_id)?,
            add_bos: self.entry("add_bos_token", "a boolean", Value::as_bool)?,
            add_eos: self.entry("add_eos_token", "a boolean", Value::as_bool)?,
            add_space_prefix: self.entry("add_space_prefix", "a boolean", Value::as_bool)?,
            chat_template: self.metadata.get("tokenizer.chat_template").and_then(as_string),
        })
    }

    fn entry<T>(&self, key: &str, expected: &'static str, as_type: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let key = format!("tokenizer.ggml.{key}");
        let value = self.metadata.get(&key);
        value.map(|value| required(key, Some(value), expected, as_type)).transpose()
    }

    fn list<T>(&self, key: &str, expected: &'static str, as_type: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
        let all = |value: &Value| value.as_array()?.iter().map(&as_type).collect::<Option<Vec<_>>>();
        Ok(self.entry(key, expected, all)?.unwrap_or_default())
    }
}

fn as_string(value: &Value) -> Option<String> {
    value.as_str().map(ToOwned::to_owned)
}

fn as_f32(value: &Value) -> Option<f32> {
    match value {
        Value::F32(value) => Some(*value),
        other => other.as_f64().map(|value| value as f32),
    }
}

fn as_i32(value: &Value) -> Option<i32> {
    value.as_i64().and_then(|value| i32::try_from(value).ok())
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|value| u32::try_from(value).ok())
}
