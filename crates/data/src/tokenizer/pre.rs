//! How byte-level vocabularies split text before merging: the rules behind the names of `tokenizer.ggml.pre`.
//!
//! A GGUF has only a name; the rules are those of each family's own `tokenizer.json`. A name that is not here is
//! refused: other rules would give other tokens, and nobody would notice.

use serde_json::{Value, json};

/// What a name of `tokenizer.ggml.pre` stands for.
pub(super) struct PreTokenizer {
    /// Applied to the text first, if the family has one.
    pub(super) normalizer: Value,
    /// The `pre_tokenizer` of `tokenizer.json`, byte-level step included.
    pub(super) json: Value,
    /// Whole words of the vocabulary are taken before any merge (tiktoken's way).
    pub(super) ignore_merges: bool,
    /// Whether BOS is added when the file does not say.
    pub(super) add_bos: bool,
}

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];
const DEEPSEEK_CODER: [&str; 5] = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\u{D7FF}]+", r"\p{N}"];

/// Every name that is known.
pub(super) const KNOWN: [&str; 27] = [
    "default",
    "gpt-2",
    "gpt2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "exaone",
    "codeshell",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "dbrx",
    "smaug-bpe",
    "qwen2",
    "deepseek-r1-qwen",
    "stablelm2",
    "glm4",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
    "deepseek-coder",
];

impl PreTokenizer {
    /// The rules of a name; `None` if it is not known. A file without a name has GPT-2's rules, as Hugging Face's
    /// byte-level pre-tokenizer has.
    pub(super) fn named(pre: Option<&str>) -> Option<Self> {
        let plain = |json| Self { normalizer: Value::Null, json, ignore_merges: false, add_bos: false };
        let tiktoken = |regex, add_bos| Self { ignore_merges: true, add_bos, ..plain(split(&[regex])) };
        Some(match pre.unwrap_or("default") {
            "default" | "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" | "jais" => plain(byte_level(true)),
            "smollm" | "starcoder" | "refact" | "command-r" | "exaone" | "codeshell" => plain(digits()),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => tiktoken(LLAMA3, true),
            "dbrx" | "smaug-bpe" | "glm4" => tiktoken(LLAMA3, false),
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" => Self { normalizer: json!({ "type": "NFC" }), ..plain(split(&[QWEN2])) },
            "tekken" => tiktoken(TEKKEN, true),
            "gpt-4o" => tiktoken(GPT4O, false),
            "deepseek-v3" => plain(split(&DEEPSEEK3)),
            "deepseek-coder" => plain(split(&DEEPSEEK_CODER)),
            _ => return None,
        })
    }
}

fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

/// Single digits, then GPT-2's rules.
fn digits() -> Value {
    json!({ "type": "Sequence", "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)] })
}

/// Each expression splits what the ones before it left; then bytes become characters.
fn split(expressions: &[&str]) -> Value {
    let mut steps: Vec<Value> = expressions
        .iter()
        .map(|e| json!({ "type": "Split", "pattern": { "Regex": e }, "behavior": "Isolated", "invert": false }))
        .collect();
    steps.push(byte_level(false));
    json!({ "type": "Sequence", "pretokenizers": steps })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_name_has_rules_that_the_library_accepts() {
        for name in KNOWN {
            let rules = PreTokenizer::named(Some(name)).expect(name);
            let parsed: Result<tokenizers::PreTokenizerWrapper, _> = serde_json::from_value(rules.json);
            assert!(parsed.is_ok(), "{name}: {parsed:?}");
        }
        assert!(PreTokenizer::named(Some("unheard-of")).is_none());
    }
}
