//! What a run learned before it broke is saved, whatever broke it.

#![forbid(unsafe_code)]

mod common;

use common::{Ended, World, tiny::read_tensors};
use serde_json::json;

/// The run ended with `code` and the error `says`; its adapter is there, can be used, and the message says where.
#[track_caller]
fn is_kept(world: &World, ended: &Ended, code: i32, says: &str) {
    assert_eq!(ended.code, Some(code), "{}", ended.stderr);
    for part in ["error: ", says, "hint: the adapter as it was before that is in `out`"] {
        assert!(ended.stderr.contains(part), "expected `{part}` in:\n{}", ended.stderr);
    }
    assert!(!read_tensors(&world.path("out/adapter_model.safetensors")).is_empty());
    assert!(world.path("out/metrics.jsonl").exists() && world.path("out/adapter_config.json").exists());
}

#[test]
fn a_step_without_a_number_keeps_the_steps_before_it() {
    let world = World::new();
    let line = "train --model model --data rows.jsonl --output out --max-steps 9 --lr 1e30 --max-grad-norm 0 --compute-dtype f32 --device cpu";
    let ended = world.run(line);
    is_kept(&world, &ended, 2, "step 2: the loss is ");
    assert!(!ended.stderr.contains("--resume"), "the same step would come again: {}", ended.stderr);
}

#[test]
fn an_evaluation_without_a_number_keeps_what_was_learned() {
    let world = World::new();
    let line = "train --model model --data rows.jsonl --eval-data rows.jsonl --output out --max-steps 1 --lr 1e30 --compute-dtype f32 --device cpu";
    let ended = world.run(line);
    is_kept(&world, &ended, 2, "evaluate: the loss is ");
    // No step is left to go on with.
    assert!(!world.path("out/training_state.safetensors").exists() && !ended.stderr.contains("--resume"), "{}", ended.stderr);
}

#[test]
fn memory_that_runs_out_keeps_what_was_learned() {
    let world = World::new();
    // The longest row comes last, and takes most of what a run takes.
    let row = |length: usize| json!({ "instruction": "Say", "output": "a".repeat(length) });
    world.jsonl("growing.jsonl", (0..3).map(|_| row(4)).chain([row(200)]));
    // The plan says 730 kB and lets 15 % less through; the last step takes 657 kB, those before it less.
    let line = "train --model model --data growing.jsonl --output out --num-train-epochs 1 --batch-size 1 --no-shuffle --lora-r 2 \
                --compute-dtype bf16 --device cpu --memory-limit 640KB";
    is_kept(&world, &world.run(line), 3, "out of memory");
}

#[test]
fn memory_that_runs_out_before_the_first_step_is_told_by_owner_and_leaves_nothing() {
    let world = World::new();
    world.jsonl("short.jsonl", [json!({ "input_ids": [1, 2, 3], "labels": [1, 2, 3] })]);
    let before = world.entries();
    // Adapters, gradients and states are nearly all of it.
    let line = "train --model model --data short.jsonl --output out --max-steps 1 --batch-size 1 --lora-r 256 --compute-dtype bf16 \
                --device cpu --memory-limit 3880KB";
    let ended = world.run(line);
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    for part in ["error: out of memory", "trained weights: ", "optimizer: ", "hint: "] {
        assert!(ended.stderr.contains(part), "expected `{part}` in:\n{}", ended.stderr);
    }
    assert_eq!(world.entries(), before);
}

#[test]
fn an_evaluation_that_does_not_fit_is_refused_before_the_first_step() {
    let world = World::new();
    let rows = |n: usize, length: usize| (0..n).map(move |_| json!({ "instruction": "Say", "output": "a".repeat(length) }));
    world.jsonl("short.jsonl", rows(4, 4));
    world.jsonl("long.jsonl", rows(12, 200));
    let line = "train --model model --data short.jsonl --output out --max-steps 1 --batch-size 1 --lora-r 2 --compute-dtype f32 \
                --device cpu --eval-data long.jsonl --memory-limit 1MB";
    let before = world.entries();
    let ended = world.run(&format!("{line} --per-device-eval-batch-size 12"));
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    assert!(ended.stderr.contains("error: train: the run needs about"), "{}", ended.stderr);
    assert_eq!(world.entries(), before);
    // What it proposes fits, and so does the default: as many documents as a step has.
    let hint = ended.stderr.split("hint: what fits: `").nth(1).and_then(|rest| rest.split('`').next()).expect("a hint");
    assert!(hint.starts_with("--per-device-eval-batch-size "), "{hint}");
    world.ok(&format!("{line} {hint}"));
    world.ok(&line.replace("--output out", "--output other"));
}
