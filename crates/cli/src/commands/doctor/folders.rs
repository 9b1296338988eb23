//! Caches: where, and how large.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::Check;
use crate::{env, ui};

/// A cache's folder.
#[derive(Debug, Serialize)]
pub(super) struct Cache {
    name: &'static str,
    path: PathBuf,
    exists: bool,
    /// Of files; a link counts as none.
    bytes: usize,
    /// Models in it.
    models: usize,
}

/// The Hub's cache, which other tools share, and this program's own.
pub(super) fn look() -> Vec<Cache> {
    let hub = env::hub_options().cache_dir;
    let own = env::nibble_cache();
    let models = |folder: &Path| names(folder).filter(|name| name.starts_with("models--")).count();
    let files = |folder: &Path| names(folder).count();
    vec![cache("hub cache", hub, models), cache("own cache", own, files)]
}

impl Cache {
    pub(super) fn check(&self) -> Check {
        if !self.exists {
            return Check::info(self.name, format!("{} (not there yet)", self.path.display()));
        }
        Check::ok(self.name, format!("{}: {} models, {}", self.path.display(), self.models, ui::bytes(self.bytes)))
    }
}

fn cache(name: &'static str, path: PathBuf, models: impl Fn(&Path) -> usize) -> Cache {
    Cache { name, exists: path.is_dir(), bytes: size(&path), models: models(&path), path }
}

fn names(folder: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// Bytes of the files below a folder. Links are not followed: a snapshot's lead to blobs that are counted already.
fn size(folder: &Path) -> usize {
    let mut total = 0;
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                Ok(kind) if kind.is_file() => total += entry.metadata().map_or(0, |meta| meta.len() as usize),
                _ => {}
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_as_large_as_its_files() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("models--a--b/blobs")).unwrap();
        fs::write(root.path().join("models--a--b/blobs/x"), [0; 700]).unwrap();
        fs::write(root.path().join("version.txt"), [0; 30]).unwrap();
        assert_eq!(size(root.path()), 730);
        assert_eq!(size(&root.path().join("none")), 0);
    }
}
