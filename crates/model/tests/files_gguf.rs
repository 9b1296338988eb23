//! GGUF files: built here byte by byte, cut, spoiled, and one published model where it is on disk.

mod common;

use common::{Builder, counted, metadata, model};
use half::{bf16, f16};
use nibble_model::Error;
use nibble_model::config::{Family, RopeScaling};
use nibble_model::error::GgufProblem;
use nibble_model::files::gguf::Value;
use nibble_model::files::{Checkpoint, StoredType};
use proptest::prelude::*;
use tempfile::TempDir;

fn open_bytes(bytes: &[u8]) -> Result<(TempDir, Checkpoint), Error> {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("m.gguf"), bytes).unwrap();
    let open = Checkpoint::open(folder.path())?;
    Ok((folder, open))
}

fn problem(bytes: &[u8]) -> GgufProblem {
    match open_bytes(bytes).map(|(_, open)| open.config()) {
        Err(Error::Gguf { problem, .. }) | Ok(Err(Error::Gguf { problem, .. })) => problem,
        other => panic!("expected a refusal, found {other:?}"),
    }
}

#[test]
fn whole_models_of_every_architecture_fit_the_config_they_amount_to() {
    for (arch, family) in [("llama", Family::Llama), ("qwen2", Family::Qwen2), ("qwen3", Family::Qwen3)] {
        for version in [2, 3] {
            let builder = model(arch).number(&format!("{arch}.attention.key_length"), 4);
            let (_folder, open) = open_bytes(&builder.build(version)).unwrap();
            let config = open.config().unwrap();
            open.check(&config).unwrap();
            assert_eq!((config.family, config.head_dim, config.num_key_value_heads), (family, 4, 1));
            assert_eq!((config.vocab_size, config.tie_word_embeddings, config.rms_norm_eps), (5, true, 1e-5));
            assert_eq!(
                (config.bos_token_id, &config.eos_token_ids[..], config.dtype),
                (Some(1), &[2][..], Some(StoredType::F32))
            );
            assert_eq!(open.gguf().unwrap().version(), version);
        }
    }
    let untied = model("llama").f32s("output.weight", &[5, 8], &counted(40));
    let (_folder, open) = open_bytes(&untied.build(3)).unwrap();
    assert!(!open.config().unwrap().tie_word_embeddings);
    let windowed = model("llama").number("llama.attention.sliding_window", 64);
    let (_folder, open) = open_bytes(&windowed.build(3)).unwrap();
    assert_eq!(open.config().unwrap().features.windows, [Some(64)]);
}

