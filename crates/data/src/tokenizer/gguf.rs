//! A tokenizer from the vocabulary that a GGUF file carries.
//!
//! The vocabulary is written as the `tokenizer.json` that the model's own repository has: byte-level BPE for
//! `tokenizer.ggml.model = gpt2`, SentencePiece-style BPE with byte fallback for `llama`. One way in, and the files of
//! an adapter trained on a GGUF are the ordinary ones.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::pre::{KNOWN, PreTokenizer};
use super::{NamedTemplate, SpecialTokens, Tokenizer};
use crate::error::{Error, Result};
use crate::template::TemplateSource;

/// Token types of `tokenizer.ggml.token_type` that matter here.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The keys `tokenizer.*` of a GGUF file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// `tokenizer.ggml.pre`: the name of the splitting rules of a `gpt2` vocabulary.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: `llama` needs them, they order the merges.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.merges`: `gpt2` needs them.
    pub merges: Option<Vec<String>>,
    /// `tokenizer.ggml.bos_token_id`
    pub bos_id: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`
    pub eos_id: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`
    pub eot_id: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`
    pub unk_id: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`
    pub pad_id: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; absent means yes for `llama` and Llama 3's rules, no otherwise.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; absent means no.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; absent means yes. Only `llama` vocabularies use it.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`
    pub chat_template: Option<String>,
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// [`Error::UnknownVocabModel`], [`Error::UnknownPreTokenizer`], [`Error::GgufFieldMissing`],
    /// [`Error::GgufFieldLength`], [`Error::GgufMerge`], [`Error::GgufTokenId`], [`Error::TokenizerJson`].
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self> {
        vocab.check()?;
        let (json, add_bos) = match vocab.model.as_str() {
            "gpt2" => vocab.byte_level_json()?,
            "llama" => vocab.sentence_piece_json()?,
            other => return Err(Error::UnknownVocabModel { found: other.to_owned() }),
        };
        let inner = tokenizers::Tokenizer::from_bytes(json.to_string())
            .map_err(|source| Error::TokenizerJson { origin: "tokenizer.ggml".into(), source })?;
        let mut config = Map::new();
        config.insert("add_bos_token".into(), add_bos.into());
        config.insert("add_eos_token".into(), vocab.add_eos.unwrap_or(false).into());
        let template =
            vocab.chat_template.clone().map(|text| NamedTemplate { name: "default".into(), text, source: TemplateSource::Gguf });
        let ends = vocab.eot_id.into_iter().collect();
        Self::assemble(inner, vocab.special_tokens(), ends, template.into_iter().collect(), config)
    }
}

impl GgufVocab {
    fn check(&self) -> Result<()> {
        let expected = self.tokens.len();
        let scores = self.scores.as_ref().map(Vec::len);
        let types = self.token_types.as_ref().map(Vec::len);
        for (field, found) in [("scores", scores), ("token_type", types)] {
            if let Some(found) = found.filter(|&n| n != expected) {
                return Err(Error::GgufFieldLength { field, expected, found });
            }
        }
        let ids = [
            ("bos_token_id", self.bos_id),
            ("eos_token_id", self.eos_id),
            ("eot_token_id", self.eot_id),
            ("unknown_token_id", self.unk_id),
            ("padding_token_id", self.pad_id),
        ];
        for (field, id) in ids {
            if let Some(found) = id.filter(|&id| id as usize >= expected) {
                return Err(Error::GgufTokenId { field, vocab_size: expected, found });
            }
        }
        Ok(())
    }

    fn token_type(&self, id: usize) -> i32 {
        self.token_types.as_ref().map_or(NORMAL, |types| types[id])
    }

    fn text(&self, id: Option<u32>) -> Option<String> {
        id.map(|id| self.tokens[id as usize].clone())
    }

    fn special_tokens(&self) -> SpecialTokens {
        SpecialTokens {
            bos: self.text(self.bos_id),
            eos: self.text(self.eos_id),
            unk: self.text(self.unk_id),
            pad: self.text(self.pad_id),
        }
    }

    fn missing(&self, field: &'static str) -> Error {
        Error::GgufFieldMissing { model: self.model.clone(), field }
    }

