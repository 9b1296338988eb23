//! `nibble generate`: prompts in, answers out, token by token.

use std::path::Path;

use nibble_autograd::ParamStore;
use nibble_data::{ChatTemplate, Message, Tokenizer};
use nibble_lora::{AdapterFile, Init};
use nibble_model::{GenerateOptions, Session, Transformer, generate_batch};
use nibble_tensor::Arena;
use serde_json::{Value, json};

use crate::{
    args::GenerateArgs,
    base::{Base, Precision, load_options, open_adapter, warn_of_other_base},
    error::{CliError, Result, io_error},
    ui,
};

/// Prompts that are answered at once.
const DEFAULT_BATCH: usize = 8;

/// # Errors
/// Whatever is wrong with the flags, the model, the adapter or the prompts.
pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    let precision = Precision::from_args(&args.precision)?;
    let mut options = options(args)?;
    let prompts = prompts(args)?;
    let adapter = args.adapter.adapter.as_deref().map(open_adapter).transpose()?;
    let base = Base::open(&args.model.model)?;
    if let Some(adapter) = &adapter {
        warn_of_other_base(adapter, base.name());
    }
    let tokenizer = base.tokenizer()?;
    options.stop = end_ids(&tokenizer, &base);
    let encoder = if args.raw { Encoder::raw(&tokenizer) } else { Encoder::chat(&tokenizer, args.system.as_deref())? };
    let prompts = prompts.iter().map(|prompt| encoder.encode(prompt)).collect::<Result<Vec<_>>>()?;
    let limit = base.config.max_position_embeddings;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    if longest < limit && longest.saturating_add(options.max_new_tokens) > limit {
        ui::warn(format_args!("the model has {limit} positions: answers end there"));
    }

    let arena = precision.arena(None)?;
    let answer = || {
        let mut model = base.load(&arena, &load_options(&precision, longest.saturating_add(options.max_new_tokens)))?;
        let params = with_adapter(&mut model, adapter.as_ref(), &arena)?;
        let speaker = Speaker { model: &model, params: &params, tokenizer: &tokenizer, options: &options };
        answer_all(&speaker, &prompts, args)
    };
    answer().map_err(|error| error.with_owners(&arena))
}

/// Writes the answers, in the order of the prompts.
fn answer_all(speaker: &Speaker<'_>, prompts: &[Vec<u32>], args: &GenerateArgs) -> Result<()> {
    let mut first = true;
    for prompts in prompts.chunks(args.batch_size.unwrap_or(DEFAULT_BATCH)) {
        let mut separate = || if std::mem::take(&mut first) { Ok(()) } else { ui::line("") };
        if let ([prompt], false) = (prompts, args.json) {
            separate()?;
            speaker.answer(prompt, |text| ui::write(text))?;
            ui::line("")?;
            continue;
        }
        for (prompt, answer) in prompts.iter().zip(speaker.answers(prompts)?) {
            if args.json {
                ui::line(json!({ "prompt_ids": prompt, "token_ids": answer.ids, "text": answer.text }))?;
            } else {
                separate()?;
                ui::line(&answer.text)?;
            }
        }
    }
    Ok(())
}

/// Puts an adapter on a model, where there is one.
///
/// # Errors
/// It does not fit.
pub(super) fn with_adapter(model: &mut Transformer, adapter: Option<&AdapterFile>, arena: &Arena) -> Result<ParamStore> {
    Ok(match adapter {
        Some(file) => model.attach(&file.config, Init::File(file))?,
        None => ParamStore::empty(arena)?,
    })
}

/// Every token that ends a text: the tokenizer's, and the config's.
pub(super) fn end_ids(tokenizer: &Tokenizer, base: &Base) -> Vec<u32> {
    let mut ids = tokenizer.end_ids().to_vec();
    ids.extend(base.config.eos_token_ids.iter().filter(|id| !tokenizer.end_ids().contains(id)));
    ids
}

fn options(args: &GenerateArgs) -> Result<GenerateOptions> {
    if args.prompt.is_some() && args.batch_size.is_some() {
        return Err(CliError::NoEffect { flag: "--batch-size", with: "--prompt" });
    }
    if args.temperature == 0.0 {
        let idle = [("--top-p", args.top_p.is_some()), ("--top-k", args.top_k.is_some()), ("--seed", args.seed.is_some())];
        if let Some((flag, _)) = idle.into_iter().find(|(_, given)| *given) {
            return Err(CliError::NoEffect { flag, with: "--temperature 0" });
        }
    }
    Ok(GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k.unwrap_or(0),
        top_p: args.top_p.unwrap_or(1.0),
        repetition_penalty: args.repetition_penalty,
        seed: args.seed.unwrap_or(0),
        stop: Vec::new(),
    })
}

fn prompts(args: &GenerateArgs) -> Result<Vec<String>> {
    match (&args.prompt, &args.prompts) {
        (Some(prompt), _) => Ok(vec![prompt.clone()]),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).map_err(io_error("read", path))?;
            parse_prompts(path, &text)
        }
        (None, None) => Ok(Vec::new()),
    }
}

