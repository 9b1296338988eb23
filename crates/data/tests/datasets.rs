//! Rows to examples, in every format; what is counted, and what is refused.

mod common;

use std::io::Write;

use common::{data, json, messages, smollm2_vocab, tiny};
use nibble_data::{Dataset, DatasetOptions, Error, Example, Format, Summary, TemplateSource, Tokenizer};
use serde_json::{Value, json};

fn prepare(rows: Value, options: &DatasetOptions) -> Result<Dataset, Error> {
    let tokenizer = tiny();
    let template = tokenizer.chat_template(None).unwrap();
    let Value::Array(rows) = rows else { panic!() };
    Dataset::from_rows(rows, &tokenizer, &template, options)
}

fn kept(rows: Value) -> Vec<Example> {
    prepare(rows, &DatasetOptions::default()).unwrap().examples().to_vec()
}

fn refused(rows: Value) -> String {
    prepare(rows, &DatasetOptions::default()).unwrap_err().to_string()
}

/// The text of all tokens, and of the learned ones.
fn texts(example: &Example) -> (String, String) {
    let learned: Vec<u32> = example.labels.iter().filter_map(|&l| u32::try_from(l).ok()).collect();
    let tokenizer = tiny();
    (tokenizer.decode(&example.tokens, false).unwrap(), tokenizer.decode(&learned, false).unwrap())
}

fn file(text: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text).unwrap();
    file
}

fn read(text: &[u8]) -> Result<Dataset, Error> {
    let tokenizer = tiny();
    let template = tokenizer.chat_template(None).unwrap();
    Dataset::from_file(file(text).path(), &tokenizer, &template, &DatasetOptions::default())
}

#[test]
fn alpaca_rows_give_the_reference_tokens_and_labels() {
    let tokenizer = Tokenizer::from_gguf(&smollm2_vocab()).unwrap();
    let template = tokenizer.chat_template(None).unwrap();
    let set = Dataset::from_file(data("curve_rows.jsonl"), &tokenizer, &template, &DatasetOptions::default()).unwrap();
    let expected = json("curve_expected.json");
    let expected = expected["examples"].as_array().unwrap();
    assert_eq!((set.examples().len(), expected.len()), (80, 80));
    for (got, expected) in set.examples().iter().zip(expected) {
        let ids: Vec<u32> = serde_json::from_value(expected["input_ids"].clone()).unwrap();
        let prompt = expected["prompt"].as_u64().unwrap() as usize;
        assert_eq!(got.tokens, ids, "row {}", got.row);
        assert!(got.labels[..prompt].iter().all(|&l| l == -100), "row {}", got.row);
        assert!(got.labels[prompt..].iter().zip(&ids[prompt..]).all(|(&l, &id)| l == id as i32), "row {}", got.row);
    }
    let summary = set.summary();
    assert_eq!((summary.format, &summary.template), (Some(Format::Alpaca), &Some(TemplateSource::Gguf)));
    assert_eq!((summary.rows, summary.examples, summary.without_end_token), (80, 80, 0));
}

#[test]
fn every_format_learns_answers_and_the_end_of_turn() {
    let user = "<|im_start|>user\nhello\n\nworld<|im_end|>\n<|im_start|>assistant\n";
    let chat = messages(&[("user", "hello\n\nworld"), ("assistant", "good")]);
    let rows = [
        json!({ "instruction": "hello", "input": "world", "output": "good" }),
        json!({ "messages": chat, "source": "x" }),
        json!({ "conversations": [{ "from": "human", "value": "hello\n\nworld" }, { "from": "gpt", "value": "good" }] }),
        json!({ "prompt": chat[..1], "completion": chat[1..] }),
    ];
    for row in rows {
        let examples = kept(json!([row]));
        assert_eq!(texts(&examples[0]), (format!("{user}good<|im_end|>\n"), "good<|im_end|>\n".into()), "{row}");
    }
}

