//! What is read from the environment: where caches are, and how the Hub is reached.

use std::{
    env,
    path::{Path, PathBuf},
};

use nibble_model::files::HubOptions;

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
