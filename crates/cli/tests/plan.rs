//! `nibble plan`, and what `train` refuses because of it, through the binary.

#![forbid(unsafe_code)]

mod common;

use std::fs;

use common::{World, tiny};
use serde_json::{Value, json};

/// The config of Llama-3-8B alone: no weights.
fn llama(world: &World) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "rope_theta": 500_000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    });
    world.write("llama/config.json", config.to_string());
}

#[test]
fn a_config_alone_is_planned_and_the_parts_add_up() {
    let world = World::new();
    llama(&world);
    let plan = world.ok("plan --model llama --gpu h200 --batch-size 4 --max-length 2048 --json").json();
    assert_eq!((&plan["model"]["parameters"], &plan["gpu"]["name"]), (&8_030_261_248_u64.into(), &"H200".into()));
    let names: Vec<&Value> = plan["methods"].as_array().unwrap().iter().map(|method| &method["name"]).collect();
    assert_eq!(names, ["QLoRA", "LoRA", "full"]);
    let modes = plan["methods"][0]["modes"].as_array().unwrap();
    // Measured on an H200, in GB.
    for (mode, measured) in modes.iter().zip([36.27, 31.98, 10.04, 7.79]) {
        let peak = mode["peak"].as_u64().unwrap();
        assert!((peak as f64 / 1e9 / measured - 1.0).abs() < 0.05, "{mode}");
        let sum: u64 = mode["components"].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(sum, peak);
        assert!(mode["largest_batch"].as_u64().unwrap() >= 4 && mode["tokens_per_second"].as_f64().unwrap() > 1000.0);
    }
}

#[test]
fn the_command_of_a_plan_is_one_that_the_program_takes() {
    let world = World::new();
    let plan = world.ok("plan --model model --gpu 4GiB --max-length 32 --lora-r 4 --json").json();
    for method in &plan["methods"].as_array().unwrap()[..2] {
        let command = method["command"].as_str().unwrap();
        let line = command.strip_prefix("nibble ").unwrap().replace("--output my-adapter", "--output out --max-steps 1");
        world.ok(&format!("{line} --device cpu --overwrite-output-dir"));
    }
    assert_eq!(plan["methods"][2]["command"], Value::Null);
}

#[test]
fn the_text_has_the_parts_the_limits_and_the_command() {
    let world = World::new();
    llama(&world);
    let text = world.ok("plan --model llama --gpu 12GiB").stdout;
    for part in [
        "base weights",
        "optimizer",
        "longest context",
        "|BBBB",
        "too large",
        "beyond the 8,192 positions",
        "nibble train --model llama",
    ] {
        assert!(text.contains(part), "expected `{part}` in:\n{text}");
    }
}

/// Llama-2-70B, which no consumer's card holds.
fn llama_70b(world: &World) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32_000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    });
    world.write("llama70/config.json", config.to_string());
}

#[test]
fn weights_that_wait_on_the_host_are_a_row_with_its_cost_and_flags() {
    let world = World::new();
    llama_70b(&world);
    let line = "plan --model llama70 --gpu rtx4090 --max-length 512";
    let plan = world.ok(&format!("{line} --json --html page.html")).json();
    let qlora = &plan["methods"][0];
    let blocks = qlora["offload_weights"].as_u64().unwrap();
    assert!(qlora["fits"] == true && (1..80).contains(&blocks), "{qlora}");
    let row = &qlora["modes"][4];
    assert_eq!((&row["checkpointing"], &row["offload_weights"], &row["fits"]), (&"offload".into(), &blocks.into(), &true.into()));
    // Half a byte a weight of the linear layers, there and, in a step, twice over the link.
    let codes = blocks * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28_672) / 2;
    assert_eq!((&row["host_weights"], &row["link_bytes_per_step"]), (&codes.into(), &(2 * codes).into()));
    assert!(row["link_seconds_per_step"].as_f64().unwrap() > 0.5 && row["longest_context"].as_u64().unwrap() >= 512, "{row}");
    assert!(row["tokens_per_second"].as_f64().unwrap() <= qlora["modes"][3]["tokens_per_second"].as_f64().unwrap(), "{row}");
    let flags = format!("--gradient-checkpointing offload --offload-weights {blocks}");
    assert!(qlora["command"].as_str().unwrap().contains(&flags), "{qlora}");
    let said = format!("the weights of {blocks} of 80 blocks wait in ");
    let text = world.ok(line).stdout;
    let page = fs::read_to_string(world.path("page.html")).unwrap();
    for found in [&text, &page] {
        for part in [&format!("offload + {blocks}/80"), &said, &flags, " cross to the GPU each step, which takes its link "] {
            assert!(found.contains(part), "expected `{part}` in:\n{found}");
        }
    }
    assert!(plan["methods"][1]["modes"].as_array().unwrap().len() == 4, "16 bits do not stream: {plan}");
}

