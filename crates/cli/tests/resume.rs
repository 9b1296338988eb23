//! N steps, an end, and M steps more are N + M steps, bit for bit on the CPU.

#![forbid(unsafe_code)]

mod common;

use std::fs;

use common::World;
use serde_json::{Value, json};

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
        for said in [&format!("`--resume {part}` go on from there"), "only `--gradient-checkpointing`"] {
            assert!(ended.stderr.contains(said), "{}", ended.stderr);
        }
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
fn what_saves_memory_may_be_another_in_the_second_part() {
    let world = World::new();
    growing(&world);
    let adapter = |out: &str| fs::read(world.path(out).join("adapter_model.safetensors")).unwrap();
    let (plain, paged) = ("--optim adamw_8bit", "--optim paged_adamw_8bit --optim-page-file pages");
    world.ok(&line("whole", &format!("{ADAPTER} {plain}")));
    for (part, first, second) in [("a", plain, paged), ("b", paged, plain)] {
        assert_eq!(world.run(&line(part, &format!("{ADAPTER} {first} --memory-limit 840KB"))).code, Some(3));
        world.ok(&line(&format!("rest-{part}"), &format!("{second} --gradient-checkpointing --resume {part}")));
        assert_eq!(adapter(&format!("rest-{part}")), adapter("whole"), "{first}, then {second}");
    }
}

#[test]
fn the_log_of_both_parts_is_that_of_one_run() {
    let world = World::new();
    growing(&world);
    let steps = |out: &str| -> Vec<(Value, Value, Value)> {
        let text = fs::read_to_string(world.path(out).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let steps = lines.filter(|line| line.get("loss").is_some());
        steps.map(|line| (line["step"].clone(), line["loss"].clone(), line["tokens"].clone())).collect()
    };
    let flags = format!("{ADAPTER} --logging-steps 1");
    world.ok(&line("whole", &flags));
    assert_eq!(world.run(&line("part", &format!("{flags} --memory-limit 840KB"))).code, Some(3));
    world.ok(&line("rest", "--logging-steps 1 --resume part"));
    world.ok(&line("part", "--logging-steps 1 --resume part --overwrite-output-dir"));
    assert_eq!(steps("whole").len(), 12);
    assert_eq!(steps("rest"), steps("whole"));
    assert_eq!(steps("part"), steps("whole"));
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
    refuses(&line("out", "--resume part --train-on-prompt"), &["labels: expected ", "data: expected "]);
    refuses(&line("out", "--resume part --quant-block-size 128"), &["quant: expected linears in nf4, blocks of 64"]);
    let edited = fs::read_to_string(world.path("growing.jsonl")).unwrap().replace("aaaa", "bbbb");
    world.write("edited.jsonl", &edited);
    refuses(&line("out", "--resume part").replace("growing.jsonl", "edited.jsonl"), &["\n  data: expected "]);
    fs::create_dir(world.path("other")).unwrap();
    for entry in fs::read_dir(world.path("model")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), world.path("other").join(entry.file_name())).unwrap();
    }
    refuses(&line("out", "--resume part").replace("--model model", "--model other"), &["model: expected model, found other"]);
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
