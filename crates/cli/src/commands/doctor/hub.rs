//! The Hugging Face Hub, and Python for what is fetched without it.

use std::{
    net::{TcpStream, ToSocketAddrs as _},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde::Serialize;

use super::Check;
use crate::env;

/// How long the Hub may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Access to the Hub.
#[derive(Debug, Serialize)]
pub(super) struct Hub {
    endpoint: String,
    /// The proxy's host and port, where one is used.
    proxy: Option<String>,
    offline: bool,
    /// Whether the server (or the proxy) takes a connection; not tried when offline.
    pub(super) reachable: Option<bool>,
    /// Whether there is an access token. It is not shown.
    token: bool,
}

impl Hub {
    pub(super) fn look() -> Self {
        let options = env::hub_options();
        let proxy = options.proxy.as_deref().and_then(authority);
        let asked = proxy.clone().or_else(|| authority(&options.endpoint));
        let reachable = (!options.offline).then(|| asked.is_some_and(|address| connects(&address)));
        // An endpoint may carry a password as a proxy does: only its host is shown then.
        let endpoint = if options.endpoint.contains('@') { authority(&options.endpoint) } else { None };
        Self {
            endpoint: endpoint.unwrap_or(options.endpoint),
            proxy,
            offline: options.offline,
            reachable,
            token: options.token.is_some(),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let through = self.proxy.as_ref().map_or(String::new(), |proxy| format!(" through {proxy}"));
        let hub = match self.reachable {
            None => Check::info("hub", format!("{}: offline (HF_HUB_OFFLINE), models come from the cache alone", self.endpoint)),
            Some(true) => Check::ok("hub", format!("{}{through} takes connections", self.endpoint)),
            Some(false) => Check::missing(
                "hub",
                format!("{}{through} takes no connection", self.endpoint),
                "check the network, set HTTPS_PROXY, or set HF_ENDPOINT to a mirror; folders and .gguf files need no Hub",
            ),
        };
        let token = if self.token {
            Check::ok("token", "set")
        } else {
            Check::info(
                "token",
                "none: public models need none; set HF_TOKEN (https://huggingface.co/settings/tokens) for others",
            )
        };
        vec![hub, token]
    }
}

/// `host:port` of a URL.
fn authority(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let host = rest.split(['/', '?', '#']).next()?.rsplit('@').next()?;
    if host.is_empty() {
        return None;
    }
    let has_port =
        host.rsplit_once(':').is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()));
    let port = if scheme == "https" { 443 } else { 80 };
    Some(if has_port { host.to_owned() } else { format!("{host}:{port}") })
}

/// Whether something listens there. Names are resolved in a thread, since that has no time limit of its own.
fn connects(address: &str) -> bool {
    let (send, receive) = mpsc::channel();
    let address = address.to_owned();
    thread::spawn(move || {
        let found = address.to_socket_addrs().ok().and_then(|mut found| found.next());
        // The receiver may have gone: the answer came too late.
        let _ = send.send(found.is_some_and(|address| TcpStream::connect_timeout(&address, PATIENCE).is_ok()));
    });
    receive.recv_timeout(PATIENCE).unwrap_or(false)
}

/// Python with pip, from which `nibble quickstart` can take its model where the Hub is not reached.
#[derive(Debug, Serialize)]
pub(super) struct Python {
    version: Option<String>,
    pip: Option<String>,
}

impl Python {
    pub(super) fn look() -> Self {
        let version = first_line("python3", &["--version"]);
        let pip = version.as_ref().and_then(|_| first_line("python3", &["-m", "pip", "--version"]));
        // `pip 24.0 from /usr/lib/... (python 3.12)`: the place is of no use here.
        let pip = pip.map(|text| text.split(" from ").next().unwrap_or_default().to_owned());
        Self { version, pip }
    }

    pub(super) fn check(&self, hub: Option<bool>) -> Check {
        match (&self.version, &self.pip) {
            (Some(version), Some(pip)) => {
                Check::ok("python", format!("{version}, {pip}: quickstart may use it where the Hub is not reached"))
            }
            (version, _) => {
                let found = version.as_ref().map_or("no python3".to_owned(), |version| format!("{version} without pip"));
                if hub == Some(true) {
                    return Check::info("python", format!("{found}: not needed, the Hub is reached"));
                }
                let fix =
                    "install python3 with pip (apt install python3-pip); or `nibble quickstart --offline`, which needs neither";
                Check::missing("python", found, fix)
            }
        }
    }
}

fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().filter(|_| output.status.success()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_off_a_url_without_its_password() {
        let of = |url| authority(url).unwrap_or_default();
        assert_eq!(of("https://huggingface.co"), "huggingface.co:443");
        assert_eq!(of("http://127.0.0.1:8080/mirror?x"), "127.0.0.1:8080");
        assert_eq!(of("http://user:secret@proxy.example:3128"), "proxy.example:3128");
        assert_eq!(of("proxy:3128"), "proxy:3128");
        assert_eq!(of("http://[::1]"), "[::1]:80");
        assert_eq!(authority("https://"), None);
    }

    #[test]
    fn a_closed_port_takes_no_connection_and_an_open_one_does() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        assert!(connects(&address));
        drop(listener);
        assert!(!connects(&address));
    }

    #[test]
    fn the_token_and_the_proxys_password_are_in_no_output() {
        let hub = Hub {
            endpoint: "https://hub".into(),
            proxy: authority("http://user:secret@proxy:3128"),
            offline: false,
            reachable: Some(false),
            token: true,
        };
        let text = format!("{} {:?}", serde_json::to_string(&hub).unwrap(), hub.checks());
        assert!(!text.contains("secret"), "{text}");
        assert!(text.contains("\"token\":true"), "{text}");
    }
}