    fn byte_level_json(&self) -> Result<(Value, bool)> {
        let rules = PreTokenizer::named(self.pre.as_deref())
            .ok_or_else(|| Error::UnknownPreTokenizer { found: self.pre.clone().unwrap_or_default(), known: KNOWN.to_vec() })?;
        let merges = self.merges.as_ref().ok_or_else(|| self.missing("merges"))?;
        let pairs: Vec<[&str; 2]> = merges.iter().enumerate().map(|(i, m)| pair(i, m)).collect::<Result<_>>()?;
        let add_bos = self.add_bos.unwrap_or(rules.add_bos);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": rules.ignore_merges, "vocab": self.vocab_json(), "merges": pairs,
        });
        let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        Ok((self.tokenizer_json(&rules.normalizer, &rules.json, &model, &decoder, add_bos), add_bos))
    }

    fn sentence_piece_json(&self) -> Result<(Value, bool)> {
        let scores = self.scores.as_ref().ok_or_else(|| self.missing("scores"))?;
        let space_prefix = self.add_space_prefix.unwrap_or(true);
        let to_meta = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
        let mut normalizers = vec![to_meta];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if space_prefix {
            normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        let add_bos = self.add_bos.unwrap_or(true);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": self.text(self.unk_id), "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": self.vocab_json(), "merges": self.merges_from_scores(scores),
        });
        let normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
        let decoder = json!({ "type": "Sequence", "decoders": decoders });
        Ok((self.tokenizer_json(&normalizer, &Value::Null, &model, &decoder, add_bos), add_bos))
    }

    /// The merges that SentencePiece's scores imply: every split of a token into two tokens, best score first, then
    /// longest left part, then longest right part (the order of Hugging Face's converter).
    fn merges_from_scores(&self, scores: &[f32]) -> Vec<[&str; 2]> {
        let ids: HashMap<&str, usize> = self.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate().filter(|&(id, _)| self.token_type(id) == NORMAL) {
            let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let mut found: Vec<_> = splits.filter_map(|(l, r)| Some((*ids.get(l)?, *ids.get(r)?, l, r))).collect();
            found.sort_unstable();
            merges.extend(found.into_iter().map(|(_, _, l, r)| (scores[id], l.chars().count(), r.chars().count(), [l, r])));
        }
        // Stable, so that equal keys stay in the order of ids.
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))));
        merges.into_iter().map(|m| m.3).collect()
    }

    fn vocab_json(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect()
    }

    fn tokenizer_json(&self, normalizer: &Value, pre: &Value, model: &Value, decoder: &Value, add_bos: bool) -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added_tokens(),
            "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": self.post_processor(add_bos),
            "decoder": decoder, "model": model,
        })
    }

    /// Control tokens are special; user-defined ones are only kept whole.
    fn added_tokens(&self) -> Vec<Value> {
        let special = [self.bos_id, self.eos_id, self.eot_id, self.unk_id, self.pad_id];
        let kind = |id: usize| match self.token_type(id) {
            CONTROL => Some(true),
            _ if special.contains(&Some(id as u32)) => Some(true),
            USER_DEFINED => Some(false),
            _ => None,
        };
        let entry = |(id, token): (usize, &String)| {
            let special = kind(id)?;
            Some(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }))
        };
        self.tokens.iter().enumerate().filter_map(entry).collect()
    }

    fn post_processor(&self, add_bos: bool) -> Value {
        let bos = self.bos_id.filter(|_| add_bos);
        let eos = self.eos_id.filter(|_| self.add_eos.unwrap_or(false));
        let token = |id: u32| json!({ "SpecialToken": { "id": self.tokens[id as usize], "type_id": 0 } });
        let text = |name: &str, kind: u32| json!({ "Sequence": { "id": name, "type_id": kind } });
        let around =
            |inner: Vec<Value>| -> Vec<Value> { bos.map(token).into_iter().chain(inner).chain(eos.map(token)).collect() };
        let special: Map<String, Value> = bos
            .into_iter()
            .chain(eos)
            .map(|id| {
                let name = self.tokens[id as usize].clone();
                (name.clone(), json!({ "id": name, "ids": [id], "tokens": [name] }))
            })
            .collect();
        json!({
            "type": "TemplateProcessing", "single": around(vec![text("A", 0)]),
            "pair": around(vec![text("A", 0), text("B", 1)]), "special_tokens": special,
        })
    }
}

/// The two sides of a merge. Byte-level tokens hold no space, but the first character is never the separator.
fn pair(index: usize, merge: &str) -> Result<[&str; 2]> {
    let bad = || Error::GgufMerge { index, found: merge.to_owned() };
    let first = merge.chars().next().ok_or_else(bad)?.len_utf8();
    let at = first + merge[first..].find(' ').ok_or_else(bad)?;
    let (left, right) = (&merge[..at], &merge[at + 1..]);
    if right.is_empty() { Err(bad()) } else { Ok([left, right]) }
}
