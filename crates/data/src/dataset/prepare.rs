//! From a row's content to an example, and the counting.

use std::path::Path;

use serde_json::Value;

use super::row::{Content, Row, is_ignored, type_name};
use super::{Dataset, DatasetOptions, Example, Format, Summary};
use crate::batch::IGNORE_INDEX;
use crate::error::{Error, Location, Result, RowPosition};
use crate::template::{ChatTemplate, Message, Piece};
use crate::tokenizer::{TokenSequence, Tokenizer};

/// Takes rows one at a time; [`Dataset::from_file`] and [`Dataset::from_rows`] are loops around it.
#[derive(Debug)]
pub struct Preparer<'a> {
    /// What renders and encodes text; rows that are already tokenised need neither.
    text: Option<(&'a Tokenizer, &'a ChatTemplate)>,
    options: DatasetOptions,
    vocab_size: usize,
    examples: Vec<Example>,
    summary: Summary,
}

impl<'a> Preparer<'a> {
    /// Starts an empty dataset.
    #[must_use]
    pub fn new(tokenizer: &'a Tokenizer, template: &'a ChatTemplate, options: DatasetOptions) -> Self {
        let vocab_size = options.vocab_size.unwrap_or(tokenizer.vocab_size());
        let summary = Summary { format: options.format, ..Summary::default() };
        Self { text: Some((tokenizer, template)), options, vocab_size, examples: Vec::new(), summary }
    }

    /// Starts an empty dataset of rows that are already tokenised; ids are checked against the options' `vocab_size`.
    #[must_use]
    pub fn tokenized(options: DatasetOptions) -> Self {
        let vocab_size = options.vocab_size.unwrap_or(usize::MAX);
        let summary = Summary { format: options.format, ..Summary::default() };
        Self { text: None, options, vocab_size, examples: Vec::new(), summary }
    }

    fn text(&self, format: Format) -> Result<(&'a Tokenizer, &'a ChatTemplate)> {
        self.text.ok_or(Error::NoTokenizer { format })
    }

    /// Takes a row.
    ///
    /// # Errors
    /// If the row is not of the dataset's format, cannot be rendered, or holds tokens that the model does not have.
    pub fn push(&mut self, location: &Location, row: &Value) -> Result<()> {
        self.summary.rows += 1;
        let Value::Object(columns) = row else {
            return Err(Error::NotAnObject { location: location.clone(), found: type_name(row) });
        };
        let row = Row { location, columns };
        let format = self.format(&row)?;
        match row.content(format)? {
            Content::Chat { messages, tools, train_from } => {
                let in_row = |source| Error::Row { location: location.clone(), source: Box::new(source) };
                let sequences = self.chat(format, &messages, tools.as_ref(), train_from).map_err(in_row)?;
                self.summary.split_conversations += usize::from(sequences.len() > 1);
                for sequence in sequences {
                    self.keep_sequence(location, sequence)?;
                }
            }
            Content::Raw(pieces) => {
                let sequence = self.raw(format, &pieces)?;
                self.keep_sequence(location, sequence)?;
            }
            Content::Tokens { ids, labels } => self.keep(location, &ids, &labels)?,
        }
        Ok(())
    }

    /// Ends the dataset; `path` is for errors.
    ///
    /// # Errors
    /// [`Error::Empty`] without rows, [`Error::AllDropped`] without examples.
    pub fn finish(self, path: Option<&Path>) -> Result<Dataset> {
        let path = path.map(Path::to_owned);
        if self.summary.rows == 0 {
            return Err(Error::Empty { path });
        }
        if self.examples.is_empty() {
            let Summary { rows, prompt_over_max_length, .. } = self.summary;
            return Err(Error::AllDropped { path, rows, prompt_over_max_length });
        }
        Ok(Dataset { examples: self.examples, summary: self.summary })
    }

    /// The format asked for, or that of the first row.
    fn format(&mut self, row: &Row) -> Result<Format> {
        if let Some(format) = self.summary.format {
            return Ok(format);
        }
        let format = Format::of(row.columns).ok_or_else(|| Error::UnknownFormat {
            location: row.location.clone(),
            columns: row.columns.keys().cloned().collect(),
        })?;
        Ok(*self.summary.format.insert(format))
    }

