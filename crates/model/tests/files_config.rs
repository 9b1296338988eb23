//! `config.json` in every spelling, and what is refused.

use nibble_model::config::{Activation, ConfigChanges, Family, ModelConfig, NormPlacement, QkNorm, Role, RopeScaling};
use nibble_model::error::ConfigProblem;
use nibble_model::files::StoredType;
use nibble_model::{Error, Result};
use serde_json::{Value, json};

fn golden(name: &str) -> String {
    std::fs::read_to_string(format!("{}/tests/data/{name}.config.json", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn read(text: &str) -> Result<ModelConfig> {
    ModelConfig::from_json(text, "test")
}

/// A golden config with fields changed; `null` in `changes` removes.
fn changed(name: &str, changes: &Value) -> String {
    let mut config: Value = serde_json::from_str(&golden(name)).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            config.as_object_mut().unwrap().shift_remove(key);
        } else {
            config[key] = value.clone();
        }
    }
    config.to_string()
}

fn problems(text: &str) -> Vec<ConfigProblem> {
    match read(text) {
        Err(Error::Config { problems, .. }) => problems,
        other => panic!("expected a refusal, found {other:?}"),
    }
}

#[test]
fn golden_configs_of_run_families_read() {
    let config = read(&golden("llama")).unwrap();
    assert_eq!((config.family, config.hidden_size, config.intermediate_size), (Family::Llama, 64, 160));
    assert_eq!((config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads), (3, 4, 2));
    assert_eq!((config.head_dim, config.vocab_size, config.max_position_embeddings), (16, 320, 256));
    assert_eq!((config.rms_norm_eps, config.tie_word_embeddings), (1e-5, false));
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..], config.pad_token_id), (Some(1), &[2][..], Some(0)));
    assert_eq!(config.dtype, Some(StoredType::F32));
    assert_eq!((config.rope.theta, config.rope.rotary_dim, config.rope.scaling), (10_000.0, 16, RopeScaling::None));
    assert_eq!(config.features.windows, [None; 3]);
    assert_eq!((config.features.query_scale, config.features.embed_scale), (0.25, None));

    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 64 };
    let config = read(&golden("llama31")).unwrap();
    assert_eq!((config.rope.scaling, config.rope.theta, config.tie_word_embeddings), (scaling, 500_000.0, true));
    assert_eq!(read(&golden("mistral")).unwrap().features.windows, [Some(12); 3]);
    let qwen2 = read(&golden("qwen2")).unwrap();
    assert_eq!((qwen2.features.qkv_bias, qwen2.features.o_bias, qwen2.head_dim), (true, false, 16));
    let qwen3 = read(&golden("qwen3")).unwrap();
    assert_eq!((qwen3.features.qk_norm, qwen3.features.qkv_bias, qwen3.head_dim), (QkNorm::Head, false, 32));
}

#[test]
fn old_and_new_spellings_say_the_same() {
    for name in ["llama", "llama31", "mistral", "qwen2", "qwen3"] {
        let new: Value = serde_json::from_str(&golden(name)).unwrap();
        let mut old = new.as_object().unwrap().clone();
        let mut rope = old.shift_remove("rope_parameters").unwrap().as_object().unwrap().clone();
        let theta = rope.shift_remove("rope_theta").unwrap();
        if rope["rope_type"] == "default" {
            rope.clear();
        }
        old.insert("rope_theta".into(), theta);
        old.insert("rope_scaling".into(), if rope.is_empty() { Value::Null } else { Value::Object(rope) });
        let dtype = old.shift_remove("dtype").unwrap();
        old.insert("torch_dtype".into(), dtype);
        old.shift_remove("layer_types");
        let (new, old) = (read(&new.to_string()).unwrap(), read(&Value::Object(old).to_string()).unwrap());
        assert_eq!(new.rope, old.rope, "{name}");
        assert_eq!((new.dtype, new.features), (old.dtype, old.features), "{name}");
    }
}

