//! Expert sets over HTTP: what an administrator may do with them, and what goes wrong with uploads.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use model_core::artifact::{Digest, Header, read_expert_set};
use model_core::config::ViTConfig;
use model_core::footprint::loading_bytes;
use serde_json::Value;
use system_tests::fixtures::{backbone_artifact, borrower_artifact, expert_set_artifact, write, write_store};
use system_tests::server::{Answer, PATIENCE, Server, image, wait_until};
use tempfile::TempDir;

/// A store of tiny random models and the server on it.
struct Gateway {
    store: TempDir,
    backbone: Digest,
    server: Server,
}

impl Gateway {
    fn start(sets: &[&str], flags: &[&str]) -> Self {
        let store = tempfile::tempdir().unwrap();
        let backbone = write_store(store.path(), &config(), sets);
        let server = serve(store.path(), flags);
        Self { store, backbone, server }
    }

    fn artifact(&self, name: &str, seed: u64) -> Vec<u8> {
        expert_set_artifact(&config(), self.backbone, name, seed)
    }

    fn put(&self, path: &str, bytes: &[u8]) -> Answer {
        Answer::of(self.server.request("PUT", path).body(bytes.to_vec()))
    }

    fn post(&self, path: &str) -> Answer {
        Answer::of(self.server.post(path))
    }

    fn set(&self, name: &str) -> Value {
        self.server.get(&format!("/sets/{name}")).json()[0].clone()
    }

    fn classify(&self, set: &str) -> Answer {
        Answer::of(self.server.post(&format!("/classify/{set}")).body(image("test-00.png")))
    }

    /// Every file of the store, without the folder's own path.
    fn files(&self) -> Vec<PathBuf> {
        files(self.store.path(), self.store.path())
    }
}

fn config() -> ViTConfig {
    ViTConfig::preset("tiny").unwrap()
}

fn serve(store: &Path, flags: &[&str]) -> Server {
    Server::start(["--model-store", store.to_str().unwrap()].iter().chain(flags))
}

/// Accounted bytes by kind.
fn accounted(server: &Server) -> Value {
    server.get("/sets").json()["memory"]["kinds"].clone()
}

fn files(root: &Path, folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(root, &path));
        } else {
            found.push(path.strip_prefix(root).unwrap().to_path_buf());
        }
    }
    found.sort();
    found
}

#[test]
fn an_uploaded_set_answers_and_can_be_pinned_unloaded_and_deleted() {
    let gateway = Gateway::start(&["alpha"], &[]);
    let answer = gateway.put("/sets/flowers/1", &gateway.artifact("flowers", 9));
    assert_eq!(answer.status, 201, "{}", answer.text);
    let first = gateway.classify("flowers").json();
    assert_eq!(first["generation"], answer.json()["generation"]);
    assert_ne!(first["predictions"], gateway.classify("alpha").json()["predictions"]);

    assert_eq!(gateway.post("/sets/flowers/pin").status, 200);
    assert_eq!(gateway.set("flowers")["pinned"], true);
    gateway.post("/sets/flowers/unload").assert_refused(409, "conflict");
    Answer::of(gateway.server.request("DELETE", "/sets/flowers")).assert_refused(409, "conflict");
    assert_eq!(gateway.post("/sets/flowers/unpin").status, 200);
    assert_eq!(gateway.post("/sets/flowers/unload").status, 200);
    assert_eq!(gateway.set("flowers")["state"], "registered");
    assert_eq!(gateway.post("/sets/flowers/load").status, 200);
    assert_eq!(gateway.set("flowers")["state"], "resident");
    assert_eq!(gateway.classify("flowers").json()["predictions"], first["predictions"]);

    assert_eq!(Answer::of(gateway.server.request("DELETE", "/sets/flowers")).status, 200);
    gateway.classify("flowers").assert_refused(404, "set_not_found");
    assert_eq!(gateway.files().len(), 2, "{:?}", gateway.files());
    Answer::of(gateway.server.request("DELETE", "/sets/alpha")).assert_refused(409, "conflict");
}