#[test]
fn without_a_model_it_is_the_table_of_sizes() {
    let world = World::new();
    let table = world.ok("plan --json").json();
    let rows = table["models"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["model"].as_str().unwrap()).collect::<Vec<_>>(), ["1.5B", "7B", "13B", "30B", "70B"]);
    assert_eq!(rows[1]["choice_by_gib"]["8"], "QLoRA");
    assert_eq!(rows[1]["choice_by_gib"]["24"], "LoRA");
    assert_eq!(rows[4]["choice_by_gib"]["24"], Value::Null);
    assert_eq!(rows[4]["choice_by_gib"]["48"], "QLoRA");
    let text = world.ok("plan").stdout;
    assert!(text.lines().any(|line| line.starts_with("70B") && line.contains("QLoRA")), "{text}");
}

#[test]
fn the_page_is_one_file_that_asks_for_nothing() {
    let world = World::new();
    llama(&world);
    for line in ["plan --model llama --gpu 24GiB --html page.html --json", "plan --html page.html --json"] {
        world.ok(line);
        let page = fs::read_to_string(world.path("page.html")).unwrap();
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"), "{page}");
        assert!(!page.contains("http") && !page.contains("<script") && !page.contains("src="), "{page}");
        fs::remove_file(world.path("page.html")).unwrap();
    }
}

