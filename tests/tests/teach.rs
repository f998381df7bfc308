//! `butterflyvit teach`: folders become sets that a running server answers with.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use model_core::artifact::read_expert_set;
use serde_json::Value;
use system_tests::fixtures::striped;
use system_tests::server::{Answer, Server, binary, root};

fn examples(folder: &Path) {
    for (label, upright) in [("up \u{e9}", true), ("across", false)] {
        fs::create_dir(folder.join(label)).unwrap();
        for seed in 0..5 {
            fs::write(folder.join(label).join(format!("{seed}.png")), striped(upright, seed)).unwrap();
        }
    }
}

fn teach(folder: &Path, flags: &[&str]) -> Output {
    Command::new(binary()).arg("teach").arg(folder).args(["--set", "stripes", "--json"]).args(flags).output().unwrap()
}

/// The one line that says why nothing was taught, after those that name what was left out.
fn refusal(output: &Output) -> String {
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    let text: Vec<&str> = lines.lines().filter(|line| !line.starts_with("butterflyvit: left out: ")).collect();
    let text = text.join("\n");
    assert_eq!((output.status.code(), text.lines().count()), (Some(2), 1), "{text}");
    text
}

#[test]
fn a_folder_becomes_a_set_that_a_running_server_answers_with() {
    let scratch = tempfile::tempdir().unwrap();
    let (folder, store, keys) =
        (scratch.path().join("images"), scratch.path().join("store"), scratch.path().join("keys"));
    fs::create_dir(&folder).unwrap();
    examples(&folder);
    fs::write(folder.join("across/broken.png"), "no image").unwrap();
    fs::write(&keys, "tests:a-long-secret\n").unwrap();
    let output = teach(&folder, &["--store", store.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("broken.png"));
    assert!(store.join("backbones/photo.safetensors").is_file(), "the embedded backbone is copied");

    let server = Server::start([
        "--model-store".as_ref(),
        store.as_os_str(),
        "--default-set".as_ref(),
        "stripes".as_ref(),
        "--admin-key-file".as_ref(),
        keys.as_os_str(),
    ]);
    let url = server.url("/");
    let upload = ["--server", &url, "--admin-key-file", keys.to_str().unwrap()];
    let output = teach(&folder, &upload);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["version"], 2, "the version after the one that is there: {said}");
    for (label, upright) in [("up \u{e9}", true), ("across", false)] {
        let answer = Answer::of(server.post("/classify/stripes").body(striped(upright, 77)));
        assert_eq!((&*answer.label(), &answer.json()["version"]), (label, &Value::from(2)), "{}", answer.text);
        assert!(answer.json()["unknown"].is_boolean(), "the set has statistics");
    }

    fs::write(&keys, "tests:another-secret\n").unwrap();
    let refused = refusal(&teach(&folder, &upload));
    assert!(refused.contains("does not take the set"), "{refused}");
    assert_eq!(server.get("/sets/stripes").json().as_array().unwrap().len(), 2);
}

#[test]
fn what_cannot_be_taught_is_one_sentence_and_nothing_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let (folder, store) = (scratch.path().join("images"), scratch.path().join("store"));
    let store = ["--store", store.to_str().unwrap()];
    fs::create_dir(&folder).unwrap();
    let no_classes = refusal(&teach(&folder, &store));
    assert!(no_classes.contains("no subfolders"), "{no_classes}");
    examples(&folder);
    let nobody = refusal(&teach(&folder, &["--server", "http://127.0.0.1:1"]));
    assert!(nobody.contains("127.0.0.1:1"), "{nobody}");
    let no_address = refusal(&teach(&folder, &["--server", "127.0.0.1"]));
    assert!(no_address.contains("no address of a server"), "{no_address}");
    let nowhere = refusal(&teach(&folder, &[]));
    assert!(nowhere.contains("--store"), "{nowhere}");
    let no_backbone = refusal(&teach(&folder, &[store[0], store[1], "--backbone", "none-such"]));
    assert!(no_backbone.contains("none-such"), "{no_backbone}");

    fs::copy(folder.join("across/0.png"), folder.join("up \u{e9}/same.png")).unwrap();
    let twice = refusal(&teach(&folder, &store));
    assert!(twice.contains("same.png") && twice.contains("the same image"), "{twice}");
    fs::remove_dir_all(folder.join("up \u{e9}")).unwrap();
    let one = refusal(&teach(&folder, &store));
    assert!(one.contains("one class, `across`"), "{one}");
    fs::create_dir(folder.join("lone")).unwrap();
    fs::copy(folder.join("across/0.png"), folder.join("lone/0.png")).unwrap();
    fs::remove_file(folder.join("across/0.png")).unwrap();
    let few = refusal(&teach(&folder, &store));
    assert!(few.contains("`lone` has 1 image"), "{few}");
    assert!(!Path::new(store[1]).join("expert-sets").exists());
}

