//! What is wrong is said in one message, with exit code 2, and nothing is left behind.

#![forbid(unsafe_code)]

mod common;

use std::fs;

use common::{
    World, edit_json,
    tiny::{self, read_tensors},
};
use serde_json::json;

const MODEL: &str = "--model model --data rows.jsonl";

#[test]
fn a_model_path_that_does_not_exist() {
    World::new().refuses("--model ./nowhere --data rows.jsonl", &["`./nowhere`", "no such file or folder", "hint: "]);
}

#[test]
fn a_folder_without_weights() {
    let world = World::new();
    fs::remove_file(world.path("model/model.safetensors")).unwrap();
    world.refuses(MODEL, &["model`", "expected `model.safetensors`", "found none", "hint: "]);
}

#[test]
fn a_truncated_safetensors_file() {
    let world = World::new();
    let path = world.path("model/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    let found = (bytes.len() - 100).to_string();
    world.refuses(MODEL, &["model.safetensors", &bytes.len().to_string(), &found, "cut"]);
    fs::write(&path, &bytes[..100]).unwrap();
    world.refuses(MODEL, &["model.safetensors", "header", "cut"]);
    fs::write(&path, b"").unwrap();
    world.refuses(MODEL, &["model.safetensors", "expected at least 8 bytes, found 0"]);
}

#[test]
fn a_shard_that_is_missing_from_the_index() {
    let world = World::new();
    let folder = world.path("model");
    fs::rename(folder.join("model.safetensors"), folder.join("model-00001-of-00002.safetensors")).unwrap();
    let mut map: serde_json::Map<_, _> =
        tiny::tensors(true).into_keys().map(|name| (name, json!("model-00001-of-00002.safetensors"))).collect();
    map.insert("model.norm.weight".into(), json!("model-00002-of-00002.safetensors"));
    world.write("model/model.safetensors.index.json", json!({ "metadata": {}, "weight_map": map }).to_string());
    world.refuses(MODEL, &["shard `model-00002-of-00002.safetensors` is missing", "`model.norm.weight`"]);
}

#[test]
fn every_wrong_shape_is_listed() {
    let world = World::new();
    edit_json(&world.path("model/config.json"), |config| config["intermediate_size"] = json!(64));
    let mut says = vec!["does not fit its config".to_owned()];
    for layer in 0..2 {
        for part in ["gate_proj", "up_proj"] {
            says.push(format!("model.layers.{layer}.mlp.{part}.weight: expected (64, 32), found (48, 32)"));
        }
        says.push(format!("model.layers.{layer}.mlp.down_proj.weight: expected (32, 64), found (32, 48)"));
    }
    world.refuses(MODEL, &says.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn tensors_that_are_missing_and_tensors_that_nothing_uses() {
    let world = World::new();
    let mut tensors = tiny::tensors(true);
    let norm = tensors.remove("model.norm.weight").unwrap();
    tensors.insert("model.extra.weight".into(), norm);
    tiny::write_tensors(&world.path("model/model.safetensors"), &tensors);
    let says = ["model.norm.weight: expected (32,), found nothing", "model.extra.weight: expected nothing, found (32,)"];
    world.refuses(MODEL, &says);
}

#[test]
fn an_architecture_that_is_not_known() {
    let world = World::new();
    edit_json(&world.path("model/config.json"), |config| {
        config["model_type"] = json!("rwkv");
        config["architectures"] = json!(["RwkvForCausalLM"]);
    });
    world.refuses(MODEL, &["`model_type`", "`rwkv`", "llama"]);
}

#[test]
fn a_config_field_that_is_not_run() {
    let world = World::new();
    edit_json(&world.path("model/config.json"), |config| config["hidden_act"] = json!("relu2"));
    world.refuses(MODEL, &["config.json", "`hidden_act`", "relu2"]);
}

#[test]
fn every_problem_of_a_config_is_listed() {
    let world = World::new();
    edit_json(&world.path("model/config.json"), |config| {
        config["hidden_size"] = json!("wide");
        config.as_object_mut().unwrap().remove("vocab_size");
    });
    world.refuses(MODEL, &["`hidden_size`", "\"wide\"", "`vocab_size`", "found nothing"]);
}

#[test]
fn a_quantisation_that_is_not_read() {
    let world = World::new();
    edit_json(&world.path("model/config.json"), |config| {
        config["quantization_config"] = json!({ "quant_method": "gptq", "bits": 4 });
    });
    world.refuses(MODEL, &["`quantization_config`", "gptq", "expected"]);
}

#[test]
fn a_config_that_is_no_json() {
    let world = World::new();
    world.write("model/config.json", "{\"hidden_size\": 32,");
    world.refuses(MODEL, &["config.json", "line 1"]);
}

#[test]
fn a_gguf_file_that_is_cut_in_the_middle() {
    let world = World::new();
    let path = world.path("tiny.gguf");
    tiny::write_gguf(&path);
    let bytes = fs::read(&path).unwrap();
    for length in [bytes.len() / 2, 200, 10] {
        fs::write(&path, &bytes[..length]).unwrap();
        world.refuses("--model tiny.gguf --data rows.jsonl", &["tiny.gguf", "expected", "(the file is cut)"]);
    }
    fs::write(&path, b"ZZZZ").unwrap();
    world.refuses("--model tiny.gguf --data rows.jsonl", &["tiny.gguf"]);
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let world = World::new();
    let mut tensors = tiny::tensors(true);
    tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().1[7] = f32::NAN;
    tiny::write_tensors(&world.path("model/model.safetensors"), &tensors);
    world.refuses(MODEL, &["`model.layers.1.mlp.up_proj.weight`", "NaN"]);
}

#[test]
fn a_tokenizer_without_a_chat_template_uses_chatml_and_says_so() {
    let world = World::new();
    edit_json(&world.path("model/tokenizer_config.json"), |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let ended = world.train("out", "");
    assert!(ended.stderr.contains("no chat template: ChatML is used"), "{}", ended.stderr);
}

#[test]
fn no_tokenizer_is_an_error_for_texts_and_none_for_tokens() {
    let world = World::new();
    fs::remove_file(world.path("model/tokenizer.json")).unwrap();
    world.refuses(MODEL, &["tokenizer.json", "hint: "]);
    world.jsonl("rows.jsonl", [json!({ "input_ids": [1, 2, 3, 4] })]);
    world.train("out", "");
}

#[test]
fn a_tokenizer_that_is_broken() {
    let world = World::new();
    world.write("model/tokenizer.json", "{\"version\": \"1.0\"}");
    world.refuses(MODEL, &["load tokenizer", "tokenizer.json"]);
}

#[test]
fn a_broken_line_is_named_by_file_and_number() {
    let world = World::new();
    world.write("rows.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \n{\"text\": \"b\"}\n");
    world.refuses(MODEL, &["`rows.jsonl`:3", "column"]);
}

#[test]
fn a_row_that_is_no_object() {
    let world = World::new();
    world.write("rows.jsonl", "{\"text\": \"a\"}\n[1, 2]\n");
    world.refuses(MODEL, &["`rows.jsonl`:2", "expected an object", "found"]);
}

#[test]
fn a_dataset_without_rows() {
    let world = World::new();
    for text in ["", "\n\n", "[]"] {
        world.write("rows.jsonl", text);
        world.refuses(MODEL, &["`rows.jsonl`", "expected rows, found none"]);
    }
    world.refuses("--model model --data absent.jsonl", &["`absent.jsonl`"]);
}

#[test]
fn a_column_that_is_missing() {
    let world = World::new();
    world.jsonl("rows.jsonl", [json!({ "question": "a", "reply": "b" })]);
    world.refuses(MODEL, &["`rows.jsonl`:1", "instruction", "found [question, reply]", "hint: "]);
    world.jsonl("rows.jsonl", [json!({ "prompt": "a", "completion": "b" }), json!({ "prompt": "a" })]);
    world.refuses(MODEL, &["`rows.jsonl`:2", "completion", "found [prompt]", "hint: "]);
}

#[test]
fn a_token_beyond_the_vocabulary() {
    let world = World::new();
    world.jsonl("rows.jsonl", [json!({ "input_ids": [1, 2] }), json!({ "input_ids": [1, 264] })]);
    world.refuses(MODEL, &["`rows.jsonl`:2", "below 264", "found 264", "hint: "]);
}

#[test]
fn prompts_longer_than_max_length_are_dropped_and_counted_and_all_of_them_are_an_error() {
    let world = World::new();
    world.refuses(&format!("{MODEL} --max-length 8"), &["all 12 rows", "12 because the prompt", "hint: raise `--max-length`"]);
    let long = "long ".repeat(40);
    let mut rows = vec![json!({ "instruction": "a", "output": "b" }); 3];
    rows.push(json!({ "instruction": long, "output": "b" }));
    world.jsonl("rows.jsonl", rows);
    let ended = world.train("out", "--max-length 64");
    assert!(ended.stderr.contains("1 examples were dropped"), "{}", ended.stderr);
}

#[test]
fn a_max_length_beyond_the_models_positions() {
    World::new().refuses(&format!("{MODEL} --max-length 100000"), &["`--max-length`", "256", "100000"]);
}

#[test]
fn an_output_folder_with_something_in_it_is_left_alone_unless_asked() {
    let world = World::new();
    let kept = world.write("out/precious.txt", "mine");
    for line in [
        "train --model model --data rows.jsonl --output out --max-steps 1",
        // Refused before anything is read: the model is not there.
        "train --model ./nowhere --data rows.jsonl --output out --max-steps 1",
        "merge --model ./nowhere --adapter nowhere --output out",
    ] {
        world.refuses_line(line, &["`out`", "new or empty folder", "--overwrite-output-dir"]);
        assert_eq!(fs::read_to_string(&kept).unwrap(), "mine");
    }
    // What no run has written is not replaced at all, nor what this run reads.
    let line = "train --model model --data rows.jsonl --output out --overwrite-output-dir";
    world.refuses_line(line, &["out`", "a result of an earlier run"]);
    world.write("out/adapter_config.json", "{}");
    let line = "train --model model --data out/precious.txt --output out --overwrite-output-dir";
    world.refuses_line(line, &["out`", "precious.txt", "which this run reads"]);
    // A run that fails leaves it too.
    world.refuses_line("train --model ./nowhere --data rows.jsonl --output out --overwrite-output-dir", &["`./nowhere`"]);
    assert!(kept.exists());
    world.train("out", "--overwrite-output-dir");
    assert!(!kept.exists() && world.path("out/adapter_config.json").exists());
}

#[test]
fn no_network() {
    let world = World::new();
    // A port that was free a moment ago, and is closed.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let line = "train --model org/name --data rows.jsonl --output out";
    let mut command = world.command(line);
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", format!("http://127.0.0.1:{port}"));
    common::Ended::new(&command.output().unwrap()).is_refusal(&["`org/name@main`", "no answer", "127.0.0.1", "hint: "]);
    assert!(!world.path("out").exists());
}

#[test]
fn offline_and_not_in_the_cache() {
    let world = World::new();
    world.refuses(
        "--model org/name --data rows.jsonl",
        &["`org/name@main`", "offline", "config.json", "hint: unset HF_HUB_OFFLINE"],
    );
}

#[test]
fn flags_with_values_that_there_are_not() {
    let world = World::new();
    for (flags, says) in [
        ("--quant int3", &["--quant", "int3", "nf4"][..]),
        ("--device tpu", &["--device", "tpu", "cpu"]),
        ("--lora-r 0", &["--lora-r", "0"]),
        ("--max-steps 0", &["--max-steps", "at least 1"]),
        ("--optim sgdd", &["--optim", "sgdd"]),
        ("--learning-rate fast", &["--learning-rate", "fast"]),
    ] {
        let ended = world.refuses_line(&format!("train {MODEL} --output out {flags}"), says);
        assert!(ended.stderr.contains("--help"), "{}", ended.stderr);
    }
    world.refuses_line("trian", &["unrecognized subcommand", "train"]);
    world.refuses_line(&format!("train {MODEL}"), &["--output"]);
}

#[test]
fn a_gpu_that_is_not_there() {
    if nibble_tensor::cuda::CudaDevice::count() == 0 {
        World::new().refuses(&format!("{MODEL} --device cuda"), &["no GPU can be used", "libcuda.so.1", "hint: `--device cpu`"]);
    }
}

#[test]
fn target_modules_that_match_nothing() {
    let world = World::new();
    world.refuses(&format!("{MODEL} --target-modules c_attn"), &["c_attn", "q_proj", "down_proj"]);
    world.refuses(&format!("{MODEL} --target-modules ("), &["target_modules", "("]);
}

#[test]
fn an_adapter_that_does_not_fit() {
    let world = World::new();
    world.train("adapter", "");
    edit_json(&world.path("adapter/adapter_config.json"), |config| config["r"] = json!(16));
    let first = "model.layers.0.self_attn.q_proj.lora_A.weight: expected (16, 32), found (4, 32)";
    let last = "model.layers.1.mlp.down_proj.lora_B.weight: expected (32, 16), found (32, 4)";
    for line in [
        "eval --model model --adapter adapter --data rows.jsonl",
        "generate --model model --adapter adapter --prompt a",
        "merge --model model --adapter adapter --output out",
        "train --model model --adapter adapter --data rows.jsonl --output out",
    ] {
        world.refuses_line(
            line,
            &["adapter `adapter` does not fit the model", first, last, "hint: it was trained with `--lora-r 4`"],
        );
    }
}

#[test]
fn an_adapter_that_is_none() {
    let world = World::new();
    for (path, found) in [("model", "a folder without it"), ("rows.jsonl", "a file"), ("absent", "nothing")] {
        for command in ["eval --data rows.jsonl", "merge --output out"] {
            let says = [&format!("`{path}`"), "adapter_config.json", found];
            world.refuses_line(&format!("{command} --model model --adapter {path}"), &says);
        }
    }
}

#[test]
fn an_adapter_with_tensors_that_the_model_has_no_place_for() {
    let world = World::new();
    world.train("adapter", "");
    let path = world.path("adapter/adapter_model.safetensors");
    let mut tensors = read_tensors(&path);
    let stray = tensors.pop_first().unwrap().1;
    tensors.insert("base_model.model.stray.lora_A.weight".into(), stray);
    tiny::write_tensors(&path, &tensors);
    for line in ["eval --model model --adapter adapter --data rows.jsonl", "merge --model model --adapter adapter --output out"] {
        world.refuses_line(line, &["does not fit", "found nothing"]);
    }
}

#[test]
fn a_merge_of_weights_that_are_no_numbers() {
    let world = World::new();
    world.train("adapter", "");
    let path = world.path("adapter/adapter_model.safetensors");
    let mut tensors = read_tensors(&path);
    let name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight";
    tensors.get_mut(name).unwrap().1[0] = f32::INFINITY;
    tiny::write_tensors(&path, &tensors);
    world.refuses_line(
        "merge --model model --adapter adapter --output out",
        &["`model.layers.0.mlp.up_proj.weight`", "finite", "the adapter"],
    );
}

#[test]
fn a_merge_beyond_the_range_of_half_precision() {
    let world = World::new();
    world.train("adapter", "");
    let mut tensors = tiny::tensors(true);
    tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap().1[3] = 70_000.0;
    tiny::write_tensors(&world.path("model/model.safetensors"), &tensors);
    let line = "merge --model model --adapter adapter --output out --dtype f16";
    world.refuses_line(line, &["`model.layers.0.input_layernorm.weight`", "F16", "hint: ", "bf16"]);
}

#[test]
fn merge_flags_that_would_change_nothing() {
    let world = World::new();
    for flags in ["--base dequantized", "--double-quant false", "--quant-block-size 128"] {
        let flag = flags.split(' ').next().unwrap();
        let line = format!("merge --model model --adapter adapter --output out --quant none {flags}");
        world.refuses_line(&line, &[flag, "has no effect", "--quant none"]);
    }
}

#[test]
fn generation_flags_that_would_change_nothing() {
    let world = World::new();
    for (flag, with) in [("--seed 1", "--temperature 0"), ("--top-k 5", "--temperature 0"), ("--batch-size 2", "--prompt")] {
        let line = format!("generate --model model --prompt a {flag}");
        let says = format!("`{}` has no effect with `{with}`", flag.split(' ').next().unwrap());
        world.refuses_line(&line, &[&says]);
    }
    world.write("prompts.txt", "one\n");
    world.ok("generate --model model --prompts prompts.txt --batch-size 2 --temperature 1 --seed 1 --max-new-tokens 1");
}

#[test]
fn pages_that_cannot_be_are_told_before_anything_is_read() {
    let world = World::new();
    let refuses = |flags: &str, says: &[&str]| {
        world.refuses(&format!("--model ./nowhere --data nothing.jsonl --device cpu --optim paged_adamw_8bit {flags}"), says);
    };
    refuses("--optim-device-memory 1MiB", &["need a file", "hint: name one with `--optim-page-file`"]);
    refuses("--optim-page-masters --compute-dtype bf16", &["optim_page_masters"]);
    refuses("", &["open model `./nowhere`"]);
}

#[test]
fn a_memory_limit_below_what_the_model_takes() {
    let world = World::new();
    let before = world.entries();
    let ended = world.run("train --model model --data rows.jsonl --output out --device cpu --memory-limit 2KiB");
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    assert!(ended.stderr.contains("error: train: the run needs about") && ended.stderr.contains("hint: "), "{}", ended.stderr);
    assert_eq!(world.entries(), before, "something was left behind");
}

#[test]
fn an_optimizer_that_is_not_known_or_cannot_have_its_pages() {
    let world = World::new();
    let refuses = |flags: &str, says: &[&str]| world.refuses(&format!("{MODEL} {flags}"), says);
    refuses("--optim paged_adamw8bit", &["`paged_adamw8bit`", "the nearest name is `paged_adamw_8bit`"]);
    refuses("--optim adamw_8bit --optim-args beta3=0.9", &["adamw_8bit: takes no argument `beta3`", "`beta1`, `beta2`, `eps`"]);
    refuses("--optim adamw_8bit --optim-page-file pages", &["`--optim-page-file` has no effect with `--optim adamw_8bit`"]);
    refuses("--optim paged_adamw_8bit --optim-device-memory 1MiB", &["need a file", "hint: name one with `--optim-page-file`"]);
    world.write("used", "precious");
    refuses("--optim paged_adamw_8bit --optim-page-file used", &["`used` cannot hold pages", "it exists, and is not empty"]);
    // A disk that is always full.
    if std::path::Path::new("/dev/full").exists() {
        refuses("--optim paged_adamw_8bit --optim-page-file /dev/full", &["`/dev/full` cannot hold pages of ", "hint: "]);
    }
}
