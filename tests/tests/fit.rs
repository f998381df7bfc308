//! Sets that the server fits to the examples that were sent to it: served when they are done, rolled back, and never half there.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use model_core::artifact::read_expert_set;
use reqwest::blocking::multipart::{Form, Part};
use serde_json::{Value, json};
use system_tests::disk::SmallDisk;
use system_tests::fixtures::striped;
use system_tests::server::{Answer, PATIENCE, Server, image, root, wait_until};

/// A model store with the models for photographs, and a folder for examples.
struct Place {
    folder: PathBuf,
    /// Deletes the folder with the place.
    _temporary: Option<tempfile::TempDir>,
}

impl Place {
    fn new() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let place = Self::within(temporary.path());
        Self { _temporary: Some(temporary), ..place }
    }

    fn within(folder: &Path) -> Self {
        let place = Self { folder: folder.to_owned(), _temporary: None };
        for (from, to) in [
            ("photo-backbone", "backbones/photo"),
            ("default-backbone", "backbones/default"),
            ("imagenet", "expert-sets/imagenet/1"),
        ] {
            let to = place.store().join(format!("{to}.safetensors"));
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(root().join(format!("models/{from}.safetensors")), to).unwrap();
        }
        place
    }

    fn store(&self) -> PathBuf {
        self.folder.join("store")
    }

    fn serve(&self, flags: &[&str]) -> Server {
        let (store, examples) = (self.store(), self.folder.join("examples"));
        let own = ["--model-store", path(&store), "--examples", path(&examples), "--default-set", "imagenet"];
        Server::start(own.iter().chain(flags))
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Sends pictures of both directions.
fn send(server: &Server, seeds: std::ops::Range<u64>) {
    for (label, upright) in [("up", true), ("across", false)] {
        for some in seeds.clone().collect::<Vec<_>>().chunks(16) {
            let part = |seed: &u64| Part::bytes(striped(upright, *seed)).file_name(format!("{seed}.png"));
            let form = some.iter().fold(Form::new(), |form, seed| form.part(format!("image{seed}"), part(seed)));
            let answer = Answer::of(server.post(&format!("/teach/stripes/examples?label={label}")).multipart(form));
            assert_eq!(answer.status, 201, "{}", answer.text);
        }
    }
}

fn begin(server: &Server) -> Answer {
    Answer::of(server.post("/teach/stripes/fit"))
}

fn state(server: &Server) -> Value {
    server.get("/teach/stripes/fit").json()
}

/// What a fit comes to.
fn end(server: &Server) -> Value {
    let begun = Instant::now();
    loop {
        let now = state(server);
        if now["state"] != "running" {
            return now;
        }
        assert!(begun.elapsed() < PATIENCE, "{now}");
        sleep(Duration::from_millis(20));
    }
}

fn refused(answer: &Answer, status: u16, code: &str, words: &str) {
    answer.assert_refused(status, code);
    assert!(answer.json()["error"].as_str().unwrap().contains(words), "{}", answer.text);
}

/// Label and version that a new picture gets.
fn verdict(server: &Server, upright: bool) -> (String, Value) {
    let answer = Answer::of(server.post("/classify/stripes").body(striped(upright, 77)));
    (answer.label(), answer.json()["version"].clone())
}

#[test]
fn examples_become_a_set_that_is_corrected_fitted_again_and_rolled_back() {
    let place = Place::new();
    let server = place.serve(&[]);
    assert_eq!(state(&server)["state"], "none");
    refused(&begin(&server), 409, "conflict", "two classes");
    send(&server, 0..6);
    let begun = begin(&server);
    assert_eq!((begun.status, &begun.json()["state"], &begun.json()["images"]), (202, &json!("running"), &json!(12)));
    let done = end(&server);
    assert_eq!(
        (&done["state"], &done["version"], &done["backbone"]),
        (&json!("done"), &json!(1), &json!("photo")),
        "{done}"
    );
    assert_eq!(done["report"]["accuracy"]["of"], 12, "{done}");
    assert_eq!(verdict(&server, true), ("up".to_owned(), json!(1)));
    assert_eq!(verdict(&server, false), ("across".to_owned(), json!(1)));

    // The set is a thing that one can hold.
    let listed = server.get("/sets/stripes").json();
    let details = &listed[0]["details"];
    assert_eq!((&details["labels"], &details["knows_unknown"]), (&json!(["across", "up"]), &json!(true)), "{listed}");
    for key in ["count", "of", "share", "low", "high"] {
        let of = |report: &Value| report[key].as_f64().unwrap();
        let (kept, said) = (of(&details["accuracy"]), of(&done["report"]["accuracy"]));
        // A set keeps four digits of its report.
        assert!((kept - said).abs() <= 5e-5, "{key}: {kept} and {said}");
    }
    assert_eq!(&server.get("/sets/stripes/1").json(), details);
    let file = fs::read(place.store().join("expert-sets/stripes/1.safetensors")).unwrap();
    for path in ["/sets/stripes/file", "/sets/stripes/1/file", "/sets/stripes/current/file"] {
        let answer = reqwest::blocking::get(server.url(path)).unwrap();
        assert_eq!(answer.headers()["content-length"], file.len().to_string(), "{path}");
        assert_eq!(answer.bytes().unwrap(), file, "{path}");
    }
    server.get("/sets/stripes/7/file").assert_refused(404, "set_not_found");
    server.get("/sets/stripes/07/file").assert_refused(400, "invalid_request");

    // A wrong one is corrected, a broken file and a black picture are left out.
    let wrong = Answer::of(server.post("/teach/stripes/examples?label=across").body(striped(true, 9))).json();
    let wrong = format!("/teach/stripes/examples/{}", wrong[0]["id"].as_str().unwrap());
    assert_eq!(server.get(&wrong).header("content-type"), Some("image/png"));
    assert_eq!(Answer::of(server.request("PATCH", &format!("{wrong}?label=up"))).status, 200);
    let cut = image("photo-cat.jpg")[..2000].to_vec();
    assert_eq!(Answer::of(server.post("/teach/stripes/examples?label=up").body(cut)).status, 201);
    assert_eq!(begin(&server).status, 202);
    let done = end(&server);
    assert_eq!((&done["state"], &done["version"]), (&json!("done"), &json!(2)), "{done}");
    assert_eq!((done["report"]["images"].as_u64(), done["images"].as_u64()), (Some(13), Some(14)), "{done}");
    assert_eq!(done["left_out"].as_array().unwrap().len(), 1, "{done}");
    assert_eq!(verdict(&server, true), ("up".to_owned(), json!(2)));

    assert_eq!(Answer::of(server.request("DELETE", "/sets/stripes/2")).status, 200);
    assert_eq!(verdict(&server, true), ("up".to_owned(), json!(1)), "rolled back");
    for (query, words) in [
        ("backbone=default", "no set on it has experts"),
        ("base=imagenet", "no experts to borrow"),
        ("backbone=none", "there is no such backbone"),
        ("crop=1,2,30,40", "not in pixels"),
        ("fit=round", "fit"),
    ] {
        let answer = Answer::of(server.post(&format!("/teach/stripes/fit?{query}")));
        refused(&answer, 400, "invalid_request", words);
    }
}

#[test]
fn an_embedded_set_is_described_to_all_and_given_to_those_who_may_classify() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    fs::write(&keys, "reader:a-long-secret\n").unwrap();
    let server = Server::start(["--user-key-file", path(&keys)]);
    let details = server.get("/sets/cifar100/current").json();
    assert_eq!((details["labels"].as_array().unwrap().len(), &details["accuracy"]), (100, &Value::Null));
    server.get("/sets/cifar100/file").assert_refused(401, "unauthorized");
    let answer = server.request("GET", "/sets/cifar100/file").header("x-api-key", "a-long-secret").send().unwrap();
    assert_eq!(answer.bytes().unwrap(), fs::read(root().join("models/cifar100.safetensors")).unwrap());
}

