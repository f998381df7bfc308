//! `FORMAT.md` says enough: a reader written from it alone, in Python, sees the same pixels and the same logits.

#[path = "../../model-core/tests/common/mod.rs"]
mod common;

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{files, minute_config};
use model_core::artifact::{read_backbone, read_expert_set};
use model_core::config::{AngleSeed, FloatFormat, Generator, StemLayer, SubstrateConfig, TernaryPacking, ViTConfig};
use model_core::image::RgbImage;
use model_core::projection::Projection;
use serde::Deserialize;

/// What `FORMAT.md` promises.
const TOLERANCE: f64 = 1e-3;

#[derive(Deserialize)]
struct Answer {
    pixels: Vec<f32>,
    logits: Vec<f64>,
    labels: Vec<String>,
}

/// An interpreter that has NumPy: the one in the path, or the distribution's.
fn python_with_numpy() -> Option<&'static str> {
    ["python3", "/usr/bin/python3"].into_iter().find(|python| {
        let status = Command::new(python).args(["-c", "import numpy"]).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    })
}

fn photo(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (f64::from(x), f64::from(y));
        let wave = |phase: f64| (128.0 + 120.0 * (x / 3.1 + y / 4.7 + phase).sin()) as u8;
        [wave(0.0), wave(2.0), (7.0 * x + 5.0 * y) as u8].into()
    })
}

