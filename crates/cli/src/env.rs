//! What is read from the environment: where caches are, and how the Hub is reached.

use std::{
    env,
    path::{Path, PathBuf},
};

use nibble_model::files::HubOptions;
use nibble_tensor::cuda::libraries::SearchPaths;

/// The server unless `HF_ENDPOINT` names another.
pub(crate) const HUB: &str = "https://huggingface.co";

/// A variable's text, if it is set and not empty.
pub(crate) fn var(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The user's home folder.
pub(crate) fn home() -> PathBuf {
    var("HOME").or_else(|| var("USERPROFILE")).map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// `$XDG_CACHE_HOME`, or `~/.cache`.
pub(crate) fn cache_home() -> PathBuf {
    var("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from)
}

/// Where this program keeps models of its own.
pub(crate) fn nibble_cache() -> PathBuf {
    cache_home().join("nibble")
}

/// `HF_HOME`, or its place by custom.
pub(crate) fn hf_home() -> PathBuf {
    var("HF_HOME").map_or_else(|| cache_home().join("huggingface"), PathBuf::from)
}

/// The Hub as `huggingface_hub` finds it: `HF_HUB_CACHE` or `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` or the file that
/// `hf auth login` wrote, `HF_HUB_OFFLINE`, `HTTPS_PROXY`.
pub(crate) fn hub_options() -> HubOptions {
    let cache_dir = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE"));
    HubOptions {
        cache_dir: cache_dir.map_or_else(|| hf_home().join("hub"), PathBuf::from),
        endpoint: var("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned()),
        token: token(),
        offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
        user_agent: concat!("nibble/", env!("CARGO_PKG_VERSION")).to_owned(),
        proxy: ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"].into_iter().find_map(var),
    }
}

/// Where NVIDIA's libraries are looked for: `LD_LIBRARY_PATH`; the toolkits of `CUDA_HOME` and `CUDA_PATH`; the Python
/// environments of `VIRTUAL_ENV`, `CONDA_PREFIX`, the `python3` of `PATH` and the user; the machine's folders.
pub(crate) fn search_paths() -> SearchPaths {
    let list = |name: &str| var(name).map(|list| env::split_paths(&list).collect::<Vec<_>>()).unwrap_or_default();
    let named = |names: [&str; 2]| names.into_iter().filter_map(var).map(PathBuf::from).collect::<Vec<_>>();
    let mut paths = SearchPaths::of_system();
    paths.folders = list("LD_LIBRARY_PATH");
    paths.toolkits = named(["CUDA_HOME", "CUDA_PATH"]);
    let mut environments = named(["VIRTUAL_ENV", "CONDA_PREFIX"]);
    environments.extend(python_prefixes(&list("PATH")));
    environments.push(home().join(".local"));
    environments.append(&mut paths.environments);
    paths.environments = environments;
    paths
}

/// The prefixes of the `python3` in one of the folders: of the file found and, where that is a link, of the one it leads to.
fn python_prefixes(folders: &[PathBuf]) -> Vec<PathBuf> {
    let Some(python) = folders.iter().map(|folder| folder.join("python3")).find(|path| path.is_file()) else {
        return Vec::new();
    };
    let target = std::fs::canonicalize(&python).ok();
    let prefix = |python: &Path| Some(python.parent()?.parent()?.to_path_buf());
    let mut prefixes: Vec<PathBuf> = [Some(python), target].into_iter().flatten().filter_map(|python| prefix(&python)).collect();
    prefixes.dedup();
    prefixes
}

fn token() -> Option<String> {
    let file = || {
        let path = var("HF_TOKEN_PATH").map_or_else(|| hf_home().join("token"), PathBuf::from);
        std::fs::read_to_string(path).ok()
    };
    let token = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or_else(file)?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn is_on(name: &str) -> bool {
    var(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&&*value.to_ascii_uppercase()))
}

/// A path with `~/` written out, for those that did not pass through a shell.
pub(crate) fn expand(path: &str) -> PathBuf {
    path.strip_prefix("~/").map_or_else(|| Path::new(path).to_path_buf(), |rest| home().join(rest))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_python_is_known_by_its_own_prefix_and_that_of_its_base() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        for folder in ["env/bin", "base/bin", "empty"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        std::fs::write(root.join("base/bin/python3"), "").unwrap();
        std::os::unix::fs::symlink(root.join("base/bin/python3"), root.join("env/bin/python3")).unwrap();
        let of = |folders: &[&str]| python_prefixes(&folders.iter().map(|folder| root.join(folder)).collect::<Vec<_>>());
        assert_eq!(of(&["empty", "env/bin", "base/bin"]), [root.join("env"), root.join("base")]);
        assert_eq!(of(&["base/bin"]), [root.join("base")]);
        assert_eq!(of(&["empty"]), [] as [PathBuf; 0]);
    }
}
