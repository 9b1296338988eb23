//! Host memory follows the result and the largest tensor, not the model: measured on the child's own high-water mark.

#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

mod common;

use std::{fs, process::Stdio, time::Duration};

use common::{World, edit_json, tiny};

/// Sizes of the large model: tensors of 1 MiB at most, in f32.
const HIDDEN: usize = 256;
const INTER: usize = 1024;
/// Blocks of the two models that are compared.
const LAYERS: [usize; 2] = [2, 26];
/// Bytes of a block in f32.
const BLOCK: usize = 4 * (2 * HIDDEN * HIDDEN + 2 * 128 * HIDDEN + 3 * INTER * HIDDEN + 2 * HIDDEN);
/// What allocators, threads and pages of files may add.
const SLACK: usize = 12 << 20;

/// A model of so many blocks in `name`; its weights repeat.
fn write_model(world: &World, name: &str, layers: usize) {
    let folder = world.path(name);
    tiny::write_model(&folder, true);
    edit_json(&folder.join("config.json"), |config| {
        for (key, value) in [("hidden_size", HIDDEN), ("intermediate_size", INTER), ("num_hidden_layers", layers)] {
            config[key] = value.into();
        }
    });
    let mut tensors = tiny::Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let values = (0..shape.iter().product::<usize>()).map(|i| (i * 7919 % 255) as f32 / 4096.0 - 0.03).collect();
        tensors.insert(name, (shape.to_vec(), values));
    };
    add("model.embed_tokens.weight".into(), &[tiny::VOCAB, HIDDEN]);
    for layer in 0..layers {
        let mut part = |part: &str, shape: &[usize]| add(format!("model.layers.{layer}.{part}.weight"), shape);
        part("input_layernorm", &[HIDDEN]);
        part("self_attn.q_proj", &[HIDDEN, HIDDEN]);
        part("self_attn.k_proj", &[128, HIDDEN]);
        part("self_attn.v_proj", &[128, HIDDEN]);
        part("self_attn.o_proj", &[HIDDEN, HIDDEN]);
        part("post_attention_layernorm", &[HIDDEN]);
        part("mlp.gate_proj", &[INTER, HIDDEN]);
        part("mlp.up_proj", &[INTER, HIDDEN]);
        part("mlp.down_proj", &[HIDDEN, INTER]);
    }
    add("model.norm.weight".into(), &[HIDDEN]);
    tiny::write_tensors(&folder.join("model.safetensors"), &tensors);
}

/// The most memory that a command held at once, in bytes. Looked at while it runs: the mark never falls, so that what is found is
/// at most what it was.
fn high_water(world: &World, line: &str) -> usize {
    let mut child = world.command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary runs");
    let mut most = 0;
    let status = format!("/proc/{}/status", child.id());
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
        most = most.max(mark.unwrap_or(0) * 1024);
        if let Some(ended) = child.try_wait().expect("a child") {
            assert!(ended.success(), "`nibble {line}` failed");
            return most;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How much more a command holds for the large model than for the small one.
fn growth(world: &World, line: &str) -> usize {
    let [small, large] = ["small", "large"].map(|size| high_water(world, &line.replace("SIZE", size)));
    large.saturating_sub(small)
}

#[test]
fn merging_and_loading_hold_the_result_and_a_tensor_not_the_model() {
    let world = World::new();
    for (name, layers) in [("small", LAYERS[0]), ("large", LAYERS[1])] {
        write_model(&world, name, layers);
        world.ok(&format!(
            "train --model {name} --data rows.jsonl --output {name}-adapter --max-steps 1 --batch-size 1 --lora-r 1 --device cpu"
        ));
    }
    let model = (LAYERS[1] - LAYERS[0]) * BLOCK;
    // In 4 bits with their scales: an eighth and a little of f32.
    let packed = model / 8 + model / 32;
    let merging = growth(&world, "merge --model SIZE --adapter SIZE-adapter --output SIZE-merged");
    assert!(merging < SLACK, "merging {model} bytes more took {merging} more");
    let loading = growth(&world, "eval --model SIZE --data rows.jsonl --batch-size 1 --device cpu");
    assert!(loading < packed + SLACK, "loading {model} bytes more took {loading} more, of which {packed} are the result");
}