#[test]
fn raw_texts_end_with_one_eos() {
    let got =
        kept(json!([{ "prompt": "hello", "completion": " world" }, { "prompt": "hello", "completion": " world<|im_end|>" }]));
    for example in &got {
        assert_eq!(texts(example), ("hello world<|im_end|>".into(), " world<|im_end|>".into()));
    }
    let got = kept(json!([{ "text": "hello world" }, { "text": "hello world<|im_end|>" }]));
    for example in &got {
        assert_eq!(texts(example), ("hello world<|im_end|>".into(), "hello world<|im_end|>".into()));
    }
}

#[test]
fn eos_is_learned_even_where_it_is_also_the_padding_token() {
    let tokenizer = Tokenizer::from_gguf(&smollm2_vocab()).unwrap();
    assert_eq!(tokenizer.eos_id(), tokenizer.pad_id());
    let template = tokenizer.chat_template(None).unwrap();
    let set = Dataset::from_file(data("curve_rows.jsonl"), &tokenizer, &template, &DatasetOptions::default()).unwrap();
    assert!(set.examples().iter().all(|e| e.labels.iter().filter(|&&l| l == 2).count() == 1));
}

#[test]
fn bos_is_there_once() {
    let tokenizer = Tokenizer::from_gguf(&common::llama_vocab()).unwrap();
    let template = tokenizer.chat_template(None).unwrap();
    let rows = [json!({ "text": "the" }), json!({ "text": "<s>the" })];
    for row in rows {
        let set = Dataset::from_rows([row], &tokenizer, &template, &DatasetOptions::default()).unwrap();
        assert_eq!(set.examples()[0].tokens.iter().filter(|&&t| t == 1).count(), 1);
        assert_eq!(set.examples()[0].tokens[0], 1);
    }
    // The tokenizer would add BOS and the template writes it.
    let chat = json!({ "messages": messages(&[("user", "the"), ("assistant", "ing")]) });
    let set = Dataset::from_rows([chat], &tokenizer, &template, &DatasetOptions::default()).unwrap();
    assert_eq!(set.examples()[0].tokens.iter().filter(|&&t| t == 1).count(), 1);
}