#[test]
fn one_fit_runs_at_a_time_and_a_cancelled_one_changes_nothing() {
    let place = Place::new();
    let server = place.serve(&[]);
    send(&server, 0..14);
    refused(&Answer::of(server.request("DELETE", "/teach/stripes/fit")), 409, "conflict", "no fit");
    assert_eq!(begin(&server).status, 202);
    refused(&begin(&server), 409, "conflict", "`stripes` is under way");
    let cancelled = Answer::of(server.request("DELETE", "/teach/stripes/fit"));
    assert_eq!((cancelled.status, &cancelled.json()["state"]), (200, &json!("cancelled")), "{}", cancelled.text);
    // The next one begins at once, and is not disturbed by what is left of the one before.
    assert_eq!(begin(&server).status, 202);
    assert_eq!(server.get("/sets/stripes").status, 404);
    assert_eq!(end(&server)["state"], "done");
    assert_eq!(server.get("/sets/stripes").json().as_array().unwrap().len(), 1);

    // A set that is deleted meanwhile does not come back.
    assert_eq!(begin(&server).status, 202);
    assert_eq!(Answer::of(server.request("DELETE", "/sets/stripes")).status, 200);
    let failed = end(&server);
    assert_eq!(failed["state"], "failed");
    assert!(failed["reason"].as_str().unwrap().contains("deleted meanwhile"), "{failed}");
    assert_eq!(server.get("/sets/stripes").status, 404);
}

