//! The output folder: written beside its place, then renamed, so that what is there is whole.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::error::{CliError, Result, io_error};

/// Files of a tokenizer, in a model's folder or on the Hub.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// A folder that is being written under another name.
#[derive(Debug)]
pub(crate) struct Staging {
    place: PathBuf,
    folder: TempDir,
}

impl Staging {
    /// Makes a folder beside `place`. With `overwrite`, what is at the place stays until [`Staging::commit`]; it must be a
    /// result of an earlier run, and hold none of `inputs`, which the run reads.
    ///
    /// # Errors
    /// [`CliError::OutputExists`], [`CliError::OutputIsFile`], [`CliError::OutputHoldsInput`], [`CliError::OutputIsOther`], or
    /// the system refuses.
    pub(crate) fn new(place: &Path, overwrite: bool, inputs: &[&Path]) -> Result<Self> {
        check(place, overwrite)?;
        keep_inputs(place, inputs)?;
        // A link as the last part is followed: the folder that it means is replaced, not the link.
        let place = if place.exists() { fs::canonicalize(place).map_err(io_error("open", place))? } else { place.to_path_buf() };
        let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
        fs::create_dir_all(&parent).map_err(io_error("create", &parent))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".nibble-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let folder = builder.tempdir_in(&parent).map_err(io_error("create a folder in", &parent))?;
        Ok(Self { place, folder })
    }

    /// The folder to write into.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Puts the folder into its place.
    ///
    /// # Errors
    /// When the system refuses: the place is as it was, and what was written stays under the name it has.
    pub(crate) fn commit(self) -> Result<PathBuf> {
        let Self { place, folder } = self;
        let old = folder.path().with_extension("old");
        let had_one = place.exists();
        if had_one {
            fs::rename(&place, &old).map_err(io_error("replace", &place))?;
        }
        let written = folder.keep();
        if let Err(error) = fs::rename(&written, &place) {
            if had_one {
                fs::rename(&old, &place).map_err(io_error("put back", &place))?;
            }
            return Err(io_error("rename into", &place)(error));
        }
        if had_one {
            fs::remove_dir_all(&old).map_err(io_error("remove", &old))?;
        }
        Ok(place)
    }
}

/// What tells a result of an earlier run from somebody's folder.
const RESULTS: [&str; 2] = ["adapter_config.json", "config.json"];

/// Refuses to replace a folder that the run reads from, or that no run has written.
fn keep_inputs(place: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(place) = fs::canonicalize(place) else { return Ok(()) };
    let inside = |input: &&&Path| fs::canonicalize(input).is_ok_and(|input| input.starts_with(&place));
    if let Some(input) = inputs.iter().find(inside) {
        return Err(CliError::OutputHoldsInput { path: place, input: input.to_path_buf() });
    }
    let empty = fs::read_dir(&place).map_err(io_error("list", &place))?.next().is_none();
    if empty || RESULTS.iter().any(|name| place.join(name).is_file()) {
        return Ok(());
    }
    Err(CliError::OutputIsOther { path: place })
}

/// Refuses a place with something in it.
fn check(place: &Path, overwrite: bool) -> Result<()> {
    if place.is_file() {
        return Err(CliError::OutputIsFile { path: place.to_path_buf() });
    }
    if !place.exists() || overwrite {
        return Ok(());
    }
    let entries = fs::read_dir(place).map_err(io_error("list", place))?.count();
    if entries > 0 {
        return Err(CliError::OutputExists { path: place.to_path_buf(), entries });
    }
    Ok(())
}

/// Copies the tokenizer's files of a model, unchanged; gives how many there were.
///
/// # Errors
/// When the system refuses.
pub(crate) fn copy_tokenizer(from: &Path, to: &Path) -> Result<usize> {
    let mut copied = 0;
    for name in TOKENIZER_FILES {
        let source = from.join(name);
        if source.is_file() {
            let target = to.join(name);
            // Not `fs::copy`: the model's folder may be read-only, which is no property of the copy.
            let bytes = fs::read(&source).map_err(io_error("read", &source))?;
            fs::write(&target, bytes).map_err(io_error("write", &target))?;
            copied += 1;
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_stays_until_the_new_folder_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("deep/out");
        let staging = Staging::new(&place, false, &[]).unwrap();
        fs::write(staging.path().join("a"), "1").unwrap();
        fs::write(staging.path().join("config.json"), "{}").unwrap();
        assert!(!place.exists());
        staging.commit().unwrap();
        assert_eq!(fs::read_to_string(place.join("a")).unwrap(), "1");

        assert!(matches!(Staging::new(&place, false, &[]), Err(CliError::OutputExists { entries: 2, .. })));
        drop(Staging::new(&place, true, &[]).unwrap());
        assert!(place.join("a").exists(), "a run that fails leaves the old result");
        let staging = Staging::new(&place, true, &[]).unwrap();
        fs::write(staging.path().join("b"), "2").unwrap();
        staging.commit().unwrap();
        assert!(place.join("b").exists() && !place.join("a").exists());
        assert_eq!(fs::read_dir(place.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_tokenizer_is_copied_byte_for_byte_and_can_be_replaced_later() {
        let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let source = from.path().join("tokenizer.json");
        fs::write(&source, "{ }\r\n").unwrap();
        fs::write(from.path().join("model.safetensors"), "").unwrap();
        let mut permissions = fs::metadata(&source).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&source, permissions).unwrap();
        assert_eq!(copy_tokenizer(from.path(), to.path()).unwrap(), 1);
        let copy = to.path().join("tokenizer.json");
        assert_eq!(fs::read(&copy).unwrap(), b"{ }\r\n");
        assert!(!fs::metadata(&copy).unwrap().permissions().readonly());
        assert!(!to.path().join("model.safetensors").exists());
    }

    #[test]
    fn an_empty_folder_is_as_good_as_none_and_a_file_is_not() {
        let root = tempfile::tempdir().unwrap();
        let staging = Staging::new(root.path().join("new").as_path(), false, &[]).unwrap();
        drop(staging);
        fs::create_dir(root.path().join("empty")).unwrap();
        Staging::new(&root.path().join("empty"), false, &[]).unwrap().commit().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        assert!(matches!(Staging::new(&root.path().join("file"), true, &[]), Err(CliError::OutputIsFile { .. })));
    }

    #[test]
    fn a_folder_that_the_run_reads_or_that_is_no_result_is_never_replaced() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("model");
        fs::create_dir(&place).unwrap();
        fs::write(place.join("notes.txt"), "mine").unwrap();
        assert!(matches!(Staging::new(&place, true, &[]), Err(CliError::OutputIsOther { .. })));
        fs::write(place.join("config.json"), "{}").unwrap();
        for input in [place.clone(), place.join("notes.txt")] {
            assert!(matches!(Staging::new(&place, true, &[&input]), Err(CliError::OutputHoldsInput { .. })));
        }
        drop(Staging::new(&place, true, &[root.path()]).unwrap());
        assert!(place.join("notes.txt").exists());
    }
}