#[test]
fn sets_that_borrow_experts_keep_their_lender() {
    let gateway = Gateway::start(&["alpha"], &[]);
    let base = gateway.artifact("base", 9);
    let same = borrower_artifact(&base, "same", |_| ());
    gateway.put("/sets/same/1", &same).assert_refused(422, "lender_mismatch");
    assert_eq!(gateway.files().len(), 2, "{:?}", gateway.files());
    assert_eq!(gateway.put("/sets/base/1", &base).status, 201);
    let other = borrower_artifact(&base, "other", |set| set.weights.head.bias[3] += 100.0);
    for (name, bytes) in [("same", &same), ("other", &other)] {
        let answer = gateway.put(&format!("/sets/{name}/1"), bytes);
        assert_eq!(answer.status, 201, "{}", answer.text);
        assert_eq!(answer.json()["base"], gateway.set("base")["generation"]);
    }
    let predictions = |set: &str| gateway.classify(set).json()["predictions"].clone();
    let expected = predictions("same");
    assert_eq!(gateway.set("base")["state"], "resident", "a borrower brings its lender");
    assert_eq!(expected, predictions("base"));
    assert_eq!(predictions("other")[0]["index"], 3);
    let (same, base_bytes) = (gateway.set("same"), gateway.set("base")["resident_bytes"].as_u64());
    assert!(same["resident_bytes"].as_u64() < base_bytes, "{same}");

    let borrowed = |answer: Answer| {
        answer.assert_refused(409, "conflict");
        assert!(answer.json()["error"].as_str().unwrap().contains("`other/1`, `same/1`"), "{}", answer.text);
    };
    borrowed(Answer::of(gateway.server.request("DELETE", "/sets/base")));
    borrowed(Answer::of(gateway.server.request("DELETE", "/sets/base/1")));
    borrowed(gateway.put("/sets/base/1", &gateway.artifact("base", 10)));
    // A newer version stands beside the one that is borrowed.
    assert_eq!(gateway.put("/sets/base/2", &gateway.artifact("base", 10)).status, 201);
    assert_ne!(predictions("base"), expected);
    assert_eq!(predictions("same"), expected);
    let chain = borrower_artifact(&base, "chain", |set| {
        set.borrowed_experts = Some(read_expert_set(&other).unwrap().digest);
    });
    gateway.put("/sets/chain/1", &chain).assert_refused(422, "lender_mismatch");

    for name in ["same", "other", "base"] {
        assert_eq!(Answer::of(gateway.server.request("DELETE", &format!("/sets/{name}"))).status, 200, "{name}");
    }
    assert_eq!(gateway.files().len(), 2, "{:?}", gateway.files());
}

#[test]
fn a_store_of_borrowers_is_found_in_any_order() {
    let store = tempfile::tempdir().unwrap();
    let backbone = write_store(store.path(), &config(), &["zebra"]);
    let lender = expert_set_artifact(&config(), backbone, "zebra", 2);
    let path = |name: &str| store.path().join("expert-sets").join(name).join("1.safetensors");
    write(&path("ant"), &borrower_artifact(&lender, "ant", |_| ()));
    write(&path("bee"), &borrower_artifact(&expert_set_artifact(&config(), backbone, "gone", 3), "bee", |_| ()));
    let server = serve(store.path(), &["--default-set", "ant"]);
    let ask = |set: &str| Answer::of(server.post(&format!("/classify/{set}")).body(image("test-00.png"))).json();
    assert_eq!(ask("ant")["predictions"], ask("zebra")["predictions"]);
    let broken = server.get("/sets").json()["broken"].clone();
    assert_eq!(broken[0]["file"], "bee/1.safetensors");
    assert!(broken[0]["reason"].as_str().unwrap().contains("which is not here"), "{broken}");
}

