//! The sources: modules with their headers and kernels.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    path::Path,
};

use crate::{
    hash::Hash,
    log::Declared,
    signatures::{self, Signature},
};

/// A `.cu` file.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) source: String,
    /// Names and texts of the headers that it includes, directly or not, sorted.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) kernels: Vec<Signature>,
    /// The spills that it says it has.
    pub(crate) spills: Vec<Declared>,
}

impl Module {
    /// Whether it is for sm_90a alone.
    pub(crate) fn hopper_only(&self) -> bool {
        self.name.ends_with("_sm90")
    }

    /// A hash of all text that an image is compiled from.
    pub(crate) fn hash(&self) -> Hash {
        self.headers.iter().fold(Hash::new().add(self.source.as_bytes()), |hash, (name, source)| {
            hash.add(name.as_bytes()).add(source.as_bytes())
        })
    }
}

/// The modules in a folder, sorted by name, and what is wrong with them. One that cannot be read right is left out.
pub(crate) fn read(folder: &Path) -> (Vec<Module>, Vec<String>) {
    let (mut modules, mut problems) = (Vec::new(), Vec::new());
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.strip_suffix(".cu").map(str::to_owned))
        .collect();
    names.sort();
    for name in names {
        match module(folder, &name) {
            Ok(module) => modules.push(module),
            Err(problem) => problems.push(format!("{name}.cu: {problem}")),
        }
    }
    problems.extend(twice(&modules));
    (modules, problems)
}

fn module(folder: &Path, name: &str) -> Result<Module, String> {
    let source = text(&folder.join(format!("{name}.cu")))?;
    let mut headers = BTreeMap::new();
    let mut open = includes(&source)?;
    while let Some(header) = open.pop() {
        if let Entry::Vacant(entry) = headers.entry(header) {
            let source = text(&folder.join(entry.key()))?;
            open.extend(includes(&source).map_err(|problem| format!("{}: {problem}", entry.key()))?);
            entry.insert(source);
        }
    }
    let kernels = signatures::parse(&source)?;
    let spills = Declared::read(&source)?;
    Ok(Module { name: name.to_owned(), source, headers: headers.into_iter().collect(), kernels, spills })
}

/// The headers that a text includes. NVRTC gets them by name, so that one file has one name: its path in the folder of sources.
fn includes(source: &str) -> Result<Vec<String>, String> {
    let lines = source.lines().filter_map(|line| line.trim_start().strip_prefix("#include"));
    lines
        .map(|rest| {
            let name = rest.trim().strip_prefix('"').and_then(|rest| rest.split_once('"')).map(|(name, _)| name);
            let name = name.filter(|name| name.starts_with("common/"));
            name.map(str::to_owned).ok_or_else(|| format!("expected `#include \"common/NAME.cuh\"`, found `{}`", rest.trim()))
        })
        .collect()
}

/// Kernels whose name another has too.
fn twice(modules: &[Module]) -> Vec<String> {
    let mut seen = BTreeMap::new();
    let mut problems = Vec::new();
    for module in modules {
        for kernel in &module.kernels {
            if let Some(before) = seen.insert(&kernel.name, &module.name) {
                problems.push(format!("{}.cu: kernel `{}` is in {before}.cu too", module.name, kernel.name));
            }
        }
    }
    problems
}

fn text(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))
}
