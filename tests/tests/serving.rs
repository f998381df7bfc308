//! The real server with its embedded model on a free port, and the real command line beside it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_path_buf()
}

/// The binary that `tests/run.sh` builds before it runs the tests.
fn binary() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let path = target.join("release/butterflyvit");
    assert!(path.exists(), "{} is missing: cargo build --release", path.display());
    path
}

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start() -> Self {
        let child = Command::new(binary())
            .args(["--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let mut server = Self { child, address: String::new() };
        let (sender, lines) = std::sync::mpsc::channel();
        for output in [
            Box::new(server.child.stdout.take().unwrap()) as Box<dyn Read + Send>,
            Box::new(server.child.stderr.take().unwrap()),
        ] {
            let sender = sender.clone();
            // Read to the end, so that the server never blocks on a full pipe.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    drop(sender.send(line));
                }
            });
        }
        loop {
            let line = lines.recv_timeout(Duration::from_secs(60)).expect("the server says where it listens");
            if let Some((_, address)) = line.split_once("listening address=") {
                server.address = address.trim().to_owned();
            }
            if line.contains(" ready ") {
                return server;
            }
        }
    }

    fn send(&self, head: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(stream, "{head}\r\nHost: test\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        (head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status"), body.to_owned())
    }

    fn classify(&self, body: &[u8]) -> (u16, Value) {
        let (status, body) = self.send("POST /classify HTTP/1.1", body);
        (status, serde_json::from_str(&body).expect("JSON"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn image(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/images").join(name)).unwrap()
}

fn images() -> Vec<String> {
    let labels: Value = serde_json::from_slice(&image("labels.json")).unwrap();
    labels.as_object().unwrap().keys().cloned().collect()
}

#[test]
fn http_and_command_line_give_the_same_labels() {
    let server = Server::start();
    for name in images() {
        let (status, answer) = server.classify(&image(&name));
        assert_eq!(status, 200, "{name}: {answer}");
        let served = answer["predictions"][0]["label"].as_str().unwrap().to_owned();
        let output =
            Command::new(binary()).arg("classify").arg(root().join("tests/images").join(&name)).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let first = text.lines().find(|line| line.contains('%')).unwrap_or_else(|| panic!("{name}: {text}"));
        assert_eq!(first.split_whitespace().last(), Some(served.as_str()), "{name}");
    }
}

#[test]
fn bad_requests_get_their_status_and_a_flat_error() {
    let server = Server::start();
    let truncated = &image("test-00.jpg")[..600];
    let cases: [(&str, &[u8], u16); 7] = [
        ("POST /classify HTTP/1.1", b"", 400),
        ("POST /classify HTTP/1.1", b"this is text, not an image", 415),
        ("POST /classify HTTP/1.1", truncated, 422),
        ("POST /classify HTTP/1.1\r\nContent-Type: application/json", b"{\"inputs\": 7}", 400),
        ("POST /classify/no-such-set HTTP/1.1", &image("test-00.png"), 404),
        ("GET /no/such/route HTTP/1.1", b"", 404),
        ("DELETE /classify HTTP/1.1", b"", 405),
    ];
    for (head, body, expected) in cases {
        let (status, body) = server.send(head, body);
        assert_eq!(status, expected, "{head}: {body}");
        let body: Value = serde_json::from_str(&body).expect("errors are JSON");
        assert!(body["error"].is_string() && body["error_type"].is_string(), "{head}: {body}");
    }
    assert_eq!(server.classify(&image("test-00.png")).0, 200, "the server still serves");
}

#[test]
fn health_and_metrics_answer_from_the_start() {
    let server = Server::start();
    assert_eq!(server.send("GET /health HTTP/1.1", b"").0, 200);
    assert_eq!(server.send("GET /v2/health/ready HTTP/1.1", b"").0, 200);
    let (status, metrics) = server.send("GET /metrics HTTP/1.1", b"");
    assert_eq!(status, 200);
    for name in ["bvit_memory_budget_bytes", "bvit_request_duration_seconds", "bvit_queue_depth", "bvit_build_info"] {
        assert!(metrics.contains(name), "{name} is missing");
    }
}

#[test]
fn a_wrong_start_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("expert-sets")).unwrap();
    std::fs::create_dir_all(folder.path().join("backbones")).unwrap();
    std::fs::write(folder.path().join("backbones/broken.safetensors"), b"not an artifact").unwrap();
    let output =
        Command::new(binary()).args(["--listen", "127.0.0.1:0", "--model-store"]).arg(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("broken.safetensors"));
}
