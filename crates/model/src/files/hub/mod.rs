//! Models by their name on the Hugging Face Hub: found in the local cache, or downloaded into it.
//!
//! The cache is laid out as `huggingface_hub` does, and shared with it: `models--org--name/refs/REV` holds a commit,
//! `snapshots/COMMIT/FILE` links to `blobs/ETAG`. Only what training needs is fetched: config, tokenizer, chat template and
//! safetensors, or one named GGUF file.

mod cache;
mod http;
mod name;

use std::path::PathBuf;

use serde_json::Value;

pub use name::ModelName;

use crate::config::ModelConfig;
use crate::error::{Error, GgufProblem, HubProblem, Result};
use cache::Cache;
use http::Client;

/// Where models come from. The library reads no environment: a program fills this in, from `HF_HUB_CACHE` or `HF_HOME`,
/// `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HTTPS_PROXY` if it follows the Hub's custom.
#[derive(Clone)]
pub struct HubOptions {
    /// The cache's folder: `~/.cache/huggingface/hub` by custom.
    pub cache_dir: PathBuf,
    /// The server: `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// An access token, for private and gated models. It is sent to the endpoint alone, not to where that redirects.
    pub token: Option<String>,
    /// Whether to use the cache alone.
    pub offline: bool,
    /// The `User-Agent` to send.
    pub user_agent: String,
    /// A proxy's URL.
    pub proxy: Option<String>,
}

/// Without the token's text.
impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubOptions")
            .field("cache_dir", &self.cache_dir)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .field("user_agent", &self.user_agent)
            .field("proxy", &self.proxy)
            .finish()
    }
}

const CONFIG: &str = "config.json";

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file.
    pub file: &'a str,
    /// Bytes of it on disk.
    pub bytes: u64,
    /// Bytes of it in all, where the server says so.
    pub total: Option<u64>,
}

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The snapshot's folder, or the GGUF file that was named: what [`Checkpoint::open`](super::Checkpoint::open) takes.
    pub path: PathBuf,
    /// The commit.
    pub commit: String,
    /// Whether the server was not asked, or not reached, so that a branch may have moved on.
    pub from_cache: bool,
}

/// Bytes of a GGUF file that are asked for first, four times as many each time that is not all of its header, and at most: a vocabulary
/// of 128,000 takes 8 MB.
const FIRST_HEAD: u64 = 8 << 20;
/// See [`Hub::fetch_gguf_config`].
const MOST_HEAD: u64 = FIRST_HEAD << 4;

/// A client of the Hub and of its cache.
#[derive(Debug)]
pub struct Hub {
    client: Client,
    cache_dir: PathBuf,
    offline: bool,
}

impl Hub {
    /// A client; nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Hub`] when the proxy's URL is malformed.
    pub fn new(options: HubOptions) -> Result<Self> {
        let (cache_dir, offline) = (options.cache_dir.clone(), options.offline);
        let client = Client::new(options).map_err(|problem| Error::Hub { model: "a model".to_owned(), problem })?;
        Ok(Self { client, cache_dir, offline })
    }

