//! Whole runs of the binary on a tiny model: what is written, and that it is the same each time.

#![forbid(unsafe_code)]

mod common;

use std::fs;

use common::{World, read_json, tiny::read_tensors};
use serde_json::Value;

fn metrics(world: &World, out: &str) -> Vec<Value> {
    let text = fs::read_to_string(world.path(out).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn training_writes_what_peft_writes() {
    let world = World::new();
    let ended = world.train("out", "--eval-data rows.jsonl");
    assert_eq!(ended.stdout, "", "progress belongs to standard error");
    let config = read_json(&world.path("out/adapter_config.json"));
    assert_eq!((&config["peft_type"], &config["r"], &config["task_type"]), (&"LORA".into(), &4.into(), &"CAUSAL_LM".into()));
    assert_eq!(config["inference_mode"], true);
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 7);
    let tensors = read_tensors(&world.path("out/adapter_model.safetensors"));
    assert_eq!(tensors.len(), 2 * 2 * 7, "an A and a B for each linear of each block");
    assert!(tensors.values().all(|(_, values)| values.iter().any(|&x| x != 0.0)), "three steps move every B from zero");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(fs::read(world.path("out").join(name)).unwrap(), fs::read(world.path("model").join(name)).unwrap());
    }
    let card = fs::read_to_string(world.path("out/README.md")).unwrap();
    assert!(
        card.starts_with("---\n") && card.contains("library_name: peft") && card.contains("LoRA adapter for model"),
        "{card}"
    );
    for text in ["nibble generate --model model --adapter out", "PeftModel", "convert_lora_to_gguf.py"] {
        assert!(ended.stderr.contains(text), "expected `{text}` in:\n{}", ended.stderr);
    }
}

