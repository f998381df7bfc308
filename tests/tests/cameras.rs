//! Cameras that answer, hang, lie and die, and what the gateway says of them.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use model_core::image::RgbImage;
use serde_json::Value;
use system_tests::server::{PATIENCE, Server, binary, image, png, wait_until};
use system_tests::snapshots::{CameraFile, Snapshots, camera};

fn view(server: &Server, name: &str) -> Value {
    server.get(&format!("/cameras/{name}")).json()
}

#[test]
fn a_camera_shows_what_it_sees_and_says_when_that_changes() {
    let snapshots = Snapshots::start();
    snapshots.show(image("test-00.png"));
    let server = CameraFile::of(&camera("gate", &snapshots.url("/now"), "frozen = 20"));
    let server = server.serve();
    let label = server.classify(&image("test-00.png")).label();
    let events = server.request("GET", "/events").send().unwrap();
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    let mut events = BufReader::new(events).lines().map_while(Result::ok);
    let mut wait_for = |what: &str, is_so: &dyn Fn(&Value) -> bool| {
        let data = events.by_ref().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok());
        let found = data.into_iter().find(is_so);
        found.unwrap_or_else(|| panic!("{what}: the events end"))
    };
    let seen = wait_for("a state", &|view| view["state"] == label.as_str());
    assert_eq!((&seen["condition"], &seen["error"]), (&"ok".into(), &Value::Null));

    let thumbnail = server.request("GET", "/cameras/gate/frame").send().unwrap();
    assert_eq!(thumbnail.headers()["content-type"], "image/jpeg");
    assert_eq!(thumbnail.bytes().unwrap()[..2], [0xff, 0xd8]);
    let whole = server.request("GET", "/cameras/gate/frame?whole=true").send().unwrap();
    assert_eq!(whole.headers()["content-type"], "image/png");
    assert_eq!(whole.bytes().unwrap(), image("test-00.png"));
    assert_eq!(server.get("/cameras").json()["examples"], false);

    wait_for("a picture that stands still", &|view| view["condition"] == "frozen" && view["state"].is_null());
    snapshots.show(png(&RgbImage::new(320, 240)));
    wait_for("a dark picture", &|view| view["condition"] == "dark");
    wait_for("the state of a dark picture", &|view| view["state"] == "unknown");
    assert_eq!(view(&server, "gate")["unknown_reason"], "flat");
    snapshots.show(b"rubbish".to_vec());
    wait_for("rubbish", &|view| view["condition"] == "silent" && view["state"].is_null());
    snapshots.show(image("test-00.png"));
    wait_for("its return", &|view| view["condition"] == "ok" && view["state"] == label.as_str());

    let detail = view(&server, "gate");
    assert!(detail["changes"].as_array().unwrap().len() >= 6, "{detail}");
    assert!(server.metric("bvit_camera_frames_total{camera=\"gate\",result=\"ok\"}") >= 20.0);
    assert!(server.metric("bvit_camera_frames_total{camera=\"gate\",result=\"bad_frame\"}") >= 3.0);
    assert!(server.metric("bvit_camera_frame_age_seconds{camera=\"gate\"}") >= 0.0);
    assert!(server.metric("bvit_camera_state{camera=\"gate\",state=\"silent\"}") == 0.0);
    server.get("/cameras/nobody").assert_refused(404, "camera_not_found");
}

