//! Clients nobody here wrote: Triton's and Hugging Face's own, and one that a program makes of the OpenAPI document; the
//! examples of `docs/clients.md`; and the add-on that Home Assistant starts the server by.

use std::ffi::OsStr;

use system_tests::fixtures::shipped_store;
use system_tests::python;
use system_tests::server::{Server, binary, image, root, wait_until};
use system_tests::snapshots::{CameraFile, Snapshots, camera};

/// Runs a script of `tests/clients` against a server with the shipped model as `photos` (two versions) and `spare`.
fn run(script: &str) {
    let Some(mut python) = python::program("python") else { return };
    let store = shipped_store(&["photos/1", "photos/2", "spare/1"]);
    let server = Server::start([OsStr::new("--model-store"), store.path().as_os_str()]);
    let picture = "test-00.png";
    python
        .arg(root().join("tests/clients").join(script))
        .arg(server.address.to_string())
        .arg(root().join("tests/images").join(picture))
        .arg(server.classify(&image(picture)).label());
    python::succeed(&mut python);
}

#[test]
fn triton() {
    run("triton.py");
}

#[test]
fn hugging_face() {
    run("hugging_face.py");
}

#[test]
fn generated_from_the_openapi_document() {
    run("generated.py");
}

#[test]
fn documented_examples() {
    let Some(mut python) = python::program("python") else { return };
    let picture = "photo-coffee.jpg";
    let snapshots = Snapshots::start();
    snapshots.show(image(picture));
    let file = CameraFile::of(&camera("garage", &snapshots.url("/now"), "frozen = 0"));
    let server = file.serve();
    let label = server.classify(&image(picture)).label();
    wait_until("the camera has a state", || server.get("/cameras/garage").json()["state"] == label.as_str());
    python
        .arg("clients/documented.py")
        .arg(server.address.to_string())
        .arg(root().join("tests/images").join(picture))
        .arg(label);
    python::succeed(&mut python);
}

#[test]
fn home_assistant_starts_the_add_on() {
    let Some(mut python) = python::program("python") else { return };
    python::succeed(python.arg("home-assistant/addon.py").arg(binary()));
}