#[test]
fn rope_type_reads_under_its_oldest_name() {
    let text = changed("llama", &json!({"rope_parameters": null, "rope_scaling": {"type": "linear", "factor": 2}}));
    assert_eq!(read(&text).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn ends_of_text_may_be_none_one_or_several() {
    for (value, want) in [(Value::Null, vec![]), (json!(7), vec![7]), (json!([7, 9]), vec![7, 9])] {
        let text = changed("llama", &json!({ "eos_token_id": value }));
        assert_eq!(read(&text).unwrap().eos_token_ids, want);
    }
}

#[test]
fn absent_fields_have_the_familys_defaults() {
    let absent = json!({"head_dim": null, "num_key_value_heads": null, "rope_parameters": null,
        "tie_word_embeddings": null, "hidden_act": null, "dtype": null});
    let llama = read(&changed("llama", &absent)).unwrap();
    assert_eq!((llama.head_dim, llama.num_key_value_heads, llama.rope.theta), (16, 4, 10_000.0));
    assert_eq!((llama.tie_word_embeddings, llama.dtype), (false, None));
    assert_eq!(read(&changed("qwen3", &absent)).unwrap().head_dim, 128);
    let gemma = ModelConfig::describe(&changed("gemma", &absent), "test").unwrap();
    assert_eq!((gemma.head_dim, gemma.tie_word_embeddings), (256, true));
}

#[test]
fn windows_follow_the_familys_rule() {
    let rule = json!({"layer_types": null, "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1});
    assert_eq!(read(&changed("qwen2", &rule)).unwrap().features.windows, [None, Some(9), Some(9)]);
    let off = json!({"layer_types": null, "use_sliding_window": false, "sliding_window": 9});
    assert_eq!(read(&changed("qwen2", &off)).unwrap().features.windows, [None; 3]);
    let gemma2 = ModelConfig::describe(&changed("gemma2", &json!({ "layer_types": null })), "test").unwrap();
    assert_eq!(gemma2.features.windows, [Some(12), None, Some(12)]);
    let listed = ModelConfig::describe(&golden("gemma2"), "test").unwrap();
    assert_eq!(gemma2.features, listed.features);
    let gemma3 = ModelConfig::describe(&changed("gemma3", &json!({ "layer_types": null })), "test").unwrap();
    let listed = ModelConfig::describe(&golden("gemma3"), "test").unwrap();
    assert_eq!(gemma3.features.windows, listed.features.windows);
}

#[test]
fn described_families_have_their_features() {
    let describe = |name: &str| ModelConfig::describe(&golden(name), "test").unwrap();
    let gemma = describe("gemma").features;
    assert_eq!((gemma.norm_offset, gemma.activation, gemma.embed_scale), (true, Activation::GeluTanh, Some(8.0)));
    let gemma2 = describe("gemma2").features;
    assert_eq!((gemma2.attn_softcap, gemma2.final_logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!(gemma2.norms, NormPlacement::PreAndPost);
    assert_eq!(gemma2.query_scale, 32f32.powf(-0.5));
    let gemma3 = describe("gemma3");
    assert_eq!(gemma3.rope.theta, 1e6);
    assert_eq!(gemma3.rope_local.unwrap().theta, 1e4);
    assert!(describe("phi3").features.fused_projections);
    let olmo2 = describe("olmo2").features;
    assert_eq!((olmo2.norms, olmo2.qk_norm), (NormPlacement::Post, QkNorm::Full));
}

#[test]
fn every_tensor_of_every_described_checkpoint_is_expected() {
    let shapes: Value = serde_json::from_str(include_str!("data/tensor_shapes.json")).unwrap();
    for (name, want) in shapes.as_object().unwrap() {
        let config = ModelConfig::describe(&golden(name), name).unwrap();
        let mut found: Vec<_> = config.tensors().into_iter().map(|spec| (spec.name, spec.shape)).collect();
        found.sort();
        let mut want: Vec<(String, Vec<usize>)> = want
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, shape)| (name.clone(), serde_json::from_value(shape.clone()).unwrap()))
            .collect();
        want.sort();
        assert_eq!(found, want, "{name}");
    }
}

#[test]
fn roles_tell_what_is_quantised() {
    let tensors = read(&golden("qwen2")).unwrap().tensors();
    let count = |role| tensors.iter().filter(|spec| spec.role == role).count();
    assert_eq!((count(Role::Linear), count(Role::Bias), count(Role::Norm)), (21, 9, 7));
    assert_eq!((count(Role::Embedding), count(Role::LmHead)), (1, 0));
    assert!(tensors.iter().all(|spec| (spec.role == Role::Linear) <= (spec.layer.is_some() && spec.shape.len() == 2)));
}

#[test]
fn families_that_are_not_run_are_refused_by_feature() {
    for (name, needed) in [("phi3", "fused `qkv_proj` and `gate_up_proj`"), ("olmo2", "a norm over whole queries and keys")] {
        let config = ModelConfig::describe(&golden(name), "test").unwrap();
        let not_run = config.not_run();
        if not_run.is_empty() {
            continue;
        }
        assert!(not_run.contains(&needed), "{name}: {not_run:?}");
        assert_eq!(problems(&golden(name)).len(), not_run.len());
    }
}

#[test]
fn unknown_architectures_are_refused_by_name() {
    for name in ["falcon", "mixtral"] {
        let problems = problems(&golden(name));
        assert!(matches!(&problems[..], [ConfigProblem::Architecture { found, .. }] if found == name), "{problems:?}");
    }
    let nested = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}).to_string();
    assert!(matches!(&problems(&nested)[..], [ConfigProblem::Nested { model_type }] if model_type == "gemma3"));
    assert!(matches!(&problems("{}")[..], [ConfigProblem::Missing { field, .. }] if field == "model_type"));
}

#[test]
fn every_problem_of_a_config_is_reported_at_once() {
    let text = changed(
        "llama",
        &json!({"hidden_size": null, "vocab_size": "many", "num_key_value_heads": 3, "hidden_act": "relu2",
            "dtype": "float8", "eos_token_id": ["x"], "rope_parameters": {"rope_type": "yarn", "rope_theta": -1},
            "layer_types": ["full_attention"],
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}}),
    );
    let message = Error::Config { model: "m".into(), problems: problems(&text) }.to_string();
    for line in [
        "\n  `hidden_size`: expected a positive integer, found nothing",
        "\n  `vocab_size`: expected a positive integer, found \"many\"",
        "\n  `num_key_value_heads`: expected a divisor of 4 (from `num_attention_heads`), found 3",
        "\n  `hidden_act`: expected silu, gelu or gelu_pytorch_tanh, found \"relu2\"",
        "\n  `dtype`: expected float32, bfloat16 or float16, found \"float8\"",
        "\n  `eos_token_id`: expected a token id or a list of them, found [\"x\"]",
        "\n  `rope_parameters.rope_type`: expected default, linear or llama3, found \"yarn\"",
        "\n  `rope_parameters.rope_theta`: expected a positive number, found -1",
        "\n  `layer_types`: expected 3 entries (from `num_hidden_layers`), found 1",
        "\n  `quantization_config`: expected 16-bit or 32-bit weights, found `bitsandbytes nf4`",
    ] {
        assert!(message.contains(line), "{line} not in {message}");
    }
    assert_eq!(message.lines().count(), 11);
}

#[test]
fn what_is_set_aside_is_noted() {
    assert_eq!(read(&golden("llama")).unwrap().notes, []);
    let noted = read(&changed("llama", &json!({"attention_dropout": 0.1, "pretraining_tp": 2}))).unwrap().notes;
    assert_eq!(noted.iter().map(|note| note.field).collect::<Vec<_>>(), ["attention_dropout", "pretraining_tp"]);
}

#[test]
fn a_saved_config_changes_only_what_changed() {
    let text = golden("llama");
    let config = read(&text).unwrap();
    assert_eq!(config.to_json(ConfigChanges::default()), text);
    let changes = ConfigChanges { dtype: Some(StoredType::BF16), tie_word_embeddings: Some(true), vocab_size: Some(328) };
    let saved: Value = serde_json::from_str(&config.to_json(changes)).unwrap();
    let mut want: Value = serde_json::from_str(&text).unwrap();
    want["dtype"] = json!("bfloat16");
    want["tie_word_embeddings"] = json!(true);
    want["vocab_size"] = json!(328);
    assert_eq!(saved, want);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&saved), keys(&want));
}
