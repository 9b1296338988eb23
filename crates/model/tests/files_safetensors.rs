//! safetensors files: written in a stream, read back, and refused by name when malformed.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use nibble_model::Error;
use nibble_model::config::ModelConfig;
use nibble_model::error::{SafetensorsProblem, TensorProblem, WriteProblem};
use nibble_model::files::{Checkpoint, SafetensorsWriter, StoredType, TensorPlan, WriteOptions};
use proptest::prelude::*;
use tempfile::TempDir;

fn plan(name: &str, dtype: StoredType, shape: &[usize]) -> TensorPlan {
    TensorPlan { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

fn encode(dtype: StoredType, values: &[f32]) -> Vec<u8> {
    match dtype {
        StoredType::F64 => values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
        StoredType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        StoredType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// Small integers, which every float type holds exactly.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 13) % 255) as f32 - 127.0).collect()
}

fn write(folder: &Path, tensors: &[TensorPlan], shard: u64) -> Vec<std::path::PathBuf> {
    let options = WriteOptions { max_shard_bytes: shard, ..WriteOptions::default() };
    let mut writer = SafetensorsWriter::create(folder, tensors, &options).unwrap();
    for (i, tensor) in tensors.iter().enumerate().rev() {
        let bytes = encode(tensor.dtype, &values(tensor.shape.iter().product(), i));
        // In two pieces, and in another order than the plan's.
        let (first, second) = bytes.split_at(bytes.len() / 3);
        writer.write(&tensor.name, first).unwrap();
        writer.write(&tensor.name, second).unwrap();
    }
    writer.finish().unwrap()
}

fn floats() -> impl Strategy<Value = StoredType> {
    proptest::sample::select(&[StoredType::F64, StoredType::F32, StoredType::F16, StoredType::BF16][..])
}

fn tensors() -> impl Strategy<Value = Vec<TensorPlan>> {
    let one = (floats(), proptest::collection::vec(0..7usize, 0..3));
    proptest::collection::vec(one, 1..7)
        .prop_map(|list| list.iter().enumerate().map(|(i, (dtype, shape))| plan(&format!("t{i}"), *dtype, shape)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_reads_back_whole_and_by_rows(tensors in tensors(), shard in 1..400u64) {
        let folder = TempDir::new().unwrap();
        let paths = write(folder.path(), &tensors, shard);
        let open = Checkpoint::open(folder.path()).unwrap();
        prop_assert_eq!(open.names().count(), tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            let info = open.info(&tensor.name).unwrap();
            prop_assert_eq!((&info.shape, info.stored), (&tensor.shape, tensor.dtype));
            let want = values(tensor.shape.iter().product(), i);
            let mut wide = vec![f32::NAN; want.len()];
            open.read_f32(&tensor.name, &mut wide).unwrap();
            prop_assert_eq!(&wide, &want);
            let mut narrow = vec![bf16::NAN; want.len()];
            open.read_bf16(&tensor.name, &mut narrow).unwrap();
            prop_assert!(narrow.iter().zip(&want).all(|(x, w)| x.to_f32() == *w));
            if let Some(&rows) = tensor.shape.first().filter(|&&rows| rows > 0) {
                let row = want.len() / rows;
                let mut part = vec![f32::NAN; want.len() - row];
                open.read_rows_f32(&tensor.name, 1..rows, &mut part).unwrap();
                prop_assert_eq!(&part, &want[row..]);
            }
            open.release(&tensor.name).unwrap();
            prop_assert_eq!(open.bytes(&tensor.name).unwrap(), encode(tensor.dtype, &want));
        }
        // The reference implementation reads every file, metadata included.
        for path in paths.iter().filter(|path| path.extension().unwrap() == "safetensors") {
            let bytes = std::fs::read(path).unwrap();
            let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
            prop_assert_eq!(&metadata.metadata().as_ref().unwrap()["format"], "pt");
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_refused(cut in 0..1000usize) {
        let folder = TempDir::new().unwrap();
        let path = write(folder.path(), &[plan("a", StoredType::F32, &[30]), plan("b", StoredType::BF16, &[4, 9])], 1 << 20).remove(0);
        let bytes = std::fs::read(&path).unwrap();
        let cut = cut % bytes.len();
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let Err(Error::Safetensors { problem, .. }) = Checkpoint::open(&path) else { panic!("cut at {cut} was read") };
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let told = match problem {
            SafetensorsProblem::TooShort { .. } => cut < 8,
            SafetensorsProblem::HeaderCut { .. } => (8..header).contains(&cut),
            SafetensorsProblem::TensorCut { name, .. } => cut >= header && name == if cut < header + 120 { "a" } else { "b" },
            _ => false,
        };
        prop_assert!(told, "cut at {cut}");
    }
}

fn problem(bytes: &[u8]) -> SafetensorsProblem {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    match Checkpoint::open(&path) {
        Err(Error::Safetensors { problem, .. }) => problem,
        other => panic!("expected a refusal, found {other:?}"),
    }
}

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn malformed_headers_are_refused_by_kind() {
    let too_large = u64::MAX.to_le_bytes();
    assert!(matches!(problem(&too_large), SafetensorsProblem::HeaderTooLarge { found: u64::MAX, .. }));
    assert!(matches!(problem(&file("{", 0)), SafetensorsProblem::Header(_)));
    assert!(matches!(problem(&file("\"\\ud800\"", 0)), SafetensorsProblem::Header(_)));
    let overlap =
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#;
    assert!(matches!(problem(&file(overlap, 6)), SafetensorsProblem::Header(_)));
    let wrong_size = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#;
    assert!(matches!(problem(&file(wrong_size, 4)), SafetensorsProblem::Header(_)));
    let overflow = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
    assert!(matches!(problem(&file(overflow, 0)), SafetensorsProblem::Header(_)));
    let exotic = r#"{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#;
    assert!(matches!(problem(&file(exotic, 4)), SafetensorsProblem::Type { name, .. } if name == "a"));
    let whole = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert!(matches!(problem(&file(whole, 5)), SafetensorsProblem::Trailing { .. }));
}

#[test]
fn shards_that_are_missing_or_lack_a_tensor_are_named() {
    let folder = TempDir::new().unwrap();
    let tensors = [plan("a", StoredType::F32, &[4]), plan("b", StoredType::F32, &[4]), plan("c", StoredType::F32, &[4])];
    let paths = write(folder.path(), &tensors, 32);
    let names: Vec<_> = paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]);
    let index: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&paths[2]).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 48);

    std::fs::copy(&paths[1], &paths[0]).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.ends_with("tensor `a`: expected in shard `model-00001-of-00002.safetensors`, found nothing"), "{error}");
    std::fs::remove_file(&paths[0]).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.ends_with("shard `model-00001-of-00002.safetensors` is missing; it holds `a` and 1 other tensors"), "{error}");
    for map in [r#"{"a": "../x.safetensors"}"#, r#"{"a": 1}"#, r#"{"a": ".."}"#, "3"] {
        std::fs::write(&paths[2], format!(r#"{{"weight_map": {map}}}"#)).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Safetensors { problem: SafetensorsProblem::WeightMap, .. }), "{map}: {error}");
    }
}

#[test]
fn folders_without_a_checkpoint_are_refused() {
    let folder = TempDir::new().unwrap();
    assert!(matches!(Checkpoint::open(folder.path()), Err(Error::NoCheckpoint { .. })));
}

fn tiny_config() -> ModelConfig {
    let text = include_str!("data/llama31.config.json");
    ModelConfig::from_json(text, "tiny").unwrap()
}

#[test]
fn every_mismatch_with_the_config_is_listed() {
    let config = tiny_config();
    let folder = TempDir::new().unwrap();
    let mut tensors: Vec<_> = config.tensors().into_iter().map(|spec| plan(&spec.name, StoredType::BF16, &spec.shape)).collect();
    // Ignored, as transformers does.
    tensors.push(plan("lm_head.weight", StoredType::BF16, &[320, 64]));
    tensors.push(plan("model.layers.0.self_attn.rotary_emb.inv_freq", StoredType::F32, &[8]));
    write(folder.path(), &tensors, 1 << 30);
    Checkpoint::open(folder.path()).unwrap().check(&config).unwrap();

    let spoiled = TempDir::new().unwrap();
    tensors[1].shape = vec![63];
    tensors[2].shape = vec![64, 65];
    tensors.remove(4);
    tensors.push(plan("model.layers.9.mlp.up_proj.weight", StoredType::BF16, &[1]));
    tensors.push(plan("extra", StoredType::F32, &[2, 3]));
    tensors[5].dtype = StoredType::I16;
    write(spoiled.path(), &tensors, 1 << 30);
    let error = Checkpoint::open(spoiled.path()).unwrap().check(&config).unwrap_err();
    let message = error.to_string();
    let Error::Tensors { problems, .. } = error else { panic!("{message}") };
    assert_eq!(problems.len(), 6, "{message}");
    for line in [
        "\n  model.layers.0.input_layernorm.weight: expected (64,), found (63,)",
        "\n  model.layers.0.self_attn.q_proj.weight: expected (64, 64), found (64, 65)",
        "\n  model.layers.0.self_attn.v_proj.weight: expected (32, 64), found nothing",
        "\n  model.layers.0.post_attention_layernorm.weight: expected a float type, found I16",
        "\n  extra: expected nothing, found (2, 3)",
        "\n  model.layers.9.mlp.up_proj.weight: expected nothing, found (1,)",
    ] {
        assert!(message.contains(line), "{line} not in {message}");
    }
    assert!(problems.iter().any(|problem| matches!(problem, TensorProblem::Missing { .. })));
}

#[test]
fn wrong_reads_are_refused() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), &[plan("a", StoredType::F32, &[4, 3]), plan("i", StoredType::I16, &[2])], 1 << 20);
    let open = Checkpoint::open(folder.path()).unwrap();
    assert!(matches!(open.info("b"), Err(Error::UnknownTensor { .. })));
    let short = open.read_f32("a", &mut [0.0; 11]);
    assert!(matches!(short, Err(Error::BufferLength { expected: 12, found: 11, .. })));
    assert!(matches!(open.read_rows_f32("a", 3..5, &mut [0.0; 6]), Err(Error::Rows { rows: 4, .. })));
    assert!(matches!(open.read_f32("i", &mut [0.0; 2]), Err(Error::NotFloat { found: StoredType::I16, .. })));
}

