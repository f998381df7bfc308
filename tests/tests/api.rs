//! The API is what `/openapi.json` says it is: every route, every method, every example, and
//! whatever schemathesis makes up.

use std::ffi::OsStr;
use std::path::Path;

use system_tests::fixtures::shipped_store;
use system_tests::python;
use system_tests::server::{Answer, Server, binary, image, root};

const METHODS: [&str; 5] = ["GET", "POST", "PUT", "DELETE", "PATCH"];

#[test]
fn a_path_takes_exactly_the_documented_methods() {
    let store = shipped_store(&["cifar100/1"]);
    let server = Server::start([OsStr::new("--model-store"), store.path().as_os_str()]);
    let document = server.get("/openapi.json").json();
    for (path, item) in document["paths"].as_object().unwrap() {
        // Nothing exists by these names, so no request changes anything.
        let concrete = path.replace("{set}", "nobody").replace("{name}", "nobody");
        let concrete = concrete.replace("{version}", "7").replace("{file}", "nothing").replace("{id}", "0a1b");
        let mut documented: Vec<_> =
            METHODS.into_iter().filter(|method| !item[method.to_lowercase()].is_null()).collect();
        documented.sort_unstable();
        for method in METHODS {
            let answer = Answer::of(server.request(method, &concrete));
            if documented.contains(&method) {
                assert!(![405, 500].contains(&answer.status), "{method} {path}: {}", answer.text);
                continue;
            }
            answer.assert_refused(405, "method_not_allowed");
            let allow = answer.header("allow").unwrap();
            let mut allowed: Vec<_> = allow.split(',').map(str::trim).filter(|method| *method != "HEAD").collect();
            allowed.sort_unstable();
            assert_eq!(allowed, documented, "{path}");
        }
    }
}

#[test]
fn every_documented_example_works_as_pasted() {
    let Some(mut python) = python::program("python") else { return };
    let store = shipped_store(&["cifar100/1", "flowers/1"]);
    let photo = std::fs::read(root().join("models/photo-backbone.safetensors")).unwrap();
    std::fs::write(store.path().join("backbones/photo.safetensors"), photo).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("admin-key");
    let flags = [OsStr::new("--model-store"), store.path().as_os_str(), OsStr::new("--default-set")];
    let pictures = folder.path().join("examples");
    let kept = [OsStr::new("--examples"), pictures.as_os_str()];
    let more = [OsStr::new("cifar100"), OsStr::new("--admin-key-out"), key.as_os_str()];
    let server = Server::start(flags.into_iter().chain(more).chain(kept));
    // Examples that manage sets call `butterflyvit admin-key`.
    std::os::unix::fs::symlink(binary(), folder.path().join("butterflyvit")).unwrap();
    let programs = [folder.path().display().to_string(), std::env::var("PATH").unwrap()].join(":");
    python.env("PATH", programs).env("BVIT_ADMIN_KEY_OUT", &key);
    std::fs::write(folder.path().join("cat.jpg"), image("test-00.jpg")).unwrap();
    let photograph = root().join("model-core/tests/pictures/jpeg_progressive_4000x3000_420.jpg");
    std::fs::copy(photograph, folder.path().join("cam.jpg")).unwrap();
    for (model, name) in [("cifar100", "flowers"), ("photo-backbone", "photo")] {
        let path = |folder: &Path, name: &str| folder.join(name).with_extension("safetensors");
        std::fs::copy(path(&root().join("models"), model), path(folder.path(), name)).unwrap();
    }
    python::succeed(python.arg("api/examples.py").arg(server.address.to_string()).arg(root()).arg(folder.path()));
}

/// All checks but one, with keys configured so that unguarded routes would show. `use_after_free` takes a name that was
/// deleted for gone for good, but an upload may bring it back, and does in some of the generated sequences; that deleted
/// sets are gone is tested in `expert_sets.rs`.
#[test]
fn schemathesis_finds_nothing() {
    let Some(mut schemathesis) = python::program("schemathesis") else { return };
    let store = shipped_store(&["cifar100/1", "spare/1"]);
    let file = |name: &str, text: &str| {
        let path = store.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.into_os_string()
    };
    let admins = file("admins", "admin:schemathesis-admin\n");
    let users = file("users", "user:schemathesis-user\n");
    let server = Server::start([
        OsStr::new("--model-store"),
        store.path().as_os_str(),
        OsStr::new("--default-set"),
        OsStr::new("cifar100"),
        OsStr::new("--admin-key-file"),
        &admins,
        OsStr::new("--user-key-file"),
        &users,
    ]);
    schemathesis
        .current_dir(root().join("tests/api"))
        .args(["--config-file", "schemathesis.toml", "run", &server.url("/openapi.json"), "--checks", "all"])
        .args(["--exclude-checks", "use_after_free"])
        .args(["--header", "Authorization: Bearer schemathesis-admin"])
        .env("BVIT_TEST_IMAGES", root().join("tests/images"))
        .env("BVIT_TEST_SET", root().join("models/cifar100.safetensors"));
    let requests = || {
        let metrics = server.get("/metrics").text;
        let answered = metrics.lines().filter(|line| line.starts_with("bvit_http_requests_total{"));
        answered.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    python::succeed(&mut schemathesis);
    assert!(requests() >= 2_000.0, "{} requests", requests());
}