    fn chat(
        &mut self,
        format: Format,
        messages: &[Message],
        tools: Option<&Value>,
        train_from: usize,
    ) -> Result<Vec<TokenSequence>> {
        let (tokenizer, template) = self.text(format)?;
        if self.summary.template.is_none() {
            self.summary.template = Some(template.source().clone());
        }
        let sequences = template.answer_pieces(messages, tools, train_from)?;
        sequences.iter().map(|pieces| tokenizer.encode_pieces(pieces)).collect()
    }

    /// A raw text: BOS as the tokenizer does it, EOS at the end; each once, even if the text has them written out.
    fn raw(&self, format: Format, pieces: &[Piece]) -> Result<TokenSequence> {
        let (tokenizer, _) = self.text(format)?;
        let eos = tokenizer.eos_id().ok_or(Error::NoEosToken { format })?;
        let trains = pieces.last().is_some_and(|p| p.train);
        let body = tokenizer.encode_pieces(pieces)?;
        let mut sequence = TokenSequence::default();
        let bos = tokenizer.bos_id().filter(|_| tokenizer.adds_bos());
        if let Some(bos) = bos.filter(|&bos| body.ids.first() != Some(&bos)) {
            sequence.push(bos, false);
        }
        sequence.ids.extend(body.ids);
        sequence.train.extend(body.train);
        if sequence.ids.last() != Some(&eos) {
            sequence.push(eos, trains);
        }
        Ok(sequence)
    }

    fn keep_sequence(&mut self, location: &Location, sequence: TokenSequence) -> Result<()> {
        let ids: Vec<i64> = sequence.ids.iter().map(|&id| i64::from(id)).collect();
        let learned = |(&id, train): (&i64, bool)| {
            if train || self.options.train_on_prompt { id } else { i64::from(IGNORE_INDEX) }
        };
        let labels: Vec<i64> = ids.iter().zip(sequence.train).map(learned).collect();
        self.keep(location, &ids, &labels)
    }

    /// Checks, cuts, counts and keeps one example.
    fn keep(&mut self, location: &Location, ids: &[i64], labels: &[i64]) -> Result<()> {
        self.check_range(location, ids.iter().chain(labels.iter().filter(|&&l| !is_ignored(l))))?;
        let length = ids.len().min(self.options.max_length.unwrap_or(usize::MAX));
        let learned = |labels: &[i64]| labels.iter().skip(1).filter(|&&l| !is_ignored(l)).count();
        let trained = learned(&labels[..length]);
        self.summary.truncated += usize::from(length < ids.len());
        if trained == 0 {
            self.summary.dropped_without_label += 1;
            self.summary.prompt_over_max_length += usize::from(learned(labels) > 0);
            return Ok(());
        }
        let (RowPosition::Line(row) | RowPosition::Item(row)) = location.row;
        let example = Example {
            tokens: ids[..length].iter().map(|&id| id as u32).collect(),
            labels: labels[..length].iter().map(|&l| l as i32).collect(),
            row,
        };
        self.count(&example, trained);
        self.examples.push(example);
        Ok(())
    }

    fn check_range<'b>(&self, location: &Location, mut ids: impl Iterator<Item = &'b i64>) -> Result<()> {
        // Labels are i32, so ids beyond its range are not usable either.
        let limit = self.vocab_size.min(i32::MAX as usize) as i64;
        match ids.find(|&&id| !(0..limit).contains(&id)) {
            Some(&id) => Err(Error::TokenOutOfRange { location: location.clone(), vocab_size: self.vocab_size, id }),
            None => Ok(()),
        }
    }

    fn count(&mut self, example: &Example, trained: usize) {
        let ends = self.text.map_or(&[][..], |(tokenizer, _)| tokenizer.end_ids());
        let stops = self.text.is_none() || example.labels.iter().any(|&l| u32::try_from(l).is_ok_and(|l| ends.contains(&l)));
        let summary = &mut self.summary;
        summary.without_end_token += usize::from(!stops);
        summary.examples += 1;
        summary.tokens += example.tokens.len();
        summary.trained_tokens += trained;
        summary.longest = summary.longest.max(example.tokens.len());
    }
}