/// Guarantee 7: readers never see half a file, and what is refused leaves nothing behind.
#[test]
fn uploads_that_cannot_be_served_are_refused_whole() {
    let gateway = Gateway::start(&["alpha"], &[]);
    let before = gateway.files();
    let good = gateway.artifact("flowers", 9);
    let (_, other_backbone) = backbone_artifact(&config().backbone, 77);
    let foreign = expert_set_artifact(&config(), other_backbone, "flowers", 9);
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for (bytes, status, code) in [
        (&good[..good.len() / 2], 422, "invalid_artifact"),
        (&good[..7], 422, "invalid_artifact"),
        (&flipped, 422, "invalid_artifact"),
        (&foreign, 422, "backbone_mismatch"),
        (&image("test-00.png"), 422, "invalid_artifact"),
        (&[], 400, "empty_body"),
    ] {
        gateway.put("/sets/flowers/1", bytes).assert_refused(status, code);
        // The same in the place of a set that is there: it stays.
        gateway.put("/sets/alpha/1", bytes).assert_refused(status, code);
    }
    assert_eq!(gateway.files(), before);
    assert_eq!(gateway.classify("alpha").status, 200);
    gateway.classify("flowers").assert_refused(404, "set_not_found");
}

#[test]
fn names_cannot_leave_the_store() {
    let gateway = Gateway::start(&["alpha"], &[]);
    let (before, good) = (gateway.files(), gateway.artifact("flowers", 9));
    let long = "n".repeat(300);
    let names = ["..%2f..%2fetc", "a%2fb", "a%00b", ".hidden", "%e2%98%83", "a%20b", "a%0ab", "C:%5cx", &long];
    for name in names {
        let answer = gateway.put(&format!("/sets/{name}/1"), &good);
        answer.assert_refused(400, "invalid_request");
    }
    for version in ["0x1", "-1", "01", "1.5", "99999999999999999999999", "one"] {
        gateway.put(&format!("/sets/flowers/{version}"), &good).assert_refused(400, "invalid_request");
    }
    // Client libraries tidy dots away before they send, so these go out by hand.
    for path in [
        "/sets/../1",
        "/sets/%2e%2e/1",
        "/sets/alpha/%2e%2e",
        "/sets/../../x/1",
        "/sets/%ff/1",
        "//sets//1",
        "/sets/alpha/../../../1",
    ] {
        let mut connection = gateway.server.connect();
        let head = format!(
            "PUT {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            good.len()
        );
        let (status, text) = connection.send(head.as_bytes()).send(&good).read();
        assert!(matches!(status, 400 | 404 | 405), "{path}: {text}");
    }
    assert_eq!(gateway.files(), before);
}

/// Guarantees 7 and 8: a request that starts after the answer to a replacement gets the new generation,
/// and none fails meanwhile.
#[test]
fn a_set_is_replaced_under_load_without_a_failed_request() {
    let gateway = Gateway::start(&["alpha"], &[]);
    let (stop, answered, start) = (AtomicBool::new(false), AtomicUsize::new(0), Instant::now());
    let generations: Vec<Vec<u8>> = (10..13).map(|seed| gateway.artifact("alpha", seed)).collect();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let answer = gateway.classify("alpha");
                        assert_eq!(answer.status, 200, "{}", answer.text);
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        for (number, bytes) in generations.iter().cycle().enumerate() {
            let enough = answered.load(Ordering::Relaxed) >= 30 || start.elapsed() > PATIENCE;
            if number >= 30 && enough {
                break;
            }
            let replaced = gateway.put("/sets/alpha/1", bytes);
            assert_eq!(replaced.status, 200, "{}", replaced.text);
            assert_eq!(gateway.classify("alpha").json()["generation"], replaced.json()["generation"]);
        }
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
    });
    assert!(answered.load(Ordering::Relaxed) >= 30, "the load was too light to show anything");
}

#[test]
fn a_kill_in_the_middle_of_an_upload_leaves_a_clean_store() {
    let mut gateway = Gateway::start(&["alpha"], &[]);
    let (before, good) = (gateway.files(), gateway.artifact("alpha", 9));
    let generation = gateway.set("alpha")["generation"].clone();
    let mut connection = gateway.server.connect();
    let head = format!("PUT /sets/alpha/1 HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {}\r\n\r\n", good.len());
    connection.send(head.as_bytes()).send(&good[..good.len() - 1]);
    // The temporary file shows that the upload has begun.
    wait_until("the upload has begun", || gateway.files() != before);
    gateway.server.signal("KILL");
    gateway.server.wait();

    let server = serve(gateway.store.path(), &[]);
    assert_eq!(gateway.files(), before, "what was left half-done is gone");
    assert_eq!(server.get("/sets/alpha").json()[0]["generation"], generation);
    assert_eq!(server.get("/sets").json()["broken"], serde_json::json!([]));
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
}

