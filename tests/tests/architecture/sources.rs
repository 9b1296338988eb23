//! What crates may do, read off their sources.

use std::path::PathBuf;

use crate::rust::{Source, has_word};
use crate::{expect_none, files, read, relative, root};

/// Folders and files where `unsafe` may stand: NVIDIA's compiler and driver, memory maps, vector instructions.
const UNSAFE: [&str; 7] = [
    "kernels/src/nvrtc.rs",
    "crates/tensor/src/cuda/",
    "crates/tensor/src/mapped.rs",
    "crates/tensor/src/ops/matmul/kernels/",
    "crates/tensor/src/ops/simd.rs",
    "crates/tensor/src/ops/simd/",
    "crates/nf4/src/simd/",
];

/// An op's own modules of vector instructions and of CUDA launches.
const UNSAFE_IN_OPS: [&str; 5] = ["x86.rs", "avx2.rs", "avx512.rs", "neon.rs", "cuda.rs"];

/// The crates that these belong to; every other forbids `unsafe`.
const WITH_UNSAFE: [&str; 3] = ["crates/tensor/", "crates/nf4/", "kernels/"];

/// The crate that is all tests, which look for reference files.
const TESTS: &str = "tests/";

/// The crate that tells tests what they run on.
const TESTKIT: &str = "crates/testkit/";

/// The longest a file may be without a reason.
const MAX_LINES: usize = 500;

/// Crates' sources: what goes into the libraries and the binary, without modules that are only tests.
fn sources() -> Vec<Source> {
    let paths = files(&root(), &["rs"]).into_iter().filter(|path| relative(path).contains("/src/"));
    let all: Vec<Source> = paths.map(|path| Source::new(&path, &read(&path))).collect();
    let tests: Vec<PathBuf> = all.iter().flat_map(Source::test_modules).collect();
    all.into_iter().filter(|source| !tests.iter().any(|test| source.path.starts_with(test))).collect()
}

/// Lines of code with one of the words, outside the places where it may stand.
fn found(words: &[&str], allowed: &[&str]) -> Vec<String> {
    found_outside(words, |path| allowed.iter().any(|place| path.starts_with(place)))
}

fn found_outside(words: &[&str], allowed: impl Fn(&str) -> bool) -> Vec<String> {
    let mut offenders = Vec::new();
    for source in sources() {
        let path = relative(&source.path);
        if allowed(&path) {
            continue;
        }
        for (number, code) in source.code() {
            if let Some(word) = words.iter().find(|word| has_word(code, word)) {
                offenders.push(format!("{path}:{number}: `{word}`"));
            }
        }
    }
    offenders
}

#[test]
fn the_sources_are_found() {
    // The tests below hold trivially over no sources.
    let sources = sources();
    assert!(sources.len() > 100, "found {}", sources.len());
    assert!(sources.iter().any(|source| source.path.ends_with("crates/cli/src/main.rs")));
    assert!(!sources.iter().any(|source| source.path.ends_with("crates/tensor/src/ops/matmul/tests.rs")));
}

#[test]
fn only_the_command_line_prints() {
    let words = ["println!", "print!", "eprintln!", "eprint!", "dbg!", "io::stdout", "io::stderr", "stdout()", "stderr()"];
    expect_none("only `cli` prints", &found(&words, &["crates/cli/", TESTS]));
}

#[test]
fn only_the_command_line_reads_the_environment_and_exits() {
    let words = ["std::env", "env::var", "env::vars", "env::var_os", "env::args", "env::current_dir", "env::home_dir"];
    expect_none("only `cli` reads the environment", &found(&words, &["crates/cli/", TESTS, TESTKIT]));
    expect_none("only `cli` exits", &found(&["process::exit", "process::abort", "ExitCode"], &["crates/cli/", TESTS]));
}

#[test]
fn cudarc_is_named_below_the_cuda_module_alone() {
    expect_none("cudarc belongs to tensor::cuda", &found(&["cudarc", "cudarc::"], &["crates/tensor/src/cuda/"]));
}