#[test]
fn query_and_key_rows_are_put_back_for_llama_alone() {
    let row = |open: &Checkpoint, name: &str, row: usize| {
        let mut out = [0.0; 8];
        open.read_rows_f32(&format!("model.layers.0.self_attn.{name}.weight"), row..row + 1, &mut out).unwrap();
        out[0] as usize / 8
    };
    let (_folder, llama) = open_bytes(&model("llama").build(3)).unwrap();
    let (_folder2, qwen) = open_bytes(&model("qwen2").build(3)).unwrap();
    // Two heads of four rows: a head's first half comes from its even rows.
    let want = [0, 2, 1, 3, 4, 6, 5, 7];
    assert_eq!((0..8).map(|i| row(&llama, "q_proj", i)).collect::<Vec<_>>(), want);
    assert_eq!((0..4).map(|i| row(&llama, "k_proj", i)).collect::<Vec<_>>(), want[..4]);
    assert_eq!((0..4).map(|i| row(&llama, "v_proj", i)).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!((0..8).map(|i| row(&qwen, "q_proj", i)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7]);
    let biased = model("llama").f32s("blk.0.attn_q.bias", &[8], &counted(8));
    let (_folder, open) = open_bytes(&biased.build(3)).unwrap();
    let mut bias = [0.0; 8];
    open.read_f32("model.layers.0.self_attn.q_proj.bias", &mut bias).unwrap();
    assert_eq!(bias, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
}

#[test]
fn quantised_weights_read_as_bf16_and_floats_as_they_are() {
    let mut q4_1 = Vec::new();
    for block in 0..2 {
        q4_1.extend(f16::from_f32(0.1 + block as f32).to_le_bytes());
        q4_1.extend(f16::from_f32(-0.7).to_le_bytes());
        q4_1.extend((0..16).map(|i| (i | (15 - i) << 4) as u8));
    }
    let halves: Vec<u8> = [0.1, 1000.5].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let builder =
        metadata("llama").tensor("blk.0.ffn_up.weight", &[2, 32], 3, &q4_1).tensor("blk.0.ffn_norm.weight", &[2], 1, &halves);
    let (_folder, open) = open_bytes(&builder.build(3)).unwrap();
    let info = open.info("model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!((info.stored, info.dtype, info.bytes), (StoredType::Q4_1, StoredType::BF16, 40));
    let mut out = [0.0; 32];
    open.read_rows_f32("model.layers.0.mlp.up_proj.weight", 1..2, &mut out).unwrap();
    let (d, m) = (f16::from_f32(1.1).to_f32(), f16::from_f32(-0.7).to_f32());
    for (i, &x) in out.iter().enumerate() {
        let q = if i < 16 { i } else { 31 - i } as f32;
        assert_eq!(x, bf16::from_f32(q * d + m).to_f32());
    }
    let mut norm = [0.0; 2];
    open.read_f32("model.layers.0.post_attention_layernorm.weight", &mut norm).unwrap();
    assert_eq!(norm, [f16::from_f32(0.1).to_f32(), 1000.5]);
}

#[test]
fn llama3_factors_become_the_scaling_they_come_from() {
    // With a head of four and the usual base no frequency is low, so the base is raised until one is.
    let base = 1e9f32;
    let factor = |i: i32| {
        let frequency = f64::from(base).powf(-2.0 * f64::from(i) / 4.0);
        let smooth = ((8192.0 / (2.0 * std::f64::consts::PI / frequency) - 1.0) / 3.0).clamp(0.0, 1.0);
        (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32
    };
    let factors = [factor(0), factor(1)];
    assert_eq!(factors, [1.0, 32.0]);
    let builder = model("llama").float("llama.rope.freq_base", base).f32s("rope_freqs.weight", &[2], &factors);
    let (_folder, open) = open_bytes(&builder.build(3)).unwrap();
    let config = open.config().unwrap();
    let RopeScaling::Llama3 { factor, original_max_position_embeddings, .. } = config.rope.scaling else {
        panic!("{:?}", config.rope)
    };
    assert_eq!((factor, original_max_position_embeddings), (32.0, 8192));
    open.check(&config).unwrap();

    let odd = model("llama").f32s("rope_freqs.weight", &[2], &[3.0, 5.0]);
    assert!(matches!(problem(&odd.build(3)), GgufProblem::Tensor { name, .. } if name == "rope_freqs.weight"));
}

#[test]
fn malformed_files_are_refused_by_kind() {
    assert!(matches!(problem(b"GGML\x03\0\0\0"), GgufProblem::Magic { .. }));
    assert!(matches!(problem(&Builder::default().build(1)), GgufProblem::Version { found: 1 }));
    let k_quant = metadata("llama").tensor("blk.0.attn_q.weight", &[1, 256], 12, &[0; 144]).build(3);
    assert!(matches!(problem(&k_quant), GgufProblem::TensorType { found: 12, .. }));
    assert!(problem(&k_quant).to_string().contains("Q4_K"));
    assert!(matches!(problem(&metadata("gemma2").build(3)), GgufProblem::Architecture { found, .. } if found == "gemma2"));
    let twice = metadata("llama").f32s("a", &[1], &[0.0]).f32s("a", &[1], &[0.0]);
    assert!(matches!(problem(&twice.build(3)), GgufProblem::Duplicate { name } if name == "a"));
    let ragged = metadata("llama").tensor("a", &[2, 33], 8, &[0; 102]);
    assert!(matches!(problem(&ragged.build(3)), GgufProblem::Tensor { .. }));
    let huge = metadata("llama").tensor("a", &[1 << 40, 1 << 40], 0, &[]);
    assert!(matches!(problem(&huge.build(3)), GgufProblem::Tensor { .. }));
    let unknown = metadata("llama").pair("x", 13, &[]).build(3);
    assert!(matches!(problem(&unknown), GgufProblem::ValueType { found: 13, .. }));
    let nested: Vec<u8> = (0..9).flat_map(|_| [9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).collect();
    assert!(matches!(problem(&metadata("llama").pair("x", 9, &nested).build(3)), GgufProblem::Nesting { .. }));
    let not_text = metadata("llama").pair("x", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).build(3);
    assert!(matches!(problem(&not_text), GgufProblem::NotUtf8 { .. }));
    let alignment = metadata("llama").number("general.alignment", 24).build(3);
    assert!(matches!(problem(&alignment), GgufProblem::Metadata { key, .. } if key == "general.alignment"));
    let experts = model("llama").number("llama.expert_count", 8).build(3);
    assert!(matches!(problem(&experts), GgufProblem::NotRun { key, .. } if key == "llama.expert_count"));
    let yarn = model("llama").string("llama.rope.scaling.type", "yarn").build(3);
    assert!(matches!(problem(&yarn), GgufProblem::NotRun { .. }));
    let silent = Builder::default().string("general.architecture", "llama").build(3);
    assert!(matches!(problem(&silent), GgufProblem::Metadata { key, .. } if key == "llama.embedding_length"));
    let split = metadata("llama").number("split.count", 2).build(3);
    assert!(matches!(problem(&split), GgufProblem::NotRun { .. }));
}

#[test]
fn a_cut_tensor_is_named_with_the_bytes_it_needs() {
    let bytes = model("llama").build(3);
    let cut = &bytes[..bytes.len() - 100];
    let want = GgufProblem::Cut { what: "tensor `blk.0.ffn_down.weight`".into(), needed: 384, available: 284 };
    assert_eq!(problem(cut), want);
}

#[test]
fn every_value_type_is_read() {
    let builder = metadata("llama")
        .pair("u8", 0, &[200])
        .pair("i8", 1, &[0xff])
        .pair("u16", 2, &60_000u16.to_le_bytes())
        .pair("i16", 3, &(-5i16).to_le_bytes())
        .pair("i32", 5, &(-7i32).to_le_bytes())
        .pair("bool", 7, &[1])
        .pair("u64", 10, &u64::MAX.to_le_bytes())
        .pair("i64", 11, &i64::MIN.to_le_bytes())
        .pair("f64", 12, &0.1f64.to_le_bytes())
        .strings("list", &["a", "ß"]);
    let (_folder, open) = open_bytes(&builder.build(3)).unwrap();
    let metadata = open.gguf().unwrap().metadata();
    let list = Value::Array(vec![Value::String("a".into()), Value::String("ß".into())]);
    for (key, want) in [
        ("u8", Value::Unsigned(200)),
        ("i8", Value::Signed(-1)),
        ("u16", Value::Unsigned(60_000)),
        ("i16", Value::Signed(-5)),
        ("i32", Value::Signed(-7)),
        ("bool", Value::Bool(true)),
        ("u64", Value::Unsigned(u64::MAX)),
        ("i64", Value::Signed(i64::MIN)),
        ("f64", Value::F64(0.1)),
        ("list", list),
    ] {
        assert_eq!(metadata[key], want, "{key}");
    }
    assert_eq!(metadata["llama.attention.layer_norm_rms_epsilon"].as_f64(), Some(1e-5));
}

#[test]
fn the_vocabulary_comes_as_plain_data() {
    let builder = metadata("llama")
        .string("tokenizer.ggml.model", "gpt2")
        .strings("tokenizer.ggml.tokens", &["<s>", "a", "b"])
        .strings("tokenizer.ggml.merges", &["a b"])
        .pair("tokenizer.ggml.add_bos_token", 7, &[0])
        .string("tokenizer.chat_template", "{{ x }}");
    let (_folder, open) = open_bytes(&builder.build(3)).unwrap();
    let vocab = open.gguf().unwrap().vocab().unwrap();
    assert_eq!((&vocab.model[..], vocab.tokens.len(), &vocab.merges[..]), ("gpt2", 3, &["a b".to_owned()][..]));
    assert_eq!((vocab.bos_id, vocab.eos_id, vocab.add_bos, vocab.pad_id), (Some(1), Some(2), Some(false), None));
    assert_eq!(vocab.chat_template.as_deref(), Some("{{ x }}"));
    let (_folder, open) = open_bytes(&metadata("llama").build(3)).unwrap();
    assert!(open.gguf().unwrap().vocab().is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_file_cut_anywhere_is_refused_as_cut(cut in any::<prop::sample::Index>()) {
        let bytes = model("qwen2").build(3);
        // The last tensor's 16 bytes end the data; what follows is padding.
        let cut = cut.index(bytes.len() - 16);
        let is_cut = matches!(problem(&bytes[..cut]), GgufProblem::Cut { .. });
        prop_assert!(is_cut);
    }

    #[test]
    fn spoiled_headers_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = model("llama").strings("tokenizer.ggml.tokens", &["a"]).build(3);
        let at = at.index(1200);
        bytes[at] = byte;
        if let Ok((_folder, open)) = open_bytes(&bytes) {
            let _ = open.config().map(|config| open.check(&config));
        }
    }
}

/// The published model that the tests use, where it was downloaded; `REQUIRE_REAL_MODEL=1` makes its absence a failure.
#[test]
fn the_published_smollm2_file_reads_whole() {
    let home = std::env::var_os("HOME").unwrap_or_default();
    let path = std::path::Path::new(&home).join(".cache/nibble/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.is_file() {
        assert!(std::env::var("REQUIRE_REAL_MODEL").as_deref() != Ok("1"), "{} is not there", path.display());
        return;
    }
    let open = Checkpoint::open(&path).unwrap();
    let config = open.config().unwrap();
    open.check(&config).unwrap();
    assert_eq!((config.family, config.hidden_size, config.num_hidden_layers, config.head_dim), (Family::Llama, 576, 30, 64));
    assert_eq!((config.rope.theta, config.rms_norm_eps, config.tie_word_embeddings), (100_000.0, 1e-5, true));
    assert_eq!((config.vocab_size, config.dtype), (49152, Some(StoredType::BF16)));
    let vocab = open.gguf().unwrap().vocab().unwrap();
    assert_eq!((vocab.tokens.len(), vocab.merges.len(), vocab.pre.as_deref()), (49152, 48900, Some("smollm")));
    let mut parameters = 0;
    for name in open.names() {
        let info = open.info(name).unwrap();
        let mut out = vec![f32::NAN; info.shape.iter().product()];
        open.read_f32(name, &mut out).unwrap();
        assert!(out.iter().all(|x| x.is_finite()), "{name}");
        parameters += out.len();
        open.release(name).unwrap();
    }
    assert_eq!(parameters, 134_515_008);
}
