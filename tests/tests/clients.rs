//! Clients nobody here wrote: Triton's and Hugging Face's own. `tests/run.sh` installs them into `target/venv`.

use std::process::Command;

use system_tests::server::{Server, image, root};

/// Runs a script of `tests/clients` against a server with the shipped model as `photos` (two versions) and `spare`.
fn run(script: &str) {
    let python = root().join("target/venv/bin/python");
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", python.display());
        eprintln!("skipped: {} is missing; tests/run.sh makes it", python.display());
        return;
    }
    let store = tempfile::tempdir().unwrap();
    let models = root().join("models");
    for (from, to) in [
        ("default-backbone.safetensors", "backbones/default.safetensors"),
        ("cifar100.safetensors", "expert-sets/photos/1.safetensors"),
        ("cifar100.safetensors", "expert-sets/photos/2.safetensors"),
        ("cifar100.safetensors", "expert-sets/spare/1.safetensors"),
    ] {
        let to = store.path().join(to);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(models.join(from), to).unwrap();
    }
    let server = Server::start([std::ffi::OsStr::new("--model-store"), store.path().as_os_str()]);
    let picture = "test-00.png";
    let output = Command::new(python)
        .arg(root().join("tests/clients").join(script))
        .arg(server.address.to_string())
        .arg(root().join("tests/images").join(picture))
        .arg(server.classify(&image(picture)).label())
        .output()
        .expect("python runs");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn triton() {
    run("triton.py");
}

#[test]
fn hugging_face() {
    run("hugging_face.py");
}
