//! What preparing a dataset did.

use serde::{Deserialize, Serialize};

use super::Format;
use crate::template::TemplateSource;

/// Counts of a prepared dataset. Nothing that was lost on the way is left unsaid.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// The format that the rows have.
    pub format: Option<Format>,
    /// Where the chat template comes from; `None` if no row was rendered by it.
    pub template: Option<TemplateSource>,
    /// Rows read.
    pub rows: usize,
    /// Examples kept. More than rows if conversations were split.
    pub examples: usize,
    /// Examples dropped because nothing in them is learned.
    pub dropped_without_label: usize,
    /// Examples longer than `max_length`, cut to it (those dropped after it included).
    pub truncated: usize,
    /// Of the truncated, those whose first answer begins at or after `max_length`: they were dropped.
    pub prompt_over_max_length: usize,
    /// Conversations split into one example an answer, because the template renders earlier turns differently later.
    pub split_conversations: usize,
    /// Examples in which no end token is learned: a model trained on nothing else never stops.
    pub without_end_token: usize,
    /// Tokens kept.
    pub tokens: usize,
    /// Tokens learned.
    pub trained_tokens: usize,
    /// The longest example kept, in tokens.
    pub longest: usize,
}
