//! Which crate may know which.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

use crate::{expect_none, root};

/// Every normal dependency between crates of the workspace, names less `nibble-`.
const EDGES: [(&str, &[&str]); 11] = [
    ("nf4", &[]),
    ("kernels", &[]),
    ("tensor", &["kernels", "nf4"]),
    ("autograd", &["tensor"]),
    ("optim", &["tensor"]),
    ("lora", &["autograd", "nf4", "tensor"]),
    ("model", &["autograd", "lora", "nf4", "tensor"]),
    ("data", &[]),
    ("train", &["autograd", "data", "lora", "model", "optim", "tensor"]),
    ("cli", &["autograd", "data", "lora", "model", "nf4", "optim", "tensor", "train"]),
    ("testkit", &[]),
];

/// The crate of this test: it may use any other, and no other uses it.
const TESTS: &str = "tests";

fn metadata() -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(root().join("Cargo.toml")).no_deps().other_options(vec!["--offline".to_owned()]);
    command.exec().expect("cargo tells the workspace's metadata")
}

fn short(name: &str) -> Option<&str> {
    name.strip_prefix("nibble-")
}

fn ours(package: &Package, kind: DependencyKind) -> BTreeSet<&str> {
    package.dependencies.iter().filter(|dep| dep.kind == kind).filter_map(|dep| short(&dep.name)).collect()
}

#[test]
fn the_crate_graph_has_exactly_the_edges_of_the_design() {
    let metadata = metadata();
    let expected: BTreeMap<&str, BTreeSet<&str>> =
        EDGES.iter().map(|(name, edges)| (*name, edges.iter().copied().collect())).collect();
    let mut offenders = Vec::new();
    let mut seen = BTreeSet::from([TESTS]);
    for package in &metadata.packages {
        let name = short(&package.name).unwrap_or(&package.name);
        seen.insert(name);
        let found = ours(package, DependencyKind::Normal);
        let Some(expected) = expected.get(name) else {
            if name != TESTS {
                offenders.push(format!("{}: a crate that the design does not have", package.manifest_path));
            }
            continue;
        };
        for edge in found.difference(expected) {
            offenders.push(format!("{}: expected no dependency on `{edge}`", package.manifest_path));
        }
        for edge in expected.difference(&found) {
            offenders.push(format!("{}: expected a dependency on `{edge}`, found none", package.manifest_path));
        }
    }
    offenders.extend(expected.keys().filter(|name| !seen.contains(*name)).map(|name| format!("crate `{name}` is missing")));
    expect_none("the crate graph is the design's", &offenders);
}

/// The crates that one is built from, directly or not.
fn below(name: &str) -> BTreeSet<&'static str> {
    let direct = EDGES.iter().find(|(from, _)| *from == name).map_or(&[][..], |(_, edges)| edges);
    direct.iter().flat_map(|edge| below(edge).into_iter().chain([*edge])).collect()
}

#[test]
fn tests_reach_for_the_testkit_and_what_is_below_alone() {
    let mut offenders = Vec::new();
    for package in metadata().packages.iter().filter(|package| short(&package.name) != Some(TESTS)) {
        let below = below(short(&package.name).unwrap_or_default());
        let dev =
            ours(package, DependencyKind::Development).into_iter().filter(|name| *name != "testkit" && !below.contains(name));
        offenders.extend(dev.map(|name| format!("{}: dev `{name}`", package.manifest_path)));
        let build = ours(package, DependencyKind::Build);
        offenders.extend(build.into_iter().map(|name| format!("{}: build `{name}`", package.manifest_path)));
    }
    expect_none("dev-dependencies among our crates are testkit or lie below", &offenders);
}

#[test]
fn a_folder_is_named_after_its_crate() {
    let mut offenders = Vec::new();
    for package in &metadata().packages {
        let folder = package.manifest_path.parent().and_then(|folder| folder.file_name());
        if short(&package.name) != folder {
            offenders.push(format!("{}: found package `{}`", package.manifest_path, package.name));
        }
    }
    expect_none("package = `nibble-` + folder", &offenders);
}
