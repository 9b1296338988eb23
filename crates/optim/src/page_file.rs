//! A file that pages live in while they are not worked on.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// A file of zeros at first, which nobody else sees. On unix it loses its name as soon as it is open, so that nothing of it is left
/// however the process ends; elsewhere once it is filled, where the system allows that.
#[derive(Debug)]
pub(crate) struct PageFile {
    file: File,
    path: PathBuf,
}

impl PageFile {
    /// `bytes` zeros, written out: a disk that is too full shows now, not in the middle of a run.
    pub(crate) fn new(path: &Path, bytes: u64) -> Result<Self> {
        let failed = |source| Error::PageFile { path: path.to_owned(), bytes, source };
        let mut file = open(path).map_err(failed)?;
        let filled = fill(&mut file, bytes);
        if !cfg!(unix) {
            unlink(&file, path);
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

/// A new or empty file; on unix nobody finds it any more.
fn open(path: &Path) -> std::io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|found| found.is_dir() || found.is_file() && found.len() > 0) {
        return Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, "it exists, and is not empty"));
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    if cfg!(unix) {
        unlink(&file, path);
    }
    Ok(file)
}

/// Takes the name of a regular file away: a device keeps its own.
fn unlink(file: &File, path: &Path) {
    if file.metadata().is_ok_and(|found| found.is_file()) {
        let _ = std::fs::remove_file(path);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("nibble-page-file-{}-{name}", std::process::id()))
    }

    #[cfg(unix)]
    #[test]
    fn a_file_has_no_name_from_the_moment_it_is_open() {
        let path = path("open");
        let mut file = open(&path).unwrap();
        assert!(!path.exists());
        fill(&mut file, 3 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3 << 20);
    }

    #[test]
    fn pages_are_what_was_written_and_nothing_is_left_of_them() {
        let path = path("pages");
        let file = PageFile::new(&path, 16).unwrap();
        file.write(4, &[1, 2, 3]).unwrap();
        let mut page = [9; 5];
        file.read(3, &mut page).unwrap();
        assert_eq!(page, [0, 1, 2, 3, 0]);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_and_a_file_with_something_in_it_are_refused() {
        let path = path("taken");
        std::fs::create_dir_all(&path).unwrap();
        assert!(PageFile::new(&path, 1).is_err());
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, "somebody's").unwrap();
        assert!(PageFile::new(&path, 1).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody's");
        std::fs::remove_file(&path).unwrap();
    }
}
