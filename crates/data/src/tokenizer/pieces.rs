//! Tokens of a text of which some pieces are to be learned.

use super::Tokenizer;
use crate::error::{Error, Result};
use crate::template::Piece;

/// Token ids and, for each, whether it is to be learned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenSequence {
    /// Token ids, `(T)`.
    pub ids: Vec<u32>,
    /// `train[t]`: token `t` is part of an answer, `(T)`.
    pub train: Vec<bool>,
}

impl TokenSequence {
    pub(crate) fn push(&mut self, id: u32, train: bool) {
        self.ids.push(id);
        self.train.push(train);
    }
}

impl Tokenizer {
    /// Tokenises pieces of one text, without adding special tokens.
    ///
    /// Each run of prompt or answer is tokenised by itself, as it is in generation, where the prompt's tokens are fixed
    /// before the answer exists. Tokenizers that encode a text as if a space stood before it (Llama 2, Mistral) would
    /// put that space into the middle: there the whole text is tokenised at once, and a token is learned if any of its
    /// bytes belong to an answer.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn encode_pieces(&self, pieces: &[Piece]) -> Result<TokenSequence> {
        if self.prefix_space { self.encode_whole(pieces) } else { self.encode_runs(pieces) }
    }

    fn encode_runs(&self, pieces: &[Piece]) -> Result<TokenSequence> {
        let mut out = TokenSequence::default();
        for run in pieces.chunk_by(|a, b| a.train == b.train) {
            let text: String = run.iter().map(|p| p.text.as_str()).collect();
            for id in self.encode(&text, false)? {
                out.push(id, run[0].train);
            }
        }
        Ok(out)
    }

    fn encode_whole(&self, pieces: &[Piece]) -> Result<TokenSequence> {
        let text: String = pieces.iter().map(|p| p.text.as_str()).collect();
        let mut learned = Vec::new();
        let mut end = 0;
        for piece in pieces {
            let start = end;
            end += piece.text.len();
            if piece.train && end > start {
                learned.push(start..end);
            }
        }
        let encoding = self.inner.encode(text, false).map_err(|source| Error::Encode { source })?;
        let mut out = TokenSequence::default();
        let mut next = 0;
        for (&id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            // Both lists are in the order of the text, so one walk over them is enough.
            while learned.get(next).is_some_and(|r| r.end <= start) {
                next += 1;
            }
            out.push(id, learned.get(next).is_some_and(|r| r.start < end));
        }
        Ok(out)
    }
}
