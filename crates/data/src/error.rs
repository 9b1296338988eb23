//! The crate's one error type.

use std::fmt;
use std::path::PathBuf;

use crate::dataset::Format;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Any error of the `tokenizers` crate, which has no type of its own.
type TokenizersError = Box<dyn std::error::Error + Send + Sync>;

/// Which row of a file: a line of JSONL, or an item of a JSON array; both count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowPosition {
    /// A line of a JSONL file.
    Line(usize),
    /// An item of a JSON array, or of rows handed over in memory.
    Item(usize),
}

/// Where a row comes from. Displays as `` `file`:12 `` or `` `file` item 12 ``.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file; `None` for rows handed over in memory.
    pub path: Option<PathBuf>,
    /// The row in it.
    pub row: RowPosition,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.path, self.row) {
            (Some(path), RowPosition::Line(n)) => write!(f, "`{}`:{n}", path.display()),
            (Some(path), RowPosition::Item(n)) => write!(f, "`{}` item {n}", path.display()),
            (None, RowPosition::Line(n) | RowPosition::Item(n)) => write!(f, "row {n}"),
        }
    }
}

/// What can go wrong between a file and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("write `{}`: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Rows of text without a tokenizer.
    #[error("prepare: rows in the format `{}` need the model's tokenizer, and none was given", format.name())]
    NoTokenizer {
        /// The rows' format.
        format: Format,
    },
    /// The model folder has no `tokenizer.json`.
    #[error("load tokenizer: expected `tokenizer.json` in `{}`, found [{}]", folder.display(), found.join(", "))]
    NoTokenizerFile {
        /// The folder.
        folder: PathBuf,
        /// The tokenizer-like files that are there.
        found: Vec<String>,
    },
    /// A configuration file is not the JSON it should be.
    #[error("parse `{}`: {source}", path.display())]
    ConfigJson {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// `tokenizer.json` describes no tokenizer.
    #[error("load tokenizer `{origin}`: {source}")]
    TokenizerJson {
        /// The file, or the part of a GGUF that it was built from.
        origin: String,
        /// What the tokenizers library said.
        source: TokenizersError,
    },
    /// A text could not be tokenised.
    #[error("encode text: {source}")]
    Encode {
        /// What the tokenizers library said.
        source: TokenizersError,
    },
    /// Token ids could not be turned back into text.
    #[error("decode tokens: {source}")]
    Decode {
        /// What the tokenizers library said.
        source: TokenizersError,
    },
    /// A special token of the configuration is not in the vocabulary.
    #[error("load tokenizer: `{role}` is `{token}`, which is not in the vocabulary")]
    SpecialTokenMissing {
        /// `bos_token`, `eos_token`, …
        role: &'static str,
        /// The token's text.
        token: String,
    },
    /// A GGUF vocabulary of a kind that is not built.
    #[error("build tokenizer: expected `tokenizer.ggml.model` to be `gpt2` or `llama`, found `{found}`")]
    UnknownVocabModel {
        /// The kind the file names.
        found: String,
    },
    /// A GGUF pre-tokenizer whose rules are not known: splitting text by other rules would be silently wrong.
    #[error("build tokenizer: expected `tokenizer.ggml.pre` to be one of [{}], found `{found}`", known.join(", "))]
    UnknownPreTokenizer {
        /// The name the file has.
        found: String,
        /// The names that are known.
        known: Vec<&'static str>,
    },
    /// A GGUF vocabulary lacks an array that its kind needs.
    #[error("build tokenizer: a `{model}` vocabulary needs `tokenizer.ggml.{field}`, which is missing")]
    GgufFieldMissing {
        /// The kind of vocabulary.
        model: String,
        /// The missing array.
        field: &'static str,
    },
    /// An array of a GGUF vocabulary is not one entry a token.
    #[error("build tokenizer: expected {expected} entries in `tokenizer.ggml.{field}`, found {found}")]
    GgufFieldLength {
        /// The array.
        field: &'static str,
        /// The number of tokens.
        expected: usize,
        /// The number of entries.
        found: usize,
    },
    /// A merge of a GGUF vocabulary is not two tokens with a space between.
    #[error("build tokenizer: expected merge {index} to be two tokens and a space, found `{found}`")]
    GgufMerge {
        /// Its place in the list, from 0.
        index: usize,
        /// Its text.
        found: String,
    },
    /// A special token id of a GGUF vocabulary is outside it.
    #[error("build tokenizer: expected `{field}` below {vocab_size}, found {found}")]
    GgufTokenId {
        /// The key.
        field: &'static str,
        /// The number of tokens.
        vocab_size: usize,
        /// The id.
        found: u32,
    },
    /// A chat template is not valid Jinja.
    #[error("parse chat template: {source}")]
    TemplateSyntax {
        /// Line and reason.
        source: minijinja::Error,
    },
    /// A chat template failed on these messages.
    #[error("render chat template: {source}")]
    TemplateRender {
        /// Line and reason.
        source: minijinja::Error,
    },
    /// The chat template itself refused the messages (`raise_exception`).
    #[error("render chat template: the template refused the messages: {message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// No chat template of that name.
    #[error("choose chat template: expected one of [{}], found `{found}`", known.join(", "))]
    UnknownTemplate {
        /// The name asked for.
        found: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The text of a prompt is not the beginning of the text with its answer, so the answer cannot be located.
    #[error(
        "render chat template: the prompt before message {message} is not a prefix of the conversation with it: \
         expected `{expected}`, found `{found}` at byte {at}"
    )]
    NotPrefixStable {
        /// Index of the assistant's message, from 0.
        message: usize,
        /// First byte that differs.
        at: usize,
        /// How the prompt goes on there.
        expected: String,
        /// How the conversation goes on there.
        found: String,
    },
    /// A text holds a character that marks answers inside the renderer (U+FDD0, U+FDD1: never valid text).
    #[error("render chat template: the messages hold the reserved noncharacter U+{code:04X}")]
    ReservedCharacter {
        /// The character's code.
        code: u32,
    },
    /// A line of a dataset is not JSON.
    #[error("read dataset {location}: column {column}: {source}")]
    BrokenRow {
        /// The row.
        location: Location,
        /// The column in the line, from 1.
        column: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A JSON array of rows is broken.
    #[error("read dataset `{}`:{line}: column {column}: {source}", path.display())]
    BrokenFile {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A row is JSON, but not an object of columns.
    #[error("read dataset {location}: expected an object of columns, found {found}")]
    NotAnObject {
        /// The row.
        location: Location,
        /// The JSON type that is there.
        found: &'static str,
    },
    /// No known format has these columns.
    #[error(
        "find dataset format {location}: expected the columns of one of [{}], found [{}]",
        Format::expectations().join("; "), columns.join(", ")
    )]
    UnknownFormat {
        /// The row that was looked at.
        location: Location,
        /// Its columns.
        columns: Vec<String>,
    },
    /// A row lacks columns that its format needs.
    #[error(
        "read dataset {location}: format `{format}`: expected columns [{}], found [{}]",
        expected.join(", "), found.join(", ")
    )]
    MissingColumns {
        /// The row.
        location: Location,
        /// The format of the dataset.
        format: Format,
        /// What it needs.
        expected: Vec<&'static str>,
        /// What the row has.
        found: Vec<String>,
    },
    /// A column holds a value of another type.
    #[error("read dataset {location}: column `{column}`: expected {expected}, found {found}")]
    ColumnType {
        /// The row.
        location: Location,
        /// The column, or a path into it.
        column: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: &'static str,
    },
    /// A ShareGPT turn comes from somebody unknown.
    #[error("read dataset {location}: column `{column}`: expected one of [{}], found `{found}`", known.join(", "))]
    UnknownRole {
        /// The row.
        location: Location,
        /// The path of the value.
        column: String,
        /// The speakers that are known.
        known: Vec<&'static str>,
        /// The speaker that is there.
        found: String,
    },
    /// Two columns of an already tokenised row have different lengths.
    #[error("read dataset {location}: column `{column}`: expected {expected} entries as `input_ids` has, found {found}")]
    ColumnLength {
        /// The row.
        location: Location,
        /// The column.
        column: &'static str,
        /// The length of `input_ids`.
        expected: usize,
        /// Its length.
        found: usize,
    },
    /// A token id that the model has no embedding for.
    #[error("read dataset {location}: expected token ids below {vocab_size}, found {id}")]
    TokenOutOfRange {
        /// The row.
        location: Location,
        /// The size of the vocabulary.
        vocab_size: usize,
        /// The id.
        id: i64,
    },
    /// An error while a row was rendered or tokenised.
    #[error("read dataset {location}: {source}")]
    Row {
        /// The row.
        location: Location,
        /// What went wrong.
        source: Box<Error>,
    },
    /// A raw text cannot be closed: the tokenizer names no end-of-sequence token.
    #[error("read dataset: format `{format}` ends each row with the `eos_token`, which this tokenizer does not name")]
    NoEosToken {
        /// The format.
        format: Format,
    },
    /// There is no row.
    #[error("read dataset{}: expected rows, found none", origin(path.as_ref()))]
    Empty {
        /// The file.
        path: Option<PathBuf>,
    },
    /// No row has a token to learn.
    #[error(
        "read dataset{}: all {rows} rows were dropped for want of a label ({prompt_over_max_length} because the prompt alone reaches `max_length`)",
        origin(path.as_ref())
    )]
    AllDropped {
        /// The file.
        path: Option<PathBuf>,
        /// How many rows there were.
        rows: usize,
        /// How many of them have a prompt that reaches `max_length`.
        prompt_over_max_length: usize,
    },
    /// Examples that do not fit the packing budget.
    #[error("pack examples: expected lengths up to {budget}, found {found} at example {example} ({count} in all)")]
    OverBudget {
        /// The budget in tokens.
        budget: usize,
        /// The first example that is too long.
        example: usize,
        /// Its length.
        found: usize,
        /// How many are too long.
        count: usize,
    },
    /// A packer that can hold nothing.
    #[error("pack examples: expected `{option}` of at least 1, found 0")]
    ZeroSize {
        /// The option that is 0.
        option: &'static str,
    },
    /// A position to resume from that this dataset does not have.
    #[error("resume data: expected {batches_per_epoch} batches an epoch, found batch {index} of {saved}")]
    ResumePosition {
        /// Batches an epoch has now.
        batches_per_epoch: usize,
        /// Batches an epoch had when the position was saved.
        saved: usize,
        /// The index of the saved position.
        index: usize,
    },
}

fn origin(path: Option<&PathBuf>) -> String {
    path.map_or_else(String::new, |p| format!(" `{}`", p.display()))
}
