//! A file that pages live in while they are not worked on.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// A file of zeros at first, which nobody else sees: it has no name any more once it is filled, where the system allows that.
#[derive(Debug)]
pub(crate) struct PageFile {
    file: File,
    path: PathBuf,
}

impl PageFile {
    /// `bytes` zeros, written out: a disk that is too full shows now, not in the middle of a run.
    pub(crate) fn new(path: &Path, bytes: u64) -> Result<Self> {
        let failed = |source| Error::PageFile { path: path.to_owned(), bytes, source };
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file() && found.is_dir() || found.is_file() && found.len() > 0) {
            return Err(failed(std::io::Error::new(std::io::ErrorKind::AlreadyExists, "it exists, and is not empty")));
        }
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = open.map_err(failed)?;
        let regular = file.metadata().is_ok_and(|found| found.is_file());
        let filled = fill(&mut file, bytes);
        if regular {
            let _ = std::fs::remove_file(path);
        }
        filled.map_err(failed)?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Reads a page that begins at byte `at`.
    pub(crate) fn read(&self, at: u64, page: &mut [u8]) -> Result<()> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(page)).map_err(|source| self.failed(page.len(), source))
    }

    /// Writes a page that begins at byte `at`.
    pub(crate) fn write(&self, at: u64, page: &[u8]) -> Result<()> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(page)).map_err(|source| self.failed(page.len(), source))
    }

    fn failed(&self, bytes: usize, source: std::io::Error) -> Error {
        Error::PageFile { path: self.path.clone(), bytes: bytes as u64, source }
    }
}

fn fill(file: &mut File, bytes: u64) -> std::io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(zeros.len() as u64);
        file.write_all(&zeros[..now as usize])?;
        left -= now;
    }
    file.flush()
}
