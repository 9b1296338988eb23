//! Text from tokens that come one by one.

use super::Tokenizer;
use crate::error::Result;

/// Turns tokens into text as they come, yielding only complete characters.
///
/// A token may be some bytes of a character, and what a token decodes to may depend on the one before it (a leading
/// space). So a few earlier tokens are decoded again with each new one, and the text is what that adds.
#[derive(Debug, Clone)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    skip_special_tokens: bool,
    /// Tokens since the one before the last text given out.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    shown: usize,
    /// The text of those.
    shown_text: String,
}

impl<'t> StreamDecoder<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, skip_special_tokens: bool) -> Self {
        Self { tokenizer, skip_special_tokens, ids: Vec::new(), shown: 0, shown_text: String::new() }
    }

    /// Takes a token; gives text if it completes some.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        // A replacement character at the end may be the beginning of a character.
        if text.ends_with('\u{FFFD}') || text.len() <= self.shown_text.len() {
            return Ok(None);
        }
        self.advance(&text).map(Some)
    }

    /// Gives what is left: bytes that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(text.get(self.shown_text.len()..).unwrap_or_default().to_owned())
    }

    fn advance(&mut self, text: &str) -> Result<String> {
        let new = text.get(self.shown_text.len()..).unwrap_or_default().to_owned();
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        self.shown_text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(new)
    }
}
