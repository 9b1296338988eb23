//! A model's name.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// A model on the Hub: `org/name`, `org/name@revision`, or one file of it, `org/name/file.gguf@revision`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelName {
    /// `org/name`.
    pub repo: String,
    /// A branch, tag or commit; `main` where none is given.
    pub revision: String,
    /// A GGUF file in it.
    pub file: Option<String>,
}

impl FromStr for ModelName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = || Error::HubName { found: text.to_owned() };
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let mut parts = path.splitn(3, '/');
        let (org, name, file) = (parts.next(), parts.next(), parts.next());
        let (Some(org), Some(name)) = (org, name) else { return Err(refuse()) };
        let gguf = file.is_none_or(|file| is_relative(file) && file.to_ascii_lowercase().ends_with(".gguf"));
        if !is_name(org) || !is_name(name) || !is_relative(revision) || !gguf {
            return Err(refuse());
        }
        Ok(Self { repo: format!("{org}/{name}"), revision: revision.to_owned(), file: file.map(ToOwned::to_owned) })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (slash, file) = self.file.as_ref().map_or(("", ""), |file| ("/", file));
        write!(f, "{}{slash}{file}@{}", self.repo, self.revision)
    }
}

/// A single segment in the Hub's alphabet, and not one that means another folder.
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    !text.is_empty() && !text.starts_with('.') && text.bytes().all(allowed)
}

/// A path that stays below its folder: names and revisions become paths of the cache.
pub(super) fn is_relative(path: &str) -> bool {
    let segment = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', ':', '\0']);
    path.split('/').all(segment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_print_back() {
        for text in ["a/b@main", "HuggingFaceTB/SmolLM2-135M@refs/pr/1", "a/b/sub/x.Q4_0.gguf@v1"] {
            assert_eq!(text.parse::<ModelName>().unwrap().to_string(), text);
        }
        assert_eq!("a/b".parse::<ModelName>().unwrap().revision, "main");
    }

    #[test]
    fn names_that_leave_the_cache_are_refused() {
        for text in ["a", "", "a/", "/b", "../b", "a/..", "a/b@", "a/b@../x", "a/b/../c.gguf", "a/b/c.bin", "a/b@x//y"] {
            assert!(matches!(text.parse::<ModelName>(), Err(Error::HubName { .. })), "{text}");
        }
    }
}
