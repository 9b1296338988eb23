//! Ten steps of each optimizer against the reference stack's.

use std::path::{Path, PathBuf};

use nibble_optim::{AdamWConfig, DecayOrder, Optimizer, OptimizerConfig, SgdConfig};
use nibble_tensor::{Arena, Device, Tensor};
use safetensors::SafeTensors;

/// The optimizer of each trace, and its learning rate.
fn cases() -> [(&'static str, f64, OptimizerConfig); 3] {
    let adamw = AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() };
    [
        ("adamw32", 1e-3, OptimizerConfig::AdamW(adamw)),
        ("bnb_adamw32", 1e-3, OptimizerConfig::AdamW(AdamWConfig { decay: DecayOrder::After, ..adamw })),
        ("sgd_momentum", 1e-2, OptimizerConfig::Sgd(SgdConfig { momentum: 0.9, weight_decay: 0.01, ..SgdConfig::default() })),
    ]
}

fn values(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let bytes = file.tensor(name).unwrap().data();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn assert_close(what: &str, found: &Tensor, want: &[f32]) {
    let found = found.as_slice::<f32>().unwrap();
    assert_eq!(found.len(), want.len());
    let worst = found.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-6, "{what}: off by {worst:e}");
}

/// Replays the trace of the parameter `which` (`big` or `small`).
fn replay(path: &Path, which: &str) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let arena = Arena::new(Device::Cpu);
    let tensor = |values: &[f32]| Tensor::from_slice(&arena, values, [values.len()]).unwrap();
    for (name, lr, config) in cases() {
        let mut params = tensor(&values(&file, &format!("{name}.{which}.0")));
        let mut optimizer = Optimizer::new(&arena, params.numel(), config, &[]).unwrap();
        for step in 1..=10 {
            // Half the gradient, scaled by two: clipping must act before everything else.
            let grads: Vec<f32> = values(&file, &format!("{name}.g{which}.{step}")).iter().map(|g| g * 0.5).collect();
            optimizer.step(&mut params, &tensor(&grads), lr, 2.0).unwrap();
            if [1, 2, 5, 10].contains(&step) {
                assert_close(&format!("{name} {which} {step}"), &params, &values(&file, &format!("{name}.{which}.{step}")));
            }
        }
        // The file has the states of the big parameter only.
        if which != "big" {
            continue;
        }
        for (ours, theirs) in [("exp_avg", "state1"), ("exp_avg_sq", "state2"), ("momentum_buffer", "momentum_buffer")] {
            let golden =
                [ours, theirs].map(|state| format!("{name}.state.{state}")).into_iter().find(|name| file.tensor(name).is_ok());
            if let (Some(golden), Some((_, found))) = (golden, optimizer.state().iter().find(|(name, _)| *name == ours)) {
                assert_close(&golden, found, &values(&file, &golden));
            }
        }
    }
}

#[test]
fn ten_steps_are_those_of_torch_and_bitsandbytes() {
    replay(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/optim_small.safetensors"), "small");
}

#[test]
fn the_whole_reference_file_where_it_is_at_hand() {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/optim.safetensors");
    if path.exists() {
        replay(&path, "big");
        replay(&path, "small");
    }
}
