//! Where reference results are, as the environment says.

use std::path::PathBuf;

/// The folder of the full reference results that `NIBBLE_GOLDEN` names, as an absolute path. `None` where it names none: tests
/// then have the part of them that is in the repository.
///
/// # Panics
/// When what it names is no folder.
#[must_use]
pub fn golden_folder() -> Option<PathBuf> {
    let folder = std::env::var_os("NIBBLE_GOLDEN").filter(|folder| !folder.is_empty()).map(PathBuf::from)?;
    assert!(folder.is_dir(), "NIBBLE_GOLDEN: expected a folder, found `{}`", folder.display());
    Some(folder)
}
