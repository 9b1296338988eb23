//! Requests to the Hub: where a file is, and its bytes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::Duration;

use ureq::http::{Response, header};
use ureq::{Agent, Body, Proxy};

use super::{HubOptions, Progress};
use crate::error::HubProblem;

/// A blocking client that follows redirects itself: the Hub tells a file's hash and size in the redirect's headers, and the
/// token must not go where it points.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    options: HubOptions,
}

/// Where a file's bytes are.
pub(super) struct Source {
    url: String,
    with_token: bool,
    /// The hash that names the blob in the cache.
    pub(super) etag: String,
    pub(super) size: Option<u64>,
}

/// Why a download failed: the server or the disk.
pub(super) enum Failure {
    Hub(HubProblem),
    Io(std::io::Error),
}

type Result<T> = std::result::Result<T, HubProblem>;

impl Client {
    pub(super) fn new(options: HubOptions) -> Result<Self> {
        let proxy =
            options.proxy.as_deref().map(Proxy::new).transpose().map_err(|error| HubProblem::Network {
                url: options.proxy.clone().unwrap_or_default(),
                reason: error.to_string(),
            })?;
        let agent = Agent::config_builder()
            .proxy(proxy)
            .user_agent(options.user_agent.clone())
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_mins(1)))
            .build()
            .new_agent();
        Ok(Self { agent, options })
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.options.endpoint.trim_end_matches('/'))
    }

    /// A small text. A repository that was renamed answers with a redirect on the same host.
    pub(super) fn text(&self, url: &str, repo: &str) -> Result<String> {
        let (mut response, url, ..) = self.follow(url, repo, false)?;
        response.body_mut().read_to_string().map_err(|error| HubProblem::Network { url, reason: error.to_string() })
    }

    /// Asks where a file is, and for its hash.
    pub(super) fn locate(&self, url: &str, repo: &str) -> Result<Source> {
        let (response, last, with_token, linked) = self.follow(url, repo, true)?;
        let Linked { etag, size } = linked;
        let etag = etag.or_else(|| text(&response, header::ETAG.as_str())).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        // The hash names a file, so it must be a plain name.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if etag.is_empty() || etag.starts_with('.') || !etag.bytes().all(plain) {
            let found = format!("`{etag}`");
            return Err(HubProblem::Answer { url: last, expected: "a hash as `ETag`", found });
        }
        Ok(Source { url: last, with_token, etag, size: size.or_else(|| length(&response)) })
    }

    /// Appends what is missing of a file to its partial file.
    pub(super) fn download(
        &self,
        source: &Source,
        mut partial: File,
        file: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> std::result::Result<(), Failure> {
        let mut have = partial.seek(SeekFrom::End(0)).map_err(Failure::Io)?;
        if source.size.is_some_and(|size| have > size) {
            partial.set_len(0).map_err(Failure::Io)?;
            have = 0;
        }
        let total = source.size;
        progress(Progress { file, bytes: have, total });
        if total == Some(have) {
            return Ok(());
        }
        let mut response = self.ask(false, &source.url, source.with_token, from(have)).map_err(Failure::Hub)?;
        match response.status().as_u16() {
            206 => {}
            // The server sends all of it again.
            200 => {
                partial.set_len(0).map_err(Failure::Io)?;
                have = 0;
            }
            status => return Err(Failure::Hub(HubProblem::Status { status, url: source.url.clone() })),
        }
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 17];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                // A connection that breaks is a cut: what came stays, and is resumed.
                Err(_) if total.is_some() => break,
                Err(error) => {
                    return Err(Failure::Hub(HubProblem::Network { url: source.url.clone(), reason: error.to_string() }));
                }
            };
            partial.write_all(&buffer[..count]).map_err(Failure::Io)?;
            have += count as u64;
            progress(Progress { file, bytes: have, total });
        }
        partial.sync_all().map_err(Failure::Io)?;
        match total {
            Some(expected) if expected != have => {
                Err(Failure::Hub(HubProblem::Cut { file: file.to_owned(), expected, found: have }))
            }
            _ => Ok(()),
        }
    }

    /// The first bytes of a file, at most `count`.
    pub(super) fn head(&self, source: &Source, count: u64) -> Result<Vec<u8>> {
        let range = Some(format!("bytes=0-{}", count.saturating_sub(1)));
        let mut response = self.ask(false, &source.url, source.with_token, range)?;
        let status = response.status().as_u16();
        if !matches!(status, 200 | 206) {
            return Err(HubProblem::Status { status, url: source.url.clone() });
        }
        let mut bytes = Vec::new();
        let read = response.body_mut().as_reader().take(count).read_to_end(&mut bytes);
        read.map_err(|error| HubProblem::Network { url: source.url.clone(), reason: error.to_string() })?;
        Ok(bytes)
    }

    /// One request, HEAD or GET, for all bytes or a range of them.
    fn ask(&self, head: bool, url: &str, with_token: bool, range: Option<String>) -> Result<Response<Body>> {
        let mut request = if head { self.agent.head(url) } else { self.agent.get(url) };
        if let Some(token) = self.options.token.as_ref().filter(|_| with_token) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        request.call().map_err(|error| HubProblem::Network { url: url.to_owned(), reason: error.to_string() })
    }

    /// Follows redirects; gives the last response, its URL, whether the token may go there, and what the Hub told on the way.
    /// A HEAD ends where the Hub told a file's hash and points to another host: the URL there is signed for a GET.
    fn follow(&self, url: &str, repo: &str, head: bool) -> Result<(Response<Body>, String, bool, Linked)> {
        let (mut url, mut with_token, mut linked) = (url.to_owned(), true, Linked::default());
        for _ in 0..6 {
            let response = self.ask(head, &url, with_token, None)?;
            linked.take(&response);
            let status = response.status().as_u16();
            match (status, text(&response, header::LOCATION.as_str())) {
                (200, _) => return Ok((response, url, with_token, linked)),
                (301 | 302 | 303 | 307 | 308, Some(to)) => {
                    let next = resolve(&url, &to);
                    let same = origin(&next) == origin(&url);
                    (url, with_token) = (next, with_token && same);
                    if head && !same && linked.etag.is_some() {
                        return Ok((response, url, with_token, linked));
                    }
                }
                _ => return Err(self.refusal(status, &response, url, repo)),
            }
        }
        Err(HubProblem::Answer { url, expected: "at most five redirects", found: "more".to_owned() })
    }

    fn refusal(&self, status: u16, response: &Response<Body>, url: String, repo: &str) -> HubProblem {
        let code = text(response, "x-error-code").unwrap_or_default();
        match (status, &code[..]) {
            (401 | 403, _) => HubProblem::Denied { status, page: self.url(repo), has_token: self.options.token.is_some() },
            (404, "RevisionNotFound") => HubProblem::NotFound { what: "revision", url },
            (404, "EntryNotFound") => HubProblem::NotFound { what: "file", url },
            (404, _) => HubProblem::NotFound { what: "repository", url },
            _ => HubProblem::Status { status, url },
        }
    }
}

/// The bytes from `start` on.
fn from(start: u64) -> Option<String> {
    (start > 0).then(|| format!("bytes={start}-"))
}

/// What the Hub tells of a file in the headers of its redirect.
#[derive(Default)]
struct Linked {
    etag: Option<String>,
    size: Option<u64>,
}

impl Linked {
    fn take(&mut self, response: &Response<Body>) {
        self.etag = self.etag.take().or_else(|| text(response, "x-linked-etag"));
        self.size = self.size.or_else(|| text(response, "x-linked-size")?.parse().ok());
    }
}

/// The length of the file, where the response is the file's own.
fn length(response: &Response<Body>) -> Option<u64> {
    let whole = response.status().is_success();
    text(response, header::CONTENT_LENGTH.as_str()).filter(|_| whole)?.parse().ok()
}

fn text(response: &Response<Body>, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(ToOwned::to_owned)
}

/// `scheme://host:port`.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find('/').map_or(url.len(), |at| host + at);
    &url[..end]
}

fn resolve(base: &str, to: &str) -> String {
    if to.contains("://") { to.to_owned() } else { format!("{}/{}", origin(base), to.trim_start_matches('/')) }
}
