//! What a gateway in a cupboard lives through: being stopped under load, full and vanishing disks, a clock that jumps.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use model_core::artifact::Digest;
use model_core::config::ViTConfig;
use system_tests::disk::SmallDisk;
use system_tests::fixtures::{expert_set_artifact, write, write_store};
use system_tests::server::{Answer, Connection, Server, binary, image, request_head, wait_until};

fn config() -> ViTConfig {
    ViTConfig::preset("tiny").unwrap()
}

fn artifact(backbone: Digest, name: &str, seed: u64) -> Vec<u8> {
    expert_set_artifact(&config(), backbone, name, seed)
}

fn serve(store: &Path) -> Server {
    Server::start(["--model-store", store.to_str().unwrap()])
}

fn classify(server: &Server, set: &str) -> Answer {
    Answer::of(server.post(&format!("/classify/{set}")).body(image("test-00.png")))
}

fn upload(server: &Server, path: &str, bytes: &[u8]) -> Answer {
    Answer::of(server.request("PUT", path).body(bytes.to_vec()))
}

#[test]
fn sigterm_under_load_loses_no_request_that_was_accepted() {
    const CLIENTS: usize = 8;
    let mut server = Server::start(["--log", "debug"]);
    let picture = image("test-00.png");
    let answered = AtomicUsize::new(0);
    let received: HashSet<String> = thread::scope(|scope| {
        let client = |client: usize| {
            let (address, picture, answered) = (server.address, &picture, &answered);
            move || {
                let mut ids = Vec::new();
                for number in 0.. {
                    let Ok(stream) = std::net::TcpStream::connect(address) else { break };
                    let id = format!("load-{client}-{number}");
                    let head = format!(
                        "POST /classify HTTP/1.1\r\nHost: test\r\nConnection: close\r\nX-Request-Id: {id}\r\n\
                         Content-Length: {}\r\n\r\n",
                        picture.len()
                    );
                    match Connection(stream).send(head.as_bytes()).send(picture).read() {
                        (200, text) => {
                            assert!(text.ends_with('}'), "an answer was cut: {text}");
                            answered.fetch_add(1, Ordering::Relaxed);
                            ids.push(id);
                        }
                        // The connection was never accepted, or its request came after the signal.
                        (0 | 503, _) => {}
                        (status, text) => panic!("{status}: {text}"),
                    }
                }
                ids
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(client(number))).collect();
        wait_until("requests are answered", || answered.load(Ordering::Relaxed) >= 20 * CLIENTS);
        server.signal("TERM");
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(server.wait().code(), Some(0));
    let log = server.log_to_end();
    let logged: HashSet<String> = log
        .iter()
        .filter(|line| line.contains("request answered") && line.contains("status=200"))
        .filter_map(|line| line.split_once("request.id=\"").map(|(_, rest)| rest.split('"').next().unwrap().to_owned()))
        .filter(|id| id.starts_with("load-"))
        .collect();
    assert!(logged.len() >= 20 * CLIENTS, "{} requests in the log", logged.len());
    let lost: Vec<_> = logged.difference(&received).collect();
    assert!(lost.is_empty(), "answered and not received: {lost:?}");
    assert!(log.iter().any(|line| line.contains("stopped")) && !log.iter().any(|line| line.contains("in time")));
}

#[test]
fn after_kill_9_under_load_every_upload_is_there_in_full_or_not_at_all() {
    const CLIENTS: usize = 4;
    let store = tempfile::tempdir().unwrap();
    let backbone = write_store(store.path(), &config(), &["first"]);
    let mut server = serve(store.path());
    let acknowledged = AtomicUsize::new(0);
    let uploads: Vec<(String, Vec<u8>, bool)> = thread::scope(|scope| {
        let client = |client: usize| {
            let (server, acknowledged) = (&server, &acknowledged);
            move || {
                let mut uploads = Vec::new();
                for number in 0.. {
                    let name = format!("set-{client}-{number}");
                    let bytes = artifact(backbone, &name, (client * 1000 + number) as u64);
                    let answer = server.request("PUT", &format!("/sets/{name}/1")).body(bytes.clone()).send();
                    let created = answer.as_ref().is_ok_and(|answer| answer.status() == 201);
                    uploads.push((name.clone(), bytes, created));
                    if answer.is_err() {
                        break;
                    }
                    assert!(created, "{answer:?}");
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                    // Loads race with the signal too.
                    drop(server.post(&format!("/classify/{name}")).body(image("test-00.png")).send());
                }
                uploads
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(client(number))).collect();
        wait_until("uploads are acknowledged", || acknowledged.load(Ordering::Relaxed) >= 10 * CLIENTS);
        server.signal("KILL");
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(server.wait().code(), None, "ended by the signal");

    let server = serve(store.path());
    assert_eq!(classify(&server, "first").status, 200);
    for (name, bytes, created) in &uploads {
        let file = store.path().join(format!("expert-sets/{name}/1.safetensors"));
        match classify(&server, name).status {
            200 => assert!(std::fs::read(&file).unwrap() == *bytes, "{name} is not what was uploaded"),
            404 => assert!(!created, "{name} was acknowledged and is gone"),
            status => panic!("{name}: {status}"),
        }
    }
    let metrics = server.get("/metrics").text;
    assert!(
        metrics.lines().any(|line| line == "bvit_sets_failed 0"),
        "a file that was being written was taken for a set"
    );
    let leftovers =
        std::fs::read_dir(store.path().join("expert-sets")).unwrap().map(|entry| entry.unwrap().file_name());
    let leftovers: Vec<_> = leftovers.filter(|name| name.to_string_lossy().starts_with('.')).collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
    let (name, bytes, _) = uploads.iter().find(|(_, _, created)| !created).unwrap();
    assert!(matches!(upload(&server, &format!("/sets/{name}/1"), bytes).status, 200 | 201), "doing it again");
}

#[test]
fn a_full_disk_refuses_uploads_and_nothing_else() {
    let Some(disk) = SmallDisk::mount("8m") else { return };
    let backbone = write_store(disk.path(), &config(), &["first"]);
    let server = serve(disk.path());
    let filler = disk.fill();
    let bytes = artifact(backbone, "second", 7);
    upload(&server, "/sets/second/1", &bytes).assert_refused(507, "disk_full");
    assert_eq!(classify(&server, "first").status, 200);
    classify(&server, "second").assert_refused(404, "set_not_found");
    std::fs::remove_file(filler).unwrap();
    assert_eq!(upload(&server, "/sets/second/1", &bytes).status, 201, "there is room again");
    assert_eq!(classify(&server, "second").status, 200);
}

#[test]
fn a_store_that_turns_read_only_goes_on_serving() {
    let Some(disk) = SmallDisk::mount("8m") else { return };
    let backbone = write_store(disk.path(), &config(), &["first", "second"]);
    let server = serve(disk.path());
    disk.remount("ro");
    upload(&server, "/sets/third/1", &artifact(backbone, "third", 7)).assert_refused(409, "conflict");
    Answer::of(server.request("DELETE", "/sets/second")).assert_refused(409, "conflict");
    assert_eq!(classify(&server, "second").status, 200, "a set that is loaded only now");
    disk.remount("rw");
    assert_eq!(upload(&server, "/sets/third/1", &artifact(backbone, "third", 7)).status, 201);
}

#[test]
fn a_store_that_vanishes_and_comes_back_takes_the_resident_sets_nowhere() {
    let parent = tempfile::tempdir().unwrap();
    let (store, away) = (parent.path().join("store"), parent.path().join("away"));
    write_store(&store, &config(), &["first", "second"]);
    let server = serve(&store);
    assert_eq!(classify(&server, "first").status, 200);
    std::fs::rename(&store, &away).unwrap();
    assert_eq!(classify(&server, "first").status, 200, "what is in memory needs no disk");
    classify(&server, "second").assert_refused(503, "set_failed");
    assert_eq!(server.get("/v2/health/ready").status, 200);
    std::fs::rename(&away, &store).unwrap();
    // A failed load is remembered for a moment; asking for a load tries at once.
    assert_eq!(Answer::of(server.post("/sets/second/load")).status, 200);
    assert_eq!(classify(&server, "second").status, 200);
}

#[test]
fn junk_in_the_store_is_counted_and_left_alone() {
    let store = tempfile::tempdir().unwrap();
    let backbone = write_store(store.path(), &config(), &["good"]);
    let whole = artifact(backbone, "cut", 7);
    let junk: [(&str, &[u8]); 9] = [
        ("expert-sets/cut/1.safetensors", &whole[..whole.len() / 2]),
        ("expert-sets/empty/1.safetensors", b""),
        ("expert-sets/text/1.safetensors", b"not an artifact"),
        ("expert-sets/huge/1.safetensors", &u64::MAX.to_le_bytes()),
        ("expert-sets/good/readme.txt", b"for people"),
        ("expert-sets/bad name!/1.safetensors", &whole),
        ("expert-sets/stray.safetensors", &whole),
        ("backbones/broken.safetensors", b"{}"),
        (".DS_Store", b"\0\0"),
    ];
    for (path, bytes) in junk {
        write(&store.path().join(path), bytes);
    }
    std::os::unix::fs::symlink("nowhere", store.path().join("expert-sets/dangling")).unwrap();
    std::os::unix::fs::symlink(store.path(), store.path().join("expert-sets/loop")).unwrap();
    let server = serve(store.path());
    assert_eq!(classify(&server, "good").status, 200);
    assert_eq!(server.get("/v2/health/ready").status, 200);
    let failed = server.get("/metrics").text;
    let failed = failed.lines().find_map(|line| line.strip_prefix("bvit_sets_failed ")).unwrap().to_owned();
    assert!(failed.parse::<u32>().unwrap() >= 4, "{failed} files are counted as broken");
    for (path, bytes) in junk {
        assert_eq!(std::fs::read(store.path().join(path)).unwrap(), bytes, "{path} was touched");
    }
}

/// A gateway without a clock of its own starts years back, and jumps when it has found a time server.
#[test]
fn the_clock_of_the_wall_may_jump() {
    let library = format!("/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1", std::env::consts::ARCH);
    if !Path::new(&library).exists() {
        assert!(std::env::var_os("CI").is_none(), "libfaketime is missing");
        println!("skipped: libfaketime is missing");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let offset = folder.path().join("offset");
    std::fs::write(&offset, "-30y\n").unwrap();
    let server = Server::start_with(
        ["--log", "debug", "--request-timeout", "30s", "--header-timeout", "30s"],
        [
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME_TIMESTAMP_FILE", offset.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ],
    );
    let picture = image("test-00.png");
    let expected = server.classify(&picture).label();
    for jump in ["+0d", "-30y", "+30y"] {
        // Headers are there before the jump, the body comes after it.
        let mut waiting = server.connect();
        waiting.send(&request_head("POST /classify", picture.len()));
        std::fs::write(&offset, format!("{jump}\n")).unwrap();
        let (status, text) = waiting.send(&picture).read_one();
        assert_eq!(status, 200, "{jump}: {text}");
        assert_eq!(server.classify(&picture).label(), expected, "{jump}");
    }
    server.signal("TERM");
    let years: HashSet<u32> = server.log_to_end().iter().filter_map(|line| line.get(..4)?.parse().ok()).collect();
    assert!(years.len() >= 3, "the clock was seen in {years:?} only");
}

#[test]
fn what_is_no_file_in_the_store_is_listed_and_holds_up_nothing() {
    let store = tempfile::tempdir().unwrap();
    write_store(store.path(), &config(), &["good", "turned"]);
    let sets = store.path().join("expert-sets");
    let fifo = |path: &Path| {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    };
    fifo(&sets.join("pipe/1.safetensors"));
    fifo(&store.path().join("backbones/pipe.safetensors"));
    std::fs::create_dir_all(sets.join("folder/1.safetensors")).unwrap();
    std::fs::create_dir_all(sets.join("device")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", sets.join("device/1.safetensors")).unwrap();
    let server = serve(store.path());
    assert_eq!(classify(&server, "good").status, 200);
    let broken = server.get("/sets").json()["broken"].as_array().unwrap().clone();
    assert_eq!(broken.len(), 4, "{broken:?}");
    assert!(broken.iter().all(|file| file["reason"].as_str().unwrap().contains("not a file")), "{broken:?}");

    // One that was a file when the server looked.
    let turned = sets.join("turned/1.safetensors");
    std::fs::remove_file(&turned).unwrap();
    fifo(&turned);
    classify(&server, "turned").assert_refused(503, "set_failed");
    assert_eq!(classify(&server, "good").status, 200);
}

#[test]
fn a_store_has_one_server_unless_nobody_can_write_to_it() {
    let start = |store: &Path| {
        let mut command = Command::new(binary());
        command.args(["--listen", "127.0.0.1:0", "--model-store"]).arg(store);
        let output = command.stdout(std::process::Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let store = tempfile::tempdir().unwrap();
    write_store(store.path(), &config(), &["first"]);
    let first = serve(store.path());
    let (code, said) = start(store.path());
    assert!(code == Some(2) && said.contains("another server"), "{said}");
    assert_eq!(classify(&first, "first").status, 200);
    drop(first);
    assert_eq!(classify(&serve(store.path()), "first").status, 200, "the lock went with its server");

    let Some(disk) = SmallDisk::mount("8m") else { return };
    write_store(disk.path(), &config(), &["first"]);
    disk.remount("ro");
    let (one, other) = (serve(disk.path()), serve(disk.path()));
    assert_eq!((classify(&one, "first").status, classify(&other, "first").status), (200, 200));
}

#[test]
fn hanging_up_drains_and_a_second_signal_hurries() {
    for first in ["HUP", "INT", "TERM"] {
        let mut server = Server::start(["--body-timeout", "60s", "--drain-timeout", "60s"]);
        let picture = image("test-00.png");
        let mut accepted = server.connect();
        accepted.send(&request_head("POST /classify", picture.len())).send(&picture[..10]);
        wait_until("it is in", || server.get("/metrics").text.contains("\nbvit_requests_in_flight 2\n"));
        server.signal(first);
        server.wait_for_log("draining");
        let start = std::time::Instant::now();
        server.signal("TERM");
        assert_eq!(server.wait().code(), Some(0), "{first}");
        assert!(start.elapsed() < std::time::Duration::from_secs(30), "{first}: the second signal was not heard");
    }
}

/// The disk that the log goes to is full, as a gateway's card is after a year.
#[test]
fn a_full_disk_of_the_log_stops_nothing() {
    let Some(disk) = SmallDisk::mount("1m") else { return };
    let log = disk.path().join("log");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let file = std::fs::File::create(&log).unwrap();
    let mut child = Command::new(binary())
        .args([
            "--listen",
            &port.to_string(),
            "--log",
            "butterflyvit=debug",
            "--trust-loopback",
            "--log-format",
            "json",
        ])
        .stdout(file)
        .spawn()
        .unwrap();
    let ask = |path: &str| -> (u16, String) {
        let Ok(stream) = std::net::TcpStream::connect(port) else { return (0, String::new()) };
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        Connection(stream).send(request.as_bytes()).read()
    };
    wait_until("it is ready", || ask("/health").0 == 200);
    let filler = disk.fill();
    wait_until("lines are lost", || {
        (0..100).for_each(|_| assert_eq!(ask("/health").0, 200));
        !ask("/metrics").1.contains("\nbvit_log_lines_lost_total 0\n")
    });
    std::fs::remove_file(filler).unwrap();
    // The next whole line stands by itself, whatever became of the last one.
    wait_until("lines are written again", || {
        ask("/health");
        std::fs::read_to_string(&log).unwrap().contains("log lines were lost")
    });
    let text = std::fs::read_to_string(&log).unwrap();
    let torn = text.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).is_err()).count();
    assert!(torn <= 1, "{torn} lines are torn");
    let pid = child.id();
    assert!(Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