#[test]
fn management_needs_the_admin_key_and_classification_the_user_key() {
    let store = tempfile::tempdir().unwrap();
    write_store(store.path(), &config(), &["alpha"]);
    let (admins, users) = (store.path().join("admins"), store.path().join("users"));
    std::fs::write(&admins, "ops:admin-key-0123456789\n").unwrap();
    std::fs::write(&users, "camera:user-key-0123456789\n").unwrap();
    let flags = ["--admin-key-file", admins.to_str().unwrap(), "--user-key-file", users.to_str().unwrap()];
    let server = serve(store.path(), &flags);
    let send = |method: &str, path: &str, key: &str| {
        let request = server.request(method, path).body(image("test-00.png"));
        Answer::of(if key.is_empty() { request } else { request.bearer_auth(key) })
    };
    let (admin, user) = ("admin-key-0123456789", "user-key-0123456789");
    for path in ["/sets/alpha/load", "/sets/alpha/pin", "/sets/alpha/unpin", "/v2/repository/models/alpha/unload"] {
        send("POST", path, "").assert_refused(401, "unauthorized");
        send("POST", path, "admin-key-012345678").assert_refused(401, "unauthorized");
        send("POST", path, user).assert_refused(403, "forbidden");
        assert_eq!(Answer::of(server.post(path).bearer_auth(admin)).status, 200, "{path}");
    }
    for path in ["/classify", "/hf/alpha"] {
        send("POST", path, "").assert_refused(401, "unauthorized");
        assert_eq!(send("POST", path, user).status, 200);
        assert_eq!(send("POST", path, admin).status, 200);
    }
    send("PUT", "/sets/beta/1", user).assert_refused(403, "forbidden");
    send("DELETE", "/sets/alpha", "").assert_refused(401, "unauthorized");
}

/// The key is read from the environment too, has a name there, and is in no line of the log, where the name is.
#[test]
fn keys_come_from_the_environment_and_are_never_logged() {
    let store = tempfile::tempdir().unwrap();
    write_store(store.path(), &config(), &["alpha"]);
    let key = "admin-key-0123456789";
    let keys = format!("ops:{key},night:another-key-0123456789");
    let flags = ["--model-store", store.path().to_str().unwrap(), "--log", "trace"];
    let server = Server::start_with(flags, [("BVIT_ADMIN_KEYS", keys.as_str())]);
    for (key, status) in [(key, 200), ("another-key-0123456789", 200), ("wrong-key-0123456789", 401)] {
        assert_eq!(Answer::of(server.post("/sets/alpha/load").bearer_auth(key)).status, status);
        assert_eq!(Answer::of(server.post("/sets/alpha/load").header("x-api-key", key)).status, status);
    }
    let mut logged = server.log_so_far();
    let start = Instant::now();
    while !logged.iter().any(|line| line.contains("by=\"night\"")) {
        assert!(start.elapsed() < PATIENCE, "who loaded the set is not in {logged:#?}");
        logged.extend(server.log_so_far());
    }
    let telling: Vec<_> = logged.iter().filter(|line| line.contains("key-0123456789")).collect();
    assert!(telling.is_empty(), "{telling:#?}");
}

#[test]
fn a_name_may_have_200_characters() {
    let gateway = Gateway::start(&["alpha"], &[]);
    let (name, artifact) = ("n".repeat(200), gateway.artifact("n", 9));
    assert_eq!(gateway.put(&format!("/sets/{name}/1"), &artifact).status, 201);
    assert_eq!(gateway.classify(&name).json()["set"], name);
    assert_eq!(Answer::of(gateway.server.request("DELETE", &format!("/sets/{name}"))).status, 200);
    gateway.put(&format!("/sets/{name}n/1"), &artifact).assert_refused(400, "invalid_request");
}

