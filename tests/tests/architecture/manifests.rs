//! Dependencies are declared once, with their reasons; lints and versions are the workspace's.

use std::path::PathBuf;

use crate::{expect_none, files, read, relative, root};

/// A line of a table of a manifest.
struct Line {
    table: String,
    number: usize,
    text: String,
}

fn lines(text: &str) -> Vec<Line> {
    let mut table = String::new();
    let mut found = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            line.split('#').next().unwrap_or_default().trim().trim_matches(['[', ']']).clone_into(&mut table);
        }
        if !line.is_empty() && !line.starts_with('#') {
            found.push(Line { table: table.clone(), number: i + 1, text: line.to_owned() });
        }
    }
    found
}

/// The manifests of the members, without the root's.
fn manifests() -> Vec<PathBuf> {
    let all = files(&root(), &["toml"]).into_iter();
    all.filter(|path| path.ends_with("Cargo.toml") && *path != root().join("Cargo.toml")).collect()
}

/// The comment at the end of a line, outside quotes.
fn comment(line: &str) -> &str {
    let mut quoted = false;
    for (i, c) in line.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '#' if !quoted => return line[i + 1..].trim(),
            _ => {}
        }
    }
    ""
}

#[test]
fn every_dependency_of_the_workspace_has_its_reason_beside_it() {
    let offenders: Vec<_> = lines(&read(&root().join("Cargo.toml")))
        .into_iter()
        .filter(|line| line.table == "workspace.dependencies" && line.text.contains('='))
        .filter(|line| !line.text.starts_with("nibble-") && comment(&line.text).is_empty())
        .map(|line| format!("Cargo.toml:{}: {}", line.number, line.text))
        .collect();
    expect_none("a dependency has a trailing comment with its reason", &offenders);
}

#[test]
fn every_lint_that_is_allowed_has_its_reason_beside_it() {
    let offenders: Vec<_> = lines(&read(&root().join("Cargo.toml")))
        .into_iter()
        .filter(|line| line.table.starts_with("workspace.lints") && line.text.contains("\"allow\""))
        .filter(|line| comment(&line.text).is_empty())
        .map(|line| format!("Cargo.toml:{}: {}", line.number, line.text))
        .collect();
    expect_none("an allowed lint has a trailing comment with its reason", &offenders);
}

#[test]
fn crates_take_every_dependency_from_the_workspace() {
    let mut offenders = Vec::new();
    for path in manifests() {
        for line in lines(&read(&path)) {
            let depends = line.table.ends_with("dependencies") && line.text.contains('=');
            if depends && !line.text.contains("workspace = true") {
                offenders.push(format!("{}:{}: {}", relative(&path), line.number, line.text));
            }
            // `[dependencies.name]` is another spelling of one dependency, where the check above does not look.
            if line.text.starts_with('[') && line.table.contains("dependencies.") {
                offenders.push(format!("{}:{}: {}", relative(&path), line.number, line.text));
            }
        }
    }
    expect_none("a dependency is `name.workspace = true` or `{ workspace = true, … }`", &offenders);
}

#[test]
fn crates_inherit_lints_version_edition_and_license() {
    let mut offenders = Vec::new();
    for path in manifests() {
        let lines = lines(&read(&path));
        let says = |table: &str, text: &str| lines.iter().any(|line| line.table == table && line.text == text);
        if !says("lints", "workspace = true") {
            offenders.push(format!("{}: expected `[lints] workspace = true`", relative(&path)));
        }
        for field in ["version", "edition", "rust-version", "license"] {
            if !says("package", &format!("{field}.workspace = true")) {
                offenders.push(format!("{}: expected `{field}.workspace = true`", relative(&path)));
            }
        }
        if !lines.iter().any(|line| line.table == "package" && line.text.starts_with("description = ")) {
            offenders.push(format!("{}: expected a `description`", relative(&path)));
        }
    }
    expect_none("a crate inherits what is the workspace's", &offenders);
}

#[test]
fn the_workspace_is_found() {
    // The tests above hold trivially over no manifests.
    assert!(manifests().len() >= 12, "found {:?}", manifests());
    let text = read(&root().join("Cargo.toml"));
    assert!(lines(&text).iter().filter(|line| line.table == "workspace.dependencies").count() > 20);
}
