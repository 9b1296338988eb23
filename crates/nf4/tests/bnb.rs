//! bitsandbytes' tensor names, there and back, and every refusal.

use std::collections::HashMap;

use nibble_nf4::bnb::{StateDtype, StateRef, StateTensor, from_state, to_state};
use nibble_nf4::{ElementType, Error, FP4, Format, QuantConfig, quantize};

const W: &str = "model.layers.0.mlp.up_proj.weight";

fn state(config: &QuantConfig) -> Vec<StateTensor> {
    let x: Vec<f32> = (0..77 * 50).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-3).collect();
    to_state(W, &quantize(&x, config).unwrap(), &[77, 50], ElementType::Bf16).unwrap()
}

fn read(tensors: &[StateTensor]) -> Result<nibble_nf4::bnb::StoredWeight, Error> {
    let by_name: HashMap<&str, &StateTensor> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    from_state(W, |name| by_name.get(name).map(|t| StateRef { dtype: t.dtype, bytes: &t.bytes }))
}

/// The `what` of each mismatch of a refused state.
fn refused(tensors: &[StateTensor]) -> Vec<String> {
    match read(tensors) {
        Err(Error::State { name, mismatches }) => {
            assert_eq!(name, W);
            mismatches.into_iter().map(|m| m.what).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn configs() -> Vec<QuantConfig> {
    let mut all = Vec::new();
    for format in [Format::Nf4, Format::Fp4] {
        for double_quant in [false, true] {
            all.push(QuantConfig { format, block_size: 64, double_quant });
        }
    }
    all
}

#[test]
fn state_reads_back_equal() {
    for config in configs() {
        let x: Vec<f32> = (0..77 * 50).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-3).collect();
        let q = quantize(&x, &config).unwrap();
        let stored = read(&to_state(W, &q, &[77, 50], ElementType::F16).unwrap()).unwrap();
        assert_eq!(stored.blocks, q);
        assert_eq!((stored.shape, stored.dtype), (vec![77, 50], ElementType::F16));
    }
}

#[test]
fn names_dtypes_shapes_and_json_are_the_reference_ones() {
    let tensors = state(&QuantConfig { format: Format::Nf4, block_size: 64, double_quant: true });
    let listed: Vec<_> = tensors.iter().map(|t| (t.name.strip_prefix(W).unwrap(), t.dtype, t.shape.clone())).collect();
    let json = tensors.last().unwrap();
    assert_eq!(
        listed,
        [
            ("", StateDtype::U8, vec![1925, 1]),
            (".absmax", StateDtype::U8, vec![61]),
            (".quant_map", StateDtype::F32, vec![16]),
            (".nested_absmax", StateDtype::F32, vec![1]),
            (".nested_quant_map", StateDtype::F32, vec![256]),
            (".quant_state.bitsandbytes__nf4", StateDtype::U8, vec![json.bytes.len()]),
        ]
    );
    let text = std::str::from_utf8(&json.bytes).unwrap();
    let head = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [77, 50], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": "#;
    let offset = text.strip_prefix(head).unwrap().strip_suffix('}').unwrap();
    assert!((offset.parse::<f64>().unwrap() - 0.05).abs() < 0.002);

    let plain = state(&QuantConfig { format: Format::Fp4, block_size: 128, double_quant: false });
    let json = std::str::from_utf8(&plain.last().unwrap().bytes).unwrap();
    assert_eq!(json, r#"{"quant_type": "fp4", "blocksize": 128, "dtype": "bfloat16", "shape": [77, 50]}"#);
    let map = &plain.iter().find(|t| t.name.ends_with("quant_map")).unwrap().bytes;
    assert_eq!(map[32..36], [0; 4], "code 8 is stored as +0, {}", FP4[8]);
}

#[test]
fn every_missing_tensor_is_named() {
    for config in configs() {
        let tensors = state(&config);
        for missing in 0..tensors.len() {
            let mut rest = tensors.clone();
            let name = rest.remove(missing).name;
            let json = name.contains("quant_state");
            let expected = if json { format!("{W}.quant_state.bitsandbytes__*") } else { name };
            assert_eq!(refused(&rest), [expected]);
        }
    }
}

#[test]
fn all_mismatches_come_at_once() {
    let mut tensors = state(&QuantConfig::default());
    tensors.retain(|t| !t.name.ends_with(".nested_absmax"));
    for t in &mut tensors {
        if t.name.ends_with("W.absmax") || t.name == format!("{W}.absmax") {
            t.dtype = StateDtype::F32;
        }
        if t.name == format!("{W}.quant_map") {
            t.bytes[4..8].copy_from_slice(&0.5f32.to_le_bytes());
        }
    }
    let expected = ["quant_map[1]".to_owned(), format!("{W}.absmax"), format!("{W}.nested_absmax")];
    assert_eq!(refused(&tensors), expected);
}

#[test]
fn sizes_that_do_not_fit_the_shape_are_named() {
    let mut tensors = state(&QuantConfig { format: Format::Nf4, block_size: 64, double_quant: false });
    tensors[0].bytes.pop();
    tensors[1].bytes.truncate(40);
    assert_eq!(refused(&tensors), ["packed", "absmax"]);
}

#[test]
fn unknown_json_fields_and_values_are_told_apart() {
    let replace = |from: &str, to: &str| {
        let mut tensors = state(&QuantConfig::default());
        let json = tensors.last_mut().unwrap();
        let text = std::str::from_utf8(&json.bytes).unwrap();
        assert!(text.contains(from));
        json.bytes = text.replace(from, to).into_bytes();
        tensors
    };
    assert_eq!(refused(&replace("\"nf4\"", "\"fp4\"")), ["quant_type"]);
    assert_eq!(refused(&replace("bfloat16", "float64")), ["dtype"]);
    assert_eq!(refused(&replace("\"nested_blocksize\": 256", "\"nested_blocksize\": 128")), ["nested_blocksize"]);
    assert_eq!(refused(&replace("[77, 50]", "[18446744073709551615, 50]")), ["shape"]);
    assert_eq!(refused(&replace("{", "")), [format!("{W}.quant_state.bitsandbytes__nf4")]);
    assert!(matches!(read(&replace("\"blocksize\": 64", "\"blocksize\": 48")), Err(Error::BlockSize { found: 48, .. })));
    assert!(read(&replace("{", "{\"later\": 1, ")).is_ok(), "fields of later releases are let through");
}

#[test]
fn shape_must_have_as_many_elements_as_the_blocks() {
    let q = quantize(&[1.0f32; 12], &QuantConfig::default()).unwrap();
    let error = to_state(W, &q, &[3, 5], ElementType::F32).unwrap_err();
    assert_eq!(error.to_string(), "to_state: `elements of the shape`: expected 12, found 15");
}
