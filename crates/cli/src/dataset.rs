//! Rows of files to examples of tokens, and what is said about it.

use std::path::Path;

use nibble_data::{ChatTemplate, Dataset, DatasetOptions, Error as DataError, Format, GgufVocab, TemplateSource, Tokenizer};

use crate::{
    base::Base,
    error::{CliError, Result},
    ui,
};

/// Tokens of an example at most, unless asked otherwise.
const DEFAULT_MAX_LENGTH: usize = 1024;

/// Reads datasets for a model.
#[derive(Debug)]
pub(crate) struct Reader {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    options: DatasetOptions,
    /// Why there is no tokenizer, where rows must be tokens already.
    missing: Option<CliError>,
}

impl Reader {
    /// Reads a model's tokenizer. A folder without one will do for rows that are tokens already.
    ///
    /// # Errors
    /// A broken tokenizer, [`CliError::MaxLength`].
    pub(crate) fn new(base: &Base, format: Option<&str>, max_length: Option<usize>, train_on_prompt: bool) -> Result<Self> {
        let max_length = max_length_for(max_length, base.config.max_position_embeddings)?;
        let (tokenizer, missing) = match base.tokenizer() {
            Ok(tokenizer) => (tokenizer, None),
            Err(missing @ CliError::Data(DataError::NoTokenizerFile { .. })) => (stand_in()?, Some(missing)),
            Err(error) => return Err(error),
        };
        let mut format = format.and_then(Format::from_name);
        if missing.is_some() {
            format = Some(Format::Tokenized);
        }
        let vocab_size = Some(base.config.vocab_size);
        let options = DatasetOptions { format, train_on_prompt, max_length: Some(max_length), vocab_size };
        let template = tokenizer.chat_template(None)?;
        Ok(Self { tokenizer, template, options, missing })
    }

    /// Tokens of an example at most.
    pub(crate) fn max_length(&self) -> usize {
        self.options.max_length.unwrap_or(DEFAULT_MAX_LENGTH)
    }

    /// The tokenizer, where the model has one.
    pub(crate) fn tokenizer(&self) -> Option<&Tokenizer> {
        self.missing.is_none().then_some(&self.tokenizer)
    }

    /// Reads a file of rows.
    ///
    /// # Errors
    /// As [`Dataset::from_file`]; the missing tokenizer, where rows needed one.
    pub(crate) fn read(&mut self, path: &Path) -> Result<Dataset> {
        let read = Dataset::from_file(path, &self.tokenizer, &self.template, &self.options);
        match (read, self.missing.take()) {
            (Err(DataError::MissingColumns { .. }), Some(missing)) => Err(missing),
            (read, missing) => {
                self.missing = missing;
                Ok(read?)
            }
        }
    }

    /// Takes rows that are in memory.
    ///
    /// # Errors
    /// As [`Dataset::from_rows`].
    pub(crate) fn rows(&self, rows: impl IntoIterator<Item = serde_json::Value>) -> Result<Dataset> {
        Ok(Dataset::from_rows(rows, &self.tokenizer, &self.template, &self.options)?)
    }

    /// Says what became of the rows, and what may be wrong with them.
    pub(crate) fn report(&self, name: &str, data: &Dataset) {
        let summary = data.summary();
        let format = summary.format.map_or("", Format::name);
        let template = summary.template.as_ref().map_or(String::new(), |template| format!(", {template}"));
        let [rows, tokens, learned] = [summary.rows, summary.tokens, summary.trained_tokens].map(ui::count);
        ui::fact(
            name,
            format_args!(
                "{rows} rows ({format}{template}): {} examples, {tokens} tokens, {learned} of them learned, the longest {}",
                ui::count(summary.examples),
                summary.longest
            ),
        );
        self.warn(data);
    }

    fn warn(&self, data: &Dataset) {
        let summary = data.summary();
        let limit = self.max_length();
        if summary.truncated > 0 {
            ui::warn(format_args!("{} examples were cut to {limit} tokens", ui::count(summary.truncated)));
        }
        if summary.dropped_without_label > 0 {
            let long = summary.prompt_over_max_length;
            let why = if long > 0 { format!(" ({long} because the prompt alone has {limit} tokens)") } else { String::new() };
            ui::warn(format_args!("{} examples were dropped: nothing in them is learned{why}", summary.dropped_without_label));
        }
        if self.missing.is_none() && summary.without_end_token > 0 {
            let none = if summary.without_end_token == summary.examples { ": the model will not learn to stop" } else { "" };
            ui::warn(format_args!("{} examples have no end token to learn{none}", ui::count(summary.without_end_token)));
        }
        if matches!(summary.template, Some(TemplateSource::DefaultChatMl { .. })) {
            ui::warn("the model has no chat template: ChatML is used");
        }
    }
}

/// The length asked for if the model has as many positions, else the default.
fn max_length_for(asked: Option<usize>, limit: usize) -> Result<usize> {
    match asked {
        Some(found) if found > limit => Err(CliError::MaxLength { limit, found }),
        Some(found) => Ok(found),
        None => Ok(DEFAULT_MAX_LENGTH.min(limit)),
    }
}

/// A tokenizer that is never asked for a token: rows of `input_ids` pass by it.
fn stand_in() -> Result<Tokenizer> {
    let tokens = vec!["<unk>".to_owned(), "a".to_owned()];
    let vocab = GgufVocab {
        model: "llama".to_owned(),
        tokens,
        scores: Some(vec![0.0; 2]),
        token_types: Some(vec![2, 1]),
        unk_id: Some(0),
        add_bos: Some(false),
        ..GgufVocab::default()
    };
    Ok(Tokenizer::from_gguf(&vocab)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_length_fits_the_model_and_a_longer_one_is_refused() {
        assert_eq!(max_length_for(None, 512).unwrap(), 512);
        assert_eq!(max_length_for(None, 8192).unwrap(), 1024);
        assert_eq!(max_length_for(Some(8192), 8192).unwrap(), 8192);
        assert!(matches!(max_length_for(Some(513), 512), Err(CliError::MaxLength { limit: 512, found: 513 })));
    }

    #[test]
    fn rows_of_tokens_need_no_tokenizer() {
        let tokenizer = stand_in().unwrap();
        let template = tokenizer.chat_template(None).unwrap();
        let options = DatasetOptions { format: Some(Format::Tokenized), vocab_size: Some(100), ..DatasetOptions::default() };
        let row = serde_json::json!({ "input_ids": [5, 99, 7] });
        let data = Dataset::from_rows([row], &tokenizer, &template, &options).unwrap();
        assert_eq!(data.examples()[0].tokens, [5, 99, 7]);
    }
}
