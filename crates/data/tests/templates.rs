//! Chat templates: rendered as Jinja2 renders them, answers where the renderer puts them.

mod common;

use common::{data, json, llama_vocab, messages, tiny};
use nibble_data::{ChatTemplate, Error, Message, Piece, SpecialTokens, TemplateSource, Tokenizer};
use serde_json::Value;

fn special() -> SpecialTokens {
    SpecialTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), ..SpecialTokens::default() }
}

fn inline(text: &str) -> ChatTemplate {
    ChatTemplate::new(text, TemplateSource::Explicit, &special()).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    inline(&std::fs::read_to_string(data(&format!("templates/{name}.jinja"))).unwrap())
}

fn render(template: &str, turns: &[(&str, &str)]) -> Result<String, Error> {
    inline(template).render(&messages(turns), None, false)
}

/// Every answer, and the text between.
fn answers(pieces: &[Piece]) -> Vec<&str> {
    pieces.iter().filter(|p| p.train).map(|p| p.text.as_str()).collect()
}

fn joined(pieces: &[Piece]) -> String {
    pieces.iter().map(|p| p.text.as_str()).collect()
}

#[test]
fn every_template_renders_as_jinja2_does() {
    let file = json("templates/rendered.json");
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() >= 120);
    for case in cases {
        let name = case["conversation"].as_str().unwrap();
        let conversation: Vec<Message> = serde_json::from_value(file["conversations"][name].clone()).unwrap();
        let tools = (name == "tools").then_some(&file["tools"]);
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let got = template(case["template"].as_str().unwrap()).render(&conversation, tools, prompt);
        match (&case["raised"], got) {
            (Value::Null, Ok(text)) => assert_eq!(text, case["text"].as_str().unwrap(), "{} {name}", case["template"]),
            (Value::String(expected), Err(Error::TemplateRaised { message })) => assert_eq!(&message, expected),
            (expected, got) => panic!("{} {name}: expected {expected}, found {got:?}", case["template"]),
        }
    }
}

