//! The console and the documentation page in a real Chromium.

use model_core::artifact::{read_backbone, write_expert_set};
use model_core::config::ViTConfig;
use serde_json::json;
use system_tests::fixtures::{expert_set_weights, shipped_store, write};
use system_tests::python;
use system_tests::server::{binary, image_names, root};

/// Markup that would run where a label or a name became more than text.
const MARKUP: &str = "<img src=x onerror=window.pwned=1>";

/// An expert set for the shipped backbone whose labels are markup.
fn markup_set(name: &str) -> Vec<u8> {
    let backbone = std::fs::read(root().join("models/default-backbone.safetensors")).unwrap();
    let backbone = read_backbone(&backbone).unwrap();
    let preset = ViTConfig::preset("tiny").unwrap();
    let config = ViTConfig { backbone: backbone.weights.config.clone(), ..preset };
    let mut weights = expert_set_weights(&config, 7);
    weights.labels = (0..config.num_classes).map(|class| format!("{MARKUP}{class}")).collect();
    write_expert_set(name, &weights, (&config.backbone, backbone.digest), &json!({})).unwrap()
}

#[test]
fn the_console_works_in_a_browser() {
    let Some(mut python) = python::program("python") else { return };
    let chromium = std::path::Path::new("/usr/bin/chromedriver");
    if !chromium.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", chromium.display());
        eprintln!("skipped: {} is missing; tests/run.sh installs it", chromium.display());
        return;
    }
    let store = shipped_store(&["photos/1", "spare/1"]);
    let longest = "n".repeat(200);
    let sets = store.path().join("expert-sets");
    write(&sets.join(&longest).join("1.safetensors"), &markup_set(&longest));
    write(&sets.join("spare").join(format!("{MARKUP}.safetensors")), b"not an artifact");
    let photo = std::fs::read(root().join("models/photo-backbone.safetensors")).unwrap();
    write(&store.path().join("backbones/photo.safetensors"), &photo);
    let picture = image_names().into_iter().find(|name| name.ends_with(".png")).unwrap();
    python
        .arg("browser/console.py")
        .arg(binary())
        .arg(store.path())
        .arg(root().join("models/cifar100.safetensors"))
        .arg(root().join("tests/images").join(picture))
        .arg(root().join("target/screenshots"));
    python::succeed(&mut python);
}
