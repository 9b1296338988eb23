//! Tokenizers from folders and from GGUF vocabularies.

mod common;

use std::sync::LazyLock;

use common::{data, json, llama_vocab, messages, smollm2_vocab, tiny};
use nibble_data::{Error, GgufVocab, Message, Piece, TemplateSource, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn gguf_tokenizer_gives_the_reference_ids_of_prompts_and_answers() {
    let tokenizer = Tokenizer::from_gguf(&smollm2_vocab()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 49152);
    let expected = json("curve_expected.json");
    for case in expected["greedy"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        assert_eq!(tokenizer.encode(prompt, false).unwrap(), ids(&case["prompt_ids"]), "{prompt}");
        assert_eq!(tokenizer.encode(prompt, true).unwrap(), ids(&case["prompt_ids"]), "no BOS is added");
        assert_eq!(tokenizer.decode(&ids(&case["new_ids"]), false).unwrap(), case["text"].as_str().unwrap());
        // The prompt is what the model's own template makes of the user's question, system line included.
        let question = prompt.split("<|im_start|>user\n").nth(1).unwrap().split("<|im_end|>").next().unwrap();
        let template = tokenizer.chat_template(None).unwrap();
        assert_eq!(template.source(), &TemplateSource::Gguf);
        assert_eq!(template.render(&messages(&[("user", question)]), None, true).unwrap(), prompt);
    }
    for row in expected["examples"].as_array().unwrap() {
        let tokens = ids(&row["input_ids"]);
        let text = tokenizer.decode(&tokens, false).unwrap();
        assert_eq!(tokenizer.encode(&text, false).unwrap(), tokens);
    }
}

#[test]
fn end_tokens_come_from_every_file_and_the_template() {
    assert_eq!(tiny().end_ids(), [2]);
    assert_eq!((tiny().bos_id(), tiny().eos_id(), tiny().pad_id()), (Some(0), Some(2), Some(0)));
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(data("tiny/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let write = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    write(
        "tokenizer_config.json",
        json!({ "chat_template": [{ "name": "rag", "template": "r" }, { "name": "default", "template": "{{ '<|im_end|>' }}" }] }),
    );
    write("special_tokens_map.json", json!({ "eos_token": { "content": "<|endoftext|>", "lstrip": false } }));
    write("generation_config.json", json!({ "eos_token_id": [0, 7] }));
    write("config.json", json!({ "eos_token_id": 9 }));
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(tokenizer.end_ids(), [0, 7, 9, 2]);
    assert_eq!(tokenizer.template_names(), ["rag", "default"]);
    assert_eq!(tokenizer.chat_template(Some("rag")).unwrap().text(), "r");
    assert!(tokenizer.chat_template(None).unwrap().text().contains("im_end"));
    let error = tokenizer.chat_template(Some("nope")).unwrap_err();
    assert_eq!(error.to_string(), "choose chat template: expected one of [rag, default], found `nope`");
}

#[test]
fn a_saved_tokenizer_is_the_same_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    for original in [tiny(), Tokenizer::from_gguf(&smollm2_vocab()).unwrap(), Tokenizer::from_gguf(&llama_vocab()).unwrap()] {
        original.save(folder.path()).unwrap();
        let again = Tokenizer::from_folder(folder.path()).unwrap();
        let text = "the answer<|im_start|>is 12345, naïve: 你好 😀\n\n";
        assert_eq!(again.encode(text, true).unwrap(), original.encode(text, true).unwrap());
        assert_eq!(again.end_ids(), original.end_ids());
        assert_eq!(again.special_tokens(), original.special_tokens());
        let turns = [Message::new("user", "q")];
        let render = |t: &Tokenizer| t.chat_template(None).unwrap().render(&turns, None, true).unwrap();
        assert_eq!(render(&again), render(&original));
        let _ = std::fs::remove_file(folder.path().join("chat_template.jinja"));
    }
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = Tokenizer::from_gguf(&llama_vocab()).unwrap();
    let tokens = |text: &str| -> Vec<String> {
        tokenizer.encode(text, true).unwrap().iter().map(|&id| tokenizer.token_of(id).unwrap()).collect()
    };
    assert_eq!(tokens("the"), ["<s>", "▁the"]);
    assert_eq!(tokens("he the"), ["<s>", "▁", "he", "▁the"]);
    assert_eq!(tokens("é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokens("<0x41>")[1..4], ["▁", "<0x3C>", "<0x30>"], "spelled-out byte tokens are text");
    for text in ["the answer é\n[INST]", "  the", "é😀"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, true).unwrap(), true).unwrap(), text);
    }
    assert!(tokenizer.adds_bos());
    let no_space = Tokenizer::from_gguf(&GgufVocab {
        add_space_prefix: Some(false),
        add_bos: Some(false),
        add_eos: Some(true),
        ..llama_vocab()
    })
    .unwrap();
    assert_eq!(no_space.decode(&no_space.encode("the", true).unwrap(), false).unwrap(), "the</s>");
}

#[test]
fn pieces_of_a_space_prefixing_tokenizer_have_no_space_in_the_middle() {
    let tokenizer = Tokenizer::from_gguf(&llama_vocab()).unwrap();
    let pieces = [Piece::prompt("<s>[INST] the [/INST]"), Piece::answer(" answer</s>")];
    let sequence = tokenizer.encode_pieces(&pieces).unwrap();
    assert_eq!(sequence.ids, tokenizer.encode("<s>[INST] the [/INST] answer</s>", false).unwrap());
    let learned: Vec<String> =
        sequence.ids.iter().zip(&sequence.train).filter(|t| *t.1).map(|t| tokenizer.token_of(*t.0).unwrap()).collect();
    // `▁a` has the better score than `an`, so `▁answer` is never reached: SentencePiece is greedy too.
    assert_eq!(learned, ["▁a", "n", "swer", "</s>"]);
}

