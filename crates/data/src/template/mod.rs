//! Chat templates: a model's own Jinja, rendered as Hugging Face renders it, and where the answers are.

mod date;
mod environment;
mod json;
mod python;
mod spans;

use std::fmt;

use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::tokenizer::{SpecialTokens, Tokenizer};
use environment::{ANSWER_CLOSE, ANSWER_OPEN};

/// ChatML, as the template of a model that has none.
pub const DEFAULT_CHAT_TEMPLATE: &str = "\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Where a template comes from; worth telling the user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateSource {
    /// `chat_template.jinja` of the model's folder.
    JinjaFile,
    /// `chat_template` of `tokenizer_config.json`.
    TokenizerConfig,
    /// `tokenizer.chat_template` of a GGUF.
    Gguf,
    /// Given by the caller.
    Explicit,
    /// The model has none: ChatML.
    DefaultChatMl {
        /// Whether `<|im_start|>` and `<|im_end|>` are tokens of the vocabulary. If not they are spelled out, and turns
        /// end with the tokenizer's own `eos_token` instead of `<|im_end|>`, so that the model learns to stop.
        marker_tokens: bool,
    },
}

impl fmt::Display for TemplateSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::JinjaFile => "chat_template.jinja",
            Self::TokenizerConfig => "tokenizer_config.json",
            Self::Gguf => "tokenizer.chat_template",
            Self::Explicit => "given template",
            Self::DefaultChatMl { marker_tokens: true } => "default ChatML",
            Self::DefaultChatMl { marker_tokens: false } => "default ChatML, turns closed by the eos token",
        })
    }
}

/// One turn of a conversation. Other keys (`tool_calls`, `reasoning_content`, `name`, …) reach the template as they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or whatever the template knows.
    pub role: String,
    /// The text, or a list of parts, or nothing beside tool calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Value>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of plain text.
    #[must_use]
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: Some(Value::String(content.into())), extra: Map::new() }
    }

    pub(crate) fn is_answer(&self) -> bool {
        self.role == "assistant"
    }
}

/// A part of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// Whether it is an answer, to be learned.
    pub train: bool,
}

impl Piece {
    /// A piece of a prompt.
    #[must_use]
    pub fn prompt(text: impl Into<String>) -> Self {
        Self { text: text.into(), train: false }
    }

    /// A piece to be learned.
    #[must_use]
    pub fn answer(text: impl Into<String>) -> Self {
        Self { text: text.into(), train: true }
    }
}

/// A compiled chat template.
///
/// It renders with `trim_blocks` and `lstrip_blocks`, loop controls, `raise_exception`, `tojson`, Python's string and
/// mapping methods, `{% generation %}` blocks, and the special tokens as `bos_token`, `eos_token`, `unk_token`,
/// `pad_token`: the environment of transformers' `apply_chat_template`. `strftime_now` is there once a time is given.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    text: String,
    source: TemplateSource,
    special: Vec<(&'static str, String)>,
    has_generation_blocks: bool,
}

impl ChatTemplate {
    /// Compiles a template. Rendered text is to be tokenised without adding special tokens: the template writes them.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`].
    pub fn new(text: &str, source: TemplateSource, special: &SpecialTokens) -> Result<Self> {
        let (prepared, has_generation_blocks) = environment::mark_generation_blocks(text);
        let environment = environment::new(prepared).map_err(|source| Error::TemplateSyntax { source })?;
        let special = special.named().into_iter().map(|(name, token)| (name, token.to_owned())).collect();
        Ok(Self { environment, text: text.to_owned(), source, special, has_generation_blocks })
    }

    /// ChatML for a tokenizer that came without a template: BOS first if the tokenizer puts it before raw text, and the
    /// `eos_token` in the place of `<|im_end|>` if the vocabulary lacks ChatML's markers.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`], which does not happen.
    pub fn chatml_for(tokenizer: &Tokenizer) -> Result<Self> {
        let marker_tokens = ["<|im_start|>", "<|im_end|>"].iter().all(|t| tokenizer.id_of(t).is_some());
        let mut text = DEFAULT_CHAT_TEMPLATE.to_owned();
        if !marker_tokens && tokenizer.eos_id().is_some() {
            text = text.replace("'<|im_end|>'", "eos_token");
        }
        if tokenizer.adds_bos() {
            text.insert_str(0, "{{ bos_token }}");
        }
        Self::new(&text, TemplateSource::DefaultChatMl { marker_tokens }, tokenizer.special_tokens())
    }

    /// Gives `strftime_now` a time, in seconds since 1970 (shown as UTC). Without it `strftime_now` is undefined, and
    /// templates that ask whether it is fall back to their fixed date: training data must not depend on the day.
    #[must_use]
    pub fn with_time(mut self, unix_seconds: i64) -> Self {
        environment::set_time(&mut self.environment, unix_seconds);
        self
    }

    /// The Jinja text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where it comes from.
    #[must_use]
    pub fn source(&self) -> &TemplateSource {
        &self.source
    }

    /// Whether it marks answers itself, with `{% generation %}` blocks.
    #[must_use]
    pub fn has_generation_blocks(&self) -> bool {
        self.has_generation_blocks
    }

    /// Renders messages. `add_generation_prompt` ends the text where the assistant is to answer; `tools` is a list of
    /// JSON schemas.
    ///
    /// # Errors
    /// [`Error::TemplateRender`], [`Error::TemplateRaised`], [`Error::ReservedCharacter`].
    pub fn render(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        let mut text = self.render_marked(messages, tools, add_generation_prompt)?;
        if self.has_generation_blocks {
            text.retain(|c| c != ANSWER_OPEN && c != ANSWER_CLOSE);
        }
        Ok(text)
    }

    /// Renders with answers between [`ANSWER_OPEN`] and [`ANSWER_CLOSE`] where the template has generation blocks.
    fn render_marked(&self, messages: &[Message], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        if self.has_generation_blocks {
            refuse_reserved(messages, tools)?;
        }
        let special = minijinja::Value::from_pairs(self.special.iter().map(|(k, v)| (*k, v.as_str())));
        let values = context! {
            messages => minijinja::Value::from(Serde(messages)),
            tools => minijinja::Value::from(Serde(tools)),
            documents => (),
            add_generation_prompt,
            ..special
        };
        let template = self.environment.get_template(environment::NAME).map_err(|source| Error::TemplateSyntax { source })?;
        template.render(values).map_err(environment::render_error)
    }
}

/// Markers of answers must not come from the messages.
fn refuse_reserved(messages: &[Message], tools: Option<&Value>) -> Result<()> {
    let text = serde_json::to_string(&(messages, tools)).unwrap_or_default();
    match text.chars().find(|&c| c == ANSWER_OPEN || c == ANSWER_CLOSE) {
        Some(c) => Err(Error::ReservedCharacter { code: c as u32 }),
        None => Ok(()),
    }
}
