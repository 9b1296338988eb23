//! A stream of tokens without padding.

use crate::dataset::Example;

/// The label of a position that is not learned, as in PyTorch's cross entropy.
pub const IGNORE_INDEX: i32 = -100;

/// Some documents one after the other, T tokens in all, N documents.
///
/// Documents never see each other: attention is limited by `cu_seqlens`, positions start again at 0, and the last
/// position of a document has no label.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `(T)`.
    pub tokens: Vec<u32>,
    /// `labels[t]` is the token to predict at position `t` (already shifted), or [`IGNORE_INDEX`], `(T)`.
    pub labels: Vec<i32>,
    /// Document `n` is `cu_seqlens[n]..cu_seqlens[n + 1]`, `(N + 1)`, from 0 to T.
    pub cu_seqlens: Vec<u32>,
    /// The place of each token in its document, `(T)`.
    pub positions: Vec<u32>,
}

impl Batch {
    /// Puts examples one after the other. An example without tokens is left out.
    #[must_use]
    pub fn from_examples<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Self { cu_seqlens: vec![0], ..Self::default() };
        for example in examples {
            batch.push(example);
        }
        batch
    }

    fn push(&mut self, example: &Example) {
        let n = example.tokens.len();
        if n == 0 {
            return;
        }
        self.tokens.extend_from_slice(&example.tokens);
        self.labels.extend_from_slice(&example.labels[1..]);
        self.labels.push(IGNORE_INDEX);
        self.positions.extend(0..n as u32);
        self.cu_seqlens.push(self.tokens.len() as u32);
    }

    /// The same with tokens behind it that nothing is learned from, `tokens` in all, as documents that are no longer than the longest
    /// before them; then empty documents, `documents(n)` in all for `n` that are not. So batches of nearly the same size are one shape.
    #[must_use]
    pub fn padded(mut self, tokens: usize, documents: impl Fn(usize) -> usize) -> Self {
        let longest = self.max_seqlen().max(1);
        while self.len() < tokens {
            let n = longest.min(tokens - self.len());
            self.tokens.extend(std::iter::repeat_n(0, n));
            self.labels.extend(std::iter::repeat_n(IGNORE_INDEX, n));
            self.positions.extend(0..n as u32);
            self.cu_seqlens.push(self.tokens.len() as u32);
        }
        let all = documents(self.documents()).max(self.documents());
        self.cu_seqlens.resize(all + 1, self.tokens.len() as u32);
        self
    }

    /// How many tokens are learned: the divisor of the loss, summed over a step's micro-batches and ranks.
    #[must_use]
    pub fn label_count(&self) -> usize {
        self.labels.iter().filter(|&&l| l != IGNORE_INDEX).count()
    }

    /// How many tokens there are, T.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// How many documents there are, N.
    #[must_use]
    pub fn documents(&self) -> usize {
        self.cu_seqlens.len().saturating_sub(1)
    }

    /// The length of the longest document.
    #[must_use]
    pub fn max_seqlen(&self) -> usize {
        self.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(tokens: &[u32], labels: &[i32]) -> Example {
        Example { tokens: tokens.to_vec(), labels: labels.to_vec(), row: 0 }
    }

    #[test]
    fn labels_are_shifted_inside_each_document_and_positions_restart() {
        let a = example(&[5, 6, 7], &[-100, 6, 7]);
        let b = example(&[8, 9], &[8, 9]);
        let batch = Batch::from_examples([&a, &b]);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 9]);
        // b's first label is nobody's target: the token before it belongs to another document.
        assert_eq!(batch.labels, [6, 7, -100, 9, -100]);
        assert_eq!(batch.cu_seqlens, [0, 3, 5]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!((batch.label_count(), batch.len(), batch.documents(), batch.max_seqlen()), (3, 5, 2, 3));
    }

    #[test]
    fn padding_is_documents_of_known_length_from_which_nothing_is_learned() {
        let batch = Batch::from_examples([&example(&[5, 6, 7], &[-100, 6, 7])]);
        let padded = batch.clone().padded(8, |documents| documents.next_multiple_of(4));
        assert_eq!(padded.tokens, [5, 6, 7, 0, 0, 0, 0, 0]);
        assert_eq!(padded.cu_seqlens, [0, 3, 6, 8, 8]);
        assert_eq!(padded.positions, [0, 1, 2, 0, 1, 2, 0, 1]);
        assert_eq!((padded.label_count(), padded.max_seqlen()), (batch.label_count(), 3));
        assert_eq!(batch.clone().padded(3, |documents| documents), batch);
    }

    #[test]
    fn a_batch_of_nothing_is_empty() {
        let batch = Batch::from_examples([]);
        assert!(batch.is_empty());
        assert_eq!((batch.cu_seqlens.as_slice(), batch.documents(), batch.max_seqlen()), ([0].as_slice(), 0, 0));
    }
}
