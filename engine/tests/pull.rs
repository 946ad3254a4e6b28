//! `edgellm pull` against a server on this machine that speaks a hub's routes, well and badly.

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use support::{BINARY, assert_error, assert_success, text};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as the server saw it: headers with lower-case names.
#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

/// What the server answers.
#[derive(Debug, Clone, Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body after which the connection is cut.
    cut_after: Option<usize>,
}

impl Answer {
    fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// `bytes`, or the range of them that `request` asks for.
    fn bytes(bytes: &[u8], request: &Request) -> Self {
        let range = request.headers.get("range");
        let start = range.map(|range| {
            let start = range.trim_start_matches("bytes=").trim_end_matches('-');
            start.parse::<usize>().expect("a start")
        });
        let mut answer = match start {
            None => Self::status(200),
            Some(start) => Self::status(206).header(
                "Content-Range",
                format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()),
            ),
        };
        answer.body = bytes[start.unwrap_or(0)..].to_vec();
        answer
    }
}

/// A server that answers with a function and remembers what it was asked.
struct Server {
    url: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(answer: impl Fn(&Request) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let log: Arc<Mutex<Vec<Request>>> = Arc::default();
        let seen = Arc::clone(&log);
        // Ends with the process of the tests.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is no fault of the server.
                let _ = serve(stream, &answer, &seen);
            }
        });
        Self { url, log }
    }

    fn requests(&self) -> Vec<Request> {
        self.log.lock().expect("not poisoned").clone()
    }
}

fn serve(
    mut stream: TcpStream,
    answer: &impl Fn(&Request) -> Answer,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(());
    };
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let request = Request {
        method,
        path,
        headers,
    };
    log.lock().expect("not poisoned").push(request.clone());
    let answer = answer(&request);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", answer.body.len());
    stream.write_all(head.as_bytes())?;
    if request.method != "HEAD" {
        let end = answer.cut_after.unwrap_or(usize::MAX);
        stream.write_all(&answer.body[..end.min(answer.body.len())])?;
    }
    stream.flush()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// A weights file of a few hundred kilobytes.
