//! `nibble merge` against what the adapter does beside its base.

#![forbid(unsafe_code)]

mod common;

use std::fs;

use common::{
    World, edit_json, read_json,
    tiny::{self, read_tensors},
};
use serde_json::json;

/// A trained adapter whose update is about as large as a real one's.
fn trained(flags: &str) -> World {
    let world = World::new();
    let line = "train --model model --data rows.jsonl --output adapter --max-steps 8 --batch-size 4 --lora-r 4 --lr 0.02 --compute-dtype f32";
    world.ok(&format!("{line} {flags}"));
    world
}

#[track_caller]
fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() < tolerance, "{a} and {b} differ by {:e}", (a - b).abs());
}

#[test]
fn a_merge_has_the_loss_of_the_adapter_beside_the_base() {
    let world = trained("--quant none");
    let ended = world.ok("merge --model model --adapter adapter --output merged --quant none");
    assert!(ended.stderr.contains("||dW|| / ||W||") && ended.stderr.contains("14 layers"), "{}", ended.stderr);
    let beside = world.loss("--model model --adapter adapter --quant none");
    close(world.loss("--model merged --quant none"), beside, 1e-5);
    assert!((world.loss("--model model --quant none") - beside).abs() > 1e-2, "the adapter does something");
}

#[test]
fn a_merge_into_the_dequantised_base_has_the_loss_of_what_was_trained() {
    let world = trained("");
    let ended = world.ok("merge --model model --adapter adapter --output merged --base dequantized");
    assert!(ended.stderr.contains("nf4 weights, dequantised"), "{}", ended.stderr);
    let trained_on = world.loss("--model model --adapter adapter");
    close(world.loss("--model merged --quant none"), trained_on, 1e-4);
    world.ok("merge --model model --adapter adapter --output original");
    let original = world.loss("--model original --quant none");
    assert!((original - trained_on).abs() > 1e-4, "the original weights are others: {original} {trained_on}");
}

#[test]
fn the_gap_between_original_and_quantised_base_is_measured_and_told() {
    let world = trained("");
    let ended = world.ok("merge --model model --adapter adapter --output merged");
    // Of uniform noise in blocks of 64, NF4 keeps all but about 9 %.
    let line = ended.stderr.lines().find(|line| line.contains("||W - dequant(W)|| / ||W||")).unwrap();
    let percent: f64 = line.rsplit("= ").next().unwrap().trim_end_matches(" %").parse().unwrap();
    assert!((5.0..15.0).contains(&percent), "{line}");
    assert!(ended.stderr.contains("has not seen the original"), "{}", ended.stderr);
}

#[test]
fn only_the_layers_of_the_adapter_change() {
    let world = trained("--target-modules q_proj,down_proj --quant none");
    world.ok("merge --model model --adapter adapter --output merged --quant none");
    let (before, after) = (tiny::tensors(true), read_tensors(&world.path("merged/model.safetensors")));
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (name, (shape, values)) in &before {
        assert_eq!(shape, &after[name].0);
        let changes = name.contains("q_proj") || name.contains("down_proj");
        assert_eq!(*values != after[name].1, changes, "{name}");
    }
}

#[test]
fn the_sum_is_the_one_of_the_formula() {
    let world = trained("--quant none --lora-alpha 8");
    world.ok("merge --model model --adapter adapter --output merged --quant none");
    let adapter = read_tensors(&world.path("adapter/adapter_model.safetensors"));
    let merged = read_tensors(&world.path("merged/model.safetensors"));
    for (name, (shape, w)) in tiny::tensors(true).iter().filter(|(name, _)| name.contains("_proj")) {
        let part = |part: &str| &adapter[&format!("base_model.model.{}", name.replace(".weight", part))].1;
        let (a, b) = (part(".lora_A.weight"), part(".lora_B.weight"));
        for (i, w) in w.iter().enumerate() {
            let (row, col) = (i / shape[1], i % shape[1]);
            let update: f64 = (0..4).map(|k| f64::from(b[row * 4 + k]) * f64::from(a[k * shape[1] + col])).sum();
            let expected = f64::from(*w) + 8.0 / 4.0 * update;
            // Five roundings of sums of this size.
            let bound = 6.0 * f64::from(f32::EPSILON) * (f64::from(w.abs()) + 2.0 * 4.0 * update.abs().max(1e-3));
            assert!((f64::from(merged[name].1[i]) - expected).abs() <= bound, "{name}[{row}, {col}]");
        }
    }
}

