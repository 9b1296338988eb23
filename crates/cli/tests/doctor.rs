//! `nibble doctor`: it always ends well, and never tells the token.

#![forbid(unsafe_code)]

mod common;

use common::{Ended, World};
use serde_json::Value;

/// Whether the machine of this test has a GPU that can be used.
fn gpus(json: &Value) -> bool {
    !json["cuda"]["gpus"].as_array().unwrap().is_empty() && json["cuda"]["refused"].is_null()
}

#[test]
fn it_tells_the_machine_in_text_and_in_json() {
    let world = World::new();
    let text = world.ok("doctor");
    for part in ["nibble 0.", "cpu", "memory", "kernel", "hub cache", "token", "python", "--device auto is"] {
        assert!(text.stdout.contains(part), "expected `{part}` in:\n{}", text.stdout);
    }
    let json = world.ok("doctor --json").json();
    for key in ["version", "system", "cpu", "memory", "devices", "cuda", "caches", "hub", "python", "checks"] {
        assert!(json.get(key).is_some(), "{key}");
    }
    let devices = json["devices"].as_array().unwrap();
    assert_eq!(devices.last().unwrap(), "cpu");
    assert_eq!((devices.len(), &json["hub"]["offline"]), (if gpus(&json) { 2 } else { 1 }, &Value::Bool(true)));
    assert!(json["cpu"]["threads"].as_u64().unwrap() > 0);
}

#[test]
fn what_is_missing_comes_with_its_fix() {
    let world = World::new();
    let json = world.ok("doctor --json").json();
    let python = json["checks"].as_array().unwrap().iter().find(|check| check["name"] == "python").unwrap();
    assert_eq!(python["mark"], "missing", "the path of this test has no python3");
    assert!(python["fix"].as_str().unwrap().contains("quickstart --offline"));
    assert!(world.ok("doctor").stdout.contains("fix: "));
}

#[test]
fn a_hub_that_does_not_answer_is_no_failure() {
    let world = World::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = world.command("doctor --json");
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", format!("http://127.0.0.1:{port}"));
    let ended = Ended::new(&command.output().unwrap());
    assert_eq!((ended.code, &ended.json()["hub"]["reachable"]), (Some(0), &Value::Bool(false)));
}

#[test]
fn the_token_is_never_shown() {
    let world = World::new();
    world.write("home/.cache/huggingface/token", "hf_fromthefile");
    for flags in ["doctor", "doctor --json"] {
        let mut command = world.command(flags);
        let ended = Ended::new(&command.env("HF_TOKEN", "hf_verysecret").output().unwrap());
        assert_eq!(ended.code, Some(0));
        let all = ended.stdout + &ended.stderr;
        assert!(!all.contains("hf_verysecret") && !all.contains("hf_fromthefile"), "{all}");
    }
    assert_eq!(world.ok("doctor --json").json()["hub"]["token"], true);
}