#[test]
fn a_folder_without_a_picture_that_can_be_read_is_one_sentence() {
    let scratch = tempfile::tempdir().unwrap();
    let (folder, store) = (scratch.path().join("images"), scratch.path().join("store"));
    for label in ["across", "up"] {
        fs::create_dir_all(folder.join(label)).unwrap();
        (0..3).for_each(|i| fs::write(folder.join(label).join(format!("{i}.jpg")), format!("no picture {i}")).unwrap());
    }
    let output = teach(&folder, &["--store", store.to_str().unwrap()]);
    assert_eq!(String::from_utf8_lossy(&output.stderr).matches("not an image").count(), 6, "each is named");
    let refused = refusal(&output);
    assert!(refused.contains("`across` has 0 images"), "{refused}");
    assert!(!store.exists());
}

#[test]
fn labels_are_the_names_of_folders_whatever_they_are() {
    let scratch = tempfile::tempdir().unwrap();
    let (folder, store) = (scratch.path().join("images"), scratch.path().join("store"));
    let labels = ["-x; rm *", "T\u{fc}r & <b>\"it's\" 100%?", "\u{65e5}\u{672c}\u{8a9e} \u{1f642}\u{200d}"];
    for (label, upright) in labels.into_iter().zip([true, false, true]) {
        fs::create_dir_all(folder.join(label)).unwrap();
        let seeds = if label == labels[2] { 10..15 } else { 0..5 };
        seeds.for_each(|seed| {
            fs::write(folder.join(label).join(format!("{seed}.png")), striped(upright, seed)).unwrap()
        });
    }
    let output = teach(&folder, &["--store", store.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let server = Server::start(["--model-store", store.to_str().unwrap(), "--default-set", "stripes"]);
    let listed = server.get("/sets/stripes/1").json();
    let listed: Vec<&str> = listed["labels"].as_array().unwrap().iter().map(|label| label.as_str().unwrap()).collect();
    assert_eq!(listed, labels);
    assert_eq!(Answer::of(server.post("/classify").body(striped(false, 77))).label(), labels[1]);
}

#[test]
fn on_a_backbone_with_blocks_a_set_borrows_experts() {
    let scratch = tempfile::tempdir().unwrap();
    let (folder, store) = (scratch.path().join("images"), scratch.path().join("store"));
    fs::create_dir(&folder).unwrap();
    examples(&folder);
    let flags = |more: &[&'static str]| [&["--store", store.to_str().unwrap(), "--backbone"], more].concat();
    for (more, words) in [
        (&["default", "--base", "none-such"][..], "no set `none-such`"),
        (&["default", "--base", "imagenet"], "on another backbone"),
        (&["photo", "--base", "cifar100"], "has no blocks"),
    ] {
        let refused = refusal(&teach(&folder, &flags(more)));
        assert!(refused.contains(words), "{refused}");
    }
    assert!(!store.join("expert-sets").exists());
    for version in 1..3 {
        let output = teach(&folder, &flags(&["default"]));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&said["version"], said["base_copied_to"].is_string()),
            (&Value::from(version), version == 1),
            "{said}"
        );
    }
    let server = Server::start(["--model-store", store.to_str().unwrap(), "--default-set", "stripes"]);
    for (label, upright) in [("up \u{e9}", true), ("across", false)] {
        assert_eq!(Answer::of(server.post("/classify").body(striped(upright, 77))).label(), label);
    }
    // With another set that could lend, the next version borrows where this one does, and a new set must choose.
    let base = fs::read(root().join("models/cifar100.safetensors")).unwrap();
    let mut twin = read_expert_set(&base).unwrap();
    twin.name = "twin".to_owned();
    let path = store.join("expert-sets/twin/1.safetensors");
    fs::create_dir(path.parent().unwrap()).unwrap();
    fs::write(path, twin.to_bytes().unwrap()).unwrap();
    let output = teach(&folder, &flags(&["default"]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let third = read_expert_set(&fs::read(store.join("expert-sets/stripes/3.safetensors")).unwrap()).unwrap();
    assert_eq!(third.borrowed_experts, Some(read_expert_set(&base).unwrap().digest));
    let mut fresh = Command::new(binary());
    fresh.arg("teach").arg(&folder).args(["--set", "fresh", "--json"]).args(flags(&["default"]));
    let refused = refusal(&fresh.output().unwrap());
    assert!(refused.contains("choose one with --base: cifar100, twin"), "{refused}");
    // Its own borrowers lend nothing.
    let refused = refusal(&teach(&folder, &flags(&["default", "--base", "stripes"])));
    assert!(refused.contains("borrows its experts itself"), "{refused}");
}
