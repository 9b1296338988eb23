//! The invariants of the design, over the crate graph, the manifests and the sources.
//!
//! Each test collects every offender, with file and line, before it fails.

#![forbid(unsafe_code)]

mod graph;
mod manifests;
mod rust;
mod sources;

use std::path::{Path, PathBuf};

/// The workspace's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate lies in the root").to_owned()
}

/// The path below the root, with slashes on every system.
fn relative(path: &Path) -> String {
    let path = path.strip_prefix(root()).unwrap_or(path);
    path.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

/// Every file below a folder with one of the extensions, sorted; build outputs and hidden folders are left out.
fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("an entry of the folder").path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|have| extensions.iter().any(|want| have == *want)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("read `{}`: {error}", path.display()))
}

/// Fails with every offender on its own line.
#[track_caller]
fn expect_none(law: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{law}; found {}:\n  {}", offenders.len(), offenders.join("\n  "));
}