#[test]
fn a_writer_holds_its_caller_to_the_plan() {
    let folder = TempDir::new().unwrap();
    let options = WriteOptions { metadata: BTreeMap::new(), ..WriteOptions::default() };
    let create = |tensors: &[TensorPlan]| SafetensorsWriter::create(folder.path(), tensors, &options);
    let kind = |result: Result<(), Error>| match result {
        Err(Error::Write { problem, .. }) => problem,
        other => panic!("expected a refusal, found {other:?}"),
    };
    let a = plan("a", StoredType::F32, &[2]);
    assert_eq!(kind(create(&[a.clone(), a.clone()]).map(drop)), WriteProblem::Twice);
    let quantised = plan("q", StoredType::Q8_0, &[32]);
    assert_eq!(kind(create(&[quantised]).map(drop)), WriteProblem::Type { found: StoredType::Q8_0 });
    let mut writer = create(std::slice::from_ref(&a)).unwrap();
    assert_eq!(kind(writer.write("b", &[])), WriteProblem::Unplanned);
    writer.write("a", &[0; 5]).unwrap();
    assert_eq!(kind(writer.write("a", &[0; 4])), WriteProblem::TooMany { expected: 8, found: 9 });
    assert_eq!(kind(writer.finish().map(drop)), WriteProblem::Unfinished { expected: 8, found: 5 });
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "an unfinished checkpoint leaves nothing behind");

    std::fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    assert!(matches!(create(&[a]), Err(Error::Shadowed { .. })));
}
