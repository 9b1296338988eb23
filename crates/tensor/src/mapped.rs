//! Files read through the page cache, without a copy of their own in memory.
// The one module outside SIMD and CUDA with `unsafe`: a memory map is only sound while nobody truncates the file.
#![allow(unsafe_code)]

use std::{fs::File, ops::Range, path::Path, sync::Arc};

use rayon::prelude::*;

use crate::{Error, Result};

/// Bytes that a task reads.
const PIECE: usize = 2 << 20;

/// A file mapped into memory, read-only.
///
/// The file must not be truncated or rewritten in place while it is mapped (writers in this project write beside and rename,
/// which is safe: the map keeps the old file).
#[derive(Debug)]
pub struct MappedFile {
    /// Nothing for an empty file.
    map: Option<memmap2::Mmap>,
    /// To read without the map.
    #[cfg(unix)]
    file: File,
}

impl MappedFile {
    /// Maps the whole file.
    ///
    /// # Errors
    /// [`Error::File`] with the system's reason.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let wrap = |source| Error::File { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(wrap)?;
        let map = if file.metadata().map_err(wrap)?.len() == 0 {
            None
        } else {
            // SAFETY: the map is read-only, and the type's contract says that the file is not changed in place meanwhile.
            Some(unsafe { memmap2::Mmap::map(&file) }.map_err(wrap)?)
        };
        Ok(Arc::new(Self {
            map,
            #[cfg(unix)]
            file,
        }))
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// Copies the bytes from `at` on, by all cores. Pages of the map are not touched, which would cost more than the copy.
    ///
    /// # Errors
    /// The system's reason; the end of the file is one.
    pub fn read_at(&self, at: u64, out: &mut [u8]) -> std::io::Result<()> {
        out.par_chunks_mut(PIECE).enumerate().try_for_each(|(i, out)| self.read_piece(at + (i * PIECE) as u64, out))
    }

    #[cfg(unix)]
    fn read_piece(&self, at: u64, out: &mut [u8]) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, at)
    }

    #[cfg(not(unix))]
    fn read_piece(&self, at: u64, out: &mut [u8]) -> std::io::Result<()> {
        let from = self.bytes().get(at as usize..).and_then(|bytes| bytes.get(..out.len()));
        out.copy_from_slice(from.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    /// Tells the system that the pages of `range` are not needed soon, so that they do not count as this process's memory.
    /// They are read again from the file when touched again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            let (start, end) = (range.start.next_multiple_of(4096), range.end.min(map.len()));
            if start < end {
                // SAFETY: the map is shared and read-only, so dropped pages come back from the file with the same content.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_gives_the_bytes_of_the_map_and_the_end_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content: Vec<u8> = (0..3 * PIECE as u32 + 5).map(|i| (i / 7) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let map = MappedFile::open(&path).unwrap();
        let mut out = vec![0; 2 * PIECE + 17];
        map.read_at(1001, &mut out).unwrap();
        assert!(out == map.bytes()[1001..1001 + out.len()]);
        assert!(map.read_at(2 * PIECE as u64, &mut out).is_err());
    }

    #[test]
    fn released_pages_read_the_same_again() {
        let path = std::env::temp_dir().join(format!("nibble-mapped-{}", std::process::id()));
        let content: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let map = MappedFile::open(&path).unwrap();
        assert_eq!(map.bytes(), content);
        map.release(0..content.len());
        assert_eq!(map.bytes(), content);
        std::fs::remove_file(path).unwrap();
    }
}
