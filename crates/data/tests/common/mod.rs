//! What the tests share: the tokenizers of tests/data.
#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::LazyLock;

use nibble_data::{GgufVocab, Message, Tokenizer};
use serde_json::Value;

/// A file or folder of tests/data.
pub(crate) fn data(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data", name].iter().collect()
}

/// A JSON file of tests/data.
pub(crate) fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

/// A byte-level BPE of 2,048 tokens with ChatML markers; `<|im_end|>` is its EOS.
pub(crate) fn tiny() -> Tokenizer {
    // Read once: property tests ask for it hundreds of times.
    static TINY: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_folder(data("tiny")).unwrap());
    TINY.clone()
}

/// The vocabulary of SmolLM2-135M-Instruct's GGUF, without the tokens and merges that the texts of tests/data cannot
/// use; ids are the original ones.
pub(crate) fn smollm2_vocab() -> GgufVocab {
    let file = json("smollm2_vocab.json");
    let size = file["size"].as_u64().unwrap() as usize;
    let mut tokens: Vec<String> = (0..size).map(|i| format!("[unused{i}]")).collect();
    let mut token_types = vec![5; size];
    for (id, token) in file["tokens"].as_object().unwrap() {
        let id: usize = id.parse().unwrap();
        tokens[id] = token.as_str().unwrap().into();
        token_types[id] = 1;
    }
    for id in file["control"].as_array().unwrap() {
        token_types[id.as_u64().unwrap() as usize] = 3;
    }
    let texts = |v: &Value| v.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect();
    GgufVocab {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        tokens,
        token_types: Some(token_types),
        merges: Some(texts(&file["merges"])),
        bos_id: Some(1),
        eos_id: Some(2),
        unk_id: Some(0),
        pad_id: Some(2),
        add_bos: Some(false),
        add_space_prefix: Some(false),
        chat_template: Some(file["chat_template"].as_str().unwrap().to_owned()),
        ..GgufVocab::default()
    }
}

/// A SentencePiece vocabulary in the way of Llama 2: byte fallback, a space before every text.
pub(crate) fn llama_vocab() -> GgufVocab {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut token_types = vec![2, 3, 3];
    let mut scores = vec![0.0; 3];
    for byte in 0..=255_u8 {
        tokens.push(format!("<0x{byte:02X}>"));
        token_types.push(6);
        scores.push(0.0);
    }
    // Two ways into "the": "th" has the better score, so "t h e" becomes "th e", then "the".
    let pieces = [
        "th",
        "he",
        "the",
        "▁t",
        "▁the",
        "in",
        "ing",
        "▁a",
        "an",
        "ans",
        "answer",
        "wer",
        "er",
        "swer",
        "▁answer",
        "▁ans",
        "[",
        "]",
        "INST",
        "IN",
        "ST",
        "▁",
        "t",
        "h",
        "e",
        "i",
        "n",
        "g",
        "a",
        "s",
        "w",
        "r",
        "I",
        "N",
        "S",
        "T",
        "/",
        "b",
        "o",
        "q",
        "u",
        "v",
    ];
    for (i, piece) in pieces.iter().enumerate() {
        tokens.push((*piece).to_owned());
        token_types.push(1);
        scores.push(-(i as f32));
    }
    GgufVocab {
        model: "llama".into(),
        tokens,
        token_types: Some(token_types),
        scores: Some(scores),
        bos_id: Some(1),
        eos_id: Some(2),
        unk_id: Some(0),
        ..GgufVocab::default()
    }
}

/// Messages of `(role, text)`.
pub(crate) fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, text)| Message::new(role, *text)).collect()
}
