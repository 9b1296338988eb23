//! A tiny model made by code, data files, and the binary.

#![allow(dead_code)] // each test binary uses a part of it

pub(crate) mod tiny;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};

/// A folder that is removed at the end, with a model in `model`, rows in `rows.jsonl` and a home of its own.
pub(crate) struct World {
    root: tempfile::TempDir,
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl World {
    /// A tied llama of two blocks, its tokenizer, and twelve rows.
    pub(crate) fn new() -> Self {
        let world = Self { root: tempfile::tempdir().expect("a temporary folder") };
        tiny::write_model(&world.path("model"), true);
        let rows = (0..12).map(|i| json!({ "instruction": format!("Say {i}"), "output": format!("It is {}.", i * 7 % 5) }));
        world.jsonl("rows.jsonl", rows);
        world
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes a file.
    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, text).expect("a file");
        path
    }

    /// Writes rows.
    pub(crate) fn jsonl(&self, name: &str, rows: impl IntoIterator<Item = Value>) -> PathBuf {
        let lines: Vec<String> = rows.into_iter().map(|row| row.to_string()).collect();
        self.write(name, lines.join("\n"))
    }

    /// The binary, with nothing of this machine's environment that it reads: no network, no caches, no token.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nibble"));
        command.current_dir(self.root.path()).args(line.split_whitespace()).env_clear();
        command.env("HOME", self.path("home")).env("PATH", "/nowhere").env("HF_HUB_OFFLINE", "1").env("RAYON_NUM_THREADS", "2");
        command
    }

    /// Runs a line of arguments.
    pub(crate) fn run(&self, line: &str) -> Ended {
        Ended::new(&self.command(line).output().expect("the binary runs"))
    }

    /// Runs a line that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, line: &str) -> Ended {
        let ended = self.run(line);
        assert_eq!(ended.code, Some(0), "`nibble {line}` failed:\n{}", ended.stderr);
        ended
    }

    /// Trains into `out` with small settings and `flags`.
    #[track_caller]
    pub(crate) fn train(&self, out: &str, flags: &str) -> Ended {
        self.ok(&format!(
            "train --model model --data rows.jsonl --output {out} --max-steps 3 --batch-size 2 --lora-r 4 --lr 0.01 \
             --compute-dtype f32 {flags}"
        ))
    }

    /// The loss that `eval --json` tells.
    #[track_caller]
    pub(crate) fn loss(&self, flags: &str) -> f64 {
        let ended = self.ok(&format!("eval --data rows.jsonl --compute-dtype f32 --json {flags}"));
        ended.json()["loss"].as_f64().expect("a loss")
    }

    /// The entries of the folder whose names begin so: also the hidden ones that a run that failed might leave.
    pub(crate) fn entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.path()).expect("the folder");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Runs `train` with these flags (without `--output`), which must be refused with exit code 2, one message that has each of
    /// `says`, and nothing written.
    #[track_caller]
    pub(crate) fn refuses(&self, flags: &str, says: &[&str]) -> Ended {
        self.refuses_line(&format!("train {flags} --output out --max-steps 1"), says)
    }

    /// The same of any command.
    #[track_caller]
    pub(crate) fn refuses_line(&self, line: &str, says: &[&str]) -> Ended {
        let before = self.entries();
        let ended = self.run(line);
        ended.is_refusal(says);
        assert_eq!(self.entries(), before, "`nibble {line}` left something behind");
        ended
    }
}

impl Ended {
    pub(crate) fn new(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8 output");
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// Exit code 2, nothing on standard output, one `error:` that has each of `says`, and no trace of a panic.
    #[track_caller]
    pub(crate) fn is_refusal(&self, says: &[&str]) {
        assert_eq!(self.code, Some(2), "{}", self.stderr);
        assert_eq!(self.stdout, "", "{}", self.stderr);
        assert_eq!(self.stderr.matches("error: ").count(), 1, "{}", self.stderr);
        for part in ["panicked", "internal error", "RUST_BACKTRACE"] {
            assert!(!self.stderr.contains(part), "{}", self.stderr);
        }
        for part in says {
            assert!(self.stderr.contains(part), "expected `{part}` in:\n{}", self.stderr);
        }
    }
}

/// A JSON file.
#[track_caller]
pub(crate) fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Changes a field of a JSON file.
pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    edit(&mut value);
    fs::write(path, value.to_string()).expect("the file is written");
}
