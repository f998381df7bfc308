//! The real binary on a free port, over plain TCP.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

/// A 1x1 red PNG.
const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC";

struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(flags: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_butterflyvit"))
            .args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json"])
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        let listening = lines.find(|line| line.contains("\"listening\"")).unwrap();
        lines.find(|line| line.contains("\"ready\"")).unwrap();
        let listening: serde_json::Value = serde_json::from_str(&listening).unwrap();
        // The pipe must stay open and be read, or the server's log would block.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, address: listening["address"].as_str().unwrap().to_owned() }
    }

    /// Status, head and body.
    fn send(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> (u16, String, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n")
            .unwrap();
        if !content_type.is_empty() {
            write!(stream, "Content-Type: {content_type}\r\n").unwrap();
        }
        stream.write_all(b"\r\n").unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), head.to_lowercase(), body.to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn png() -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(PNG).unwrap()
}

#[test]
fn every_form_of_input_gets_the_same_labels() {
    let server = Server::start(&[]);
    let labels = |body: &str| serde_json::from_str::<serde_json::Value>(body).unwrap()["predictions"].clone();
    let (status, head, raw) = server.send("POST", "/classify?top_k=3", "", &png());
    assert_eq!(status, 200, "{raw}");
    assert!(head.contains("x-request-id") && head.contains("server-timing") && head.contains("x-expert-set: "));
    assert_eq!(labels(&raw).as_array().unwrap().len(), 3);
    let json = format!(r#"{{"inputs":"{PNG}","parameters":{{"top_k":3}}}}"#);
    assert_eq!(labels(&server.send("POST", "/classify", "application/json", json.as_bytes()).2), labels(&raw));
    assert_eq!(labels(&server.send("PUT", "/classify?top_k=3", "image/png", &png()).2), labels(&raw));
    let mut form = b"--b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"a.png\"\r\n\r\n".to_vec();
    form.extend(png());
    form.extend(b"\r\n--b--\r\n");
    let form = server.send("POST", "/classify?top_k=3", "multipart/form-data; boundary=b", &form);
    assert_eq!(labels(&form.2), labels(&raw));
    let batch = format!(r#"{{"inputs":["{PNG}","bm8="]}}"#);
    let (status, _, batch) = server.send("POST", "/classify?routing=true", "application/json", batch.as_bytes());
    let batch: serde_json::Value = serde_json::from_str(&batch).unwrap();
    assert_eq!(status, 200);
    assert!(batch[0]["routing"]["layers"].is_array());
    assert_eq!(batch[1]["error_type"], "unsupported_media_type");
}

#[test]
fn refusals_follow_the_status_table() {
    let server = Server::start(&["--max-body", "1KiB"]);
    let cases: [(&str, &str, &[u8], u16, &str); 8] = [
        ("POST", "/classify", b"", 400, "empty_body"),
        ("POST", "/classify", b"not an image", 415, "unsupported_media_type"),
        ("POST", "/classify", &[0; 2000], 413, "body_too_large"),
        ("POST", "/classify?top_k=0", b"x", 400, "invalid_request"),
        ("POST", "/classify/unknown", b"x", 404, "set_not_found"),
        ("POST", "/nowhere", b"", 404, "route_not_found"),
        ("GET", "/classify", b"", 405, "method_not_allowed"),
        ("GET", "/sets/unknown", b"", 404, "set_not_found"),
    ];
    for (method, path, body, expected, code) in cases {
        let (status, _, body) = server.send(method, path, "", body);
        let error: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, error["error_type"].as_str()), (expected, Some(code)), "{method} {path}");
        assert!(error["error"].is_string());
    }
    for path in ["/health", "/v2/health/live", "/v2/health/ready", "/sets", "/sets/cifar100"] {
        assert_eq!(server.send("GET", path, "", b"").0, 200, "{path}");
    }
    let (_, _, metrics) = server.send("GET", "/metrics", "", b"");
    assert!(metrics.contains(r#"bvit_request_failures_total{reason="body_too_large"} 1"#));
    assert!(metrics.contains("bvit_sets_resident 1"));
}

#[test]
fn sigterm_drains_and_exits_with_success() {
    let mut server = Server::start(&[]);
    assert!(Command::new("kill").arg(server.process.id().to_string()).status().unwrap().success());
    assert!(server.process.wait().unwrap().success());
}

#[test]
fn what_keeps_it_from_starting_is_one_line_and_exit_code_2() {
    for args in [&["--nonsense"][..], &["--model-store", "/nowhere"], &["--default-set", "unknown"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_butterflyvit")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        let last = stderr.lines().next_back().unwrap();
        assert!(
            last.starts_with("butterflyvit: ") && last.contains(args.last().unwrap().trim_start_matches('-')),
            "{stderr}"
        );
    }
}