    /// Finds a model: asks the server for the revision's commit and fetches the files that are not in the cache; offline, or
    /// if the server cannot be reached, takes a snapshot that is whole.
    ///
    /// # Errors
    /// [`Error::Hub`]: not reached and not cached, no access (with what to do), no such model, revision or file, a download
    /// that ended early (what came stays, and is resumed next time).
    pub fn fetch(&self, model: &ModelName, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Fetched> {
        let cache = Cache::new(&self.cache_dir, model);
        let wrap = |problem| Error::Hub { model: model.to_string(), problem };
        if self.offline {
            return cache.find(model).map_err(wrap);
        }
        let (commit, files) = match self.list(model) {
            Ok(listing) => listing,
            Err(problem @ HubProblem::Network { .. }) => {
                return cache.find(model).map_err(|_| wrap(problem));
            }
            Err(problem) => return Err(wrap(problem)),
        };
        for file in &files {
            self.file(model, &cache, &commit, file, progress)?;
        }
        cache.write_ref(&model.revision, &commit)?;
        let snapshot = cache.snapshot(&commit);
        let path = model.file.as_ref().map_or(snapshot.clone(), |file| snapshot.join(file));
        Ok(Fetched { path, commit, from_cache: false })
    }

    /// The path of a model's `config.json`: fetched alone, or found in the cache as in [`Hub::fetch`].
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn fetch_config(&self, model: &ModelName, progress: &mut dyn FnMut(Progress<'_>)) -> Result<PathBuf> {
        let cache = Cache::new(&self.cache_dir, model);
        let wrap = |problem| Error::Hub { model: model.to_string(), problem };
        if self.offline {
            return cache.config(model).map_err(wrap);
        }
        match self.list(model) {
            Ok((commit, _)) => {
                // The branch is not noted as this commit: its weights are not here.
                self.file(model, &cache, &commit, CONFIG, progress)?;
                Ok(cache.snapshot(&commit).join(CONFIG))
            }
            Err(problem @ HubProblem::Network { .. }) => cache.config(model).map_err(|_| wrap(problem)),
            Err(problem) => Err(wrap(problem)),
        }
    }

    /// The config of the GGUF file that `model` names, from the beginning of the file alone, or from all of it where it is in the cache; and how
    /// many bytes were fetched for it.
    ///
    /// # Errors
    /// As [`Hub::fetch`]; [`Error::Gguf`] for a header that is malformed or longer than 128 MiB.
    pub fn fetch_gguf_config(&self, model: &ModelName) -> Result<(ModelConfig, u64)> {
        let cache = Cache::new(&self.cache_dir, model);
        let wrap = |problem| Error::Hub { model: model.to_string(), problem };
        if self.offline {
            return Ok((super::Checkpoint::open(&cache.find(model).map_err(wrap)?.path)?.config()?, 0));
        }
        let (commit, files) = self.list(model).map_err(wrap)?;
        let file = files.last().map(String::as_str).unwrap_or_default();
        let here = cache.snapshot(&commit).join(file);
        if here.is_file() {
            return Ok((super::Checkpoint::open(&here)?.config()?, 0));
        }
        let url = self.client.url(&format!("{}/resolve/{commit}/{}", model.repo, escape_path(file)));
        let source = self.client.locate(&url, &model.repo).map_err(wrap)?;
        let length = source.size.map_or(usize::MAX, |size| size as usize);
        let mut count = FIRST_HEAD;
        loop {
            let head = self.client.head(&source, count).map_err(wrap)?;
            if let Some(config) = super::gguf::config_of_head(&head, length, &model.to_string())? {
                return Ok((config, head.len() as u64));
            }
            if count >= MOST_HEAD {
                let (what, needed) = ("the header".to_owned(), MOST_HEAD + 1);
                let problem = GgufProblem::Cut { what, needed, available: head.len() as u64 };
                return Err(Error::Gguf { path: model.to_string().into(), problem });
            }
            count *= 4;
        }
    }

    /// The revision's commit, and the files of it to fetch.
    fn list(&self, model: &ModelName) -> std::result::Result<(String, Vec<String>), HubProblem> {
        let url = self.client.url(&format!("api/models/{}/revision/{}", model.repo, escape(&model.revision)));
        let text = self.client.text(&url, &model.repo)?;
        let answer = |expected, found: String| HubProblem::Answer { url: url.clone(), expected, found };
        let json: Value = serde_json::from_str(&text).map_err(|error| answer("JSON", error.to_string()))?;
        let commit = json.get("sha").and_then(Value::as_str).unwrap_or_default();
        // The commit names a folder, so it must not reach elsewhere.
        if commit.is_empty() || !commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(answer("a commit in `sha`", format!("`{commit}`")));
        }
        let siblings = json.get("siblings").and_then(Value::as_array).into_iter().flatten();
        let names: Vec<&str> = siblings.filter_map(|file| file.get("rfilename")?.as_str()).collect();
        Ok((commit.to_owned(), needed(&names, model, &url)?))
    }

    fn file(
        &self,
        model: &ModelName,
        cache: &Cache,
        commit: &str,
        file: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<()> {
        if cache.snapshot(commit).join(file).is_file() {
            return Ok(());
        }
        let wrap = |problem| Error::Hub { model: model.to_string(), problem };
        let url = self.client.url(&format!("{}/resolve/{commit}/{}", model.repo, escape_path(file)));
        let source = self.client.locate(&url, &model.repo).map_err(wrap)?;
        let blob = cache.blob(&source.etag);
        if !blob.is_file() {
            let partial = cache.lock_partial(&source.etag)?;
            // Another process may have brought it while this one waited for the lock.
            if !blob.is_file() {
                self.client.download(&source, partial, file, progress).map_err(|error| match error {
                    http::Failure::Hub(problem) => wrap(problem),
                    http::Failure::Io(source) => Error::Io { op: "write", path: blob.clone(), source },
                })?;
                cache.settle(&source.etag)?;
            }
        }
        cache.link(commit, file, &source.etag)
    }
}

/// The files to fetch, weights last: a model without usable weights costs no download.
fn needed(names: &[&str], model: &ModelName, url: &str) -> std::result::Result<Vec<String>, HubProblem> {
    if let Some(file) = &model.file {
        if !names.contains(&&file[..]) {
            return Err(HubProblem::NotFound { what: "file", url: format!("{url} ({file})") });
        }
        return Ok(vec![file.clone()]);
    }
    let weights: Vec<&str> = if names.contains(&"model.safetensors") {
        vec!["model.safetensors"]
    } else if names.contains(&cache::INDEX) {
        let shard = |name: &&str| name.starts_with("model-") && name.ends_with(".safetensors") && !name.contains('/');
        std::iter::once(cache::INDEX).chain(names.iter().copied().filter(shard)).collect()
    } else {
        Vec::new()
    };
    if weights.is_empty() {
        let weights = |name: &&str| [".gguf", ".bin", ".pth", ".safetensors"].iter().any(|end| name.ends_with(end));
        let found = names.iter().copied().filter(weights).map(ToOwned::to_owned).collect();
        return Err(HubProblem::NoWeights { found });
    }
    let small = names.iter().copied().filter(|name| is_text_file(name));
    Ok(small.chain(weights).map(ToOwned::to_owned).collect())
}

/// Config, tokenizer and chat template, at the top of the repository.
fn is_text_file(name: &str) -> bool {
    let exact =
        ["config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"];
    exact.contains(&name) || (!name.contains('/') && (name.starts_with("tokenizer") || name.starts_with("chat_template")))
}

/// A path segment for a URL: `refs/pr/1` is one segment to the Hub.
fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

fn escape_path(path: &str) -> String {
    path.split('/').map(escape).collect::<Vec<_>>().join("/")
}