/// Distance of two vectors in their largest component.
fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn independent_answer(python: &str, folder: &Path, image: &RgbImage) -> Answer {
    let mut reader = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/independent_reader.py"))
        .args([folder.join("backbone"), folder.join("set")])
        .args([image.width().to_string(), image.height().to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    reader.stdin.take().unwrap().write_all(image.as_raw()).unwrap();
    let output = reader.wait_with_output().unwrap();
    assert!(output.status.success(), "the independent reader failed; its complaint is above");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What `butterflyvit-trainer logits --float` prints for a file.
#[derive(Deserialize)]
struct Printed {
    labels: Vec<String>,
    logits: Vec<f64>,
}

fn float_path(folder: &Path, image: &RgbImage) -> Printed {
    let file = folder.join("image.png");
    image.save(&file).unwrap();
    printed(&file, [&folder.join("backbone"), &folder.join("set")], None)
}

fn printed(image: &Path, [backbone, set]: [&Path; 2], lender: Option<&Path>) -> Printed {
    let mut trainer = Command::new(env!("CARGO_BIN_EXE_butterflyvit-trainer"));
    trainer.arg("logits").arg(image).arg("--backbone").arg(backbone).arg("--set").arg(set).arg("--float");
    if let Some(lender) = lender {
        trainer.arg("--lender").arg(lender);
    }
    let output = trainer.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_reader_written_from_the_format_document_reproduces_pixels_and_logits() {
    let Some(python) = python_with_numpy() else {
        assert!(std::env::var_os("CI").is_none(), "python3 with numpy is required here");
        eprintln!("skipped: there is no python3 with numpy");
        return;
    };
    let tiny = ViTConfig::preset("tiny").unwrap();
    let mut without_out_rotation = tiny.clone();
    without_out_rotation.experts.stages_out = 0;
    without_out_rotation.experts.angle_bits = 4;
    // Strided, padded convolutions whose last windows hang over the edge, and three heads.
    let mut strided = tiny.clone();
    strided.backbone.image_size = 15;
    strided.backbone.stem =
        vec![StemLayer::conv3(6, 2), StemLayer { padding: [2; 4], kernel: 4, ..StemLayer::conv3(24, 3) }];
    (strided.backbone.d_model, strided.backbone.num_heads) = (24, 3);
    (strided.experts.stages_in, strided.experts.angle_bits, strided.experts.router_bits) = (3, 16, 16);

    // Every encoding of version 2 that a random model can have.
    let mut packed = tiny.clone();
    packed.backbone.substrates =
        SubstrateConfig { shared: true, packing: TernaryPacking::FiveTrits, scales: FloatFormat::F16 };
    packed.experts.angle_seed = Some(AngleSeed { generator: Generator::SplitMix64, seed: 5, spread_bits: 3 });
    (packed.experts.router_bits, packed.experts.router_scales) = (4, FloatFormat::F16);
    // Nothing turns features that come in odd numbers.
    let mut odd = tiny.clone();
    odd.backbone.stem[2].channels = 15;
    (odd.backbone.d_model, odd.backbone.d_ff, odd.backbone.num_heads) = (15, 27, 3);
    (odd.experts.stages_in, odd.experts.stages_hidden, odd.experts.stages_out) = (0, 0, 0);

    for (name, config) in [
        ("folded", tiny.clone()),
        ("packed", packed),
        ("odd", odd),
        ("minute", minute_config()),
        ("tiny", tiny),
        ("without an out rotation", without_out_rotation),
        ("strided", strided),
    ] {
        let mut files = files(&config, 11);
        if name == "folded" {
            files.expert_set = folded(&files.expert_set);
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("backbone"), &files.backbone).unwrap();
        std::fs::write(folder.path().join("set"), &files.expert_set).unwrap();
        let preprocess = read_backbone(&files.backbone).unwrap().preprocess;
        let side = config.backbone.image_size;
        for (width, height) in [(side as u32, side as u32), (37, 23), (5, 11)] {
            let image = photo(width, height);
            let answer = independent_answer(python, folder.path(), &image);
            assert_eq!(answer.pixels, preprocess.pixels(&image, side), "{name}, {width}x{height}");
            let Printed { labels, logits } = float_path(folder.path(), &image);
            assert_eq!(answer.labels, labels);
            let error = largest_difference(&logits, &answer.logits);
            println!("{name}, {width}x{height}: off by {error:.1e}");
            assert!(error < TOLERANCE, "{name}, {width}x{height}: off by {error}");
        }
    }
}

/// The set with a head that sees fewer features than the backbone has.
fn folded(set: &[u8]) -> Vec<u8> {
    let mut artifact = read_expert_set(set).unwrap();
    let features = artifact.backbone.d_model * 2 / 3;
    let mut rows = artifact.weights.head.weight.to_f32().into_owned();
    rows.truncate(artifact.weights.labels.len() * features);
    artifact.weights.head.weight = rows.into();
    artifact.weights.projection = Some(Projection::Folded { features });
    artifact.to_bytes().unwrap()
}

/// What the recipe `make.py` says that its files give.
#[derive(Deserialize)]
struct Golden {
    image: Vec<u8>,
    #[serde(flatten)]
    answers: HashMap<String, serde_json::Value>,
}

#[test]
fn files_of_both_versions_give_what_the_recipe_says() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-core/tests/fixtures/artifacts");
    let golden: Golden = serde_json::from_slice(&std::fs::read(fixtures.join("golden.json")).unwrap()).unwrap();
    let path = |name: &str| fixtures.join(format!("{name}.safetensors"));
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.png");
    RgbImage::from_raw(8, 8, golden.image).unwrap().save(&image).unwrap();
    for (set, backbone, lender) in [
        ("v1_set", "v1_backbone", None),
        ("v2_set", "v2_backbone", None),
        ("v2_borrower", "v2_backbone", Some("v2_set")),
        ("v2_seeded", "v2_backbone", None),
    ] {
        let Printed { logits, .. } = printed(&image, [&path(backbone), &path(set)], lender.map(path).as_deref());
        let expected = &golden.answers[&format!("answer of {set}")]["logits"];
        let expected: Vec<f64> = serde_json::from_value(expected.clone()).unwrap();
        let error = largest_difference(&logits, &expected);
        println!("{set}: off by {error:.1e}");
        assert!(error < TOLERANCE, "{set}: off by {error}");
    }
}
