//! N steps, an end, and M steps more are N + M steps, bit for bit.

#![forbid(unsafe_code)]

mod common;

use std::fs;

use common::World;
use serde_json::json;

/// Rows of which the longest comes last: a run that has too little memory for it learns from the others first.
fn growing(world: &World) {
    let row = |length: usize| json!({ "instruction": "Say", "output": "a".repeat(length) });
    world.jsonl("growing.jsonl", (0..5).map(|i| row(4 + i)).chain([row(200)]));
}

/// Two epochs; a limit of 840 kB is too little for the sixth step.
fn line(out: &str, flags: &str) -> String {
    format!(
        "train --model model --data growing.jsonl --output {out} --num-train-epochs 2 --batch-size 1 --no-shuffle --lr 0.01 \
         --lr-scheduler-type cosine --compute-dtype f32 --device cpu {flags}"
    )
}

const ADAPTER: &str = "--lora-r 2 --lora-dropout 0.1";

#[test]
fn a_run_that_was_ended_goes_on_bit_for_bit() {
    let world = World::new();
    growing(&world);
    let adapter = |out: &str| fs::read(world.path(out).join("adapter_model.safetensors")).unwrap();
    for optim in
        ["adamw_torch", "adamw_8bit", "sgd --optim-args momentum=0.9", "adafactor", "paged_adamw_32bit --optim-page-file pages"]
    {
        let name = optim.split(' ').next().unwrap();
        let [whole, part, rest] = ["whole", "part", "rest"].map(|out| format!("{out}-{name}"));
        let flags = format!("--optim {optim}");
        world.ok(&line(&whole, &format!("{ADAPTER} {flags}")));
        assert!(!world.path(&whole).join("training_state.safetensors").exists(), "a run that is done leaves no state");
        let ended = world.run(&line(&part, &format!("{ADAPTER} {flags} --memory-limit 840KB")));
        assert_eq!(ended.code, Some(3), "{name}: {}", ended.stderr);
        assert_ne!(adapter(&part), adapter(&whole), "{name}");
        let ended = world.ok(&line(&rest, &format!("{flags} --resume {part}")));
        assert!(ended.stderr.contains(&format!("goes on with `{part}` after step 5")), "{}", ended.stderr);
        assert_eq!(adapter(&rest), adapter(&whole), "{name}");
    }
}

#[test]
fn a_run_is_gone_on_with_in_its_own_folder() {
    let world = World::new();
    growing(&world);
    assert_eq!(world.run(&line("out", &format!("{ADAPTER} --memory-limit 840KB"))).code, Some(3));
    world.ok(&line("out", "--resume out --overwrite-output-dir"));
    assert!(!world.path("out/training_state.safetensors").exists());
}

#[test]
fn a_run_that_was_another_is_not_gone_on_with() {
    let world = World::new();
    growing(&world);
    assert_eq!(world.run(&line("part", &format!("{ADAPTER} --memory-limit 840KB"))).code, Some(3));
    let refuses = |line: &str, says: &[&str]| world.refuses_line(line, says);
    let other = line("out", "--resume part --weight-decay 0.5").replace("--lr 0.01", "--lr 0.02");
    refuses(&other, &["learning_rate: expected 0.01, found 0.02", "weight_decay: expected 0, found 0.5", "hint: "]);
    refuses(&line("out", "--resume part").replace("growing.jsonl", "rows.jsonl"), &["examples: expected 6, found 12"]);
    refuses(&line("out", "--resume part --lora-r 2"), &["`--lora-r` cannot be given with `--resume part`"]);
    world.ok(&line("done", ADAPTER));
    refuses(&line("out", "--resume done"), &["training_state.safetensors", "ended before its last step", "hint: "]);
    let state = world.path("part/training_state.safetensors");
    let bytes = fs::read(&state).unwrap();
    for cut in [0, 7, 100, bytes.len() - 1] {
        fs::write(&state, &bytes[..cut]).unwrap();
        refuses(&line("out", "--resume part"), &["found a damaged file"]);
    }
}
