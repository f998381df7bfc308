//! The log: whoever reads it, and whatever clients do, it neither stops the server nor grows with what they send.

use std::thread;
use std::time::{Duration, Instant};

use system_tests::server::{Answer, Reader, Server, image, request_head, wait_until};

const LIVE: &[u8] = b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n";

/// So many requests, one after the other, each of which is a line of the log at `--log debug`.
fn ask(server: &Server, requests: usize) {
    let mut connection = server.connect();
    for i in 0..requests {
        assert_eq!(connection.send(LIVE).read_one().0, 200, "request {i}");
    }
}

#[test]
fn a_reader_of_the_log_that_stands_still_stops_nothing() {
    let mut server = Server::start(["--log", "butterflyvit=debug"]);
    server.set_reader(Reader::StandsStill);
    let start = Instant::now();
    while server.metric("bvit_log_lines_lost_total") == 0.0 {
        assert!(start.elapsed() < Duration::from_secs(60), "the pipe does not fill");
        ask(&server, 1000);
    }
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
    assert_eq!(server.get("/health").status, 200);
    server.set_reader(Reader::Reads);
    server.wait_for_log("log lines were lost");

    server.set_reader(Reader::StandsStill);
    let lost = server.metric("bvit_log_lines_lost_total");
    while server.metric("bvit_log_lines_lost_total") == lost {
        ask(&server, 1000);
    }
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0), "SIGTERM ends it");
}

#[test]
fn a_closed_log_stops_nothing() {
    let mut server = Server::start(["--log", "butterflyvit=debug"]);
    server.set_reader(Reader::Closes);
    ask(&server, 100);
    wait_until("lines are lost", || server.metric("bvit_log_lines_lost_total") > 0.0);
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn what_clients_write_is_cut_before_it_is_repeated() {
    let mut server = Server::start(["--log", "butterflyvit=debug"]);
    let long = "x".repeat(30_000);
    let json =
        |path: &str, body: String| Answer::of(server.post(path).header("content-type", "application/json").body(body));
    let answers = [
        server.get(&format!("/{long}")),
        server.get(&format!("/sets/{long}")),
        server.get(&format!("/v2/models/{long}")),
        Answer::of(server.request(&long[..20_000], "/classify")),
        Answer::of(server.post(&format!("/classify?top_k={long}")).body("x")),
        Answer::of(server.post(&format!("/classify?{long}=1")).body("x")),
        Answer::of(server.post(&format!("/classify/{long}")).body(image("test-00.png"))),
        Answer::of(server.post(&format!("/hf/{long}")).body(image("test-00.png"))),
        Answer::of(server.post("/classify").header("content-type", long.as_str()).body("x")),
        Answer::of(server.post("/classify").header("content-encoding", long.as_str()).body("x")),
        Answer::of(server.request("PUT", &format!("/sets/{long}/1")).body("x")),
        Answer::of(server.request("PUT", &format!("/sets/a/{long}")).body("x")),
        json("/classify", format!(r#"{{"inputs":"aGk=","model":"{long}"}}"#)),
        json("/classify", format!(r#"{{"{long}":1}}"#)),
        json("/classify", format!(r#"{{"inputs":"aGk=","parameters":{{"{long}":1}}}}"#)),
        json("/v2/models/cifar100/infer", format!(r#"{{"inputs":[{{"name":"{long}","datatype":"U","shape":[1]}}]}}"#)),
        json(
            "/v2/models/cifar100/infer",
            format!(r#"{{"inputs":[{{"name":"image","datatype":"{long}","shape":[1]}}]}}"#),
        ),
        json("/v2/models/cifar100/infer", format!(r#"{{"id":"{long}","inputs":[]}}"#)),
    ];
    for (i, answer) in answers.iter().enumerate() {
        assert!((400..500).contains(&answer.status), "{i}: {}", answer.status);
        assert!(answer.text.len() < 1000, "{i}: {}", answer.text);
    }
    server.signal("TERM");
    server.wait();
    for line in server.log_to_end() {
        assert!(line.len() < 1000, "{line}");
    }
}

#[test]
fn repeated_refusals_are_a_line_a_second_with_a_count() {
    const REQUESTS: u64 = 3000;
    let mut server = Server::start([] as [&str; 0]);
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut connection = server.connect();
                for _ in 0..REQUESTS / 3 {
                    assert_eq!(connection.send(&request_head("POST /classify", 4)).send(b"junk").read_one().0, 415);
                }
            });
        }
    });
    server.signal("TERM");
    server.wait();
    let seconds = start.elapsed().as_secs();
    let log = server.log_to_end();
    let lines: Vec<&String> = log.iter().filter(|line| line.contains("unsupported_media_type")).collect();
    let repeated = |line: &String| -> u64 {
        line.split_once("repeated=").and_then(|(_, count)| count.trim().parse().ok()).expect(line)
    };
    let written = lines.iter().filter(|line| line.contains("request refused")).count() as u64;
    let counted: u64 = lines.iter().map(|line| repeated(line)).sum();
    assert_eq!(written + counted, REQUESTS, "{lines:#?}");
    // One at once, one after each second, and one at the end.
    assert!(lines.len() as u64 <= seconds + 2, "{} lines in {seconds} s", lines.len());
}
