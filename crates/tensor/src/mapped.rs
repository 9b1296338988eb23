//! Files read through the page cache, without a copy of their own in memory.
// The one module outside SIMD and CUDA with `unsafe`: a memory map is only sound while nobody truncates the file.
#![allow(unsafe_code)]

use std::{fs::File, ops::Range, path::Path, sync::Arc};

use crate::{Error, Result};

/// A file mapped into memory, read-only.
///
/// The file must not be truncated or rewritten in place while it is mapped (writers in this project write beside and rename,
/// which is safe: the map keeps the old file).
#[derive(Debug)]
pub struct MappedFile(Option<memmap2::Mmap>);

impl MappedFile {
    /// Maps the whole file.
    ///
    /// # Errors
    /// [`Error::File`] with the system's reason.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let wrap = |source| Error::File { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(wrap)?;
        if file.metadata().map_err(wrap)?.len() == 0 {
            return Ok(Arc::new(Self(None)));
        }
        // SAFETY: the map is read-only, and the type's contract says that the file is not changed in place meanwhile.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(wrap)?;
        Ok(Arc::new(Self(Some(map))))
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }

    /// Tells the system that the pages of `range` are not needed soon, so that they do not count as this process's memory.
    /// They are read again from the file when touched again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.0 {
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