#[test]
fn a_server_that_is_killed_in_a_fit_has_its_examples_and_the_last_good_version() {
    let place = Place::new();
    let server = place.serve(&[]);
    send(&server, 0..6);
    assert_eq!(begin(&server).status, 202);
    assert_eq!(end(&server)["state"], "done");
    send(&server, 6..14);
    let examples = server.get("/teach/stripes").json()["examples"].clone();
    drop(server);
    // At the beginning, amid the pictures, and near the end.
    for share in [0.0, 0.3, 0.75] {
        let server = place.serve(&[]);
        assert_eq!(begin(&server).status, 202);
        wait_until("the fit is so far", || state(&server)["progress"].as_f64().unwrap() >= share);
        drop(server);
        let server = place.serve(&[]);
        assert_eq!(server.get("/teach/stripes").json()["examples"], examples);
        assert_eq!(verdict(&server, true).0, "up");
        assert_eq!(state(&server)["state"], "none");
        let left = fs::read_dir(place.store().join("expert-sets")).unwrap().flatten();
        let left: Vec<_> = left.filter(|entry| entry.file_name().to_string_lossy().starts_with('.')).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn what_cannot_be_fitted_is_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(["--examples", path(folder.path())]);
    send(&server, 0..2);
    refused(&begin(&server), 409, "conflict", "--model-store");
    drop(server);
    let place = Place::new();
    let server = place.serve(&["--memory-budget", "32MiB"]);
    send(&server, 0..2);
    assert_eq!(begin(&server).status, 202);
    let failed = end(&server);
    assert_eq!(failed["state"], "failed");
    assert!(failed["reason"].as_str().unwrap().contains("raise --memory-budget"), "{failed}");
    drop(server);
    let server = place.serve(&[]);
    assert_eq!(Answer::of(server.post("/teach/stripes/examples?label=half").body(striped(true, 50))).status, 201);
    refused(&begin(&server), 409, "conflict", "`half` has 1 image");
    refused(&Answer::of(server.post("/teach/a%20b/fit")), 400, "invalid_request", "no name of a set");
    // The file of the backbone goes while the server runs.
    fs::write(place.store().join("backbones/photo.safetensors"), "junk").unwrap();
    assert_eq!(Answer::of(server.post("/teach/stripes/examples?label=half").body(striped(true, 51))).status, 201);
    assert_eq!(begin(&server).status, 202);
    let failed = end(&server);
    assert_eq!(failed["state"], "failed");
    assert!(failed["reason"].as_str().unwrap().contains("the backbone `photo`"), "{failed}");
    assert!(!failed.to_string().contains(path(&place.store())), "{failed}");
}

#[test]
fn a_full_disk_refuses_examples_and_new_versions_and_loses_nothing() {
    // Room for the models, and for little else.
    let Some(disk) = SmallDisk::mount("12m") else { return };
    let place = Place::within(disk.path());
    let server = place.serve(&[]);
    send(&server, 0..6);
    begin(&server);
    assert_eq!(end(&server)["state"], "done");
    let filler = disk.fill();
    let answer = Answer::of(server.post("/teach/stripes/examples?label=up").body(striped(true, 100)));
    refused(&answer, 507, "disk_full", "the disk of --examples is full");
    let listed = server.get("/teach/stripes").json();
    assert_eq!(listed["examples"].as_array().unwrap().len(), 12, "no example came and none went: {listed}");
    begin(&server);
    let failed = end(&server);
    assert_eq!((&failed["state"], &failed["version"]), (&json!("failed"), &Value::Null), "{failed}");
    assert!(failed["reason"].as_str().unwrap().contains("the disk of the model store is full"), "{failed}");
    assert_eq!(verdict(&server, true), ("up".to_owned(), json!(1)), "the version before is served");
    fs::remove_file(filler).unwrap();
    disk.remount("ro");
    let answer = Answer::of(server.post("/teach/stripes/examples?label=up").body(striped(true, 100)));
    refused(&answer, 409, "conflict", "cannot be written to");
    disk.remount("rw");
    let answer = Answer::of(server.post("/teach/stripes/examples?label=up").body(striped(true, 100)));
    assert_eq!(answer.status, 201, "there is room again: {}", answer.text);
    begin(&server);
    assert_eq!(end(&server)["version"], 2);
    assert_eq!(verdict(&server, true), ("up".to_owned(), json!(2)));
}

#[test]
fn on_a_backbone_with_blocks_a_set_borrows_the_experts_of_another() {
    let place = Place::new();
    let to = place.store().join("expert-sets/cifar100/1.safetensors");
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(root().join("models/cifar100.safetensors"), to).unwrap();
    let server = place.serve(&[]);
    send(&server, 0..6);
    let fit = |query: &str| Answer::of(server.post(&format!("/teach/stripes/fit?{query}")));
    refused(&fit("backbone=default&base=imagenet"), 400, "invalid_request", "on another backbone");
    refused(&fit("backbone=default&base=none"), 404, "set_not_found", "none");
    assert_eq!(fit("backbone=default").status, 202);
    let done = end(&server);
    assert_eq!((&done["state"], &done["backbone"]), (&json!("done"), &json!("default")), "{done}");
    assert_eq!(verdict(&server, true), ("up".to_owned(), json!(1)));
    assert_eq!(verdict(&server, false), ("across".to_owned(), json!(1)));
    let sets = server.get("/sets").json()["sets"].as_array().unwrap().clone();
    let view = |name: &str| sets.iter().find(|set| set["name"] == name).unwrap().clone();
    assert!(view("stripes")["base"].is_string(), "{}", view("stripes"));
    assert!(
        view("stripes")["file_bytes"].as_u64() < view("cifar100")["file_bytes"].as_u64(),
        "it has no experts of its own"
    );
    let kept = Answer::of(server.request("DELETE", "/sets/cifar100"));
    refused(&kept, 409, "conflict", "stripes");
    refused(&fit("base=stripes"), 400, "invalid_request", "borrows its experts itself");
    // Without a word the next version borrows where this one does.
    assert_eq!(fit("").status, 202);
    assert_eq!(end(&server)["version"], 2);
    drop(server);
    let server = place.serve(&[]);
    assert_eq!(verdict(&server, true), ("up".to_owned(), json!(2)), "after a restart");
}

/// The files of features that fits have kept, by name, with what is in them and when they were written.
fn kept(place: &Place) -> Vec<(PathBuf, Vec<u8>, SystemTime)> {
    let files = fs::read_dir(place.folder.join("examples/stripes/.features")).unwrap();
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    let read =
        |path: PathBuf| (path.clone(), fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
    files.into_iter().map(read).collect()
}

#[test]
fn features_of_one_fit_serve_the_next_and_damaged_ones_are_computed_anew() {
    let place = Place::new();
    let server = place.serve(&[]);
    send(&server, 0..3);
    let fitted = |version: u64| {
        assert_eq!(begin(&server).status, 202);
        assert_eq!(end(&server)["version"], version);
        fs::read(place.store().join(format!("expert-sets/stripes/{version}.safetensors"))).unwrap()
    };
    let used = || server.get("/teach/stripes").json()["used_bytes"].as_u64().unwrap();
    let before = used();
    let first = fitted(1);
    let features = kept(&place);
    assert_eq!(features.len(), 6);
    assert_eq!(used() - before, features.iter().map(|(_, bytes, _)| bytes.len() as u64).sum::<u64>());
    assert!(fitted(2) == first, "the same set from features that were kept");
    assert!(kept(&place) == features, "none was computed anew");

    let [cut, empty, changed, gone, ..] = &features[..] else { panic!("six files") };
    fs::write(&cut.0, &cut.1[..cut.1.len() - 5]).unwrap();
    fs::write(&empty.0, "").unwrap();
    let mut flipped = changed.1.clone();
    flipped[100] ^= 64;
    fs::write(&changed.0, flipped).unwrap();
    fs::remove_file(&gone.0).unwrap();
    assert!(fitted(3) == first, "the same set whatever became of the features");
    let contents = |files: &[(PathBuf, Vec<u8>, SystemTime)]| -> Vec<_> {
        files.iter().map(|(path, bytes, _)| (path.clone(), bytes.clone())).collect()
    };
    assert!(contents(&kept(&place)) == contents(&features), "and they are whole again");
    let warned = server.log_so_far().iter().filter(|line| line.contains("features of an example are damaged")).count();
    assert_eq!(warned, 3);

    // Another part of the picture has features of its own.
    let other = Answer::of(server.post("/teach/stripes/fit?crop=0,0,0.5,0.5"));
    assert_eq!((other.status, &end(&server)["version"]), (202, &json!(4)));
    assert!(contents(&kept(&place)) != contents(&features));

    // They go with their example, also those that a crash left without one.
    let id = cut.0.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(Answer::of(server.request("DELETE", &format!("/teach/stripes/examples/{id}"))).status, 200);
    assert!(!cut.0.exists());
    let (bytes, lone) = (used(), cut.0.with_file_name("0123456789abcdef01234567"));
    drop(server);
    fs::write(&lone, "of no example").unwrap();
    let server = place.serve(&[]);
    assert_eq!((lone.exists(), server.get("/teach/stripes").json()["used_bytes"].as_u64()), (false, Some(bytes)));
}

/// The set of the store's `cifar100` under another name and with an identity of its own.
fn twin(name: &str) -> Vec<u8> {
    let file = fs::read(root().join("models/cifar100.safetensors")).unwrap();
    let mut artifact = read_expert_set(&file).unwrap();
    artifact.name = name.to_owned();
    artifact.to_bytes().unwrap()
}

#[test]
fn a_base_lends_whatever_its_newer_versions_borrow_and_may_go_while_a_fit_runs() {
    let place = Place::new();
    let put = |name: &str, version: u64, bytes: &[u8]| {
        let to = place.store().join(format!("expert-sets/{name}/{version}.safetensors"));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, bytes).unwrap();
    };
    put("cifar100", 1, &fs::read(root().join("models/cifar100.safetensors")).unwrap());
    let server = place.serve(&[]);
    send(&server, 0..14);
    let fit = |query: &str| Answer::of(server.post(&format!("/teach/stripes/fit?{query}")));
    let base = json!({ "set": "cifar100", "version": 1 });
    let begun = fit("backbone=default");
    assert_eq!((begun.status, &begun.json()["base"]), (202, &base), "{}", begun.text);
    assert_eq!(end(&server)["base"], base);

    // A newer version of the base that borrows itself hides nothing.
    let borrower = fs::read(place.store().join("expert-sets/stripes/1.safetensors")).unwrap();
    let upload = |path: &str, bytes: Vec<u8>| Answer::of(server.request("PUT", path).body(bytes));
    assert_eq!(upload("/sets/cifar100/2", borrower).status, 201);
    for query in ["base=cifar100", ""] {
        let begun = fit(query);
        assert_eq!((begun.status, &begun.json()["base"]), (202, &base), "{query}: {}", begun.text);
        assert_eq!(end(&server)["state"], "done");
    }

    // A base that goes or changes while the fit runs: a sentence, and what was there stays.
    for replace in [false, true] {
        assert_eq!(upload("/sets/twin/1", twin("twin")).status, 201);
        // A part of the pictures of which no features are kept, so that the fit takes its time.
        let begun = fit(&format!("base=twin&crop=0,0,0.9,0.{}", if replace { 8 } else { 9 }));
        assert_eq!((begun.status, &begun.json()["base"]["set"]), (202, &json!("twin")), "{}", begun.text);
        let answer = match replace {
            true => upload("/sets/twin/1", twin("another")),
            false => Answer::of(server.request("DELETE", "/sets/twin")),
        };
        assert!([200, 201].contains(&answer.status), "{}", answer.text);
        let failed = end(&server);
        assert_eq!((&failed["state"], &failed["version"]), (&json!("failed"), &Value::Null), "{failed}");
        let reason = failed["reason"].as_str().unwrap();
        assert!(reason.contains("twin") || reason.contains("experts"), "{reason}");
        assert_eq!(verdict(&server, true), ("up".to_owned(), json!(3)));
        assert_eq!(server.get("/teach/stripes").json()["examples"].as_array().unwrap().len(), 28);
        Answer::of(server.request("DELETE", "/sets/twin"));
    }
    assert_eq!(fit("").status, 202);
    assert_eq!(end(&server)["version"], 4);
}
