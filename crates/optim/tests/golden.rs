//! Ten steps of each optimizer against the reference stack's.

mod common;

use std::path::{Path, PathBuf};

use nibble_nf4::{dynamic_map_signed, dynamic_map_unsigned};
use nibble_optim::{AdafactorConfig, AdamWConfig, DecayOrder, Layout, LionConfig, Optimizer, OptimizerConfig, SgdConfig};
use nibble_tensor::{Shape, Tensor};
use nibble_testkit::golden_folder;
use safetensors::SafeTensors;

/// The optimizer of each trace, and its learning rate.
fn cases() -> Vec<(&'static str, f64, OptimizerConfig)> {
    let adamw = AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() };
    let bitsandbytes = AdamWConfig { decay: DecayOrder::After, ..adamw };
    vec![
        ("adamw32", 1e-3, OptimizerConfig::AdamW(adamw)),
        ("bnb_adamw32", 1e-3, OptimizerConfig::AdamW(bitsandbytes)),
        ("bnb_adamw8", 1e-3, OptimizerConfig::AdamW8bit(bitsandbytes)),
        // The reference's own default betas.
        ("bnb_lion8", 1e-4, OptimizerConfig::Lion8bit(LionConfig { weight_decay: 0.01, ..LionConfig::default() })),
        ("adafactor", 1e-3, OptimizerConfig::Adafactor(AdafactorConfig::default())),
        ("sgd_momentum", 1e-2, OptimizerConfig::Sgd(SgdConfig { momentum: 0.9, weight_decay: 0.01, ..SgdConfig::default() })),
    ]
}

fn values(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let bytes = file.tensor(name).unwrap().data();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// `tolerance` holds for each element.
fn assert_close(what: &str, found: &Tensor, want: &[f32], tolerance: impl Fn(usize) -> f32) {
    let found = found.to_f32_vec().unwrap();
    assert_eq!(found.len(), want.len());
    for (i, (found, want)) in found.iter().zip(want).enumerate() {
        assert!((found - want).abs() <= tolerance(i), "{what} [{i}]: expected {want:e}, found {found:e}");
    }
}

/// Ours and the reference's names of an f32 state.
const STATES: [(&str, &str); 7] = [
    ("exp_avg", "exp_avg"),
    ("exp_avg_sq", "exp_avg_sq"),
    ("exp_avg", "state1"),
    ("exp_avg_sq", "state2"),
    ("momentum_buffer", "momentum_buffer"),
    ("exp_avg_sq_row", "exp_avg_sq_row"),
    ("exp_avg_sq_col", "exp_avg_sq_col"),
];

/// Replays the trace of the parameter `which` (`big` or `small`).
fn replay(path: &Path, which: &str) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let arena = common::arena();
    let tensor = |values: &[f32]| Tensor::from_slice(&arena, values, [values.len()]).unwrap();
    for (name, lr, config) in cases() {
        let first = format!("{name}.{which}.0");
        let mut params = tensor(&values(&file, &first));
        let shape = match file.tensor(&first).unwrap().shape() {
            &[rows, cols] => Shape::from([rows, cols]),
            _ => [params.numel()].into(),
        };
        let mut optimizer = Optimizer::new(&arena, &Layout::new([(shape, true)]), config).unwrap();
        for step in 1..=10 {
            // Half the gradient, scaled by two: clipping must act before everything else.
            let grads: Vec<f32> = values(&file, &format!("{name}.g{which}.{step}")).iter().map(|g| g * 0.5).collect();
            optimizer.step(&mut params, &tensor(&grads), lr, 2.0).unwrap();
            if [1, 2, 5, 10].contains(&step) {
                let want = values(&file, &format!("{name}.{which}.{step}"));
                assert_close(&format!("{name} {which} {step}"), &params, &want, |_| 1e-6);
            }
        }
        // The file has the states of the big parameter only.
        if which == "big" {
            assert_states(&file, name, &optimizer.state().unwrap());
        }
    }
}

fn assert_states(file: &SafeTensors<'_>, name: &str, states: &[(&str, Tensor)]) {
    let state = |name: &str| states.iter().find(|(found, _)| *found == name).map(|(_, state)| state);
    for (ours, theirs) in STATES {
        let golden = format!("{name}.state.{theirs}");
        if let (Ok(_), Some(found)) = (file.tensor(&golden), state(ours)) {
            assert_close(&golden, found, &values(file, &golden), |_| 1e-6);
        }
    }
    for (i, levels) in [dynamic_map_signed(), dynamic_map_unsigned()].into_iter().enumerate() {
        let [codes, absmax] = ["state", "absmax"].map(|what| format!("{what}{}", i + 1));
        let (Some(found), Some(found_max)) = (state(&codes), state(&absmax)) else { continue };
        let want_max = values(file, &format!("{name}.state.{absmax}"));
        // The reference takes 1 - beta from beta in f32, which is off by 1.3e-5 for 0.999.
        assert_close(&absmax, found_max, &want_max, |block| want_max[block] * 2e-5);
        let want = file.tensor(&format!("{name}.state.{codes}")).unwrap();
        let found = found.to_vec::<u8>().unwrap();
        assert_eq!(found.len(), want.data().len());
        assert_eq!(values(file, &format!("{name}.state.qmap{}", i + 1)), levels);
        let others = found.iter().zip(want.data()).filter(|(a, b)| a != b).count();
        // A value within rounding of the middle of two levels may have either code: of 11,520 none or a few.
        assert!(others <= 3, "{name} {codes}: {others} codes differ");
        assert!(found.iter().zip(want.data()).all(|(a, b)| a.abs_diff(*b) <= 1), "{name} {codes}");
    }
}

/// The crate's folder; a copy of the tests on another machine is told it by `CARGO_MANIFEST_DIR`, as by cargo.
fn folder() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

#[test]
fn ten_steps_are_those_of_torch_and_bitsandbytes() {
    replay(&folder().join("tests/data/optim_small.safetensors"), "small");
}

#[test]
fn the_whole_reference_file_where_it_is_at_hand() {
    let Some(folder) = golden_folder() else { return };
    let path = folder.join("optim.safetensors");
    replay(&path, "big");
    replay(&path, "small");
}
