//! Clients that mean no good, or might as well: what they send, how slowly, and how many they are.

use std::cell::Cell;
use std::io::Read;
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

use system_tests::server::{Answer, Connection, Server, binary, image, request_head, wait_until};

/// A probe, which is answered whatever else goes on.
const GOOD: &str = "GET /v2/health/live HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";

fn still_serves(server: &Server) {
    assert_eq!(server.classify(&image("test-00.png")).status, 200, "the server still serves");
}

#[test]
fn malformed_http_is_refused_and_the_connection_closed() {
    let server = Server::start([] as [&str; 0]);
    let long = "x".repeat(100_000);
    let cases = [
        "\r\n\r\n\r\nnonsense\r\n\r\n".to_owned(),
        "GET\r\n\r\n".into(),
        "GET /health\r\n\r\n".into(),
        "GET /health HTTP/9.9\r\n\r\n".into(),
        "GET /health HTTP/1.1\r\nno colon here\r\n\r\n".into(),
        "GET /health HTTP/1.1\r\nHost : spaced\r\n\r\n".into(),
        "GET /health HTTP/1.1\r\nA: b\r\n folded: c\r\n\r\n".into(),
        "GET /health HTTP/1.1\r\nA: \0\r\n\r\n".into(),
        "GET /he\0alth HTTP/1.1\r\nHost: test\r\n\r\n".into(),
        "G\u{e9}T /health HTTP/1.1\r\nHost: test\r\n\r\n".into(),
        format!("GET /{long} HTTP/1.1\r\nHost: test\r\n\r\n"),
        format!("GET /health HTTP/1.1\r\nA: {long}\r\n\r\n"),
        format!("GET /health HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(5000)),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}".into(),
        "POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: -1\r\n\r\n".into(),
        "POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: +4\r\n\r\nabcd".into(),
        "POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 99999999999999999999\r\n\r\n".into(),
    ];
    for case in cases {
        // A second request behind the first must not be answered: who knows where it begins?
        let (status, text) = server.connect().send(case.as_bytes()).send(GOOD.as_bytes()).read();
        let shown = &case[..case.len().min(60)];
        assert!(status == 0 || (400..500).contains(&status), "{shown:?}: {text}");
        assert!(!text.contains(r#""live""#), "{shown:?}: {text}");
    }
    still_serves(&server);
}

/// Two parties that disagree where a request ends let one client's bytes become another's request. So whatever is
/// ambiguous is refused, or ends the connection at its own end.
#[test]
fn no_request_is_smuggled_behind_an_ambiguous_one() {
    let server = Server::start([] as [&str; 0]);
    let post = "POST /v2/health/live HTTP/1.1\r\nHost: test\r\n";
    let chunked = format!("0\r\n\r\n{GOOD}");
    let whole = chunked.len();
    let cases = [
        // The body is empty by chunks and holds a request by length, in either order of the headers.
        format!("{post}Content-Length: {whole}\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}"),
        format!("{post}Transfer-Encoding: chunked\r\nContent-Length: {whole}\r\n\r\n{chunked}"),
        format!("{post}Content-Length: 0\r\nContent-Length: {}\r\n\r\n{GOOD}", GOOD.len()),
        format!("{post}Content-Length: {}\r\nContent-Length: 0\r\n\r\n{GOOD}", GOOD.len()),
        format!("{post}Content-Length: 0, {}\r\n\r\n{GOOD}", GOOD.len()),
        format!("{post}Transfer-Encoding: identity\r\nContent-Length: {whole}\r\n\r\n{chunked}"),
        format!("{post}Transfer-Encoding: xchunked\r\n\r\n{chunked}"),
        format!("{post}Transfer-Encoding: chunked, identity\r\n\r\n{chunked}"),
        format!("{post}Transfer-Encoding : chunked\r\n\r\n{chunked}"),
        format!("{post}Transfer-Encoding:\x0bchunked\r\n\r\n{chunked}"),
        format!("{post}X: y\r\n Transfer-Encoding: chunked\r\n\r\n{chunked}"),
        format!("POST /v2/health/live HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}"),
        // Sizes of chunks that another party would read as something else.
        format!("{post}Transfer-Encoding: chunked\r\n\r\n-0\r\n\r\n{GOOD}"),
        format!("{post}Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n{GOOD}"),
        format!("{post}Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n{GOOD}"),
        format!("{post}Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n{GOOD}"),
    ];
    for case in cases {
        let (_, text) = server.connect().send(case.as_bytes()).read();
        assert!(!text.contains(r#""live""#), "{case:?} was taken for two requests: {text}");
        assert!(text.matches("HTTP/1.1 ").count() <= 1, "{case:?}: {text}");
    }
    // Two requests on one connection are not ambiguous, and both are answered.
    let two = format!("{post}Transfer-Encoding: chunked\r\n\r\n{chunked}");
    let (status, text) = server.connect().send(two.as_bytes()).read();
    assert!(status == 405 && text.contains(r#""live""#), "{text}");
    still_serves(&server);
}

#[test]
fn ten_thousand_connections_leave_those_that_were_there_alone() {
    const CONNECTIONS: usize = 10_000;
    let allowed = rlimit::increase_nofile_limit(CONNECTIONS as u64 + 1000).unwrap();
    assert!(allowed > CONNECTIONS as u64 + 500, "this test needs more open files than {allowed}");
    let server = Server::start(["--max-connections", "64", "--client-share", "100", "--header-timeout", "10m"]);
    let picture = image("test-00.png");
    let classify = |connection: &mut Connection| {
        connection.send(&request_head("POST /classify", picture.len())).send(&picture).read_one()
    };
    let mut early = server.connect();
    assert_eq!(classify(&mut early).0, 200);
    let before = server.memory().0;

    let mut held: Vec<TcpStream> = Vec::with_capacity(CONNECTIONS);
    for i in 0..CONNECTIONS {
        held.push(TcpStream::connect(server.address).unwrap());
        if i % 1000 == 0 {
            let (status, text) = classify(&mut early);
            assert_eq!(status, 200, "with {i} others: {text}");
        }
    }
    // One more is told that there is no room; it never waits.
    let (status, text) = server.connect().send(&request_head("POST /classify", picture.len())).send(&picture).read();
    assert!(status == 503 && text.contains("too_many_connections"), "{text}");
    assert_eq!(server.connect().send(GOOD.as_bytes()).read().0, 200, "a probe");
    let metrics = early.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").read_one().1;
    assert!(metrics.contains("\nbvit_connections_open 64\n"), "{metrics}");
    // 64 idle connections and as many refusals under way: some kilobytes each.
    let grown = server.memory().1.saturating_sub(before);
    assert!(grown < 8 << 20, "10,000 connections took {grown} bytes");
    drop(held);
    // The server notices that they are gone when it reads from them.
    wait_until("there is room again", || classify(&mut server.connect()).0 == 200);
    assert_eq!(classify(&mut early).0, 200);
    still_serves(&server);
}

#[test]
fn a_refused_connection_says_why() {
    let server = Server::start(["--max-connections", "1", "--header-timeout", "60s"]);
    let mut only = server.connect();
    assert_eq!(only.send(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n").read_one().0, 200);
    let listing = b"GET /sets HTTP/1.1\r\nHost: test\r\n\r\n";
    let (status, text) = server.connect().send(listing).read();
    assert_eq!(status, 503, "{text}");
    assert!(text.contains(r#""error_type":"too_many_connections""#) && text.contains("retry-after: 1"), "{text}");
    // Whatever it sends: a body is read away, so that the answer is not lost to a reset.
    let body = vec![0; 1 << 20];
    let (status, text) = server.connect().send(&request_head("POST /classify", body.len())).send(&body).read();
    assert_eq!(status, 503, "{text}");
    assert_eq!(only.send(listing).read_one().0, 200);
}

/// A bare connection that comes from an address of the loopback.
fn connect_from(server: &Server, last_byte: u8) -> Connection {
    use std::net::{Ipv4Addr, SocketAddr};
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::new(127, 0, 0, last_byte), 0)).into()).unwrap();
    socket.connect(&server.address.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(system_tests::server::PATIENCE)).unwrap();
    Connection(stream)
}

fn metric(server: &Server, name: &str) -> u64 {
    let text =
        connect_from(server, 1).send(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").read().1;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

#[test]
fn probes_are_answered_while_a_thousand_connections_are_held() {
    const HELD: usize = 1024;
    rlimit::increase_nofile_limit(4 * HELD as u64).unwrap();
    let probe = |server: &Server, from: u8| {
        for path in ["/health", "/v2/health/live", "/v2/health/ready", "/metrics"] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
            let (status, text) = connect_from(server, from).send(request.as_bytes()).read();
            assert_eq!(status, 200, "{path} from 127.0.0.{from}: {text}");
        }
        let listen = server.address.to_string();
        let status = Command::new(binary()).args(["healthcheck", "--listen", &listen]).status().unwrap();
        assert!(status.success(), "healthcheck");
    };
    let picture = image("test-00.png");
    let classify = |server: &Server, from: u8| {
        let request = request_head("POST /classify", picture.len());
        connect_from(server, from).send(&request).send(&picture).read_one()
    };
    for addresses in [1, 8] {
        let server = Server::start(["--header-timeout", "10m"]);
        let held: Vec<_> = (0..HELD).map(|i| connect_from(&server, 1 + (i % addresses) as u8)).collect();
        wait_until("all are in", || metric(&server, "bvit_connections_open") as usize >= addresses * HELD / 8);
        probe(&server, 1);
        probe(&server, 99);
        if addresses == 1 {
            assert_eq!(metric(&server, "bvit_connections_open"), HELD as u64 / 4, "a quarter");
            assert!(metric(&server, "bvit_share_refusals_total{limit=\"connections\"}") > 0);
            let (status, text) = classify(&server, 1);
            assert!(status == 503 && text.contains("too_many_connections"), "{text}");
            assert_eq!(classify(&server, 2).0, 200, "others go on");
        }
        drop(held);
        wait_until("there is room again", || classify(&server, 1).0 == 200);
    }
}

/// Requests that wait for the rest of their bodies, from one address; another address goes on.
#[test]
fn one_address_takes_a_quarter_of_the_requests_and_leaves_body_memory_to_others() {
    let picture = image("test-00.png");
    let classify = |server: &Server, from: u8| {
        connect_from(server, from).send(&request_head("POST /classify", picture.len())).send(&picture).read_one()
    };
    let expecting = |length: usize| {
        let head = String::from_utf8(request_head("POST /classify", length)).unwrap();
        head.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n")
    };
    let server = Server::start(["--max-requests", "8", "--body-timeout", "60s"]);
    let mut waiting: Vec<_> = (0..2).map(|_| connect_from(&server, 1)).collect();
    for connection in &mut waiting {
        assert_eq!(connection.send(expecting(picture.len()).as_bytes()).read_one().0, 100, "asked for its body");
    }
    let (status, text) = classify(&server, 1);
    assert!(status == 429 && text.contains("queue_full") && text.contains("address"), "{text}");
    assert_eq!(metric(&server, "bvit_share_refusals_total{limit=\"requests\"}"), 1);
    assert_eq!(classify(&server, 2).0, 200);
    for connection in &mut waiting {
        assert_eq!(connection.send(&picture).read_one().0, 200);
    }
    assert_eq!(classify(&server, 1).0, 200);

    // By default one address may fill 16 of 24 MiB: the largest body.
    let server = Server::start(["--body-timeout", "60s"]);
    let part = vec![0; 6 << 20];
    let mut hogs: Vec<_> = (0..3).map(|_| connect_from(&server, 1)).collect();
    for hog in &mut hogs {
        hog.send(&request_head("POST /classify", part.len() + 1)).send(&part);
    }
    // The server reads the three at its own pace, so any of them may be the one too many, and two that ask at the same
    // moment may both be.
    let refused = "bvit_share_refusals_total{limit=\"body_bytes\"}";
    wait_until("one of the three is refused", || metric(&server, refused) >= 1);
    hogs.iter().for_each(|hog| hog.0.set_nonblocking(true).unwrap());
    let answer = Cell::new(String::new());
    wait_until("the refusal is sent", || {
        let sent = hogs.iter().find_map(|hog| {
            let mut bytes = [0; 4096];
            (&hog.0).read(&mut bytes).ok().map(|count| String::from_utf8_lossy(&bytes[..count]).into_owned())
        });
        sent.map(|text| answer.set(text)).is_some()
    });
    let text = answer.take();
    assert!(text.contains(" 429 ") && text.contains("body bytes") && text.contains("address"), "{text}");
    let large = [picture.as_slice(), &vec![0; 4 << 20]].concat();
    let mut other = connect_from(&server, 2);
    let (status, text) = other.send(&request_head("POST /classify", large.len())).send(&large).read_one();
    assert_eq!(status, 200, "{text}");
}

#[test]
fn a_full_request_passes_whatever_the_shares_are() {
    let server = Server::start(["--max-connections", "1", "--max-requests", "1", "--client-share", "1"]);
    let picture = image("test-00.png");
    let large = [picture.as_slice(), &vec![0; (16 << 20) - picture.len()]].concat();
    assert_eq!(server.classify(&large).status, 200);
    let batch = serde_json::json!({"inputs": vec![base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &picture); 32]});
    let answer = Answer::of(server.post("/classify").json(&batch));
    assert_eq!(answer.status, 200, "{}", answer.text);
}

#[test]
fn connections_that_idle_or_do_not_read_are_closed() {
    let server = Server::start(["--header-timeout", "2s", "--write-timeout", "300ms"]);
    let mut idle = server.connect();
    assert_eq!(idle.send(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n").read_one().0, 200);
    assert!(idle.0.read(&mut [0]).is_ok_and(|count| count == 0), "closed by the server");

    let mut deaf = server.connect();
    let ask = b"GET /console/uplot/uPlot.iife.min.js HTTP/1.1\r\nHost: test\r\n\r\n".repeat(1000);
    // This write does not end in time either: the server stops reading.
    deaf.0.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    deaf.send(&ask);
    // Only the connection that asks is left.
    let gone = |text: &str| text.contains("\nbvit_connections_open 1\n");
    let ask = || server.connect().send(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").read().1;
    wait_until("the connection is closed", || gone(&ask()));
    drop(deaf);
}

#[test]
fn bodies_of_64_mebibytes_are_refused_without_being_kept() {
    const BODY: usize = 64 << 20;
    let server = Server::start([] as [&str; 0]);
    still_serves(&server);
    let before = server.memory().0;
    let chunk = vec![b'x'; 1 << 20];
    let announced = || {
        let mut connection = server.connect();
        connection.send(&request_head("POST /classify", BODY));
        for _ in 0..BODY / chunk.len() {
            connection.send(&chunk);
        }
        connection.read_one()
    };
    let chunked = || {
        let mut connection = server.connect();
        connection.send(b"POST /classify HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n");
        for _ in 0..BODY / chunk.len() {
            connection.send(b"100000\r\n").send(&chunk).send(b"\r\n");
        }
        connection.send(b"0\r\n\r\n").read_one()
    };
    thread::scope(|scope| {
        let mut clients: Vec<_> = (0..4).map(|_| scope.spawn(announced)).collect();
        clients.extend((0..4).map(|_| scope.spawn(chunked)));
        for client in clients {
            let (status, text) = client.join().unwrap();
            // 429: bodies together are bounded too. 0: still sending after all patience, and cut off.
            assert!([413, 429, 0].contains(&status), "{text}");
        }
    });
    // `--body-memory`, 24 MiB, bounds what all bodies hold; growing buffers double, so old and new may meet.
    let grown = server.memory().1.saturating_sub(before);
    assert!(grown < 72 << 20, "eight bodies of 64 MiB took {grown} bytes");
    still_serves(&server);
}

#[test]
fn each_key_has_its_rate_and_is_told_when_to_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "busy:first-secret-key\ncalm:second-secret-key\n").unwrap();
    // The rate is as low as it can be, so that what comes back during the test is far less than what is sent.
    let server = Server::start(["--user-key-file", keys.to_str().unwrap(), "--key-rate", "1", "--key-burst", "32"]);
    let picture = image("test-00.png");
    let send = |key: &str| Answer::of(server.post("/classify").header("x-api-key", key).body(picture.clone()));
    let answers: Vec<Answer> = (0..200).map(|_| send("first-secret-key")).collect();
    assert!(answers[..32].iter().all(|answer| answer.status == 200), "the burst passes");
    let refused = answers.iter().find(|answer| answer.status != 200).expect("more than the rate");
    refused.assert_refused(429, "rate_limited");
    for _ in 0..16 {
        assert_eq!(send("second-secret-key").status, 200, "one key's rate is not another's");
    }
    // Images count, not requests: a batch of 32 is more than a key that has just sent 16 has left, or gets in 15 s.
    let batch = serde_json::json!({"inputs": vec![""; 32]});
    let batch = Answer::of(server.post("/classify").bearer_auth("second-secret-key").json(&batch));
    batch.assert_refused(429, "rate_limited");
    send("no-such-secret-key").assert_refused(401, "unauthorized");
}

#[test]
fn the_log_shows_neither_keys_nor_images() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "camera:the-users-secret\n").unwrap();
    let mut server = Server::start(["--user-key-file", keys.to_str().unwrap(), "--log", "trace"]);
    let picture = image("test-00.png");
    let base64 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &picture);
    let json = serde_json::json!({ "inputs": base64 });
    assert_eq!(Answer::of(server.post("/classify").bearer_auth("the-users-secret").json(&json)).status, 200);
    let wrong = server.post("/classify?set=in-a-query").bearer_auth("a-wrong-secret").body(picture);
    Answer::of(wrong).assert_refused(401, "unauthorized");
    let unknown = server.get("/no/such/route?token=in-a-query");
    unknown.assert_refused(404, "route_not_found");
    // To the end, because lines may still be on their way.
    server.signal("TERM");
    server.wait();
    let log = server.log_to_end().join("\n");
    assert!(log.contains("request refused"), "{log}");
    for secret in ["the-users-secret", "a-wrong-secret", "in-a-query", &base64[..24], &base64[base64.len() - 24..]] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[test]
fn every_answer_carries_the_headers_browsers_need() {
    let server = Server::start([] as [&str; 0]);
    for path in ["/", "/health", "/metrics", "/no/such/route", "/classify", "/console/main.js"] {
        let answer = server.get(path);
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        let policy = answer.header("content-security-policy").expect(path);
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{path}: {policy}");
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"), "{path}");
        assert_eq!(answer.header("cross-origin-resource-policy"), Some("same-origin"), "{path}");
    }
}