/// A file whose first line is a JSON object is JSONL; any other holds a prompt a line. Empty lines are passed over.
fn parse_prompts(path: &Path, text: &str) -> Result<Vec<String>> {
    let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let is_json =
        lines().next().is_some_and(|(_, line)| serde_json::from_str::<Value>(line).is_ok_and(|value| value.is_object()));
    let parse = |(i, line): (usize, &str)| {
        if !is_json {
            return Ok(line.to_owned());
        }
        let refuse = |found| CliError::Prompt { path: path.to_path_buf(), line: i + 1, found };
        let value: Value = serde_json::from_str(line).map_err(|_| refuse("no JSON"))?;
        let prompt = value.get("prompt").ok_or_else(|| refuse("no such key"))?;
        Ok(prompt.as_str().ok_or_else(|| refuse("another type"))?.to_owned())
    };
    let prompts = lines().map(parse).collect::<Result<Vec<_>>>()?;
    if prompts.is_empty() { Err(CliError::NoPrompts { path: path.to_path_buf() }) } else { Ok(prompts) }
}

/// Prompts to tokens.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    chat: Option<(ChatTemplate, Option<&'a str>)>,
}

impl<'a> Encoder<'a> {
    fn raw(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, chat: None }
    }

    /// Prompts become the user's turn of the model's chat template.
    ///
    /// # Errors
    /// A template that is no Jinja.
    pub(super) fn chat(tokenizer: &'a Tokenizer, system: Option<&'a str>) -> Result<Self> {
        // Without a date, as in training: a prompt is rendered as those that were learned.
        Ok(Self { tokenizer, chat: Some((tokenizer.chat_template(None)?, system)) })
    }

    /// # Errors
    /// A template that refuses the prompt.
    pub(super) fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let Some((template, system)) = &self.chat else { return Ok(self.tokenizer.encode(prompt, true)?) };
        let mut messages: Vec<Message> = system.iter().map(|text| Message::new("system", *text)).collect();
        messages.push(Message::new("user", prompt));
        Ok(self.tokenizer.encode(&template.render(&messages, None, true)?, false)?)
    }
}

/// An answer.
pub(super) struct Answer {
    /// Its tokens; the end token too, where it has one.
    pub(super) ids: Vec<u32>,
    /// Its text.
    pub(super) text: String,
}

/// A model that answers.
pub(super) struct Speaker<'a> {
    pub(super) model: &'a Transformer,
    pub(super) params: &'a ParamStore,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) options: &'a GenerateOptions,
}

impl Speaker<'_> {
    /// Answers a prompt; `on_text` gets each piece of text as it is known.
    ///
    /// # Errors
    /// As [`Session::generate`], and what `on_text` says, which ends the answer.
    pub(super) fn answer(&self, prompt: &[u32], mut on_text: impl FnMut(&str) -> Result<()>) -> Result<Answer> {
        let mut session = Session::new(self.model, self.params, self.capacity(prompt))?;
        let mut stream = self.tokenizer.stream(true);
        let (mut text, mut failed) = (String::new(), None);
        let mut hear = |piece: Result<Option<String>>| -> bool {
            let heard = piece.and_then(|piece| {
                let piece = piece.unwrap_or_default();
                text.push_str(&piece);
                if piece.is_empty() { Ok(()) } else { on_text(&piece) }
            });
            failed = heard.err();
            failed.is_none()
        };
        let ids = session.generate(prompt, self.options, |id| {
            // An end token that is not special (GGUF files may forget) would show in the text.
            self.options.stop.contains(&id) || hear(stream.push(id).map_err(CliError::from))
        })?;
        hear(stream.finish().map(Some).map_err(CliError::from));
        failed.map_or(Ok(Answer { ids, text }), Err)
    }

    /// Answers several prompts at once.
    ///
    /// # Errors
    /// As [`generate_batch`].
    fn answers(&self, prompts: &[Vec<u32>]) -> Result<Vec<Answer>> {
        let capacity = prompts.iter().map(|prompt| self.capacity(prompt)).max().unwrap_or(1);
        let all = generate_batch(self.model, self.params, prompts, capacity, self.options, |_, _| true)?;
        all.into_iter().map(|ids| self.decoded(ids)).collect()
    }

    /// Tokens of prompt and answer: a prompt alone beyond the positions is refused; an answer just ends with them.
    fn capacity(&self, prompt: &[u32]) -> usize {
        let (wanted, positions) = (prompt.len().saturating_add(self.options.max_new_tokens), self.model.max_positions());
        if prompt.len() < positions { wanted.min(positions) } else { wanted }
    }

    /// An answer's text, without the token that ends it.
    fn decoded(&self, ids: Vec<u32>) -> Result<Answer> {
        let (mut stream, mut text) = (self.tokenizer.stream(true), String::new());
        // An end token that is not special (GGUF files may forget) would show.
        for &id in ids.iter().filter(|id| !self.options.stop.contains(id)) {
            text.extend(stream.push(id)?);
        }
        text.push_str(&stream.finish()?);
        Ok(Answer { ids, text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_files_are_lines_or_json_lines() {
        let parse = |text| parse_prompts(Path::new("p"), text);
        assert_eq!(parse("one\n\n two\n").unwrap(), ["one", " two"]);
        assert_eq!(parse("{\"prompt\": \"a\\nb\"}\n{\"prompt\": \"c\"}").unwrap(), ["a\nb", "c"]);
        assert_eq!(parse("{not json").unwrap(), ["{not json"]);
        assert!(matches!(parse("\n \n"), Err(CliError::NoPrompts { .. })));
        let found = |text| match parse(text) {
            Err(CliError::Prompt { line, found, .. }) => (line, found),
            other => panic!("{other:?}"),
        };
        assert_eq!(found("{\"prompt\": \"a\"}\nb"), (2, "no JSON"));
        assert_eq!(found("{\"text\": \"a\"}"), (1, "no such key"));
        assert_eq!(found("{\"prompt\": 3}"), (1, "another type"));
    }
}