#[test]
fn answers_are_what_the_template_writes_after_the_prompt() {
    let turns = messages(&[("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]);
    let expected = [
        ("chatml", ["1<|im_end|>\n", "2<|im_end|>\n"]),
        ("llama3", ["1<|eot_id|>", "2<|eot_id|>"]),
        ("mistral", [" 1</s>", " 2</s>"]),
        ("gemma", ["1<end_of_turn>\n", "2<end_of_turn>\n"]),
        ("qwen25", ["1<|im_end|>\n", "2<|im_end|>\n"]),
        ("zephyr", ["1</s>\n", "2</s>\n"]),
        ("generation", ["1<|im_end|>", "2<|im_end|>"]),
    ];
    for (name, expected) in expected {
        let template = template(name);
        let sequences = template.answer_pieces(&turns, None, 0).unwrap();
        assert_eq!(sequences.len(), 1, "{name}");
        assert_eq!(answers(&sequences[0]), expected, "{name}");
        assert_eq!(joined(&sequences[0]), template.render(&turns, None, false).unwrap(), "{name}");
    }
}

#[test]
fn an_answer_that_repeats_the_markers_of_a_turn_is_learned_whole() {
    // A search for turn markers would end the first answer too early and begin another in the prompt.
    let turns = messages(&[("user", "say assistant\n1<|im_end|>"), ("assistant", "<|im_start|>assistant\nx<|im_end|>\ny")]);
    for name in ["chatml", "generation"] {
        let sequences = template(name).answer_pieces(&turns, None, 0).unwrap();
        let [answer] = answers(&sequences[0])[..] else { panic!("{name}") };
        assert_eq!(answer.trim_end(), "<|im_start|>assistant\nx<|im_end|>\ny<|im_end|>", "{name}");
    }
}

#[test]
fn turns_that_change_once_others_follow_become_one_example_an_answer() {
    let turns = messages(&[
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\n1"),
        ("user", "b"),
        ("assistant", "<think>\nso\n</think>\n\n2"),
    ]);
    let template = template("qwen3");
    let sequences = template.answer_pieces(&turns, None, 0).unwrap();
    let got: Vec<_> = sequences.iter().map(|s| answers(s)).collect();
    assert_eq!(got, [["<think>\nhm\n</think>\n\n1<|im_end|>\n"], ["<think>\nso\n</think>\n\n2<|im_end|>\n"]]);
    // The second example has the first answer as the model will see it then: without its thoughts.
    assert_eq!(joined(&sequences[1]), template.render(&turns, None, false).unwrap());
    assert!(!sequences[1][0].text.contains("hm"));
}

#[test]
fn a_prompt_that_is_no_prefix_is_an_error() {
    let unstable = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}";
    let error = inline(unstable).answer_pieces(&messages(&[("user", "q"), ("assistant", "r")]), None, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "render chat template: the prompt before message 1 is not a prefix of the conversation with it: \
         expected `<think>`, found `r` at byte 1"
    );
}

#[test]
fn only_answers_of_the_completion_are_learned() {
    let turns = messages(&[("user", "a"), ("assistant", "1"), ("user", "b"), ("assistant", "2")]);
    for name in ["chatml", "generation"] {
        let sequences = template(name).answer_pieces(&turns, None, 2).unwrap();
        assert_eq!(answers(&sequences[0])[0].trim_end(), "2<|im_end|>", "{name}");
        assert_eq!(answers(&sequences[0]).len(), 1, "{name}");
    }
}

#[test]
fn markers_of_answers_never_reach_the_text_and_never_come_from_it() {
    let template = template("generation");
    let text = template.render(&messages(&[("user", "a"), ("assistant", "b")]), None, false).unwrap();
    assert!(text.chars().all(|c| !('\u{FDD0}'..='\u{FDEF}').contains(&c)));
    let error = template.render(&messages(&[("user", "\u{FDD1}")]), None, false).unwrap_err();
    assert!(matches!(error, Error::ReservedCharacter { code: 0xFDD1 }));
}

#[test]
fn the_time_is_passed_in_or_undefined() {
    let text = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'fixed' }}";
    assert_eq!(render(text, &[]).unwrap(), "fixed");
    assert_eq!(inline(text).with_time(951_827_696).render(&[], None, false).unwrap(), "29 Feb 2000");
    let llama = template("llama3").with_time(0).render(&messages(&[("user", "x")]), None, true).unwrap();
    assert!(llama.contains("Today Date: 01 Jan 1970\n"));
}

#[test]
fn faults_and_refusals_of_a_template_are_told_apart() {
    assert!(matches!(render("{{ raise_exception('no') }}", &[]), Err(Error::TemplateRaised { message }) if message == "no"));
    assert!(matches!(render("{{ 'a'.nonsense() }}", &[]), Err(Error::TemplateRender { .. })));
    assert!(matches!(ChatTemplate::new("{% if %}", TemplateSource::Explicit, &special()), Err(Error::TemplateSyntax { .. })));
}

#[test]
fn without_a_template_there_is_chatml_and_it_says_so() {
    let plain = Tokenizer::from_gguf(&llama_vocab()).unwrap();
    let template = plain.chat_template(None).unwrap();
    assert_eq!(template.source(), &TemplateSource::DefaultChatMl { marker_tokens: false });
    // No `<|im_end|>` in this vocabulary: the turn must end with a token that stops the model.
    let text = template.render(&messages(&[("user", "q"), ("assistant", "a")]), None, false).unwrap();
    assert_eq!(text, "<s><|im_start|>user\nq</s>\n<|im_start|>assistant\na</s>\n");
    let with_markers = ChatTemplate::chatml_for(&tiny()).unwrap();
    assert_eq!(with_markers.source(), &TemplateSource::DefaultChatMl { marker_tokens: true });
    assert_eq!(
        with_markers.render(&messages(&[("user", "q")]), None, true).unwrap(),
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    );
}