/// Guarantees 1 and 3, by the real server: what is pinned stays, a set that cannot fit beside it is 507, and without
/// the pin the two take turns.
#[test]
fn a_pinned_set_stays_and_what_cannot_fit_beside_it_is_507() {
    let store = tempfile::tempdir().unwrap();
    write_store(store.path(), &config(), &["alpha", "beta"]);
    let roomy = serve(store.path(), &["--pin", "alpha"]);
    let used = roomy.get("/sets").json()["memory"]["accounted_bytes"].as_u64().unwrap();
    // Room for one set, and for loading it.
    let header = Header::read(&store.path().join("expert-sets/beta/1.safetensors")).unwrap();
    let budget = (used + loading_bytes(&header.contents, header.file_bytes)).to_string();
    // A store has one server at a time.
    drop(roomy);
    let classify =
        |server: &Server, set: &str| Answer::of(server.post(&format!("/classify/{set}")).body(image("test-00.png")));

    let pinned = serve(store.path(), &["--memory-budget", &budget, "--pin", "alpha"]);
    classify(&pinned, "beta").assert_refused(507, "set_too_large");
    assert_eq!(classify(&pinned, "alpha").status, 200);
    assert_eq!(pinned.metric("bvit_set_resident{pinned=\"true\",set=\"alpha\"}"), 1.0);
    Answer::of(pinned.post("/sets/alpha/unload")).assert_refused(409, "conflict");

    drop(pinned);
    let free = serve(store.path(), &["--memory-budget", &budget]);
    for set in ["alpha", "beta", "alpha", "beta"] {
        assert_eq!(classify(&free, set).status, 200);
        let total = free.get("/sets").json()["memory"]["accounted_bytes"].as_u64().unwrap();
        assert!(total <= budget.parse().unwrap());
    }
    assert_eq!(free.metric("bvit_set_evictions_total{reason=\"budget\"}"), 3.0);
    assert_eq!(free.metric("bvit_sets_resident"), 1.0);
}

/// Guarantee 13, by the real server.
#[test]
fn one_bad_file_stops_nothing_unless_strict() {
    let store = tempfile::tempdir().unwrap();
    write_store(store.path(), &config(), &["alpha"]);
    write(&store.path().join("expert-sets/torn/1.safetensors"), b"no artifact");
    let server = serve(store.path(), &[]);
    assert_eq!(server.get("/v2/health/ready").status, 200);
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
    assert_eq!(server.get("/sets").json()["broken"][0]["file"], "torn/1.safetensors");
    assert_eq!(server.metric("bvit_sets_failed"), 1.0);
    drop(server);
    let strict = std::process::Command::new(system_tests::server::binary())
        .args(["--listen", "127.0.0.1:0", "--strict", "--model-store"])
        .arg(store.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&strict.stderr);
    assert_eq!(strict.status.code(), Some(2), "{said}");
    assert!(said.contains("torn/1.safetensors"), "{said}");
}

#[test]
fn two_backbones_serve_side_by_side_and_leave_with_their_last_set_when_asked() {
    let store = tempfile::tempdir().unwrap();
    write_store(store.path(), &config(), &["alpha"]);
    let (bytes, other) = backbone_artifact(&config().backbone, 77);
    write(&store.path().join("backbones/other.safetensors"), &bytes);
    for (name, seed) in [("beta", 21), ("gamma", 22)] {
        let bytes = expert_set_artifact(&config(), other, name, seed);
        write(&store.path().join(format!("expert-sets/{name}/1.safetensors")), &bytes);
    }
    let server = serve(store.path(), &["--drop-idle-backbones"]);
    let backbones = || accounted(&server)["backbone"].as_u64().unwrap();
    let classify = |set: &str| {
        let answer = Answer::of(server.post(&format!("/classify/{set}")).body(image("test-00.png")));
        assert_eq!(answer.status, 200, "{}", answer.text);
    };
    let one = backbones();
    for set in ["beta", "gamma", "alpha"] {
        classify(set);
        assert_eq!(backbones(), 2 * one, "each once, whatever the number of its sets");
    }
    for (set, left) in [("beta", 2), ("gamma", 1)] {
        assert_eq!(Answer::of(server.post(&format!("/sets/{set}/unload"))).status, 200);
        wait_until("the backbone stays exactly as long as a set of it", || backbones() == left * one);
    }
    classify("gamma");
    assert_eq!(backbones(), 2 * one);
}

