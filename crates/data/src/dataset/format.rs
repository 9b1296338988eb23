//! The formats of instruction data.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What the columns of a row mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `instruction`, `output` and perhaps `input`, `system`, `history`: a chat turn of which the user's text is the
    /// instruction, an empty line and the input.
    Alpaca,
    /// `messages`, and perhaps `tools`: a conversation; the assistant's messages are learned.
    Messages,
    /// `conversations` of `from` and `value` (ShareGPT), and perhaps `system`, `tools`.
    Conversations,
    /// `prompt` and `completion`: two texts, the second learned up to and with the end-of-sequence token; or two lists
    /// of messages, and perhaps `tools`.
    PromptCompletion,
    /// `text`: learned from beginning to end, end-of-sequence token included.
    Text,
    /// `input_ids` and perhaps `labels` (−100 where nothing is learned) and `attention_mask` (0 on padding).
    Tokenized,
}

impl Format {
    /// Every format, in the order in which they are tried on a row's columns.
    pub const ALL: [Self; 6] =
        [Self::Tokenized, Self::Messages, Self::Conversations, Self::PromptCompletion, Self::Alpaca, Self::Text];

    /// The name to ask for it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Alpaca => "alpaca",
            Self::Messages => "messages",
            Self::Conversations => "conversations",
            Self::PromptCompletion => "prompt_completion",
            Self::Text => "text",
            Self::Tokenized => "tokenized",
        }
    }

    /// The format of a name, if there is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// The columns that it needs.
    #[must_use]
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Alpaca => &["instruction", "output"],
            Self::Messages => &["messages"],
            Self::Conversations => &["conversations"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Text => &["text"],
            Self::Tokenized => &["input_ids"],
        }
    }

    /// Whether a row has every column that it needs.
    pub(super) fn fits(self, row: &Map<String, Value>) -> bool {
        self.columns().iter().all(|c| row.contains_key(*c))
    }

    /// The format of a row's columns.
    pub(super) fn of(row: &Map<String, Value>) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.fits(row))
    }

    /// For an error: each format with its columns.
    pub(crate) fn expectations() -> Vec<String> {
        Self::ALL.into_iter().map(|f| format!("{f}: {}", f.columns().join(" + "))).collect()
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
