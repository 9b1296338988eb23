//! A tokenizer with what its model's files say about it: special tokens, end tokens, chat templates.

mod folder;
mod gguf;
mod pieces;
mod pre;
mod stream;

use serde_json::{Map, Value};

pub use gguf::GgufVocab;
pub use pieces::TokenSequence;
pub use stream::StreamDecoder;

use crate::error::{Error, Result};
use crate::template::{ChatTemplate, TemplateSource};

/// Tokens that close a turn in some family: they end generation where the model's template writes them.
const END_OF_TURN: [&str; 9] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|eot|>", "<|return|>", "<turn|>"];

/// The texts of the special tokens that `tokenizer_config.json` or a GGUF names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `bos_token`
    pub bos: Option<String>,
    /// `eos_token`
    pub eos: Option<String>,
    /// `unk_token`
    pub unk: Option<String>,
    /// `pad_token`
    pub pad: Option<String>,
}

impl SpecialTokens {
    /// The names and texts of those that are set, as templates and `tokenizer_config.json` call them.
    #[must_use]
    pub fn named(&self) -> Vec<(&'static str, &str)> {
        [("bos_token", &self.bos), ("eos_token", &self.eos), ("unk_token", &self.unk), ("pad_token", &self.pad)]
            .into_iter()
            .filter_map(|(name, text)| Some((name, text.as_deref()?)))
            .collect()
    }
}

/// A chat template as found beside a tokenizer.
#[derive(Debug, Clone)]
struct NamedTemplate {
    name: String,
    text: String,
    source: TemplateSource,
}

/// Text to token ids and back, as Hugging Face's `tokenizers` does it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    end_ids: Vec<u32>,
    templates: Vec<NamedTemplate>,
    /// `tokenizer_config.json` as it was found, without its templates.
    config: Map<String, Value>,
    vocab_size: usize,
    /// Whether encoding a text puts BOS before it.
    adds_bos: bool,
    /// Whether a text is encoded as if a space stood before it: then it cannot be encoded in parts.
    prefix_space: bool,
}

impl Tokenizer {
    /// Puts together what a folder or a GGUF gave; `stated_ends` are end tokens named by id or text.
    fn assemble(
        inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        stated_ends: Vec<u32>,
        templates: Vec<NamedTemplate>,
        config: Map<String, Value>,
    ) -> Result<Self> {
        for (role, token) in special.named() {
            // A configuration may name an `unk_token` that byte-level vocabularies never need.
            if matches!(role, "bos_token" | "eos_token") && inner.token_to_id(token).is_none() {
                return Err(Error::SpecialTokenMissing { role, token: token.to_owned() });
            }
        }
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let mut tokenizer =
            Self { inner, special, end_ids: Vec::new(), templates, config, vocab_size, adds_bos: false, prefix_space: false };
        tokenizer.end_ids = tokenizer.find_end_ids(stated_ends);
        tokenizer.adds_bos = tokenizer.starts_with_bos("a")?;
        tokenizer.prefix_space = tokenizer.has_prefix_space()?;
        Ok(tokenizer)
    }

    fn find_end_ids(&self, stated: Vec<u32>) -> Vec<u32> {
        let mut ids: Vec<u32> = self.eos_id().into_iter().chain(stated).collect();
        for token in END_OF_TURN {
            let written = self.templates.iter().any(|t| t.text.contains(token));
            ids.extend(self.id_of(token).filter(|_| written));
        }
        let mut seen = std::collections::HashSet::new();
        ids.retain(|&id| seen.insert(id));
        ids
    }

    fn starts_with_bos(&self, text: &str) -> Result<bool> {
        let bos = self.bos_id();
        Ok(bos.is_some() && self.encode(text, true)?.first().copied() == bos)
    }

    fn has_prefix_space(&self) -> Result<bool> {
        // Tried, not read off the configuration: there are half a dozen ways to ask for it.
        let first = self.encode("a", false)?.first().and_then(|&id| self.token_of(id)).unwrap_or_default();
        Ok(first.starts_with('▁') || first.starts_with('Ġ'))
    }

    /// Token ids of a text. `add_special_tokens` adds what the tokenizer's post-processor adds (BOS, EOS): use it for
    /// raw texts, never for a rendered chat template, which writes its own BOS.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|source| Error::Encode { source })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids; bytes that are no valid UTF-8 become U+FFFD. Ids outside the vocabulary are left out.
    ///
    /// # Errors
    /// [`Error::Decode`].
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner.decode(ids, skip_special_tokens).map_err(|source| Error::Decode { source })
    }

    /// A decoder for tokens that come one by one.
    #[must_use]
    pub fn stream(&self, skip_special_tokens: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, skip_special_tokens)
    }

    /// The id of a token given by its text in the vocabulary.
    #[must_use]
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text in the vocabulary of an id.
    #[must_use]
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the largest id: a model needs at least this many embedding rows.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The texts of the special tokens.
    #[must_use]
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The id of `bos_token`.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos.as_deref().and_then(|t| self.id_of(t))
    }

    /// The id of `eos_token`.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos.as_deref().and_then(|t| self.id_of(t))
    }

    /// The id of `pad_token`. Nothing here pads; it is for files written for other tools.
    #[must_use]
    pub fn pad_id(&self) -> Option<u32> {
        self.special.pad.as_deref().and_then(|t| self.id_of(t))
    }

    /// Every token that ends generation, `eos_token` first: those of `generation_config.json` and `config.json` (a
    /// number or a list), of a GGUF's `eot_token_id`, and the end-of-turn tokens that the chat template writes.
    #[must_use]
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Whether encoding a raw text puts BOS before it.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The names of the chat templates that came with the tokenizer; the usual one is called `default`.
    #[must_use]
    pub fn template_names(&self) -> Vec<&str> {
        self.templates.iter().map(|t| t.name.as_str()).collect()
    }

    /// The model's chat template: the one named, else `default`, else the first. ChatML where there is none, which
    /// [`ChatTemplate::source`] tells.
    ///
    /// # Errors
    /// [`Error::UnknownTemplate`] for a name that is not there, [`Error::TemplateSyntax`].
    pub fn chat_template(&self, name: Option<&str>) -> Result<ChatTemplate> {
        let wanted = name.unwrap_or("default");
        let found = self.templates.iter().find(|t| t.name == wanted);
        match (found.or_else(|| self.templates.first().filter(|_| name.is_none())), name) {
            (Some(t), _) => ChatTemplate::new(&t.text, t.source.clone(), &self.special),
            (None, Some(name)) => Err(Error::UnknownTemplate {
                found: name.to_owned(),
                known: self.templates.iter().map(|t| t.name.clone()).collect(),
            }),
            (None, None) => ChatTemplate::chatml_for(self),
        }
    }
}
