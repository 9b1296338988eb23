//! The Hub's client against a server on this machine.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nibble_model::Error;
use nibble_model::config::ModelConfig;
use nibble_model::error::HubProblem;
use nibble_model::files::{Checkpoint, Fetched, Hub, HubOptions, ModelName};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server knows and saw.
#[derive(Default)]
struct State {
    /// Content by file name.
    files: BTreeMap<String, Vec<u8>>,
    /// Files that are redirected to another origin, as large files are.
    large: Vec<String>,
    /// The status and `X-Error-Code` of every answer, where the model is not to be had.
    refuse: Option<(u16, &'static str)>,
    /// Ends the next body early.
    cut_next: bool,
    /// The commit, where it is not `COMMIT`.
    commit: Option<String>,
    /// `METHOD path` of each request, with its `Range`, and whether it had the token.
    seen: Vec<(String, bool)>,
}

struct Server {
    state: Arc<Mutex<State>>,
    endpoint: String,
}

impl Server {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let (listener, store) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let store_url = format!("http://{}", store.local_addr().unwrap());
        let files = files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        for listener in [listener, store] {
            let (state, store_url) = (state.clone(), store_url.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let (state, store_url) = (state.clone(), store_url.clone());
                    std::thread::spawn(move || serve(&stream.unwrap(), &state, &store_url));
                }
            });
        }
        Self { state, endpoint }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn seen(&self) -> Vec<(String, bool)> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>, store: &str) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let (mut range, mut token, mut head) = (None, false, None);
    for line in lines.take_while(|line| !line.is_empty()) {
        let line = line.to_ascii_lowercase();
        token |= line == "authorization: bearer secret";
        head = head.or_else(|| line.strip_prefix("range: bytes=0-")?.parse::<usize>().ok());
        range = range.or_else(|| line.strip_prefix("range: bytes=")?.trim_end_matches('-').parse::<usize>().ok());
    }
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let mut state = state.lock().unwrap();
    let asked = range.map_or_else(|| format!("{method} {path}"), |start| format!("{method} {path} from {start}"));
    state.seen.push((asked, token));
    let mut answer = answer(&mut state, path, range, store);
    if let Some(last) = head.filter(|last| method == "GET" && *last + 1 < answer.1.len()) {
        answer.1.truncate(last + 1);
        let length = answer.1.len();
        answer.0 = format!("HTTP/1.1 206 Partial\r\ncontent-length: {length}\r\n");
    }
    let body = if method == "HEAD" { &[][..] } else { &answer.1[..] };
    answer.0.push_str("connection: close\r\n\r\n");
    let mut stream = stream;
    let _ = stream.write_all(answer.0.as_bytes()).and_then(|()| stream.write_all(body));
}

