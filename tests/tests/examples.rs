//! Pictures with labels over HTTP: kept once, within a budget, and through the death of the server.

use std::path::Path;

use model_core::image::{DecodeLimits, RgbImage, probe};
use reqwest::blocking::multipart::{Form, Part};
use serde_json::{Value, json};
use system_tests::server::{Answer, Server, image, png, wait_until};

fn serve(folder: &Path, flags: &[&str]) -> Server {
    Server::start(["--examples", folder.to_str().unwrap()].iter().chain(flags))
}

fn add(server: &Server, label: &str, picture: Vec<u8>) -> Answer {
    Answer::of(server.post(&format!("/teach/door/examples?label={label}")).body(picture))
}

#[test]
fn examples_are_kept_listed_relabelled_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), &[]);
    let picture = image("test-00.png");
    let answer = add(&server, "open", picture.clone());
    assert_eq!(answer.status, 201, "{}", answer.text);
    let first = answer.json()[0].clone();
    assert_eq!((&first["label"], &first["new"]), (&json!("open"), &json!(true)));
    assert_eq!(add(&server, "open", picture.clone()).json()[0]["new"], false, "kept once");
    add(&server, "closed", picture.clone()).assert_refused(409, "conflict");

    let part = |name: &str, bytes: Vec<u8>| Part::bytes(bytes).file_name(name.to_owned());
    let form = Form::new()
        .part("a", part("a.png", image("test-01.png")))
        .part("b", part("b.png", b"no picture".to_vec()))
        .part("c", part("c.png", image("test-02.png")));
    let many = Answer::of(server.post("/teach/door/examples?label=half%20open").multipart(form));
    assert_eq!(many.status, 201, "{}", many.text);
    let kinds: Vec<bool> = many.json().as_array().unwrap().iter().map(|item| item["new"] == true).collect();
    assert_eq!(kinds, [true, false, true], "{}", many.text);
    let listing = server.get("/teach/door").json();
    assert_eq!(listing["labels"], json!({ "open": 1, "half open": 2 }));

    let path = format!("/teach/door/examples/{}", first["id"].as_str().unwrap());
    assert_eq!(Answer::of(server.request("PATCH", &format!("{path}?label=closed"))).json()["label"], "closed");
    // The folder is what `butterflyvit teach` reads.
    let file = folder.path().join("door/closed").join(first["id"].as_str().unwrap());
    assert_eq!(std::fs::read(file).unwrap(), picture);
    assert_eq!(Answer::of(server.request("DELETE", &path)).status, 200);
    Answer::of(server.request("DELETE", &path)).assert_refused(404, "example_not_found");

    for (label, body) in [("a%2Fb", picture.clone()), ("", picture.clone()), (".x", picture), ("open", Vec::new())] {
        assert_eq!(add(&server, label, body).status, 400, "{label}");
    }
    add(&server, "open", b"no picture".to_vec()).assert_refused(415, "unsupported_media_type");
}

#[test]
fn large_pictures_are_kept_small_and_once() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), &[]);
    let large = png(&RgbImage::from_fn(3000, 2000, |x, y| [(x / 12) as u8, (y / 8) as u8, (x * y / 7) as u8].into()));
    let kept = add(&server, "open", large.clone()).json()[0].clone();
    assert_eq!(kept["new"], true, "{kept}");
    assert!(kept["bytes"].as_u64().unwrap() < 500_000, "{kept}: {} were sent", large.len());
    let id = kept["id"].as_str().unwrap();
    let stored = std::fs::read(folder.path().join("door/open").join(id)).unwrap();
    assert_eq!(stored.len() as u64, kept["bytes"].as_u64().unwrap());
    let info = probe(&stored, &DecodeLimits::default()).unwrap();
    assert_eq!((info.width, info.height), (1024, 682));
    assert_eq!(server.get("/teach/door").json()["used_bytes"], kept["bytes"]);
    assert_eq!(add(&server, "open", large.clone()).json()[0]["new"], false, "told by what was sent");
    // Half a picture has a header that is whole.
    add(&server, "open", large[..large.len() / 2].to_vec()).assert_refused(422, "undecodable_image");
}

#[test]
fn a_server_that_is_killed_has_every_example_that_it_confirmed() {
    let folder = tempfile::tempdir().unwrap();
    let mut confirmed: Vec<Value> = Vec::new();
    for round in 0..3 {
        let server = serve(folder.path(), &[]);
        assert_eq!(server.get("/teach/door").json()["examples"].as_array().unwrap().len(), confirmed.len());
        for i in 0..4 {
            let name = format!("test-{:02}.png", round * 4 + i);
            let mut example = add(&server, "open", image(&name)).json()[0].clone();
            example.as_object_mut().unwrap().remove("new");
            confirmed.push(example);
        }
        // Dropping it kills it.
        drop(server);
    }
    confirmed.sort_by_key(|example| example["id"].as_str().unwrap().to_owned());
    assert_eq!(serve(folder.path(), &[]).get("/teach/door").json()["examples"], json!(confirmed));
}

#[test]
fn without_a_folder_or_room_nothing_is_kept() {
    let server = Server::start([] as [&str; 0]);
    let refused = add(&server, "open", image("test-00.png"));
    refused.assert_refused(409, "conflict");
    assert!(refused.json()["error"].as_str().unwrap().contains("--examples"), "{}", refused.text);
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), &["--examples-budget", "1KiB"]);
    let refused = add(&server, "open", image("photo-cat.jpg"));
    refused.assert_refused(507, "disk_full");
    assert!(refused.json()["error"].as_str().unwrap().contains("--examples-budget"), "{}", refused.text);
}

#[test]
fn the_last_frames_that_were_not_named_wait_for_a_label() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), &["--keep-unsure", "2"]);
    let unsure = || server.get("/teach/cifar100").json()["unsure"].as_array().unwrap().clone();
    let ids = || unsure().iter().map(|frame| frame["id"].clone()).collect::<Vec<_>>();
    // Pictures that are named are not kept, nor are those that show nothing.
    assert_eq!(server.classify(&image("test-00.png")).status, 200);
    let mut before = ids();
    for name in ["test-01.png", "test-02.png", "test-03.png"] {
        wait_until("the frame is kept", || {
            // Not more often than once a second, and not while another one is written.
            assert_eq!(Answer::of(server.post("/classify?min_score=1").body(image(name))).status, 200);
            ids() != before
        });
        before = ids();
    }
    assert_eq!(before.len(), 2, "the last two are kept");
    assert!(unsure().iter().all(|frame| frame["reason"] == "unsure"), "{:?}", unsure());
    let path = |id: &Value| format!("/teach/cifar100/examples/{}", id.as_str().unwrap());
    assert_eq!(server.get(&path(&before[1])).header("content-type"), Some("image/png"));
    let labelled = Answer::of(server.request("PATCH", &format!("{}?label=cat", path(&before[1]))));
    assert_eq!(labelled.json()["label"], "cat", "{}", labelled.text);
    assert_eq!(Answer::of(server.request("DELETE", &path(&before[0]))).json()["deleted"], before[0]);
    let listing = server.get("/teach/cifar100").json();
    assert_eq!((&listing["labels"], &listing["unsure"]), (&json!({ "cat": 1 }), &json!([])));
}