/// One batch, many sets: what shares a forward pass with others is answered as it is alone, to the last bit.
#[test]
fn images_of_different_sets_share_batches_and_answer_as_alone() {
    let names = ["alpha", "beta", "gamma", "delta"];
    let gateway = Gateway::start(&names, &["--compute-threads", "1", "--max-wait", "30ms"]);
    let alone: Vec<Value> = names.iter().map(|name| gateway.classify(name).json()["predictions"].clone()).collect();
    let (gateway, start) = (&gateway, Instant::now());
    let sum = |of: &str| gateway.server.metric(&format!("bvit_batch_distinct_sets_{of}"));
    while sum("sum") < sum("count") + 20.0 {
        assert!(start.elapsed() < PATIENCE, "batches are hardly mixed");
        thread::scope(|scope| {
            for (name, alone) in names.iter().zip(&alone) {
                scope.spawn(move || assert_eq!(gateway.classify(name).json()["predictions"], *alone, "{name}"));
            }
        });
    }
}

#[test]
fn a_watched_store_notices_files_put_there_by_hand() {
    let gateway = Gateway::start(&["alpha"], &["--watch-store", "20ms"]);
    let path = gateway.store.path().join("expert-sets/flowers/1.safetensors");
    write(&path, &gateway.artifact("flowers", 9));
    wait_until("the set is known", || gateway.server.get("/sets/flowers").status == 200);
    assert_eq!(gateway.classify("flowers").status, 200);
    std::fs::remove_file(path).unwrap();
    wait_until("the set is forgotten", || gateway.server.get("/sets/flowers").status == 404);
}

#[test]
fn an_empty_store_begins_with_the_embedded_models() {
    let store = tempfile::tempdir().unwrap();
    let server = serve(store.path(), &[]);
    assert_eq!(Answer::of(server.post("/classify").body(image("photo-coffee.jpg"))).label(), "espresso");
    let seeded = files(store.path(), store.path());
    for file in ["backbones/photo", "backbones/default", "expert-sets/imagenet/1", "expert-sets/cifar100/1"] {
        let path = PathBuf::from(format!("{file}.safetensors"));
        assert!(seeded.contains(&path), "{file} in {seeded:?}");
    }
    drop(server);

    // What is deleted later stays deleted.
    std::fs::remove_dir_all(store.path().join("expert-sets/imagenet")).unwrap();
    let server = serve(store.path(), &[]);
    assert_eq!(server.get("/sets/imagenet").status, 404);
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
}

#[test]
fn backbones_are_uploaded_once_and_never_replaced() {
    let gateway = Gateway::start(&["roses"], &[]);
    let names = || -> Vec<String> {
        let listed = gateway.server.get("/backbones").json();
        listed.as_array().unwrap().iter().map(|backbone| backbone["name"].as_str().unwrap().to_owned()).collect()
    };
    let (bytes, digest) = backbone_artifact(&config().backbone, 7);
    let before = gateway.files();
    gateway.put("/backbones/main", &bytes).assert_refused(409, "conflict");
    gateway.put("/backbones/.hidden", &bytes).assert_refused(400, "invalid_request");
    gateway.put("/backbones/second", &[]).assert_refused(400, "empty_body");
    gateway.put("/backbones/second", &bytes[..bytes.len() - 1]).assert_refused(422, "invalid_artifact");
    let mut torn = bytes.clone();
    *torn.last_mut().unwrap() ^= 1;
    gateway.put("/backbones/second", &torn).assert_refused(422, "invalid_artifact");
    gateway.put("/backbones/second", &gateway.artifact("lilies", 3)).assert_refused(422, "invalid_artifact");
    assert_eq!((gateway.files(), names()), (before, vec!["main".to_owned()]));

    let answer = gateway.put("/backbones/second", &bytes);
    assert_eq!((answer.status, answer.json()["digest"].as_str()), (201, Some(&*digest.to_string())));
    let again = gateway.put("/backbones/third", &bytes);
    assert_eq!(
        (again.status, again.json()["name"].as_str()),
        (200, Some("second")),
        "the same contents are one backbone"
    );
    assert_eq!(names(), ["main", "second"]);
    let set = expert_set_artifact(&config(), digest, "lilies", 3);
    assert_eq!(gateway.put("/sets/lilies/1", &set).status, 201);
    assert_eq!(gateway.classify("lilies").status, 200);
}