#[test]
fn pieces_are_tokenised_as_generation_sees_them() {
    let tokenizer = tiny();
    // As one text "\n\n\n" would be a token of its own that no generation could begin with.
    let sequence = tokenizer.encode_pieces(&[Piece::prompt("a\n"), Piece::answer("\n\nb")]).unwrap();
    let mut expected = tokenizer.encode("a\n", false).unwrap();
    let prompt = expected.len();
    expected.extend(tokenizer.encode("\n\nb", false).unwrap());
    assert_eq!(sequence.ids, expected);
    assert!(sequence.train[..prompt].iter().all(|t| !t) && sequence.train[prompt..].iter().all(|&t| t));
}

#[test]
fn gguf_splitting_follows_the_named_rules() {
    // A vocabulary that can merge whole numbers and words: what it merges shows where the text was split.
    let build = |pre: Option<&str>| {
        let mut vocab = smollm2_vocab();
        let merges = vocab.merges.as_mut().unwrap();
        for merge in ["1 2", "12 3", "123 4", "t 1"] {
            merges.push(merge.into());
            vocab.tokens[40000 + merges.len() % 50] = merge.replace(' ', "");
        }
        vocab.pre = pre.map(str::to_owned);
        Tokenizer::from_gguf(&vocab)
    };
    let split = |pre: &str| -> Vec<String> {
        let t = build(Some(pre)).unwrap();
        t.encode("1234", false).unwrap().iter().map(|&id| t.token_of(id).unwrap()).collect()
    };
    assert_eq!(split("gpt-2"), ["1234"]);
    assert_eq!(split("smollm"), ["1", "2", "3", "4"]);
    assert_eq!(split("qwen2"), ["1", "2", "3", "4"]);
    assert_eq!(split("llama-bpe"), ["123", "4"]);
    // Llama 3's rules add BOS where the file does not say.
    let unsaid = GgufVocab { add_bos: None, ..smollm2_vocab() };
    let adds_bos = |pre: &str| {
        let vocab = GgufVocab { pre: Some(pre.into()), ..unsaid.clone() };
        Tokenizer::from_gguf(&vocab).unwrap().adds_bos()
    };
    assert!(adds_bos("llama-bpe") && !adds_bos("qwen2"));
}

#[test]
fn what_a_gguf_lacks_is_named() {
    let error = |change: &dyn Fn(&mut GgufVocab)| {
        let mut vocab = smollm2_vocab();
        change(&mut vocab);
        Tokenizer::from_gguf(&vocab).unwrap_err().to_string()
    };
    assert_eq!(
        error(&|v| v.model = "t5".into()),
        "build tokenizer: expected `tokenizer.ggml.model` to be `gpt2` or `llama`, found `t5`"
    );
    assert!(error(&|v| v.pre = Some("new".into())).ends_with("found `new`"));
    assert_eq!(
        error(&|v| v.merges = None),
        "build tokenizer: a `gpt2` vocabulary needs `tokenizer.ggml.merges`, which is missing"
    );
    assert_eq!(
        error(&|v| v.model = "llama".into()),
        "build tokenizer: a `llama` vocabulary needs `tokenizer.ggml.scores`, which is missing"
    );
    assert_eq!(error(&|v| v.eos_id = Some(49152)), "build tokenizer: expected `eos_token_id` below 49152, found 49152");
    assert_eq!(
        error(&|v| v.token_types = Some(vec![1])),
        "build tokenizer: expected 49152 entries in `tokenizer.ggml.token_type`, found 1"
    );
    assert_eq!(
        error(&|v| v.merges = Some(vec!["ab".into()])),
        "build tokenizer: expected merge 0 to be two tokens and a space, found `ab`"
    );
}

#[test]
fn a_folder_without_tokenizer_json_says_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.model"), "").unwrap();
    let error = Tokenizer::from_folder(folder.path()).unwrap_err();
    assert!(matches!(&error, Error::NoTokenizerFile { found, .. } if found == &["`tokenizer.model`"]), "{error}");
}

static STREAMED: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| [tiny(), Tokenizer::from_gguf(&llama_vocab()).unwrap()]);

proptest! {
    #[test]
    fn streamed_text_is_the_decoded_text(text in "[a-z é😀你\n,.]{0,40}") {
        for tokenizer in STREAMED.iter() {
            let ids = tokenizer.encode(&text, false).unwrap();
            let mut stream = tokenizer.stream(false);
            let mut got = String::new();
            for &id in &ids {
                if let Some(part) = stream.push(id).unwrap() {
                    let whole = !part.is_empty() && !part.contains(char::REPLACEMENT_CHARACTER);
                    prop_assert!(whole);
                    got.push_str(&part);
                }
            }
            got.push_str(&stream.finish().unwrap());
            prop_assert_eq!(&got, &tokenizer.decode(&ids, false).unwrap());
            prop_assert_eq!(&got, &text);
        }
    }
}

#[test]
fn a_stream_that_ends_inside_a_character_shows_it_as_replacement() {
    let tokenizer = tiny();
    let ids = tokenizer.encode("😀", false).unwrap();
    let mut stream = tokenizer.stream(true);
    assert_eq!(stream.push(ids[0]).unwrap(), None);
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}