#[test]
fn an_unknown_gpu_is_refused_with_the_nearest() {
    let world = World::new();
    let ended = world.run("plan --model model --gpu rtx4091");
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("unknown GPU `rtx4091`: the nearest is `RTX 4090`"), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: "), "{}", ended.stderr);
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_its_weights_are_read_with_what_fits() {
    let world = World::new();
    // Documents of hundreds of tokens, so that activations are what does not fit.
    let rows = (0..4).map(|i| json!({ "text": format!("number {i} ").repeat(120) }));
    world.jsonl("long.jsonl", rows);
    let train = "train --model model --data long.jsonl --output out --device cpu --compute-dtype f32 --batch-size 4 --max-length 256 \
                 --gradient-checkpointing none --max-steps 1";
    let whole = world.ok(&format!("{train} --overwrite-output-dir"));
    let needed = whole.stderr.lines().find(|line| line.starts_with("memory")).unwrap().to_owned();
    assert!(needed.contains("activations"), "{needed}");
    fs::remove_dir_all(world.path("out")).unwrap();
    let ended = world.run(&format!("{train} --memory-limit 1500KB"));
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    for part in ["error: train: the run needs about", "(`--memory-limit`)", "\n  activations: ", "hint: what fits: `--"] {
        assert!(ended.stderr.contains(part), "expected `{part}` in:\n{}", ended.stderr);
    }
    assert!(!world.path("out").exists());
    // The hint is true.
    let hint = ended.stderr.lines().find_map(|line| line.strip_prefix("hint: what fits: `")).unwrap();
    let flags = hint.trim_end_matches('`').replace("--gradient-checkpointing", "--overwrite-output-dir --gradient-checkpointing");
    let line = train.replace("--gradient-checkpointing none", "").replace("--batch-size 4", "");
    let batch = if flags.contains("--batch-size") { "" } else { "--batch-size 4" };
    let line = if flags.contains("--max-length") { line.replace("--max-length 256", "") } else { line };
    world.ok(&format!("{line} {batch} {flags} --memory-limit 1500KB"));
}

#[test]
fn a_limit_below_the_base_weights_is_said_before_they_are_read() {
    let world = World::new();
    let weights = world.path("model/model.safetensors");
    let mut tensors = tiny::tensors(true);
    for (_, values) in tensors.values_mut() {
        values.fill(f32::NAN);
    }
    tiny::write_tensors(&weights, &tensors);
    let ended = world.run("train --model model --data rows.jsonl --output out --device cpu");
    assert_eq!(ended.code, Some(2), "weights that cannot be quantised: {}", ended.stderr);
    let ended = world.run("train --model model --data rows.jsonl --output out --device cpu --memory-limit 2KiB");
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    for part in ["needs about", "base weights: ", "embeddings: ", "hint: nothing near it fits"] {
        assert!(ended.stderr.contains(part), "expected `{part}` in:\n{}", ended.stderr);
    }
}

#[test]
fn the_log_ends_with_who_held_the_memory() {
    let world = World::new();
    let ended = world.train("out", "");
    assert!(ended.stderr.contains("activations: linear"), "{}", ended.stderr);
    let log = fs::read_to_string(world.path("out/metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    let owners = last["memory_by_owner"].as_object().unwrap();
    let sum: u64 = owners.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(last["memory_peak"], sum);
    for owner in ["base weights", "embeddings", "trained weights", "gradients", "optimizer"] {
        assert!(owners[owner].as_u64().unwrap() > 0, "{last}");
    }
}

/// The peak that the log of a run in `out` ends with.
fn measured_peak(world: &World) -> u64 {
    let log = fs::read_to_string(world.path("out/metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    last["memory_peak"].as_u64().unwrap()
}

/// Rows of two and of hundreds of words.
fn short_and_long(world: &World) {
    let text = |words: usize| json!({ "text": "number ".repeat(words) });
    world.jsonl("long.jsonl", (0..4).map(|_| text(400)));
    world.jsonl("both.jsonl", [2, 2, 2, 2, 400, 400, 400, 400].map(text));
}

#[test]
fn memory_that_runs_out_in_a_run_is_told_by_owner_with_what_fits_and_leaves_nothing() {
    let world = World::new();
    short_and_long(&world);
    let train = "train --model model --output out --device cpu --compute-dtype bf16 --max-length 64 --no-shuffle --batch-size 4";
    world.ok(&format!("{train} --data long.jsonl --max-steps 2"));
    let peak = measured_peak(&world);
    fs::remove_dir_all(world.path("out")).unwrap();
    let before = world.entries();
    // What a plan lets pass, since plans are not exact, and a step finds too little.
    let limit = format!("--memory-limit {}B", peak - peak / 50);
    let ended = world.run(&format!("{train} --data long.jsonl --max-steps 2 {limit}"));
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    for part in ["error: out of memory on cpu: ", "\n  activations: ", "\n  base weights: ", "hint: what fits: `--"] {
        assert!(ended.stderr.contains(part), "expected `{part}` in:\n{}", ended.stderr);
    }
    assert!(!ended.stderr.contains("the adapter as it was"), "{}", ended.stderr);
    assert_eq!(world.entries(), before, "nothing half-written");
    // The hint is true.
    let hint = ended.stderr.lines().find_map(|line| line.strip_prefix("hint: what fits: `")).unwrap();
    let flags = hint.trim_end_matches('`');
    let mut line = train.to_owned();
    for (flag, given) in [("--batch-size", "--batch-size 4"), ("--max-length", "--max-length 64")] {
        line = if flags.contains(flag) { line.replace(given, "") } else { line };
    }
    world.ok(&format!("{line} --data long.jsonl --max-steps 2 {limit} {flags}"));
}

#[test]
fn what_was_learned_before_the_memory_ran_out_is_saved_whole() {
    let world = World::new();
    short_and_long(&world);
    let train = "train --model model --data both.jsonl --output out --device cpu --compute-dtype bf16 --max-length 64 --no-shuffle \
                 --batch-size 4 --lr-scheduler-type constant";
    world.ok(&format!("{train} --max-steps 2"));
    let peak = measured_peak(&world);
    world.ok(&format!("{} --max-steps 1", train.replace("--output out", "--output first")));
    fs::remove_dir_all(world.path("out")).unwrap();
    let ended = world.run(&format!("{train} --max-steps 2 --memory-limit {}B", peak - peak / 50));
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: the adapter as it was before that is in `out`; what fits: `--"), "{}", ended.stderr);
    let values = |folder: &str| fs::read(world.path(folder).join("adapter_model.safetensors")).unwrap();
    assert_eq!(values("out"), values("first"));
}
