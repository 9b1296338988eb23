//! From `--model` to files: a folder, a GGUF file, a name on the Hub, or the model inside the binary.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nibble_model::files::{Hub, HubOptions, ModelName};

use crate::{
    assets, env,
    error::{CliError, Result},
    ui,
};

/// Where a model's files are, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelSource {
    /// The folder or file.
    pub(crate) path: PathBuf,
    /// As it was asked for; without the revision.
    pub(crate) name: String,
    /// The commit, of a model from the Hub.
    pub(crate) revision: Option<String>,
}

impl ModelSource {
    /// Finds the files of a model; downloads them if they are on the Hub and not in the cache.
    ///
    /// # Errors
    /// [`CliError::ModelNotFound`], and what the Hub says.
    pub(crate) fn resolve(model: &str) -> Result<Self> {
        let path = env::expand(model);
        if path.exists() {
            return Ok(Self { path, name: model.to_owned(), revision: None });
        }
        if model == assets::TINY_MODEL {
            return Ok(Self { path: assets::unpack_tiny_model()?, name: model.to_owned(), revision: None });
        }
        match hub_name(model) {
            Some(name) => Self::fetch(&name, env::hub_options()),
            None => Err(CliError::ModelNotFound { model: model.to_owned() }),
        }
    }

    /// Fetches a model from the Hub, or finds it in the cache of it.
    ///
    /// # Errors
    /// What the Hub says.
    pub(crate) fn fetch(name: &ModelName, options: HubOptions) -> Result<Self> {
        let offline = options.offline;
        let mut bar = ui::Download::new();
        let fetched =
            Hub::new(options)?.fetch(name, &mut |progress| bar.update(progress.file, progress.bytes, progress.total))?;
        bar.finish();
        if fetched.from_cache && !offline {
            ui::say(format_args!("the Hub was not reached: `{name}` is taken from the cache"));
        }
        let file = name.file.as_ref().map_or(String::new(), |file| format!("/{file}"));
        Ok(Self { path: fetched.path, name: format!("{}{file}", name.repo), revision: Some(fetched.commit) })
    }

    /// The folder that the tokenizer's files are in, if they are files of their own.
    pub(crate) fn tokenizer_folder(&self) -> Option<&Path> {
        let folder = if self.path.is_dir() { &self.path } else { self.path.parent()? };
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        // A GGUF file carries its own tokenizer, whatever lies beside it.
        let beside_gguf = !self.path.is_dir() && is_gguf(&self.path);
        (!beside_gguf).then_some(folder)
    }
}

/// Whether a path ends as GGUF files do.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The only GGUF file of a folder.
pub(crate) fn only_gguf(folder: &Path) -> Option<PathBuf> {
    let mut files = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_gguf(path));
    let first = files.next()?;
    files.next().is_none().then_some(first)
}

/// A name on the Hub, unless the text is plainly a path.
pub(crate) fn hub_name(model: &str) -> Option<ModelName> {
    let is_path = model.starts_with(['.', '/', '~']) || model.contains('\\') || model.ends_with('/');
    if is_path { None } else { model.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_names() {
        for name in ["org/name", "org/name@v1", "org/name/file.gguf", "org/name/file.gguf@main"] {
            assert!(hub_name(name).is_some(), "{name}");
        }
        for path in ["./org/name", "/org/name", "~/org", "../name", "model.gguf", "models", "a/b/c", "org\\name", "org/name/"] {
            assert!(hub_name(path).is_none(), "{path}");
        }
    }

    #[test]
    fn a_path_that_is_not_there_is_one_clear_error() {
        let error = ModelSource::resolve("./no/such/model").unwrap_err();
        assert_eq!(error.to_string(), "open model `./no/such/model`: no such file or folder");
        assert!(error.hint().is_some());
    }
}