#[test]
fn texts_are_copied_and_the_config_says_the_new_type() {
    let world = trained("");
    world.ok("merge --model model --adapter adapter --output merged --dtype bf16");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(fs::read(world.path("merged").join(name)).unwrap(), fs::read(world.path("model").join(name)).unwrap());
    }
    let config = read_json(&world.path("merged/config.json"));
    assert_eq!((&config["torch_dtype"], &config["tie_word_embeddings"]), (&json!("bfloat16"), &json!(true)));
    world.ok("merge --model model --adapter adapter --output same");
    assert_eq!(fs::read(world.path("same/config.json")).unwrap(), fs::read(world.path("model/config.json")).unwrap());
    assert_eq!(world.entries().iter().filter(|name| name.starts_with('.')).count(), 0);
}

#[test]
fn an_update_that_rounding_takes_away_is_told() {
    let world = trained("--quant none");
    let path = world.path("adapter/adapter_model.safetensors");
    let mut tensors = read_tensors(&path);
    for (_, (_, values)) in tensors.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
        for x in values.iter_mut() {
            *x *= 1e-3;
        }
    }
    tiny::write_tensors(&path, &tensors);
    // Weights that bf16 holds exactly: what rounding takes is the update's.
    let mut base = tiny::tensors(true);
    for (_, values) in base.values_mut() {
        for x in values.iter_mut() {
            *x = half::bf16::from_f32(*x).to_f32();
        }
    }
    tiny::write_tensors(&world.path("model/model.safetensors"), &base);
    let merge = |out: &str, dtype: &str| {
        world.ok(&format!("merge --model model --adapter adapter --output {out} --quant none --dtype {dtype}")).stderr
    };
    let (lost, kept) = (merge("bf16", "bf16"), merge("f32", "f32"));
    assert!(lost.contains("warning: most of the update was rounded away"), "{lost}");
    assert!(!kept.contains("rounded away") && kept.contains("100.00 % of the update is in the result"), "{kept}");
}

#[test]
fn a_head_trained_whole_unties_the_embeddings() {
    let world = trained("--quant none --modules-to-save lm_head");
    let ended = world.ok("merge --model model --adapter adapter --output merged --quant none");
    assert!(ended.stderr.contains("two tensors now"), "{}", ended.stderr);
    assert_eq!(read_json(&world.path("merged/config.json"))["tie_word_embeddings"], false);
    let merged = read_tensors(&world.path("merged/model.safetensors"));
    let adapter = read_tensors(&world.path("adapter/adapter_model.safetensors"));
    assert_eq!(merged["lm_head.weight"], adapter["base_model.model.lm_head.weight"]);
    assert_eq!(merged["model.embed_tokens.weight"], tiny::tensors(true)["model.embed_tokens.weight"]);
    close(world.loss("--model merged --quant none"), world.loss("--model model --adapter adapter --quant none"), 1e-5);
}

#[test]
fn a_head_of_an_untied_model_is_replaced() {
    let world = World::new();
    tiny::write_model(&world.path("model"), false);
    world.train("adapter", "--quant none --modules-to-save lm_head,embed_tokens");
    world.ok("merge --model model --adapter adapter --output merged --quant none");
    close(world.loss("--model merged --quant none"), world.loss("--model model --adapter adapter --quant none"), 1e-5);
}

#[test]
fn a_gguf_base_becomes_a_hugging_face_folder() {
    let world = trained("--quant none");
    tiny::write_gguf(&world.path("tiny.gguf"));
    world.ok("merge --model tiny.gguf --adapter adapter --output from_gguf --quant none");
    world.ok("merge --model model --adapter adapter --output from_folder --quant none");
    let tensors = |out: &str| read_tensors(&world.path(out).join("model.safetensors"));
    assert!(tensors("from_gguf") == tensors("from_folder"), "names, rows and values are the checkpoint's");
    assert_eq!(read_json(&world.path("from_gguf/config.json"))["model_type"], "llama");
}

#[test]
fn an_untrained_adapter_is_told() {
    let world = World::new();
    world.train("adapter", "--quant none");
    let path = world.path("adapter/adapter_model.safetensors");
    let mut tensors = read_tensors(&path);
    for (_, (_, values)) in tensors.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
        values.fill(0.0);
    }
    tiny::write_tensors(&path, &tensors);
    edit_json(&world.path("adapter/adapter_config.json"), |config| config["base_model_name_or_path"] = json!("org/other"));
    let ended = world.ok("merge --model model --adapter adapter --output merged --quant none");
    assert!(ended.stderr.contains("the update is zero"), "{}", ended.stderr);
    assert!(ended.stderr.contains("trained on `org/other`"), "{}", ended.stderr);
    assert!(read_tensors(&world.path("merged/model.safetensors")) == tiny::tensors(true));
}
