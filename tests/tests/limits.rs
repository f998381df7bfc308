//! What the real server refuses, and what it does when there is too much, too slowly, or when it has to go.

use std::io::Write;
use std::thread;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use model_core::config::ViTConfig;
use system_tests::server::{Answer, Server, image, wait_until};

/// A valid 1-bit greyscale PNG of `side` x `side` black pixels: kilobytes that would decode to `side * side` bytes.
fn black_png(side: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_depth(png::BitDepth::One);
    let mut writer = encoder.write_header().unwrap();
    let mut rows = writer.stream_writer().unwrap();
    let row = vec![0; side.div_ceil(8) as usize];
    (0..side).for_each(|_| rows.write_all(&row).unwrap());
    rows.finish().unwrap();
    writer.finish().unwrap();
    bytes
}

fn head(method_and_path: &str, length: usize) -> Vec<u8> {
    format!("{method_and_path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n").into()
}

#[test]
fn each_bad_request_gets_its_status_and_a_flat_sentence() {
    let server = Server::start(["--max-body", "1MiB"]);
    let picture = image("test-00.png");
    let jpeg = image("test-00.jpg");
    let bomb = black_png(30_000);
    assert!(bomb.len() < 1 << 20, "the bomb must pass the body limit: {} bytes", bomb.len());
    let no_pixels = b"BM\x36\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\0\0\0\0\0\0\0\0\x01\0\x18\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let raw = |body: &[u8]| server.classify(body);
    let json =
        |text: &'static str| Answer::of(server.post("/classify").header("content-type", "application/json").body(text));
    raw(b"").assert_refused(400, "empty_body");
    raw(b"this is text, not an image").assert_refused(415, "unsupported_media_type");
    raw(&jpeg[..jpeg.len() / 2]).assert_refused(422, "undecodable_image");
    raw(&picture[..picture.len() / 2]).assert_refused(422, "undecodable_image");
    raw(no_pixels).assert_refused(422, "undecodable_image");
    raw(&bomb).assert_refused(413, "image_too_large");
    raw(&vec![0; (1 << 20) + 1]).assert_refused(413, "body_too_large");
    json("{").assert_refused(400, "invalid_request");
    json(r#"{"inputs": 7}"#).assert_refused(400, "invalid_request");
    json(r#"{"inputs": "%%%"}"#).assert_refused(400, "invalid_request");
    let typed = server.post("/classify").header("content-type", "text/html").body(picture.clone());
    Answer::of(typed).assert_refused(415, "unsupported_media_type");
    for query in ["top_k=0", "top_k=many", "routing=perhaps"] {
        let answer = Answer::of(server.post(&format!("/classify?{query}")).body(picture.clone()));
        answer.assert_refused(400, "invalid_request");
    }
    let unknown = server.post("/classify/no-such-set").body(picture.clone());
    Answer::of(unknown).assert_refused(404, "set_not_found");
    server.get("/no/such/route").assert_refused(404, "route_not_found");
    let wrong_method = Answer::of(server.request("DELETE", "/classify"));
    wrong_method.assert_refused(405, "method_not_allowed");
    assert!(wrong_method.header("allow").is_some_and(|methods| methods.contains("POST")));
    assert_eq!(raw(&picture).status, 200, "the server still serves");
}

#[test]
fn a_batch_over_the_limit_is_refused() {
    let server = Server::start(["--max-images", "2"]);
    let three = serde_json::json!({"inputs": ["aGk=", "aGk=", "aGk="]});
    Answer::of(server.post("/classify").json(&three)).assert_refused(413, "batch_too_large");
}

#[test]
fn a_body_that_stalls_or_trickles_is_given_up() {
    let server = Server::start(["--body-timeout", "300ms"]);
    let refused = |(status, text): (u16, String)| {
        assert_eq!(status, 408, "{text}");
        assert!(text.contains(r#""error_type":"body_timeout""#), "{text}");
    };
    refused(server.connect().send(&head("POST /classify", 1000)).send(b"half of it").read());
    // A byte now and then is no progress.
    let mut trickle = server.connect();
    trickle.send(&head("POST /classify", 1000));
    for _ in 0..6 {
        trickle.send(b"x");
        thread::sleep(Duration::from_millis(100));
    }
    refused(trickle.read());
    // Uploads of expert sets are bodies like others.
    let store = tempfile::tempdir().unwrap();
    system_tests::fixtures::write_store(store.path(), &ViTConfig::preset("tiny").unwrap(), &["first"]);
    let flags = ["--body-timeout", "300ms", "--model-store", store.path().to_str().unwrap()];
    let server = Server::start_with(flags, [("BVIT_ADMIN_KEYS", "ops:admin-key-0123456789")]);
    let upload = String::from_utf8(head("PUT /sets/second/1", 1000)).unwrap();
    let upload = upload.replace("\r\n\r\n", "\r\nX-Api-Key: admin-key-0123456789\r\n\r\n");
    refused(server.connect().send(upload.as_bytes()).send(b"half of it").read());
}

/// A camera on a thin line: the time for the whole body is many times `--body-timeout` and `--request-timeout`.
#[test]
fn a_body_that_comes_steadily_takes_its_time() {
    let server = Server::start(["--body-timeout", "300ms", "--request-timeout", "300ms"]);
    let picture = image("test-00.png");
    // Something after the end mark makes it long without changing it.
    let padded = [picture.as_slice(), &vec![0; 100 << 10]].concat();
    let mut steady = server.connect();
    steady.send(&head("POST /classify", padded.len()));
    for piece in padded.chunks(padded.len() / 20) {
        thread::sleep(Duration::from_millis(100));
        steady.send(piece);
    }
    let (status, text) = steady.read();
    assert_eq!(status, 200, "{text}");
}

/// Whatever a body's form: at the limit it is read, above it is refused for good,
/// and no client is told to try again in vain.
#[test]
fn compressed_bodies_near_the_limit_get_a_truthful_status() {
    const LIMIT: usize = 1 << 20;
    let server = Server::start(["--max-body", "1MiB", "--body-memory", "1MiB"]);
    let picture = image("test-00.png");
    let noise = |length: usize| -> Vec<u8> {
        let mut state = 1u64;
        let step = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..length).map(step).collect()
    };
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let send = |body: Vec<u8>| Answer::of(server.post("/classify").header("content-encoding", "gzip").body(body));
    for (what, filler) in [("zeros", vec![0; LIMIT + 1]), ("noise", noise(LIMIT + 1))] {
        // A little less than the limit, because noise grows when it is compressed.
        for length in [LIMIT / 2, LIMIT - LIMIT / 64] {
            let body = [picture.as_slice(), &filler[picture.len()..length]].concat();
            let answer = send(gzip(&body));
            assert_eq!(answer.status, 200, "{what}, {length} bytes: {}", answer.text);
        }
        send(gzip(&[picture.as_slice(), &filler[picture.len()..]].concat())).assert_refused(413, "body_too_large");
    }
}

#[test]
fn slow_headers_lose_their_connection() {
    let server = Server::start(["--header-timeout", "2s"]);
    let (status, text) = server.connect().send(b"POST /classify HTTP/1.1\r\nHost: te").read();
    assert!(status == 0 || status == 408, "{text}");
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
}

#[test]
fn more_requests_than_allowed_are_told_to_come_back() {
    let server = Server::start(["--max-requests", "1"]);
    let picture = image("test-00.png");
    let mut busy = server.connect();
    // Asked for its body, a request has been let in. Without that signal, the next one might come first.
    let expecting = String::from_utf8(head("POST /classify", picture.len())).unwrap();
    busy.send(expecting.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n").as_bytes());
    assert_eq!(busy.read_one().0, 100);
    server.classify(&picture).assert_refused(429, "queue_full");
    let (status, text) = busy.send(&picture).read();
    assert_eq!(status, 200, "{text}");
    assert_eq!(server.classify(&picture).status, 200, "there is room again");
}

#[test]
fn a_full_queue_refuses_what_it_cannot_hold_and_answers_the_rest() {
    let server = Server::start(["--queue-images", "32", "--set-queue-images", "32", "--compute-threads", "1"]);
    let batch: Vec<_> = vec![image("test-00.png"); 32];
    let form = || {
        use reqwest::blocking::multipart::{Form, Part};
        batch.iter().fold(Form::new(), |form, bytes| form.part("image", Part::bytes(bytes.clone()).file_name("x")))
    };
    let answers: Vec<Answer> = thread::scope(|scope| {
        let send = || {
            let answers: Vec<_> = (0..8).map(|_| Answer::of(server.post("/classify").multipart(form()))).collect();
            answers
        };
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(send)).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    let (done, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 200);
    assert!(!done.is_empty() && !refused.is_empty(), "{} answered, {} refused", done.len(), refused.len());
    refused.iter().for_each(|answer| answer.assert_refused(429, "queue_full"));
    for answer in done {
        let results = answer.json();
        assert_eq!(results.as_array().map(Vec::len), Some(32));
        assert!(results.as_array().unwrap().iter().all(|result| result["predictions"].is_array()), "{results}");
    }
    assert_eq!(server.classify(&batch[0]).status, 200, "the server still serves");
}

#[test]
fn sigterm_finishes_what_was_accepted_and_takes_no_more() {
    let mut server = Server::start([] as [&str; 0]);
    let picture = image("test-00.png");
    let expected = server.classify(&picture).label();
    let mut accepted: Vec<_> = (0..8).map(|_| server.connect()).collect();
    for connection in &mut accepted {
        connection.send(&head("POST /classify", picture.len())).send(&picture[..10]);
    }
    // Eight, and the request that asks.
    wait_until("all are in", || server.get("/metrics").text.contains("\nbvit_requests_in_flight 9\n"));
    server.signal("TERM");
    server.wait_for_log("draining");
    for connection in &mut accepted {
        let (status, text) = connection.send(&picture[10..]).read();
        assert_eq!(status, 200, "{text}");
        assert!(text.contains(&format!(r#""label":"{expected}""#)), "{text}");
    }
    assert_eq!(server.wait().code(), Some(0));
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
}

/// What a client can repeat costs it bytes and the server a count: lists end with the entry that is one too many.
#[test]
fn what_repeats_is_refused_before_it_is_stored() {
    let server = Server::start([] as [&str; 0]);
    let infer = "/v2/models/cifar100/infer";
    let png = STANDARD.encode(image("test-00.png"));
    let many = |entry: &str, count: usize| vec![entry; count].join(",");
    let request = |shape: &str, data: &str, more: &str| {
        format!(r#"{{"inputs":[{{"name":"image","datatype":"BYTES","shape":[{shape}],"data":[{data}]}}]{more}}}"#)
    };
    let picture = format!("\"{png}\"");
    let outputs = many(r#"{"name":"scores","parameters":{"classification":100}}"#, 1000);
    let inputs = many(r#"{"name":"image","datatype":"BYTES","shape":[1],"data":[]}"#, 10_000);
    let cases = [
        ("outputs", request("1", &picture, &format!(r#","outputs":[{outputs}]"#))),
        ("shape", request(&many("1", 1_000_000), &picture, "")),
        ("inputs", format!(r#"{{"inputs":[{inputs}]}}"#)),
        ("data", request("1", &many(r#""""#, 1_000_000), "")),
        ("data beside the shape", request("2", &picture, "")),
    ];
    for (what, body) in cases {
        let answer = Answer::of(server.post(infer).body(body));
        assert_eq!(answer.status, 400, "{what}: {}", answer.text);
        assert!(answer.text.len() < 1000, "{what}: {}", answer.text);
    }
    // Elements of no bytes behind a header that announces one.
    let binary = vec![0; 4_000_000];
    let head = format!(
        r#"{{"inputs":[{{"name":"image","datatype":"BYTES","shape":[1],"parameters":{{"binary_data_size":{}}}}}]}}"#,
        binary.len()
    );
    let body = [head.as_bytes(), &binary].concat();
    let bytes = server.post(infer).header("inference-header-content-length", head.len()).body(body);
    Answer::of(bytes).assert_refused(400, "invalid_request");
    // Parts of a form that are no images.
    let part = "--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n\r\n";
    let form = format!("{}--x--\r\n", part.repeat(10_000));
    let form = server.post("/classify").header("content-type", "multipart/form-data; boundary=x").body(form);
    Answer::of(form).assert_refused(400, "invalid_request");
    // The inputs of Hugging Face's schema.
    let list = format!(r#"{{"inputs":[{}]}}"#, many(r#""""#, 1_000_000));
    let list = server.post("/classify").header("content-type", "application/json").body(list);
    Answer::of(list).assert_refused(413, "batch_too_large");
    let (_, peak) = server.memory();
    assert!(peak < 64 << 20, "the server took {peak} bytes");
}

/// An answer has a bound that is known before it is built, and what is large but allowed is the same as what is small.
#[test]
fn the_size_of_an_answer_is_bounded() {
    let config = ViTConfig { num_classes: 30_000, ..ViTConfig::preset("tiny").unwrap() };
    let store = tempfile::tempdir().unwrap();
    system_tests::fixtures::write_store(store.path(), &config, &["many"]);
    let server = Server::start(["--model-store", store.path().to_str().unwrap(), "--default-set", "many"]);
    let png = STANDARD.encode(image("test-00.png"));
    let ask = |path: &str, images: usize, top_k: usize| {
        let body = serde_json::json!({"inputs": vec![&png; images], "parameters": {"top_k": top_k}});
        Answer::of(server.post(path).json(&body))
    };
    let (small, large) = (ask("/classify", 1, 5).json(), ask("/classify", 1, 30_000).json());
    assert_eq!(large[0]["predictions"].as_array().map(Vec::len), Some(30_000));
    assert_eq!(large[0]["predictions"].as_array().unwrap()[..5], small[0]["predictions"].as_array().unwrap()[..]);
    let list = ask("/hf/many", 1, 30_000).json();
    assert_eq!(list[0], large[0]["predictions"]);
    for path in ["/classify", "/hf/many"] {
        ask(path, 8, 30_000).assert_refused(413, "batch_too_large");
    }
    let infer = |outputs: usize| {
        let input = serde_json::json!({"name": "image", "datatype": "BYTES", "shape": [1], "data": [png]});
        let output = serde_json::json!({"name": "scores", "parameters": {"classification": 30_000}});
        let body = serde_json::json!({"inputs": [input], "outputs": vec![output; outputs]});
        Answer::of(server.post("/v2/models/many/infer").json(&body))
    };
    assert_eq!(infer(1).json()["outputs"][0]["shape"], serde_json::json!([1, 30_000]));
    infer(8).assert_refused(413, "batch_too_large");
}
