//! The cache's layout, as `huggingface_hub` has it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Fetched, ModelName};
use crate::error::{Error, HubProblem, Result};

pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The folder of one repository.
pub(super) struct Cache {
    folder: PathBuf,
    root: PathBuf,
}

impl Cache {
    pub(super) fn new(root: &Path, model: &ModelName) -> Self {
        let folder = root.join(format!("models--{}", model.repo.replace('/', "--")));
        Self { folder, root: root.to_owned() }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    fn partial(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// A snapshot of the model that is whole.
    pub(super) fn find(&self, model: &ModelName) -> std::result::Result<Fetched, HubProblem> {
        let missing = |file: &str| HubProblem::Offline { file: file.to_owned(), cache: self.root.clone() };
        let reference = fs::read_to_string(self.folder.join("refs").join(&model.revision)).ok();
        let commit = reference.as_deref().map_or(&model.revision[..], str::trim).to_owned();
        let snapshot = self.snapshot(&commit);
        let fetched = |path| Fetched { path, commit: commit.clone(), from_cache: true };
        if let Some(file) = &model.file {
            let path = snapshot.join(file);
            return if path.is_file() { Ok(fetched(path)) } else { Err(missing(file)) };
        }
        if !snapshot.join("config.json").is_file() {
            return Err(missing("config.json"));
        }
        if !snapshot.join("model.safetensors").is_file() {
            let shards = shards(&snapshot).ok_or_else(|| missing("model.safetensors"))?;
            if let Some(shard) = shards.iter().find(|shard| !snapshot.join(shard).is_file()) {
                return Err(missing(shard));
            }
        }
        Ok(fetched(snapshot))
    }

    /// The config of a revision that was fetched, whole or in part.
    pub(super) fn config(&self, model: &ModelName) -> std::result::Result<PathBuf, HubProblem> {
        let reference = fs::read_to_string(self.folder.join("refs").join(&model.revision)).ok();
        let commit = reference.as_deref().map_or(&model.revision[..], str::trim);
        let path = self.snapshot(commit).join(super::CONFIG);
        let missing = || HubProblem::Offline { file: super::CONFIG.to_owned(), cache: self.root.clone() };
        if path.is_file() { Ok(path) } else { Err(missing()) }
    }

    /// Notes which commit a branch or tag was.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        make_parent(&path)?;
        fs::write(&path, commit).map_err(|source| Error::Io { op: "write", path, source })
    }

    /// Opens the partial file of a blob, locked: a second process waits here instead of writing into it too.
    pub(super) fn lock_partial(&self, etag: &str) -> Result<File> {
        let path = self.partial(etag);
        make_parent(&path)?;
        let io = |source| Error::Io { op: "lock", path: path.clone(), source };
        let file = File::options().create(true).append(true).read(true).open(&path).map_err(io)?;
        file.lock().map_err(io)?;
        Ok(file)
    }

    /// The partial file of a blob is whole.
    pub(super) fn settle(&self, etag: &str) -> Result<()> {
        let path = self.blob(etag);
        fs::rename(self.partial(etag), &path).map_err(|source| Error::Io { op: "rename into", path, source })
    }

    /// Puts a blob into a snapshot: as a relative link, so that the cache can be moved.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        make_parent(&path)?;
        let up = "../".repeat(2 + file.matches('/').count());
        match symlink(&format!("{up}blobs/{etag}"), &self.blob(etag), &path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_file() => Ok(()),
            done => done.map_err(|source| Error::Io { op: "link", path, source }),
        }
    }
}

#[cfg(unix)]
fn symlink(to: &str, _blob: &Path, at: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(to, at)
}

/// Links need a privilege on Windows: there a snapshot has a hard link, which is what a link and its blob amount to.
#[cfg(not(unix))]
fn symlink(_to: &str, blob: &Path, at: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, at)
}

/// The shards that a snapshot's index names.
fn shards(snapshot: &Path) -> Option<Vec<String>> {
    let index: Value = serde_json::from_str(&fs::read_to_string(snapshot.join(INDEX)).ok()?).ok()?;
    let map = index.get("weight_map")?.as_object()?;
    let mut shards: Vec<_> = map.values().filter_map(|shard| shard.as_str().map(ToOwned::to_owned)).collect();
    shards.sort();
    shards.dedup();
    Some(shards)
}

fn make_parent(path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(|source| Error::Io { op: "create", path: parent.to_owned(), source })
}