#[test]
fn metrics_are_an_object_a_logged_step() {
    let world = World::new();
    world.train("out", "--eval-data rows.jsonl --eval-steps 2");
    let lines = metrics(&world, "out");
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 3);
    for (i, line) in steps.iter().enumerate() {
        assert_eq!(line["step"], i + 1);
        for key in ["epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"] {
            assert!(line[key].as_f64().is_some_and(f64::is_finite), "{key}: {line}");
        }
    }
    let evals: Vec<&Value> = lines.iter().filter(|line| line.get("eval_loss").is_some()).collect();
    assert_eq!(evals.iter().map(|line| &line["step"]).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn the_last_evaluation_is_what_eval_measures_on_the_saved_adapter() {
    let world = World::new();
    world.train("out", "--eval-data rows.jsonl");
    let told = metrics(&world, "out").into_iter().find_map(|line| line.get("eval_loss")?.as_f64()).unwrap();
    let measured = world.loss("--model model --adapter out");
    assert!((told - measured).abs() < 1e-6, "{told} {measured}");
}

#[test]
fn two_runs_with_one_seed_are_the_same_bytes_and_another_seed_is_another_run() {
    let world = World::new();
    for (out, seed) in [("a", 7), ("b", 7), ("c", 8)] {
        world.train(out, &format!("--seed {seed} --lora-dropout 0.1"));
    }
    let bytes = |out: &str| fs::read(world.path(out).join("adapter_model.safetensors")).unwrap();
    assert!(bytes("a") == bytes("b"));
    assert!(bytes("a") != bytes("c"));
}

#[test]
fn the_loss_falls() {
    let world = World::new();
    let before = world.loss("--model model");
    world.ok("train --model model --data rows.jsonl --output out --max-steps 30 --batch-size 6 --lr 0.02 --compute-dtype f32");
    let after = world.loss("--model model --adapter out");
    assert!(after < 0.8 * before, "{before} -> {after}");
}

#[test]
fn memory_options_do_not_change_the_result() {
    let world = World::new();
    world.train("plain", "");
    world.train("checkpointed", "--gradient-checkpointing");
    let tensors = |out: &str| fs::read(world.path(out).join("adapter_model.safetensors")).unwrap();
    assert!(tensors("plain") == tensors("checkpointed"));
}

#[test]
fn an_optimizer_in_pages_learns_the_same_bytes() {
    let world = World::new();
    let adapter = |out: &str| fs::read(world.path(out).join("adapter_model.safetensors")).unwrap();
    for (whole, paged) in [("adamw_bnb_8bit", "paged_adamw_8bit"), ("adamw_bnb_32bit", "paged_adamw_32bit")] {
        world.train(whole, &format!("--optim {whole}"));
        world.train(paged, &format!("--optim {paged} --optim-page-file pages"));
        assert_eq!(adapter(whole), adapter(paged), "{paged}");
        assert!(!world.path("pages").exists());
    }
}

#[test]
fn an_adapter_can_be_trained_further() {
    let world = World::new();
    world.train("first", "");
    let line =
        "train --model model --adapter first --data rows.jsonl --output second --max-steps 2 --batch-size 2 --compute-dtype f32";
    let ended = world.ok(line);
    let said = "continues `first`: its own config decides; optimizer and schedule begin anew";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
    assert_eq!(read_json(&world.path("second/adapter_config.json"))["r"], 4);
    world.refuses_line(&format!("{} --lora-r 8", line.replace("second", "third")), &["--lora-r", "--adapter"]);
}

#[test]
fn evaluation_is_one_json_object() {
    let world = World::new();
    let json = world.ok("eval --model model --data rows.jsonl --json").json();
    let number = |key: &str| json[key].as_f64().unwrap();
    assert_eq!(json.as_object().unwrap().len(), 3);
    assert!((number("loss").exp() / number("perplexity") - 1.0).abs() < 1e-6);
    assert!(json["tokens"].as_u64().unwrap() > 0);
}

#[test]
fn evaluation_does_not_depend_on_the_batch_size() {
    let world = World::new();
    let loss = |size: usize| world.loss(&format!("--model model --batch-size {size}"));
    assert!((loss(1) - loss(12)).abs() < 1e-5);
}

#[test]
fn generation_is_one_json_object_a_prompt() {
    let world = World::new();
    world.write("prompts.txt", "one\ntwo\n");
    let ended = world.ok("generate --model model --prompts prompts.txt --json --max-new-tokens 5");
    let lines: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for line in &lines {
        assert_eq!(line.as_object().unwrap().keys().collect::<Vec<_>>(), ["prompt_ids", "token_ids", "text"]);
        assert!((1..=5).contains(&line["token_ids"].as_array().unwrap().len()));
    }
    assert_eq!(lines[0]["prompt_ids"][0], 257, "the chat template begins with <|im_start|>");
    let raw = world.ok("generate --model model --prompt ab --raw --json --max-new-tokens 1").json();
    assert_eq!(raw["prompt_ids"], serde_json::json!([97, 98]));
}

#[test]
fn an_adapter_changes_the_answers_and_an_untrained_one_does_not() {
    let world = World::new();
    world.ok("train --model model --data rows.jsonl --output out --max-steps 30 --batch-size 6 --lr 0.02 --compute-dtype f32");
    let answer = |flags: &str| {
        let line = format!("generate --model model --prompt Say --json --max-new-tokens 12 --compute-dtype f32 {flags}");
        world.ok(&line).json()["token_ids"].clone()
    };
    assert_ne!(answer(""), answer("--adapter out"));
    let path = world.path("out/adapter_model.safetensors");
    let mut tensors = read_tensors(&path);
    for (_, (_, values)) in tensors.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
        values.fill(0.0);
    }
    common::tiny::write_tensors(&path, &tensors);
    assert_eq!(answer(""), answer("--adapter out"));
}

#[test]
fn a_seed_is_the_same_draw_each_time() {
    let world = World::new();
    let answer = |seed: usize| {
        let flags = format!("--temperature 1.5 --max-new-tokens 12 --seed {seed}");
        world.ok(&format!("generate --model model --prompt a --raw {flags}")).stdout
    };
    assert_eq!(answer(1), answer(1));
    assert_ne!(answer(1), answer(2));
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_ends_with_130() {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Command, Stdio},
    };

    let world = World::new();
    let line =
        "train --model model --data rows.jsonl --output out --max-steps 100000 --batch-size 1 --lora-r 2 --compute-dtype f32";
    let mut run = world.command(line).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(run.stderr.take().unwrap()).lines().map(Result::unwrap);
    // A line with a loss: a step is done.
    let first = lines.find(|line| line.contains("loss"));
    assert!(first.is_some(), "the run ended before its first step");
    let killed = Command::new("kill").args(["-s", "INT", &run.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<String> = lines.collect();
    assert_eq!(run.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(!read_tensors(&world.path("out/adapter_model.safetensors")).is_empty());
    assert!(!metrics(&world, "out").is_empty());
    assert!(world.loss("--model model --adapter out").is_finite());
}

#[test]
fn without_arguments_it_explains_itself() {
    let world = World::new();
    let help = world.run("");
    for command in ["train", "generate", "eval", "merge", "doctor", "quickstart"] {
        assert!(help.stdout.contains(command), "{}", help.stdout);
        let page = world.ok(&format!("{command} --help")).stdout;
        assert!(page.contains("Usage: nibble"), "{page}");
    }
    assert!(world.ok("--version").stdout.starts_with("nibble 0."));
}
