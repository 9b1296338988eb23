//! Rows of text to examples of tokens.

mod format;
mod prepare;
mod read;
mod row;
mod summary;

use std::path::Path;

use serde_json::Value;

pub use format::Format;
pub use prepare::Preparer;
pub use summary::Summary;

use crate::batch::Batch;
use crate::error::{Location, Result, RowPosition};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// How rows become examples.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatasetOptions {
    /// The format; found from the first row's columns if not given.
    pub format: Option<Format>,
    /// Learn prompts too, not only answers. Rows that bring their own `labels` keep them.
    pub train_on_prompt: bool,
    /// Longer examples lose their end (TRL's `keep_start`), and are counted.
    pub max_length: Option<usize>,
    /// How many embedding rows the model has; the tokenizer's vocabulary if not given.
    pub vocab_size: Option<usize>,
}

/// One tokenised document of T tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, `(T)`.
    pub tokens: Vec<u32>,
    /// `labels[t]` is the token at `t` if it is learned, else −100, `(T)`: not shifted, as in Hugging Face's datasets.
    pub labels: Vec<i32>,
    /// The row of the file that it comes from, from 1.
    pub row: usize,
}

/// The examples of a file, in its order, and what became of its rows.
#[derive(Debug, Clone)]
pub struct Dataset {
    pub(crate) examples: Vec<Example>,
    pub(crate) summary: Summary,
}

impl Dataset {
    /// Reads a file of rows: JSONL, or a JSON array of objects. The file is read row by row; only tokens are kept.
    ///
    /// # Errors
    /// The first row that cannot be used, with its file and line; [`crate::Error::Empty`]; [`crate::Error::AllDropped`].
    pub fn from_file(
        path: impl AsRef<Path>,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        options: &DatasetOptions,
    ) -> Result<Self> {
        let path = path.as_ref();
        let mut preparer = Preparer::new(tokenizer, template, options.clone());
        read::for_each_row(path, |location, row| preparer.push(&location, &row))?;
        preparer.finish(Some(path))
    }

    /// Prepares rows that are already tokenised (`input_ids`, optional `labels`) and in memory, without a tokenizer.
    ///
    /// # Errors
    /// As [`Dataset::from_file`]; [`crate::Error::NoTokenizer`] for rows of text; rows named by their number from 1.
    pub fn from_tokenized_rows(rows: impl IntoIterator<Item = Value>, options: &DatasetOptions) -> Result<Self> {
        Self::from_values(rows, Preparer::tokenized(options.clone()))
    }

    /// Prepares rows that are already in memory.
    ///
    /// # Errors
    /// As [`Dataset::from_file`], rows named by their number from 1.
    pub fn from_rows(
        rows: impl IntoIterator<Item = Value>,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        options: &DatasetOptions,
    ) -> Result<Self> {
        Self::from_values(rows, Preparer::new(tokenizer, template, options.clone()))
    }

    fn from_values(rows: impl IntoIterator<Item = Value>, mut preparer: Preparer<'_>) -> Result<Self> {
        for (i, row) in rows.into_iter().enumerate() {
            preparer.push(&Location { path: None, row: RowPosition::Item(i + 1) }, &row)?;
        }
        preparer.finish(None)
    }

    /// The examples that were kept.
    #[must_use]
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// What became of the rows.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The examples of these indices as one stream. Indices out of range are left out.
    #[must_use]
    pub fn batch(&self, indices: &[usize]) -> Batch {
        Batch::from_examples(indices.iter().filter_map(|&i| self.examples.get(i)))
    }
}
