//! Text to packed token batches: datasets, chat templates, tokenizers and packing.
//!
//! The way of a row: a line of a JSONL file becomes a conversation or a raw text ([`Dataset`]), the model's own
//! [`ChatTemplate`] renders it into pieces that know whether they are an answer, the [`Tokenizer`] turns them into
//! tokens and labels, the [`Packer`] groups examples, and [`Batch`] is the stream a model reads: no padding,
//! documents delimited by `cu_seqlens`, labels already shifted by one.
//!
//! This crate knows no tensors, devices or models. It reads files it is given and nothing else: no clock (the time
//! that `strftime_now` shows is passed in), no environment, no network.
#![forbid(unsafe_code)]

mod batch;
mod dataset;
mod error;
mod loader;
mod pack;
mod rng;
mod template;
mod tokenizer;

pub use batch::{Batch, IGNORE_INDEX};
pub use dataset::{Dataset, DatasetOptions, Example, Format, Preparer, Summary};
pub use error::{Error, Location, Result, RowPosition};
pub use loader::{DataLoader, LoaderOptions, LoaderState};
pub use pack::Packer;
pub use rng::{Sampler, Xoshiro256};
pub use template::{ChatTemplate, DEFAULT_CHAT_TEMPLATE, Message, Piece, TemplateSource};
pub use tokenizer::{GgufVocab, SpecialTokens, StreamDecoder, TokenSequence, Tokenizer};