#[test]
fn unsafe_stands_in_the_modules_made_for_it() {
    // A macro defined in ops/simd.rs is written out elsewhere; its `unsafe` stands there once.
    let allowed = |path: &str| {
        let of_an_op =
            path.starts_with("crates/tensor/src/ops/") && UNSAFE_IN_OPS.iter().any(|name| path.ends_with(&format!("/{name}")));
        of_an_op || UNSAFE.iter().any(|place| path.starts_with(place))
    };
    expect_none("`unsafe` has its places", &found_outside(&["unsafe"], allowed));
}

#[test]
fn every_unsafe_block_says_why_it_is_safe() {
    let mut offenders = Vec::new();
    for source in sources() {
        for (number, code) in source.code() {
            let opens = has_word(code, "unsafe") && !has_word(code, "unsafe fn") && !has_word(code, "unsafe extern");
            if opens && !says_why(&source, number - 1) {
                offenders.push(format!("{}:{number}: {}", relative(&source.path), code.trim()));
            }
        }
    }
    expect_none("an `unsafe` block has a `// SAFETY:` line before it", &offenders);
}

/// Whether the comment before the statement that line `at` belongs to says `SAFETY:`.
fn says_why(source: &Source, at: usize) -> bool {
    if source.lines[at].text.contains("// SAFETY:") {
        return true;
    }
    for line in source.lines[..at].iter().rev() {
        let (text, code) = (line.text.trim(), line.code.trim());
        if text.contains("// SAFETY:") {
            return true;
        }
        let begins = code.is_empty() && !text.starts_with("//");
        let ended = !code.starts_with("#[") && (code.ends_with([';', '{', '}', ',']));
        if begins || ended {
            return false;
        }
    }
    false
}

#[test]
fn every_other_crate_forbids_unsafe() {
    let mut offenders = Vec::new();
    let roots =
        sources().into_iter().filter(|source| source.path.ends_with("src/lib.rs") || source.path.ends_with("src/main.rs"));
    for source in roots {
        let path = relative(&source.path);
        let forbids = source.code().any(|(_, code)| code.trim() == "#![forbid(unsafe_code)]");
        if !forbids && !WITH_UNSAFE.iter().any(|place| path.starts_with(place)) {
            offenders.push(format!("{path}: expected `#![forbid(unsafe_code)]`"));
        }
    }
    expect_none("a crate without need forbids `unsafe`", &offenders);
}

#[test]
fn a_transformer_has_one_block() {
    let blocks: Vec<String> = sources()
        .iter()
        .filter(|source| relative(&source.path).starts_with("crates/model/"))
        .flat_map(|source| {
            let path = relative(&source.path);
            let lines = source.code().filter(|(_, code)| has_word(code, "struct Block"));
            lines.map(move |(number, _)| format!("{path}:{number}")).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(blocks.len(), 1, "expected one `struct Block`, found {blocks:?}");
}

#[test]
fn a_long_file_says_why() {
    let mut offenders = Vec::new();
    for path in files(&root(), &["rs", "cu", "cuh"]) {
        let source = Source::new(&path, &read(&path));
        let lines = source.lines.len();
        if lines > MAX_LINES && !source.first_comment().contains("500 lines") {
            offenders.push(format!("{}: {lines} lines", relative(&path)));
        }
    }
    expect_none("a file over 500 lines says in its first comment why it has more than `500 lines`", &offenders);
}

#[test]
fn no_source_is_left_for_later() {
    let words = ["todo!", "unimplemented!", "TODO", "FIXME", "XXX"];
    let mut offenders = found(&words[..2], &[]);
    for source in sources() {
        for (i, line) in source.lines.iter().enumerate() {
            if words[2..].iter().any(|word| has_word(&line.text, word)) && !line.code.contains(&line.text) {
                offenders.push(format!("{}:{}: {}", relative(&source.path), i + 1, line.text.trim()));
            }
        }
    }
    expect_none("nothing is left for later", &offenders);
}
