//! Tokenizers in the folders of models: what Hugging Face's tools write, read and written.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::{NamedTemplate, SpecialTokens, Tokenizer};
use crate::error::{Error, Result};
use crate::template::TemplateSource;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const GENERATION: &str = "generation_config.json";
const MODEL: &str = "config.json";
const TEMPLATE: &str = "chat_template.jinja";

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder and, where they exist, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json`, `config.json` and `chat_template.jinja` (which wins over a template in the configuration).
    ///
    /// # Errors
    /// [`Error::NoTokenizerFile`], [`Error::Read`], [`Error::ConfigJson`], [`Error::TokenizerJson`],
    /// [`Error::SpecialTokenMissing`].
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(TOKENIZER);
        if !path.is_file() {
            return Err(Error::NoTokenizerFile { folder: folder.to_owned(), found: tokenizer_like(folder) });
        }
        let bytes = fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|source| Error::TokenizerJson { origin: path.display().to_string(), source })?;
        let mut config = object(&folder.join(CONFIG))?;
        let map = object(&folder.join(SPECIAL_TOKENS))?;
        let token = |name| token_text(config.get(name)).or_else(|| token_text(map.get(name)));
        let special =
            SpecialTokens { bos: token("bos_token"), eos: token("eos_token"), unk: token("unk_token"), pad: token("pad_token") };
        let templates = templates(folder, config.remove("chat_template"))?;
        let mut ends = ids(object(&folder.join(GENERATION))?.get("eos_token_id"));
        ends.extend(ids(object(&folder.join(MODEL))?.get("eos_token_id")));
        Self::assemble(inner, special, ends, templates, config)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is one, the default `chat_template.jinja`; other
    /// named templates go into the configuration. The folder must exist.
    ///
    /// # Errors
    /// [`Error::Write`], [`Error::Encode`] if the tokenizer cannot be written as JSON.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let json = self.inner.to_string(true).map_err(|source| Error::Encode { source })?;
        write(&folder.join(TOKENIZER), &json)?;
        write(&folder.join(CONFIG), &format!("{:#}\n", Value::Object(self.config_to_save())))?;
        if let Some(template) = self.templates.iter().find(|t| t.name == "default") {
            write(&folder.join(TEMPLATE), &template.text)?;
        }
        Ok(())
    }

    fn config_to_save(&self) -> Map<String, Value> {
        let mut config = self.config.clone();
        for (name, token) in self.special.named() {
            config.entry(name).or_insert_with(|| token.into());
        }
        config.entry("clean_up_tokenization_spaces").or_insert(false.into());
        config.entry("tokenizer_class").or_insert("PreTrainedTokenizerFast".into());
        if self.templates.iter().any(|t| t.name != "default") {
            let named = |t: &NamedTemplate| serde_json::json!({ "name": t.name, "template": t.text });
            config.insert("chat_template".into(), self.templates.iter().map(named).collect());
        }
        config
    }
}

/// An object in a file; empty if there is no such file.
fn object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let text = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::ConfigJson { path: path.to_owned(), source })
}

/// A special token is a text, or an object with its `content`.
fn token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// `eos_token_id` is a number or a list of them.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

fn templates(folder: &Path, configured: Option<Value>) -> Result<Vec<NamedTemplate>> {
    let mut all = Vec::new();
    match configured {
        Some(Value::String(text)) => {
            all.push(NamedTemplate { name: "default".into(), text, source: TemplateSource::TokenizerConfig });
        }
        Some(Value::Array(list)) => all.extend(list.iter().filter_map(|entry| {
            Some(NamedTemplate {
                name: entry.get("name")?.as_str()?.to_owned(),
                text: entry.get("template")?.as_str()?.to_owned(),
                source: TemplateSource::TokenizerConfig,
            })
        })),
        _ => {}
    }
    let path = folder.join(TEMPLATE);
    if path.is_file() {
        let text = fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
        all.retain(|t| t.name != "default");
        all.insert(0, NamedTemplate { name: "default".into(), text, source: TemplateSource::JinjaFile });
    }
    Ok(all)
}

/// Files that hint at what kind of tokenizer the folder has instead.
fn tokenizer_like(folder: &Path) -> Vec<String> {
    ["tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "tekken.json", "tokenizer.tiktoken"]
        .into_iter()
        .filter(|name| folder.join(name).exists())
        .map(|name| format!("`{name}`"))
        .collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|source| Error::Write { path: path.to_owned(), source })
}