#[test]
fn earlier_turns_system_lines_and_tools_reach_the_template() {
    let row = json!({ "instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]] });
    let (all, learned) = texts(&kept(json!([row]))[0]);
    assert_eq!(learned, "b<|im_end|>\nd<|im_end|>\n");
    assert!(all.starts_with("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"));
    let tokenizer = tiny();
    let special = tokenizer.special_tokens();
    let shown = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let template = nibble_data::ChatTemplate::new(shown, TemplateSource::Explicit, special).unwrap();
    let turns = messages(&[("user", "q"), ("assistant", "a")]);
    for tools in [json!([{ "name": "f" }]), json!(r#"[{"name": "f"}]"#)] {
        let row = json!({ "messages": turns, "tools": tools });
        let set = Dataset::from_rows([row], &tokenizer, &template, &DatasetOptions::default()).unwrap();
        assert_eq!(texts(&set.examples()[0]).0, r#"[{"name": "f"}]qa"#);
    }
}

#[test]
fn tokenised_rows_lose_their_padding_and_keep_their_labels() {
    let got = kept(json!([
        { "input_ids": [5, 6, 7, 0, 0], "labels": [-100, 6, 7, -100, -100], "attention_mask": [1, 1, 1, 0, 0] },
        { "input_ids": [8, 9] },
    ]));
    assert_eq!((got[0].tokens.as_slice(), got[0].labels.as_slice()), ([5, 6, 7].as_slice(), [-100, 6, 7].as_slice()));
    assert_eq!((got[1].tokens.as_slice(), got[1].labels.as_slice()), ([8, 9].as_slice(), [8, 9].as_slice()));
    assert_eq!(
        refused(json!([{ "input_ids": [1, 2] }, { "input_ids": [1, 2048] }])),
        "read dataset row 2: expected token ids below 2048, found 2048"
    );
    assert!(refused(json!([{ "input_ids": [1, 2], "labels": [1, -7] }])).ends_with("found -7"));
    assert!(refused(json!([{ "input_ids": [1, 2], "labels": [1] }])).contains("column `labels`: expected 2 entries"));
    let small = DatasetOptions { vocab_size: Some(100), ..DatasetOptions::default() };
    assert!(matches!(prepare(json!([{ "input_ids": [1, 100] }]), &small), Err(Error::TokenOutOfRange { id: 100, .. })));
}

#[test]
fn everything_is_learned_on_request() {
    let options = DatasetOptions { train_on_prompt: true, ..DatasetOptions::default() };
    let set = prepare(json!([{ "prompt": "hello", "completion": " world" }]), &options).unwrap();
    let (all, learned) = texts(&set.examples()[0]);
    assert_eq!(all, learned);
}

#[test]
fn what_is_cut_or_dropped_is_counted() {
    let options = DatasetOptions { max_length: Some(4), ..DatasetOptions::default() };
    let rows = json!([
        { "input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5] },
        { "input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, -100, 5] },
        { "input_ids": [1, 2], "labels": [-100, -100] },
        { "input_ids": [7], "labels": [7] },
        { "input_ids": [1, 2], "labels": [-100, 2] },
        { "input_ids": [] },
    ]);
    let set = prepare(rows, &options).unwrap();
    let expected = Summary {
        format: Some(Format::Tokenized),
        rows: 6,
        examples: 2,
        dropped_without_label: 4,
        truncated: 2,
        prompt_over_max_length: 1,
        without_end_token: 1,
        tokens: 6,
        trained_tokens: 3,
        longest: 4,
        ..Summary::default()
    };
    assert_eq!(set.summary(), &expected);
    assert_eq!(set.examples().iter().map(|e| e.row).collect::<Vec<_>>(), [1, 5]);
    let batch = set.batch(&[0, 1]);
    assert_eq!(batch.label_count(), set.summary().trained_tokens);
}

#[test]
fn a_dataset_without_anything_to_learn_is_an_error() {
    let options = DatasetOptions { max_length: Some(3), ..DatasetOptions::default() };
    let rows = json!([{ "instruction": "a long question", "output": "b" }, { "instruction": "another one", "output": "b" }]);
    let error = prepare(rows, &options).unwrap_err();
    assert!(matches!(error, Error::AllDropped { rows: 2, prompt_over_max_length: 2, .. }), "{error}");
    let only_user = json!([{ "messages": messages(&[("user", "q")]) }]);
    assert!(refused(only_user).starts_with("read dataset: all 1 rows were dropped for want of a label"));
    assert_eq!(refused(json!([])), "read dataset: expected rows, found none");
    assert!(matches!(read(b"\n \n"), Err(Error::Empty { path: Some(_) })));
    assert!(matches!(read(b"[]"), Err(Error::Empty { path: Some(_) })));
}

#[test]
fn lines_and_arrays_are_read_alike() {
    let rows = [r#"{"text": "one"}"#, r#"{"text": "two"}"#];
    let expected = kept(json!([{ "text": "one" }, { "text": "two" }]));
    let variants = [
        format!("{}\n{}", rows[0], rows[1]),
        format!("\u{FEFF}{}\r\n\r\n{}\r\n", rows[0], rows[1]),
        format!("[{},\n {}]\n", rows[0], rows[1]),
        format!("\u{FEFF}\n [{},{}]", rows[0], rows[1]),
    ];
    for text in &variants {
        let set = read(text.as_bytes()).unwrap();
        let tokens = |examples: &[Example]| examples.iter().map(|e| e.tokens.clone()).collect::<Vec<_>>();
        assert_eq!(tokens(set.examples()), tokens(&expected), "{text:?}");
    }
    assert_eq!(read(variants[1].as_bytes()).unwrap().examples()[1].row, 3, "the row is the line");
}

#[test]
fn broken_rows_are_named_by_file_line_and_column() {
    let broken = |text: &str| match read(text.as_bytes()).unwrap_err() {
        Error::BrokenRow { location, column, .. } => (format!("{:?}", location.row), column),
        Error::BrokenFile { line, column, .. } => (format!("File({line})"), column),
        other => panic!("{other}"),
    };
    assert_eq!(broken("{\"text\": \"a\"}\n\n{\"text\": x}\n"), ("Line(3)".into(), 10));
    assert_eq!(broken("{\"text\": \"a\"}\n{\"text\": \"b\"\n"), ("Line(2)".into(), 12));
    assert_eq!(broken("[{\"text\": \"a\"},\n{\"text\": x}]"), ("File(2)".into(), 10));
    assert_eq!(broken("[{\"text\": \"a\"}] 1"), ("File(1)".into(), 17));
    let error = read(b"{\"text\": \"a\"}\n3").unwrap_err().to_string();
    assert!(error.ends_with(":2: expected an object of columns, found a number"), "{error}");
    let error = read(b"[{\"text\": \"a\"}, {\"text\": 1}]").unwrap_err().to_string();
    assert!(error.ends_with(" item 2: column `text`: expected a text, found a number"), "{error}");
    let missing =
        Dataset::from_file("/nonexistent/x.jsonl", &tiny(), &tiny().chat_template(None).unwrap(), &DatasetOptions::default());
    assert!(matches!(missing, Err(Error::Read { .. })));
}

#[test]
fn rows_that_do_not_fit_are_refused_with_what_was_expected() {
    assert_eq!(
        refused(json!([{ "question": "a", "answer": "b" }])),
        "find dataset format row 1: expected the columns of one of [tokenized: input_ids; messages: messages; \
         conversations: conversations; prompt_completion: prompt + completion; alpaca: instruction + output; text: text], \
         found [question, answer]"
    );
    assert_eq!(
        refused(json!([{ "instruction": "a", "output": "b" }, { "instruction": "a", "input": "" }])),
        "read dataset row 2: format `alpaca`: expected columns [instruction, output], found [instruction, input]"
    );
    let forced = DatasetOptions { format: Some(Format::Text), ..DatasetOptions::default() };
    assert!(matches!(prepare(json!([{ "messages": [] }]), &forced), Err(Error::MissingColumns { .. })));
    let cases = [
        (json!({ "messages": [{ "content": "a" }] }), "column `messages[0].role`: expected a text, found nothing"),
        (
            json!({ "messages": [{ "role": "user" }] }),
            "column `messages[0].content`: expected a text or a list of parts, found nothing",
        ),
        (json!({ "messages": ["a"] }), "column `messages[0]`: expected an object, found a text"),
        (json!({ "instruction": 1, "output": "" }), "column `instruction`: expected a text, found a number"),
        (json!({ "input_ids": [1.5] }), "column `input_ids`: expected a list of integers, found a list"),
        (json!({ "conversations": [{ "from": "alien", "value": "" }] }), "found `alien`"),
        (json!({ "prompt": [], "completion": "x" }), "column `completion`: expected a list, found a text"),
    ];
    for (row, expected) in cases {
        let error = refused(json!([row]));
        assert!(error.starts_with("read dataset row 1: ") && error.ends_with(expected), "{error}");
    }
}

#[test]
fn format_names_are_read_back() {
    for format in Format::ALL {
        assert_eq!(Format::from_name(format.name()), Some(format));
        assert_eq!(serde_json::to_value(format).unwrap(), format.name());
    }
    assert_eq!(Format::from_name("csv"), None);
}

#[test]
fn answers_that_never_end_are_counted() {
    let tokenizer = tiny();
    let text = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let template = nibble_data::ChatTemplate::new(text, TemplateSource::Explicit, tokenizer.special_tokens()).unwrap();
    let row = json!({ "messages": messages(&[("user", "q"), ("assistant", "a")]) });
    let set = Dataset::from_rows([row], &tokenizer, &template, &DatasetOptions::default()).unwrap();
    assert_eq!(set.summary().without_end_token, 1);
}

#[test]
fn pre_tokenised_and_rendered_rows_agree() {
    let rendered = kept(json!([{ "instruction": "hello", "output": "world" }]));
    let row = json!({ "input_ids": rendered[0].tokens, "labels": rendered[0].labels });
    assert_eq!(kept(json!([row])), rendered);
}
