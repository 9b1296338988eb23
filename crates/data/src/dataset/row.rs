//! What a row says, by its format: a conversation, a raw text, or tokens.

use serde_json::{Map, Value};

use super::Format;
use crate::batch::IGNORE_INDEX;
use crate::error::{Error, Location, Result};
use crate::template::{Message, Piece};

/// ShareGPT's speakers and the roles that they are.
const SPEAKERS: [(&str, &str); 9] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("chatgpt", "assistant"),
    ("system", "system"),
    ("observation", "tool"),
    ("tool", "tool"),
];

/// The content of a row.
#[derive(Debug, PartialEq)]
pub(super) enum Content {
    /// To be rendered by the chat template; assistant messages from `train_from` on are learned.
    Chat { messages: Vec<Message>, tools: Option<Value>, train_from: usize },
    /// To be tokenised as it is, and closed with the end-of-sequence token.
    Raw(Vec<Piece>),
    /// Tokens and their labels.
    Tokens { ids: Vec<i64>, labels: Vec<i64> },
}

/// A row with its place, for errors.
pub(super) struct Row<'a> {
    pub(super) location: &'a Location,
    pub(super) columns: &'a Map<String, Value>,
}

impl Row<'_> {
    pub(super) fn content(&self, format: Format) -> Result<Content> {
        if !format.fits(self.columns) {
            return Err(Error::MissingColumns {
                location: self.location.clone(),
                format,
                expected: format.columns().to_vec(),
                found: self.columns.keys().cloned().collect(),
            });
        }
        match format {
            Format::Alpaca => self.alpaca(),
            Format::Messages => self.chat(self.messages("messages")?, 0),
            Format::Conversations => self.conversations(),
            Format::PromptCompletion => self.prompt_completion(),
            Format::Text => Ok(Content::Raw(vec![Piece::answer(self.text("text")?)])),
            Format::Tokenized => self.tokenized(),
        }
    }

    fn alpaca(&self) -> Result<Content> {
        let mut messages = Vec::new();
        if let Some(system) = self.optional_text("system")? {
            messages.push(Message::new("system", system));
        }
        messages.extend(self.history()?);
        let mut user = self.text("instruction")?.to_owned();
        if let Some(input) = self.optional_text("input")? {
            user = format!("{user}\n\n{input}");
        }
        messages.push(Message::new("user", user));
        messages.push(Message::new("assistant", self.text("output")?));
        Ok(Content::Chat { messages, tools: None, train_from: 0 })
    }

    /// Earlier turns of an Alpaca row: `[[question, answer], …]`.
    fn history(&self) -> Result<Vec<Message>> {
        let mut messages = Vec::new();
        for (i, turn) in self.optional_list("history")?.iter().enumerate() {
            let pair = turn.as_array().filter(|pair| pair.len() == 2);
            let pair = pair.ok_or_else(|| self.wrong(&format!("history[{i}]"), "a pair of texts", turn))?;
            for (role, value) in ["user", "assistant"].into_iter().zip(pair) {
                let text = value.as_str().ok_or_else(|| self.wrong(&format!("history[{i}]"), "a pair of texts", value))?;
                messages.push(Message::new(role, text));
            }
        }
        Ok(messages)
    }

    fn conversations(&self) -> Result<Content> {
        let mut messages = Vec::new();
        if let Some(system) = self.optional_text("system")? {
            messages.push(Message::new("system", system));
        }
        for (i, turn) in self.list("conversations")?.iter().enumerate() {
            let field = |name: &str| {
                let column = format!("conversations[{i}].{name}");
                turn.get(name)
                    .and_then(Value::as_str)
                    .ok_or_else(|| self.wrong(&column, "a text", turn.get(name).unwrap_or(&Value::Null)))
            };
            let from = field("from")?;
            let role = SPEAKERS.iter().find(|(speaker, _)| *speaker == from).ok_or_else(|| Error::UnknownRole {
                location: self.location.clone(),
                column: format!("conversations[{i}].from"),
                known: SPEAKERS.iter().map(|s| s.0).collect(),
                found: from.to_owned(),
            })?;
            messages.push(Message::new(role.1, field("value")?));
        }
        self.chat(messages, 0)
    }

    fn prompt_completion(&self) -> Result<Content> {
        let (prompt, completion) = (&self.columns["prompt"], &self.columns["completion"]);
        if prompt.is_array() || completion.is_array() {
            let mut messages = self.messages("prompt")?;
            let train_from = messages.len();
            messages.extend(self.messages("completion")?);
            return self.chat(messages, train_from);
        }
        let pieces = vec![Piece::prompt(self.text("prompt")?), Piece::answer(self.text("completion")?)];
        Ok(Content::Raw(pieces))
    }

    fn chat(&self, messages: Vec<Message>, train_from: usize) -> Result<Content> {
        // Some datasets keep their JSON schemas as text.
        let tools = match self.columns.get("tools") {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) if text.trim().is_empty() => None,
            Some(Value::String(text)) => {
                Some(serde_json::from_str(text).map_err(|_| self.wrong("tools", "a list of schemas", &self.columns["tools"]))?)
            }
            Some(list) => Some(list.clone()),
        };
        Ok(Content::Chat { messages, tools: tools.filter(|t| t.as_array().is_none_or(|a| !a.is_empty())), train_from })
    }

    fn messages(&self, column: &str) -> Result<Vec<Message>> {
        self.list(column)?.iter().enumerate().map(|(i, value)| self.message(&format!("{column}[{i}]"), value)).collect()
    }

    fn message(&self, path: &str, value: &Value) -> Result<Message> {
        let Value::Object(fields) = value else { return Err(self.wrong(path, "an object", value)) };
        let mut extra = fields.clone();
        let role = extra.shift_remove("role").unwrap_or(Value::Null);
        let Value::String(role) = role else { return Err(self.wrong(&format!("{path}.role"), "a text", &role)) };
        let content = extra.shift_remove("content");
        let answers_otherwise = extra.contains_key("tool_calls");
        match &content {
            Some(Value::String(_) | Value::Array(_)) => {}
            None | Some(Value::Null) if answers_otherwise => {}
            other => {
                let found = other.as_ref().unwrap_or(&Value::Null);
                return Err(self.wrong(&format!("{path}.content"), "a text or a list of parts", found));
            }
        }
        Ok(Message { role, content, extra })
    }

    fn tokenized(&self) -> Result<Content> {
        let ids = self.integers("input_ids")?.unwrap_or_default();
        let labels = self.integers("labels")?.unwrap_or_else(|| ids.clone());
        let mask = self.integers("attention_mask")?.unwrap_or_else(|| vec![1; ids.len()]);
        for (column, found) in [("labels", labels.len()), ("attention_mask", mask.len())] {
            if found != ids.len() {
                return Err(Error::ColumnLength { location: self.location.clone(), column, expected: ids.len(), found });
            }
        }
        let kept = |values: Vec<i64>| values.into_iter().zip(&mask).filter(|(_, m)| **m != 0).map(|(v, _)| v).collect();
        Ok(Content::Tokens { ids: kept(ids), labels: kept(labels) })
    }

    fn integers(&self, column: &str) -> Result<Option<Vec<i64>>> {
        let Some(value) = self.columns.get(column).filter(|v| !v.is_null()) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_i64).collect::<Option<Vec<_>>>());
        list.map(Some).ok_or_else(|| self.wrong(column, "a list of integers", value))
    }

    fn text(&self, column: &str) -> Result<&str> {
        let value = &self.columns[column];
        value.as_str().ok_or_else(|| self.wrong(column, "a text", value))
    }

    /// A text column that may be absent, null or empty.
    fn optional_text(&self, column: &str) -> Result<Option<&str>> {
        match self.columns.get(column) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => Ok(Some(self.text(column)?).filter(|t| !t.is_empty())),
        }
    }

    fn list(&self, column: &str) -> Result<&[Value]> {
        let value = &self.columns[column];
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong(column, "a list", value))
    }

    fn optional_list(&self, column: &str) -> Result<&[Value]> {
        match self.columns.get(column) {
            None | Some(Value::Null) => Ok(&[]),
            Some(_) => self.list(column),
        }
    }

    fn wrong(&self, column: &str, expected: &'static str, found: &Value) -> Error {
        Error::ColumnType { location: self.location.clone(), column: column.to_owned(), expected, found: type_name(found) }
    }
}

/// The JSON type of a value.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Whether a label is the mark of a position that is not learned.
pub(super) fn is_ignored(label: i64) -> bool {
    label == i64::from(IGNORE_INDEX)
}