#[test]
fn whatever_a_camera_does_it_is_said_and_no_other_waits() {
    let snapshots = Snapshots::start();
    snapshots.show(image("test-01.png"));
    let user = "user = 'viewer'\npassword = 'sesame'";
    let wrong = "user = 'viewer'\npassword = 'wrong'";
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cases = [
        ("hangs", "/hangs", "timeout = '300ms'", "no picture came within 0.3 s"),
        ("page", "/page", "", "a page or a text"),
        ("rubbish", "/rubbish", "", "not an image"),
        ("empty", "/empty", "", "no bytes"),
        ("stream", "/stream", "", "a stream of pictures"),
        ("half", "/half", "", "breaks off"),
        ("huge", "/huge", "", "more than the 4194304 bytes"),
        ("announced", "/announced", "", "more than the 4194304 bytes"),
        ("gone", "/gone", "", "404 Not Found"),
        ("elsewhere", "/elsewhere", "", "another host"),
        ("round", "/round", "", "too often"),
        ("babble", "/babble", "", "no answer in HTTP"),
        ("locked", "/digest", "", "wants a user"),
        ("wrong", "/digest", wrong, "does not accept"),
    ];
    let mut text: String = cases
        .iter()
        .map(|(name, path, more, _)| {
            let text = camera(name, &snapshots.url(path), more);
            if more.contains("timeout") { text.replacen("timeout = '2s'\n", "", 1) } else { text }
        })
        .collect();
    text += &camera("dead", &format!("http://{dead}/"), "");
    text += &camera("good", &snapshots.url("/now"), "frozen = 0");
    text += &camera("moved", &snapshots.url("/moved"), "");
    text += &camera("basic", &snapshots.url("/basic"), user);
    text += &camera("digest", &snapshots.url("/digest"), user);
    text += &camera("off", &snapshots.url("/now"), "enabled = false");
    let file = CameraFile::of(&text);
    let server = file.serve();
    for (name, _, _, reason) in cases.iter().chain(&[("dead", "", "", "cannot connect")]) {
        wait_until(name, || view(&server, name)["condition"] == "silent");
        let view = view(&server, name);
        assert!(view["error"].as_str().unwrap().contains(reason), "{view}");
        assert!(view["state"].is_null() && view["last_frame"].is_null(), "{view}");
    }
    for name in ["good", "moved", "basic", "digest"] {
        wait_until(name, || view(&server, name)["frames"].as_u64() >= Some(3));
        assert!(view(&server, name)["failures"] == 0, "{}", view(&server, name));
    }
    assert_eq!(view(&server, "off")["condition"], "disabled");
    let good = view(&server, "good")["frames"].as_u64();
    wait_until("frames beside cameras that hang", || view(&server, "good")["frames"].as_u64() > good.map(|n| n + 20));
    assert_eq!(server.get("/cameras").json()["cameras"].as_array().unwrap().len(), cases.len() + 6);
}

#[test]
fn a_changed_file_is_taken_and_a_broken_one_is_not() {
    let snapshots = Snapshots::start();
    snapshots.show(image("test-02.png"));
    let first = camera("first", &snapshots.url("/now"), "");
    let file = CameraFile::of(&first);
    let server = file.serve();
    wait_until("frames", || view(&server, "first")["frames"].as_u64() >= Some(1));
    file.write(&camera("first", &snapshots.url("/now"), "set = 'nobody'"));
    let line = server.wait_for_log("cannot be used");
    assert!(line.contains("cameras.toml: camera `first`: there is no expert set `nobody`"), "{line}");
    let listing = server.get("/cameras").json();
    assert!(listing["file_error"].as_str().unwrap().contains("nobody"), "{listing}");
    let before = view(&server, "first")["frames"].as_u64();
    wait_until("it goes on", || view(&server, "first")["frames"].as_u64() > before);
    file.write(&(first + &camera("second", &snapshots.url("/now"), "set = 'imagenet'")));
    server.wait_for_log("the file of cameras has changed");
    assert!(view(&server, "first")["frames"].as_u64() >= before, "an unchanged camera goes on");
    wait_until("the second", || view(&server, "second")["frames"].as_u64() >= Some(1));
    file.write("");
    wait_until("none", || server.get("/cameras").json()["cameras"].as_array().unwrap().is_empty());
    assert!(!server.get("/metrics").text.contains("camera=\"first\""));
}