fn answer(state: &mut State, path: &str, range: Option<usize>, store: &str) -> (String, Vec<u8>) {
    if let Some((status, code)) = state.refuse {
        return (format!("HTTP/1.1 {status} No\r\nx-error-code: {code}\r\ncontent-length: 0\r\n"), Vec::new());
    }
    let commit = state.commit.clone().unwrap_or_else(|| COMMIT.to_owned());
    if path.starts_with("/api/models/org/name/revision/") {
        let names: Vec<_> = state.files.keys().map(|name| format!(r#"{{"rfilename":"{name}"}}"#)).collect();
        let body = format!(r#"{{"sha":"{commit}","siblings":[{}]}}"#, names.join(",")).into_bytes();
        return (format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", body.len()), body);
    }
    let name = path.rsplit_once(&format!("/{COMMIT}/")).or_else(|| path.rsplit_once("/store/")).unwrap().1.to_owned();
    let content = &state.files[&name];
    if path.starts_with("/org/") && state.large.contains(&name) {
        let length = content.len();
        let headers = format!("x-linked-etag: \"sha-{name}\"\r\nx-linked-size: {length}\r\nlocation: {store}/store/{name}\r\n");
        return (format!("HTTP/1.1 302 Found\r\ncontent-length: 0\r\n{headers}"), Vec::new());
    }
    let start = range.unwrap_or(0);
    let status = if start > 0 { "206 Partial" } else { "200 OK" };
    let mut body = content[start..].to_vec();
    let length = body.len();
    if std::mem::take(&mut state.cut_next) {
        body.truncate(length / 2);
    }
    let tag = name.replace('/', "-");
    (format!("HTTP/1.1 {status}\r\netag: W/\"tag-{tag}\"\r\ncontent-length: {length}\r\n"), body)
}

fn options(endpoint: &str, cache: &Path) -> HubOptions {
    HubOptions {
        cache_dir: cache.to_owned(),
        endpoint: endpoint.to_owned(),
        token: Some("secret".to_owned()),
        offline: false,
        user_agent: "test".to_owned(),
        proxy: None,
    }
}

fn fetch(options: HubOptions, model: &str) -> Result<Fetched, Error> {
    Hub::new(options).unwrap().fetch(&model.parse::<ModelName>().unwrap(), &mut |_| {})
}

fn problem(result: Result<Fetched, Error>) -> HubProblem {
    match result {
        Err(Error::Hub { problem, .. }) => problem,
        other => panic!("expected a refusal, found {other:?}"),
    }
}

const FILES: [(&str, &[u8]); 7] = [
    ("config.json", b"{}"),
    ("tokenizer.json", b"{ }"),
    ("README.md", b"no"),
    ("onnx/model.onnx", b"no"),
    ("pytorch_model.bin", b"no"),
    ("model.safetensors", b"weights weights weights"),
    ("sub/m.Q4_0.gguf", b"gguf"),
];

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_model_is_fetched_once_and_found_offline() {
    let (server, cache) = (Server::start(&FILES), TempDir::new().unwrap());
    server.set(|state| state.large.push("model.safetensors".to_owned()));
    let hub = Hub::new(options(&server.endpoint, cache.path())).unwrap();
    let mut progress = Vec::new();
    let model: ModelName = "org/name@v1".parse().unwrap();
    let fetched = hub.fetch(&model, &mut |p| progress.push((p.file.to_owned(), p.bytes, p.total))).unwrap();
    assert_eq!((&fetched.commit[..], fetched.from_cache), (COMMIT, false));
    assert_eq!(names(&fetched.path), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(std::fs::read(fetched.path.join("model.safetensors")).unwrap(), FILES[5].1);
    assert_eq!(progress.last().unwrap(), &("model.safetensors".to_owned(), 23, Some(23)));

    // The layout that other tools of the Hub share.
    let repo = cache.path().join("models--org--name");
    assert_eq!(fetched.path, repo.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(repo.join("refs/v1")).unwrap(), COMMIT);
    let link = std::fs::read_link(fetched.path.join("model.safetensors")).unwrap();
    assert_eq!(link, PathBuf::from("../../blobs/sha-model.safetensors"));
    assert_eq!(names(&repo.join("blobs")), ["sha-model.safetensors", "tag-config.json", "tag-tokenizer.json"]);

    // The token goes to the endpoint and not to where it redirects.
    for (asked, token) in server.seen() {
        assert_eq!(token, !asked.contains("/store/"), "{asked}");
    }
    hub.fetch(&model, &mut |_| {}).unwrap();
    assert_eq!(server.seen().len(), 1, "a second fetch asks for the commit alone");
    let offline = || HubOptions { offline: true, ..options("http://127.0.0.1:1", cache.path()) };
    let found = fetch(offline(), "org/name@v1").unwrap();
    assert_eq!((found.path, found.from_cache), (fetched.path.clone(), true));
    assert_eq!(fetch(offline(), &format!("org/name@{COMMIT}")).unwrap().path, fetched.path);
    // Not offline, and nobody answers: what is cached still serves.
    let found = fetch(options("http://127.0.0.1:1", cache.path()), "org/name@v1").unwrap();
    assert!(found.from_cache);
}

/// The config of `content` as a file on the Hub, beside the one of the same file here; and how much of it was fetched.
fn gguf_config(content: &[u8]) -> u64 {
    let (server, cache) = (Server::start(&[("m.gguf", content)]), TempDir::new().unwrap());
    server.set(|state| state.large.push("m.gguf".to_owned()));
    let hub = Hub::new(options(&server.endpoint, cache.path())).unwrap();
    let model: ModelName = "org/name/m.gguf".parse().unwrap();
    let (config, fetched) = hub.fetch_gguf_config(&model).unwrap();
    assert!(server.seen().iter().all(|(asked, token)| *token != asked.contains("/store/")));
    let file = cache.path().join("m.gguf");
    std::fs::write(&file, content).unwrap();
    let whole = Checkpoint::open(&file).unwrap().config().unwrap();
    let sizes = |config: &ModelConfig| (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.tensors().len());
    assert_eq!(sizes(&config), sizes(&whole));
    fetched
}

#[test]
fn the_config_of_a_gguf_file_is_read_from_its_beginning() {
    const MIB: usize = 1 << 20;
    let mut file = common::model("llama").build(3);
    assert_eq!(gguf_config(&file), file.len() as u64);
    // Weights that are not fetched.
    file.resize(9 * MIB, 0);
    assert_eq!(gguf_config(&file), 8 << 20);
    // A header that is longer than what is asked for first.
    let mut file = common::model("llama").string("general.description", &"x".repeat(9 * MIB)).build(3);
    file.resize(40 * MIB, 0);
    assert_eq!(gguf_config(&file), 32 << 20);
}

#[test]
fn a_header_on_the_hub_that_is_none_is_refused() {
    let (server, cache) = (Server::start(&FILES), TempDir::new().unwrap());
    let hub = Hub::new(options(&server.endpoint, cache.path())).unwrap();
    for content in [&b"not a header"[..], &common::model("llama").build(3)[..100]] {
        server.set(|state| drop(state.files.insert("sub/m.Q4_0.gguf".to_owned(), content.to_vec())));
        let error = hub.fetch_gguf_config(&"org/name/sub/m.Q4_0.gguf".parse().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Gguf { .. }), "{error}");
    }
}

#[test]
fn one_named_gguf_file_is_fetched_alone() {
    let (server, cache) = (Server::start(&FILES), TempDir::new().unwrap());
    let fetched = fetch(options(&server.endpoint, cache.path()), "org/name/sub/m.Q4_0.gguf").unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), b"gguf");
    assert!(fetched.path.ends_with("sub/m.Q4_0.gguf"));
    let missing = problem(fetch(options(&server.endpoint, cache.path()), "org/name/other.gguf"));
    assert!(matches!(missing, HubProblem::NotFound { what: "file", .. }));
}

#[test]
fn a_download_that_was_cut_is_resumed() {
    let (server, cache) = (Server::start(&FILES), TempDir::new().unwrap());
    let options = || options(&server.endpoint, cache.path());
    server.set(|state| state.files.retain(|name, _| name == "model.safetensors" || name == "config.json"));
    fetch(options(), "org/name").unwrap();
    std::fs::remove_dir_all(cache.path().join("models--org--name")).unwrap();
    server.set(|state| {
        state.files.remove("config.json");
        state.large.push("model.safetensors".to_owned());
        state.seen.clear();
    });
    // The API and the HEAD answers have bodies of their own; cut the content alone.
    let hub = Hub::new(options()).unwrap();
    let model: ModelName = "org/name".parse().unwrap();
    let mut armed = false;
    let cut = hub.fetch(&model, &mut |_| {
        if !std::mem::replace(&mut armed, true) {
            server.set(|state| state.cut_next = true);
        }
    });
    assert_eq!(problem(cut), HubProblem::Cut { file: "model.safetensors".into(), expected: 23, found: 11 });
    server.seen();
    let fetched = hub.fetch(&model, &mut |_| {}).unwrap();
    assert_eq!(std::fs::read(fetched.path.join("model.safetensors")).unwrap(), FILES[5].1);
    assert!(server.seen().iter().any(|(asked, _)| asked == "GET /store/model.safetensors from 11"));
}

#[test]
fn offline_and_not_cached_names_what_is_missing() {
    let (server, cache) = (Server::start(&FILES), TempDir::new().unwrap());
    let offline = || HubOptions { offline: true, ..options(&server.endpoint, cache.path()) };
    let file = |result| match problem(result) {
        HubProblem::Offline { file, .. } => file,
        other => panic!("{other}"),
    };
    assert_eq!(file(fetch(offline(), "org/name")), "config.json");
    let snapshot = cache.path().join("models--org--name/snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    let named = format!("org/name@{COMMIT}");
    assert_eq!(file(fetch(offline(), &named)), "model.safetensors");
    let index = r#"{"weight_map":{"a":"model-00001-of-00002.safetensors"}}"#;
    std::fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(file(fetch(offline(), &named)), "model-00001-of-00002.safetensors");
    assert_eq!(server.seen(), [], "offline sends nothing");
}

#[test]
fn refusals_of_the_server_are_told_apart() {
    let (server, cache) = (Server::start(&FILES), TempDir::new().unwrap());
    let with = |status, code, token: Option<&str>| {
        server.set(|state| state.refuse = Some((status, code)));
        let token = token.map(ToOwned::to_owned);
        problem(fetch(HubOptions { token, ..options(&server.endpoint, cache.path()) }, "org/name"))
    };
    let page = format!("{}/org/name", server.endpoint);
    assert_eq!(with(401, "GatedRepo", None), HubProblem::Denied { status: 401, page: page.clone(), has_token: false });
    assert_eq!(with(403, "GatedRepo", Some("t")), HubProblem::Denied { status: 403, page, has_token: true });
    assert!(matches!(with(404, "RepoNotFound", None), HubProblem::NotFound { what: "repository", .. }));
    assert!(matches!(with(404, "RevisionNotFound", None), HubProblem::NotFound { what: "revision", .. }));
    assert!(matches!(with(503, "", None), HubProblem::Status { status: 503, .. }));
    let unreachable = problem(fetch(options("http://127.0.0.1:1", cache.path()), "org/name"));
    assert!(matches!(unreachable, HubProblem::Network { .. }));
}

#[test]
fn repositories_without_safetensors_say_what_they_have() {
    let (server, cache) = (Server::start(&[FILES[0], FILES[4], FILES[6]]), TempDir::new().unwrap());
    let problem = problem(fetch(options(&server.endpoint, cache.path()), "org/name"));
    assert_eq!(problem, HubProblem::NoWeights { found: vec!["pytorch_model.bin".into(), "sub/m.Q4_0.gguf".into()] });
}

#[test]
fn answers_that_would_leave_the_cache_are_refused() {
    let (server, cache) = (Server::start(&FILES), TempDir::new().unwrap());
    server.set(|state| state.commit = Some("../../x".to_owned()));
    let refused = problem(fetch(options(&server.endpoint, cache.path()), "org/name"));
    assert!(matches!(refused, HubProblem::Answer { expected: "a commit in `sha`", .. }));
    assert_eq!(names(cache.path()).len(), 0);
}

#[test]
fn a_token_is_not_printed() {
    let printed = format!("{:?}", options("http://127.0.0.1:1", Path::new("c")));
    assert!(!printed.contains("secret"), "{printed}");
}