fn weights() -> Vec<u8> {
    (0..300_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// The answer to the listing of `files`.
fn listing(files: &[&str]) -> Answer {
    let siblings: Vec<String> = files
        .iter()
        .map(|file| format!("{{\"rfilename\": {}}}", serde_json::json!(file)))
        .collect();
    let mut answer = Answer::status(200);
    answer.body = format!(
        "{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}",
        siblings.join(", ")
    )
    .into();
    answer
}

/// A large file's answer on the hub itself: a redirect to `to` with its hash and size.
fn linked(bytes: &[u8], hash: &str, to: &str) -> Answer {
    Answer::status(302)
        .header("Location", to)
        .header("X-Linked-Etag", format!("\"{hash}\""))
        .header("X-Linked-Size", bytes.len().to_string())
        .header("X-Repo-Commit", COMMIT)
}

/// `edgellm pull NAME --into FOLDER` with the hub at `url`.
fn pull(url: &str, name: &str, into: &Path) -> Output {
    let home = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(BINARY);
    for proxy in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(proxy).env_remove(proxy.to_uppercase());
    }
    command
        .args(["pull", name, "--into"])
        .arg(into)
        .env("HF_ENDPOINT", url)
        .env("HF_TOKEN", "secret")
        .env("HF_HOME", home.path())
        .output()
        .expect("started")
}

/// Names of the files in a folder, sorted.
fn files(folder: &TempDir) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder.path())
        .expect("listed")
        .map(|entry| {
            entry
                .expect("listed")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

/// A hub with one large file `m.gguf` whose bytes `send` answers with.
fn hub_of_one(send: impl Fn(&Request) -> Answer + Send + 'static) -> Server {
    Server::start(move |request| match &*request.path {
        "/api/models/o/r/revision/main" => listing(&["README.md", "m.gguf"]),
        "/bytes" => send(request),
        _ => linked(&weights(), &sha256(&weights()), "/bytes"),
    })
}

#[test]
fn a_repository_arrives_whole_and_the_token_stays_with_the_hub() {
    let store = Server::start(|request| Answer::bytes(&weights(), request));
    let elsewhere = format!("{}/blob", store.url);
    // What `git hash-object` says of the two bytes `{}`.
    let config_hash = "9e26dfeeb6e641a33dae4961196235bdb965b21b";
    let hub = Server::start(move |request| {
        let file = request
            .path
            .strip_prefix(&format!("/o/r/resolve/{COMMIT}/"));
        match (file, &*request.path) {
            (_, "/api/models/o/r/revision/main") => listing(&[
                ".gitattributes",
                "config.json",
                "model.safetensors",
                "pytorch_model.bin",
            ]),
            (Some("model.safetensors"), _) => linked(&weights(), &sha256(&weights()), &elsewhere),
            // The hub keeps small files at another address of its own.
            (Some("config.json"), _) => {
                Answer::status(307).header("Location", "/api/resolve-cache/config.json")
            }
            (_, "/api/resolve-cache/config.json") => Answer::bytes(b"{}", request)
                .header("ETag", format!("\"{config_hash}\""))
                .header("X-Repo-Commit", COMMIT),
            _ => Answer::status(404),
        }
    });
    let folder = folder();
    let output = pull(&hub.url, "hf:o/r", folder.path());
    assert_success(&output);
    assert_eq!(
        text(&output.stdout).trim_end(),
        folder.path().to_str().expect("UTF-8")
    );
    assert_eq!(files(&folder), ["config.json", "model.safetensors"]);
    let read = |name| std::fs::read(folder.path().join(name)).expect("read");
    assert_eq!(read("config.json"), b"{}");
    assert!(read("model.safetensors") == weights());
    for request in hub.requests() {
        let token = request.headers.get("authorization");
        assert_eq!(
            token.map(String::as_str),
            Some("Bearer secret"),
            "{request:?}"
        );
    }
    let elsewhere = store.requests();
    assert!(!elsewhere.is_empty());
    for request in &elsewhere {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
    }

    // Again: everything is here, nothing is transferred.
    let output = pull(&hub.url, "hf:o/r", folder.path());
    assert_success(&output);
    assert_eq!(text(&output.stderr).matches("already here").count(), 2);
    assert_eq!(store.requests().len(), elsewhere.len());
}

#[test]
fn a_cut_transfer_goes_on_where_it_was() {
    let hub = hub_of_one(|request| {
        let mut answer = Answer::bytes(&weights(), request);
        answer.cut_after = Some(70_000);
        answer
    });
    let folder = folder();
    let output = pull(&hub.url, "hf:o/r", folder.path());
    assert_success(&output);
    let path = folder.path().join("m.gguf");
    assert_eq!(
        text(&output.stdout).trim_end(),
        path.to_str().expect("UTF-8")
    );
    assert!(std::fs::read(&path).expect("read") == weights());
    assert_eq!(files(&folder), ["m.gguf"]);
    let bytes = hub
        .requests()
        .into_iter()
        .filter(|request| request.path == "/bytes");
    let ranges: Vec<String> = bytes
        .filter(|request| request.method == "GET")
        .map(|request| request.headers.get("range").cloned().unwrap_or_default())
        .collect();
    let expected = [
        "",
        "bytes=70000-",
        "bytes=140000-",
        "bytes=210000-",
        "bytes=280000-",
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn a_transfer_that_stays_cut_is_kept_for_the_next_command() {
    let hub = hub_of_one(|request| match request.headers.contains_key("range") {
        true => Answer::status(503),
        false => {
            let mut answer = Answer::bytes(&weights(), request);
            answer.cut_after = Some(100_000);
            answer
        }
    });
    let folder = folder();
    let output = pull(&hub.url, "hf:o/r", folder.path());
    assert_error(&output, 1, "100000 of 300000 bytes are kept");
    let left = files(&folder);
    assert!(left.len() == 1 && left[0].ends_with(".part"), "{left:?}");

    let better = hub_of_one(|request| Answer::bytes(&weights(), request));
    assert_success(&pull(&better.url, "hf:o/r", folder.path()));
    assert!(std::fs::read(folder.path().join("m.gguf")).expect("read") == weights());
    assert_eq!(files(&folder), ["m.gguf"]);
    let last = better.requests().pop().expect("a request");
    assert_eq!(last.headers["range"], "bytes=100000-");
}

#[test]
fn a_server_without_ranges_sends_all_of_it_again() {
    let hub = hub_of_one(|request| {
        let mut answer = Answer::status(200);
        answer.body = weights();
        answer.cut_after = (!request.headers.contains_key("range")).then_some(50_000);
        answer
    });
    let folder = folder();
    assert_success(&pull(&hub.url, "hf:o/r", folder.path()));
    assert!(std::fs::read(folder.path().join("m.gguf")).expect("read") == weights());

    let liar = hub_of_one(|request| {
        let mut answer = Answer::bytes(&weights(), request);
        match request.headers.contains_key("range") {
            true => answer.headers = vec![("Content-Range", "bytes 0-299999/300000".into())],
            false => answer.cut_after = Some(50_000),
        }
        answer
    });
    // It says that it starts over and does not: the hash tells.
    let folder = self::folder();
    let output = pull(&liar.url, "hf:o/r", folder.path());
    assert_eq!(output.status.code(), Some(1));
    assert!(!folder.path().join("m.gguf").exists());
}

#[test]
fn a_wrong_hash_is_refused_and_nothing_is_left() {
    let mut wrong = weights();
    wrong[123_456] ^= 1;
    let hub = hub_of_one(move |request| Answer::bytes(&wrong, request));
    let folder = folder();
    assert_error(&pull(&hub.url, "hf:o/r", folder.path()), 1, "its hash is");
    assert!(files(&folder).is_empty());

    // A small file, with git's hash.
    let small = Server::start(|request| match &*request.path {
        "/api/models/o/r/revision/main" => listing(&["m.gguf"]),
        _ => Answer::bytes(b"{]", request)
            .header("ETag", "\"9e26dfeeb6e641a33dae4961196235bdb965b21b\""),
    });
    assert_error(&pull(&small.url, "hf:o/r", folder.path()), 1, "its hash is");
    assert!(files(&folder).is_empty());
}

#[test]
fn refusals_are_told_apart() {
    let folder = folder();
    for (status, code, expected) in [
        (401, 2, "HF_TOKEN"),
        (403, 2, "licence"),
        (404, 2, "check the name"),
        (418, 1, "418"),
    ] {
        let hub = Server::start(move |_| Answer::status(status));
        assert_error(&pull(&hub.url, "hf:o/r", folder.path()), code, expected);
        // The listing is there, the file is not.
        let hub = Server::start(move |request| match request.path.starts_with("/api/") {
            true => listing(&["m.gguf"]),
            false => Answer::status(status),
        });
        assert_error(&pull(&hub.url, "hf:o/r", folder.path()), code, expected);
    }
    let hub = Server::start(|request| match request.path.starts_with("/api/") {
        true => listing(&["m.gguf"]),
        false => Answer::status(429).header("Retry-After", "100000"),
    });
    assert_error(
        &pull(&hub.url, "hf:o/r", folder.path()),
        1,
        "too many requests",
    );
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", nobody.local_addr().expect("an address"));
    drop(nobody);
    assert_error(&pull(&url, "hf:o/r", folder.path()), 1, "cannot reach");
    assert!(files(&folder).is_empty());
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    let asked = Mutex::new(0);
    let hub = hub_of_one(move |request| {
        let mut asked = asked.lock().expect("not poisoned");
        *asked += 1;
        match *asked {
            1 => Answer::status(429).header("Retry-After", "0"),
            2 => Answer::status(503),
            _ => Answer::bytes(&weights(), request),
        }
    });
    let folder = folder();
    assert_success(&pull(&hub.url, "hf:o/r", folder.path()));
    assert_eq!(files(&folder), ["m.gguf"]);
}

#[test]
fn names_that_lead_elsewhere_write_nothing() {
    let outer = folder();
    let inner = outer.path().join("inner");
    for evil in [
        "../evil.safetensors",
        "a/../../evil.safetensors",
        "..\\evil.safetensors",
    ] {
        let hub = Server::start(move |request| match request.path.starts_with("/api/") {
            true => listing(&["config.json", "model.safetensors", evil]),
            false => Answer::bytes(b"{}", request),
        });
        assert_error(&pull(&hub.url, "hf:o/r", &inner), 2, "no name for a file");
        assert!(files(&outer).is_empty(), "{:?}", files(&outer));
    }
    let commit = Server::start(|_| {
        let mut answer = Answer::status(200);
        answer.body = br#"{"sha": "../../x", "siblings": [{"rfilename": "m.gguf"}]}"#.to_vec();
        answer
    });
    assert_error(&pull(&commit.url, "hf:o/r", &inner), 1, "commit");
    for name in ["hf:o", "hf:../r", "hf:o/r:../m.gguf", "no-such-model"] {
        let output = pull(&commit.url, name, &inner);
        assert_eq!(output.status.code(), Some(2), "{name}");
    }
    assert!(files(&outer).is_empty());
}

#[test]
fn a_choice_of_files_is_left_to_the_user() {
    let hub = Server::start(|request| match &*request.path {
        "/api/models/o/r/revision/v1" | "/api/models/o/r/revision/main" => {
            listing(&["a.gguf", "b.gguf"])
        }
        _ => Answer::bytes(b"GGUF", request),
    });
    let folder = folder();
    assert_error(&pull(&hub.url, "hf:o/r", folder.path()), 2, "a.gguf");
    assert_error(
        &pull(&hub.url, "hf:o/r:c.gguf", folder.path()),
        2,
        "no file c.gguf",
    );
    // Without a hash from the hub, that is said.
    let output = pull(&hub.url, "hf:o/r@v1:b.gguf", folder.path());
    assert_success(&output);
    assert!(
        text(&output.stderr).contains("no hash"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(files(&folder), ["b.gguf"]);
}

#[test]
fn the_catalogue_is_shown() {
    let output = Command::new(BINARY)
        .args(["pull", "--list"])
        .output()
        .expect("started");
    assert_success(&output);
    let list = text(&output.stdout);
    assert!(
        list.starts_with("smollm2-135m-instruct ") && list.contains("Apache-2.0"),
        "{list}"
    );
}
