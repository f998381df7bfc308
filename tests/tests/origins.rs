//! What pages of other sites make a browser send, from inside the network that it is in.

use system_tests::server::{Answer, Server, image};

const KEY: &str = "admin-key-0123456789";
const FRIEND: &str = "https://app.example";

/// Requests that do something, with and without bodies, and one that does not exist.
const REQUESTS: [(&str, &str); 11] = [
    ("POST", "/classify"),
    ("PUT", "/classify/cifar100"),
    ("POST", "/hf/cifar100"),
    ("POST", "/v1/vision/custom/cifar100"),
    ("POST", "/v2/models/cifar100/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/sets/cifar100/pin"),
    ("DELETE", "/sets/cifar100/1"),
    ("PUT", "/sets/new/1"),
    ("PATCH", "/classify"),
    ("POST", "/no/such/route"),
];

type Headers = &'static [(&'static str, &'static str)];

/// What browsers say of a page of another site.
const OTHERS: [Headers; 6] = [
    &[("sec-fetch-site", "cross-site")],
    &[("sec-fetch-site", "same-site"), ("origin", "http://127.0.0.1:3000")],
    &[("origin", "https://evil.example")],
    &[("origin", "null")],
    &[("origin", "https://app.example.evil.example")],
    &[("sec-fetch-site", "cross-site"), ("origin", "http://app.example"), ("x-requested-with", "console")],
];

fn send(server: &Server, (method, path): (&str, &str), headers: &[(&str, &str)], body: Option<&[u8]>) -> Answer {
    let request =
        headers.iter().fold(server.request(method, path), |request, (name, value)| request.header(*name, *value));
    Answer::of(match body {
        Some(body) => request.body(body.to_vec()),
        None => request,
    })
}

#[test]
fn what_pages_of_other_sites_send_needs_a_key() {
    let picture = image("test-00.png");
    for flags in [&[][..], &["--cors-origin", FRIEND]] {
        let server = Server::start_with(flags, [("BVIT_ADMIN_KEYS", KEY)]);
        for headers in OTHERS {
            for request in REQUESTS {
                for body in [Some(picture.as_slice()), None] {
                    let answer = send(&server, request, headers, body);
                    assert_eq!(answer.json()["error_type"], "cross_site", "{request:?} {headers:?}: {}", answer.text);
                    assert_eq!(answer.status, 403);
                    assert_eq!(answer.header("access-control-allow-origin"), None);
                }
            }
            let wrong = [headers, &[("x-api-key", "not-a-key-of-this-server")]].concat();
            send(&server, REQUESTS[0], &wrong, Some(&picture)).assert_refused(403, "cross_site");
            let known = [headers, &[("x-api-key", KEY)]].concat();
            assert_eq!(send(&server, REQUESTS[0], &known, Some(&picture)).status, 200, "{headers:?}");
            assert_eq!(send(&server, ("POST", "/sets/cifar100/pin"), &known, None).status, 200);
            // Reading changes nothing, and a page of another site does not get to see it.
            assert_eq!(send(&server, ("GET", "/health"), headers, None).status, 200);
        }
    }
}

#[test]
fn our_own_pages_and_programs_go_on_also_behind_a_proxy_that_changes_host() {
    let server = Server::start_with([] as [&str; 0], [("BVIT_ADMIN_KEYS", KEY)]);
    let own = server.url("");
    let cases: [&[(&str, &str)]; 5] = [
        &[],
        &[("sec-fetch-site", "same-origin"), ("origin", &own)],
        &[("origin", &own)],
        // The console through a proxy: over TLS the browser says that it is the same site, without TLS our header does.
        &[("sec-fetch-site", "same-origin"), ("origin", "https://gateway.example")],
        &[("x-requested-with", "console"), ("origin", "http://gateway.example")],
    ];
    for headers in cases {
        let answer = send(&server, ("POST", "/classify"), headers, Some(&image("test-00.png")));
        assert_eq!(answer.status, 200, "{headers:?}: {}", answer.text);
    }
}

#[test]
fn named_sites_may_after_they_have_asked() {
    let server = Server::start_with(
        ["--cors-origin", "https://App.example:443/,http://b.example:3000"],
        [("BVIT_ADMIN_KEYS", KEY)],
    );
    let ask = |origin: &str| {
        let wanted = "authorization,content-type";
        let headers =
            [("origin", origin), ("access-control-request-method", "POST"), ("access-control-request-headers", wanted)];
        send(&server, ("OPTIONS", "/classify"), &headers, None)
    };
    for origin in [FRIEND, "http://b.example:3000"] {
        let preflight = ask(origin);
        assert_eq!((preflight.status, preflight.header("access-control-allow-origin")), (200, Some(origin)));
        assert!(preflight.header("access-control-allow-methods").is_some_and(|methods| methods.contains("POST")));
        assert!(preflight.header("access-control-allow-headers").is_some_and(|names| names.contains("authorization")));
        let headers = [("origin", origin), ("sec-fetch-site", "cross-site")];
        let answer = send(&server, ("POST", "/classify"), &headers, Some(&image("test-00.png")));
        assert_eq!(
            (answer.status, answer.header("access-control-allow-origin")),
            (200, Some(origin)),
            "{}",
            answer.text
        );
        let refused = send(&server, ("POST", "/classify"), &headers, Some(b"no image"));
        assert_eq!((refused.status, refused.header("access-control-allow-origin")), (415, Some(origin)), "errors, too");
        send(&server, ("POST", "/sets/cifar100/pin"), &headers, None).assert_refused(401, "unauthorized");
    }
    for origin in ["https://evil.example", "null", "http://app.example", "https://app.example:444"] {
        assert_eq!(ask(origin).header("access-control-allow-origin"), None, "{origin}");
    }
    for wrong in ["*", "null", "app.example", "https://app.example/path"] {
        let mut command = std::process::Command::new(system_tests::server::binary());
        let output = command.args(["--listen", "127.0.0.1:0", "--cors-origin", wrong]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{wrong}: {said}");
        assert!(said.contains("https://HOST"), "{said}");
    }
}