/// The console's sample of a gateway with TLS is the picture of an https camera.
#[test]
fn changed_certificates_and_passwords_are_taken_without_a_restart() {
    let snapshots = Snapshots::start();
    snapshots.show(image("test-02.png"));
    let file = CameraFile::of("");
    let beside = |name: &str| file.folder().join(name);
    let certify = |host: &str, name: &str| {
        let certified = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
        std::fs::write(beside(&format!("{name}.key")), certified.signing_key.serialize_pem()).unwrap();
        std::fs::write(beside(&format!("{name}.pem")), certified.cert.pem()).unwrap();
        let path = |kind: &str| beside(&format!("{name}.{kind}")).display().to_string();
        Server::start(["--tls-cert", &path("pem"), "--tls-key", &path("key")])
    };
    let (right, other) = (certify("127.0.0.1", "right"), certify("elsewhere.example", "other"));
    std::fs::copy(beside("other.pem"), beside("ca.pem")).unwrap();
    std::fs::write(beside("password"), "wrong\n").unwrap();
    let url = |server: &Server| format!("https://{}/console/samples/photo-cat.jpg", server.address);
    let locked = "user = 'viewer'\npassword_file = 'password'";
    file.write(
        &[
            camera("signed", &url(&right), "ca = 'ca.pem'"),
            camera("elsewhere", &url(&other), "ca = 'other.pem'"),
            camera("unsigned", &url(&right), ""),
            camera("plain", &snapshots.url("/now").replace("http:", "https:"), ""),
            camera("locked", &snapshots.url("/digest"), locked),
        ]
        .concat(),
    );
    let server = file.serve();
    for (name, reason) in [
        ("signed", "nobody who is trusted has signed"),
        ("elsewhere", "not valid for name"),
        ("unsigned", "nobody who is trusted has signed"),
        ("plain", "hangs up"),
        ("locked", "does not accept"),
    ] {
        wait_until(name, || view(&server, name)["condition"] == "silent");
        assert!(view(&server, name)["error"].as_str().unwrap().contains(reason), "{}", view(&server, name));
    }
    std::fs::write(beside("password"), "sesame\n").unwrap();
    std::fs::copy(beside("right.pem"), beside("ca.pem")).unwrap();
    for name in ["signed", "locked"] {
        wait_until(name, || view(&server, name)["condition"] == "ok");
    }
    let line = server.log_so_far().into_iter().find(|line| line.contains("file of cameras has changed")).unwrap();
    assert!(!line.contains("started=5"), "those that did not change go on: {line}");
    std::fs::write(beside("ca.pem"), "no certificate").unwrap();
    let line = server.wait_for_log("cannot be used");
    assert!(line.contains("camera `signed`") && line.contains("ca.pem: the file holds no certificate"), "{line}");
}

#[test]
fn a_server_with_a_wrong_file_says_why_it_does_not_start() {
    let file = CameraFile::of("[[camera]]\nname = 'a'\nurl = 'http://a/'\nevrey = '1s'");
    let output =
        Command::new(binary()).args(["--listen", "127.0.0.1:0", "--cameras"]).arg(file.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("cameras.toml: camera `a`: unknown field `evrey`"), "{said}");
}

#[test]
fn cameras_are_behind_the_user_key_and_streams_end_with_the_server() {
    let snapshots = Snapshots::start();
    snapshots.show(image("test-03.png"));
    let file = CameraFile::of(&camera("gate", &snapshots.url("/now"), ""));
    let flags = ["--cameras", file.path().to_str().unwrap()].map(str::to_owned);
    let mut server = Server::start_with(flags, [("BVIT_USER_KEYS", "viewer:sesame-open-now")]);
    for path in ["/cameras", "/cameras/gate", "/cameras/gate/frame", "/cameras/gate/frame?whole=true", "/events"] {
        server.get(path).assert_refused(401, "unauthorized");
    }
    let open = |path: &str| server.request("GET", path).header("X-Api-Key", "sesame-open-now").send().unwrap();
    assert_eq!(open("/cameras").status(), 200);
    let streams: Vec<_> = (0..16).map(|_| open("/events")).collect();
    assert!(streams.iter().all(|stream| stream.status() == 200));
    assert_eq!(open("/events").status(), 429);
    server.signal("TERM");
    let started = std::time::Instant::now();
    for stream in streams {
        drop(stream.text());
    }
    assert!(server.wait().success());
    // No statement about speed: with streams that do not end, the server would use up its time to drain.
    assert!(started.elapsed() < PATIENCE.min(Duration::from_secs(24)));
}
