//! The binary, from a folder of images to measured artifacts.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use butterflyvit_trainer::checkpoint::Checkpoint;
use model_core::artifact::{BackboneArtifact, Digest, read_backbone, read_expert_set, write_backbone};
use model_core::config::{Activation, BackboneConfig, StemLayer, SubstrateConfig, ViTConfig};
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::{Preprocess, RgbImage};
use model_core::kernels::Isa;
use model_core::random::{AngleSpread, AngleStart, SplitMix64};
use model_core::weights::{BackboneWeights, ExpertLayerWeights, Linear, Norm, StemWeights};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use training::quantize::angle_codes;

fn trainer(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_butterflyvit-trainer")).args(args).output().unwrap()
}

fn succeed(args: &[&str]) -> Output {
    let output = trainer(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn fail(args: &[&str]) -> String {
    let output = trainer(args);
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// 3 classes of 8x8 images: red, green and blue with noise, 20 of each to learn from and 5 to measure on.
fn images(root: &Path) -> PathBuf {
    let data = root.join("data");
    for (part, count) in [("train", 20), ("test", 5)] {
        for (channel, class) in ["red", "green", "blue"].into_iter().enumerate() {
            let folder = data.join(part).join(class);
            fs::create_dir_all(&folder).unwrap();
            for number in 0..count {
                let noise = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(number * 977) >> 11) as u8 / 4;
                let mut image =
                    RgbImage::from_fn(8, 8, |x, y| [noise(x * 8 + y), noise(x + y * 9), noise(x * y)].into());
                image.pixels_mut().for_each(|pixel| pixel[channel] += 150);
                image.save(folder.join(format!("{number}.png"))).unwrap();
            }
        }
    }
    data
}

const FAST: [&str; 14] = [
    "--quiet",
    "--epochs",
    "12",
    "--batch-size",
    "12",
    "--shard-size",
    "6",
    "--hold-out",
    "0.2",
    "--mix",
    "0",
    "--threads",
    "2",
    "--log-every=2",
];

fn train<'a>(data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "--data", data, "--out", out][..], &FAST, more].concat()
}

#[test]
fn train_evaluate_and_specialise() {
    let root = tempfile::tempdir().unwrap();
    let data = images(root.path());
    fs::write(data.join("train/red/broken.png"), "no picture").unwrap();
    let (data, out) = (text(&data).to_owned(), root.path().join("run"));
    let rate = ["--preset", "tiny", "--learning-rate", "0.01"];
    let output = succeed(&train(&data, text(&out), &rate));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("1 files and folders are no usable images") && said.contains("broken.png"), "{said}");
    for file in ["checkpoint.safetensors", "metrics.jsonl", "curve.png"] {
        assert!(out.join(file).is_file(), "{file}");
    }

    let backbone = out.join("store/backbones/backbone.safetensors");
    let set = out.join("store/expert-sets/default/1.safetensors");
    let picture = root.path().join("confusion.png");
    let evaluate = ["evaluate", "--data", &data, "--backbone", text(&backbone), "--set", text(&set)];
    let measure = |more: &[&str]| -> Value {
        serde_json::from_slice(&succeed(&[&evaluate[..], &["--json"], more].concat()).stdout).unwrap()
    };
    let integer = measure(&["--confusion", text(&picture)]);
    assert_eq!(integer["images"], 15);
    assert!(integer["top1"].as_f64().unwrap() > 0.8, "{integer}");
    assert_eq!(integer["classes"].as_array().unwrap().len(), 3);
    assert_eq!(integer["layers"].as_array().unwrap().len(), 2);
    assert!(picture.is_file());
    // The held-out images say how sure it may be.
    let temperature = |set: &Path| read_expert_set(&fs::read(set).unwrap()).unwrap().weights.temperature;
    let fitted = temperature(&set);
    assert_ne!(fitted, 1.0);
    let again = root.path().join("again");
    let model = ["--backbone", text(&backbone), "--set", text(&set), "--store", text(&again)];
    let error = fail(&[&["calibrate", "--data", &data][..], &model].concat());
    assert!(error.contains("12 images were held out, and 19 are needed at least"), "{error}");
    assert!(!again.exists());
    // Some of the classes, below names that put them in another order, are found by name.
    let some = root.path().join("some");
    for class in ["red", "blue"] {
        fs::create_dir_all(some.join(class)).unwrap();
        fs::copy(Path::new(&data).join("test").join(class).join("0.png"), some.join(class).join("0.png")).unwrap();
    }
    let of_some = |more: &[&str]| trainer(&[&["evaluate", "--data", text(&some)][..], &evaluate[3..], more].concat());
    let report: Value = serde_json::from_slice(&of_some(&["--json"]).stdout).unwrap();
    assert_eq!((&report["images"], &report["top1"]), (&2.into(), &1.0.into()), "{report}");
    assert_eq!(report["classes"].as_array().unwrap().len(), 3);
    assert!(String::from_utf8(of_some(&[]).stdout).unwrap().contains("of 3 labels 2 have images"));
    fs::rename(some.join("red"), some.join("crimson")).unwrap();
    let said = String::from_utf8(of_some(&[]).stderr).unwrap();
    assert!(said.contains("1 of the 2 classes are no labels: crimson; the labels are blue, green, red"), "{said}");
    let float = measure(&["--float"]);
    assert!((float["cross_entropy"].as_f64().unwrap() - integer["cross_entropy"].as_f64().unwrap()).abs() < 0.1);
    assert_eq!(measure(&["--limit", "4"])["images"], 4);
    let printed = String::from_utf8(succeed(&evaluate).stdout).unwrap();
    assert!(printed.contains("top-5") && printed.contains("calibration error"), "{printed}");

    // Another set on the same backbone: the classes renamed and one dropped.
    let other = root.path().join("other");
    fs::create_dir(&other).unwrap();
    for (from, to) in [("red", "warm"), ("blue", "cold")] {
        fs::rename(Path::new(&data).join("train").join(from), other.join(to)).unwrap();
    }
    let second = root.path().join("second");
    let specialise = [
        &["specialise", "--data", text(&other), "--backbone", text(&backbone), "--start", text(&set)][..],
        &["--out", text(&second), "--set-name", "warmth", "--learning-rate", "0.01"],
        &FAST,
    ];
    succeed(&specialise.concat());
    let set = second.join("store/expert-sets/warmth/1.safetensors");
    let evaluate = ["evaluate", "--json", "--data", text(&other), "--backbone", text(&backbone), "--set", text(&set)];
    let report: Value = serde_json::from_slice(&succeed(&evaluate).stdout).unwrap();
    assert!(report["top1"].as_f64().unwrap() > 0.8, "{report}");
    let error = fail(&["evaluate", "--data", &data, "--backbone", text(&backbone), "--set", text(&set)]);
    assert!(error.contains("3 of the 3 classes are no labels"), "{error}");
}

#[test]
fn a_finished_model_teaches_another() {
    let root = tempfile::tempdir().unwrap();
    let (data, first, second) = (images(root.path()), root.path().join("first"), root.path().join("second"));
    let rate = ["--preset", "tiny", "--learning-rate", "0.01"];
    succeed(&train(text(&data), text(&first), &rate));
    let backbone = first.join("store/backbones/backbone.safetensors");
    let set = first.join("store/expert-sets/default/1.safetensors");
    let teacher = ["--teacher-backbone", text(&backbone), "--teacher-set", text(&set)];
    let recipe = ["--distil", "0.7", "--drop-path", "0.1", "--float-epochs", "2", "--seed", "2"];
    let more = [&rate[..], &teacher, &recipe].concat();
    succeed(&train(text(&data), text(&second), &[&more[..], &["--limit-seconds", "0"]].concat()));
    let resume = ["train", "--data", text(&data), "--out", text(&second), "--resume", "--quiet"];
    let error = fail(&resume);
    assert!(error.contains("give --teacher-backbone and --teacher-set again"), "{error}");
    succeed(&[&resume[..], &teacher].concat());
    let set = second.join("store/expert-sets/default/1.safetensors");
    let backbone = second.join("store/backbones/backbone.safetensors");
    let evaluate = ["evaluate", "--json", "--data", text(&data), "--backbone", text(&backbone), "--set", text(&set)];
    let report: Value = serde_json::from_slice(&succeed(&evaluate).stdout).unwrap();
    assert!(report["top1"].as_f64().unwrap() > 0.8, "{report}");
    let error = fail(&train(text(&data), text(&root.path().join("third")), &["--teacher-set", text(&set)]));
    assert!(error.contains("--teacher-backbone"), "{error}");
}

/// Backbone and expert set that a run wrote.
fn artifacts(run: &Path) -> (PathBuf, PathBuf) {
    (run.join("store/backbones/backbone.safetensors"), run.join("store/expert-sets/default/1.safetensors"))
}

#[test]
fn training_goes_on_from_a_finished_model() {
    let root = tempfile::tempdir().unwrap();
    let data = images(root.path());
    let out = |name: &str| root.path().join(name);
    let report = |data: &Path, (backbone, set): &(PathBuf, PathBuf)| -> Value {
        let files = ["--data", text(data), "--backbone", text(backbone), "--set", text(set)];
        serde_json::from_slice(&succeed(&[&["evaluate", "--json"], &files[..]].concat()).stdout).unwrap()
    };
    let (first, second, third) = (out("first"), out("second"), out("third"));
    succeed(&train(text(&data), text(&first), &["--preset", "tiny", "--learning-rate", "0.01"]));
    let finished = artifacts(&first);
    let start = ["--start-backbone", text(&finished.0), "--start-set", text(&finished.1)];

    // A rate at which nothing moves: the new artifacts are the old ones, also after an interruption.
    let still = [&start[..], &["--learning-rate", "1e-12", "--limit-seconds", "0"]].concat();
    let mut still = train(text(&data), text(&second), &still);
    let given = still.iter().position(|arg| *arg == "--hold-out").unwrap();
    still.drain(given..given + 2);
    succeed(&still);
    succeed(&["train", "--data", text(&data), "--out", text(&second), "--resume", "--quiet"]);
    let header = fs::read(artifacts(&second).0).unwrap();
    assert!(String::from_utf8_lossy(&header).contains(r#"\"hold_out\":0.2"#), "the same images stay held out");
    let (before, after) = (report(&data, &finished), report(&data, &artifacts(&second)));
    let cross_entropy = |report: &Value| report["cross_entropy"].as_f64().unwrap();
    assert!((cross_entropy(&before) - cross_entropy(&after)).abs() < 1e-3, "{before} and {after}");

    // Other classes get a head of their own.
    let other = out("other");
    fs::create_dir(&other).unwrap();
    for (from, to) in [("red", "warm"), ("blue", "cold")] {
        fs::rename(data.join("train").join(from), other.join(to)).unwrap();
    }
    succeed(&train(text(&other), text(&third), &[&start[..], &["--learning-rate", "0.01"]].concat()));
    let report = report(&other, &artifacts(&third));
    assert!(report["top1"].as_f64().unwrap() > 0.8, "{report}");

    let error = fail(&train(text(&data), text(&out("fourth")), &[&start[..], &["--preset", "tiny"]].concat()));
    assert!(error.contains("--preset"), "{error}");
}

/// Values of every parameter that the checkpoint of a run would export.
fn exported(run: &Path) -> BTreeMap<String, Vec<f32>> {
    let mut checkpoint = Checkpoint::load(run).unwrap();
    checkpoint.parameters.append(&mut checkpoint.average);
    checkpoint.parameters
}

fn largest_difference(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>, part: &str) -> f32 {
    let pairs = a.iter().filter(|(name, _)| name.contains(part)).flat_map(|(name, a)| a.iter().zip(&b[name]));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn latent_parameters_go_on_from_run_to_run() {
    let root = tempfile::tempdir().unwrap();
    let data = images(root.path());
    let out = |name: &str| root.path().join(name);
    let (first, codes, latents) = (out("first"), out("codes"), out("latents"));
    succeed(&train(text(&data), text(&first), &["--preset", "tiny", "--learning-rate", "0.01", "--seed", "7"]));
    let (backbone, set) =
        (first.join("store/backbones/backbone.safetensors"), first.join("store/expert-sets/default/1.safetensors"));
    // A rate at which nothing moves: what differs is the start. Steps of at most a few rates each, 48 of them.
    let still = ["--learning-rate", "1e-12"];
    let start = ["--start-backbone", text(&backbone), "--start-set", text(&set)];
    succeed(&train(text(&data), text(&codes), &[&start[..], &still].concat()));
    let start = ["--start-run", text(&first)];
    succeed(&train(text(&data), text(&latents), &[&start[..], &still, &["--limit-seconds", "0"]].concat()));
    succeed(&["train", "--data", text(&data), "--out", text(&latents), "--resume", "--quiet"]);
    let before = exported(&first);
    for part in [".rotation_in", ".rotation_hidden", ".up", "head."] {
        let moved = largest_difference(&before, &exported(&latents), part);
        assert!(moved < 1e-9, "{part}: {moved}");
    }
    assert!(largest_difference(&before, &exported(&codes), ".rotation_in") > 1e-3, "codes know less than latents");
    let state = Checkpoint::load(&latents).unwrap().state;
    assert_eq!((state.recipe.seed, state.recipe.hold_out), (7, 0.2), "the same images stay held out");
    let of_first = Checkpoint::load(&first).unwrap().state.angle_start;
    assert_eq!(of_first.as_ref().map(|start| start.seed), Some(7));
    assert_eq!(state.angle_start, of_first, "angles count as started where the first run started them");

    // A set on the first run's backbone starts from its latent angles and routers, and another goes on from the set's.
    let mut specialised = Vec::new();
    for (name, start_run) in [("a", first.clone()), ("b", out("a"))] {
        let folder = out(name);
        let args = ["specialise", "--data", text(&data), "--backbone", text(&backbone), "--out", text(&folder)];
        succeed(&[&args[..], &["--start-run", text(&start_run)], &still, &FAST].concat());
        specialised.push(exported(&folder));
    }
    for set in &specialised {
        assert!(largest_difference(&before, set, ".moe.r") < 1e-9);
    }
    let args = ["specialise", "--data", text(&data), "--backbone", text(&backbone), "--start-run", text(&codes)];
    let error = fail(&[&args[..], &["--out", text(&out("c"))]].concat());
    assert!(error.contains("neither made nor specialised the backbone"), "{error}");
    let error = fail(&train(text(&data), text(&out("c")), &["--start-run", text(&out("a"))]));
    assert!(error.contains("specialised a backbone"), "{error}");
}

#[test]
fn experts_of_a_seed_learn_everything_else() {
    let root = tempfile::tempdir().unwrap();
    let data = images(root.path());
    let out = |name: &str| root.path().join(name);
    let (first, second) = (out("first"), out("second"));
    succeed(&train(text(&data), text(&first), &["--preset", "tiny", "--learning-rate", "0.01"]));
    let (backbone, set) = artifacts(&first);
    let start = ["--start-backbone", text(&backbone), "--start-set", text(&set), "--learning-rate", "0.01"];
    let seeded = [&start[..], &["--angle-seed", "11", "--router-bits", "4", "--limit-seconds", "0"]].concat();
    succeed(&train(text(&data), text(&second), &seeded));
    succeed(&[
        "train",
        "--data",
        text(&data),
        "--out",
        text(&second),
        "--resume",
        "--quiet",
        start[0],
        start[1],
        start[2],
        start[3],
    ]);
    let finished = artifacts(&second);
    let files = ["--data", text(&data), "--backbone", text(&finished.0), "--set", text(&finished.1)];
    let report: Value =
        serde_json::from_slice(&succeed(&[&["evaluate", "--json"], &files[..]].concat()).stdout).unwrap();
    assert!(report["top1"].as_f64().unwrap() > 0.8, "{report}");
    let header = fs::read(&finished.1).unwrap();
    let header = String::from_utf8_lossy(&header);
    assert!(header.contains(r#"\"angle_seed\":{"#) && header.contains(r#"\"router_bits\":4"#), "{header}");
    assert!(!header.contains("rotation_in"), "a seed stands for the angles");
    assert!(fs::metadata(&finished.1).unwrap().len() < fs::metadata(&set).unwrap().len());

    // A set that is specialised from there keeps the seed, unless its angles are to move.
    for (name, rate, keeps_seed) in [("kept", &[][..], true), ("moved", &["--angle-rate", "0.1"], false)] {
        let folder = out(name);
        let specialise = ["specialise", "--data", text(&data), "--backbone", text(&finished.0), "--out", text(&folder)];
        let more = ["--start", text(&finished.1), "--learning-rate", "0.05"];
        succeed(&[&specialise[..], &more, &FAST, rate].concat());
        let set = read_expert_set(&fs::read(folder.join("store/expert-sets/default/1.safetensors")).unwrap()).unwrap();
        let start = read_expert_set(&fs::read(&finished.1).unwrap()).unwrap();
        assert_eq!(set.weights.config.angle_seed.is_some(), keeps_seed, "{name}");
        if !keeps_seed {
            let mut start = start.weights;
            start.own_angles(&set.backbone);
            let codes = |layers: &[ExpertLayerWeights]| layers[0].rotation_in.codes.clone();
            let (then, now) = (codes(&start.layers), codes(&set.weights.layers));
            // No angle moves further than its rate lets it: less than a tenth of a turn.
            let turn = 1 << set.weights.config.angle_bits;
            let apart = |(&then, &now): (&u16, &u16)| then.abs_diff(now).min(turn - then.abs_diff(now));
            assert!(then != now && then.iter().zip(&now).all(|pair| apart(pair) < turn / 10), "{then:?}, {now:?}");
        }
    }

    let moving = [&start[..], &["--angle-seed", "11", "--angle-rate", "2"]].concat();
    let error = fail(&train(text(&data), text(&out("third")), &moving));
    assert!(error.contains("angles of a seed do not move"), "{error}");
}

#[test]
fn angles_of_rate_zero_stay_where_the_artifact_says_they_started() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("run"));
    let options = ["--preset", "tiny", "--learning-rate", "0.01", "--angle-rate", "0", "--angle-spread", "uniform"];
    succeed(&train(text(&data), text(&out), &options));
    let bytes = fs::read(out.join("store/expert-sets/default/1.safetensors")).unwrap();
    let set = read_expert_set(&bytes).unwrap();
    assert_eq!(set.training["recipe"]["optimizer"]["angle_rate"], 0.0);
    let start: AngleStart = serde_json::from_value(set.training["angle_start"].clone()).unwrap();
    assert_eq!(start.spread, AngleSpread::Uniform);
    for (l, layer) in set.weights.layers.iter().enumerate() {
        for (site, codes) in [&layer.rotation_in, &layer.rotation_hidden, &layer.rotation_out].into_iter().enumerate() {
            let angles = start.angles(l, site, codes.codes.len(), set.weights.config.angle_bits).unwrap();
            assert_eq!(angle_codes(&angles, set.weights.config.angle_bits), codes.codes, "layer {l}, site {site}");
        }
    }
    let backbone = out.join("store/backbones/backbone.safetensors");
    let set_path = out.join("store/expert-sets/default/1.safetensors");
    let evaluate = ["evaluate", "--data", text(&data), "--backbone", text(&backbone), "--set", text(&set_path)];
    let json = |more: &[&str]| -> Value {
        serde_json::from_slice(&succeed(&[&evaluate[..], &["--json"], more].concat()).stdout).unwrap()
    };
    let (report, probe) = (json(&[]), json(&["--probe"]));
    assert_eq!(probe["top1"], report["top1"]);
    assert_eq!((&probe["angles_moved"], &probe["angles_at_start"]), (&Value::from(0.0), &report["top1"]), "{probe}");
    for key in ["wrong_expert", "random_expert", "no_rotation", "no_experts"] {
        assert!(probe[key].as_f64().is_some_and(|top1| (0.0..=1.0).contains(&top1)), "{key}: {probe}");
    }
    assert_eq!(json(&["--probe", "--limit", "4", "--float"])["images"], 4);
    let said = String::from_utf8(succeed(&[&evaluate[..], &["--probe"]].concat()).stdout).unwrap();
    assert!(said.contains("angle codes moved       0.00 %"), "{said}");
    // Routers and everything else did move.
    let initial = Checkpoint::load(&out).unwrap().state.recipe.init_model().unwrap();
    for part in ["router", "up"] {
        let name = format!("blocks.0.moe.{part}");
        let before = initial.parameters().var(&name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_ne!(exported(&out)[&name], before, "{name}");
    }
}

#[test]
fn compare_trains_variants_and_goes_on_after_an_interruption() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("study"));
    let what = [
        "compare",
        "--data",
        text(&data),
        "--out",
        text(&out),
        "--preset",
        "tiny",
        "--seeds",
        "3",
        "--learning-rate",
        "0.01",
    ];
    let compare =
        [&what[..], &["--variants", "butterfly,dense-experts,dense,angles4,float-activations"], &FAST].concat();
    for twice in [["--seeds", "4,4"], ["--variants", "dense,dense"]] {
        let error = fail(&["compare", "--data", text(&data), "--out", text(&out), twice[0], twice[1]]);
        assert!(error.contains(twice[0]) && error.contains("twice"), "{error}");
    }
    succeed(&[&compare[..], &["--limit-seconds", "0"]].concat());
    assert!(!out.join("table.md").exists());
    let table = String::from_utf8(succeed(&compare).stdout).unwrap();
    assert_eq!(table.lines().filter(|line| line.starts_with("| angles4 | integer | 1 |")).count(), 2, "{table}");
    let json: Value = serde_json::from_slice(&fs::read(out.join("table.json")).unwrap()).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 5);
    for row in json.as_array().unwrap() {
        // Three colours: a model that learns at all tells them apart, and so does its artifact.
        assert!(row["top1"].as_f64().unwrap() > 0.8, "{row}");
        assert_eq!(row["path"] == "integer", row["variant"] == "butterfly" || row["variant"] == "angles4", "{row}");
        assert_eq!(row["routing_agreement"].is_null(), row["variant"] == "dense", "{row}");
    }
    assert!(out.join("butterfly-seed-3/curve.png").is_file());
    assert!(table.contains("| variant against butterfly |"), "{table}");
    assert_eq!(json[0]["paired"], Value::Null);
    assert_eq!(json[1]["paired"]["by_seed"]["3"], json[1]["paired"]["difference"], "one seed");
    for picture in ["accuracy-memory.png", "memory-experts.png", "routing-maps.png", "expert-utilisation.png"] {
        assert!(out.join(picture).is_file(), "{picture}");
    }
}

#[test]
fn every_variant_gets_the_rate_that_does_best_on_held_out_images() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("study"));
    let compare = ["compare", "--data", text(&data), "--out", text(&out), "--preset", "tiny", "--seeds", "3"];
    // At a rate of 1e-9 nothing is learnt.
    let rates =
        ["--rates", "1e-9,0.01", "--rate-epochs", "10", "--variants", "butterfly,ternary-experts,low-rank-experts"];
    let compare = [&compare[..], &rates, &FAST].concat();
    succeed(&[&compare[..], &["--limit-seconds", "0"]].concat());
    assert!(!out.join("table.md").exists());
    succeed(&compare);
    let read = |name: &str| -> Value { serde_json::from_slice(&fs::read(out.join(name)).unwrap()).unwrap() };
    let trials = read("rates.json");
    assert_eq!(trials.as_array().unwrap().len(), 6);
    assert_eq!(trials[2]["variant"], "ternary-experts");
    assert!(trials.as_array().unwrap().iter().all(|trial| trial["held_out"]["epoch"] == 10), "{trials}");
    for row in read("table.json").as_array().unwrap() {
        assert_eq!(row["learning_rate"], 0.01, "{row}");
        assert!(row["top1"].as_f64().unwrap() > 0.8, "{row}");
    }
}

#[test]
fn runs_are_not_overwritten_and_resume_only_as_they_were() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("run"));
    let start = train(text(&data), text(&out), &["--preset", "tiny", "--limit-seconds", "0"]);
    succeed(&start);
    assert!(!out.join("store").exists(), "an unfinished run exports nothing by itself");
    assert!(fail(&start).contains("already holds a run"));
    let resume = |more: &[&'static str]| -> Vec<String> {
        let args = [&["train", "--data", text(&data), "--out", text(&out), "--quiet", "--resume"], more].concat();
        args.into_iter().map(str::to_owned).collect()
    };
    let run = |args: Vec<String>| trainer(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let refused = run(resume(&["--batch-size", "13"]));
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("batch_size was 12, now 13"), "{error}");
    assert!(run(resume(&[])).status.success());
    assert!(out.join("store/backbones/backbone.safetensors").is_file());
}

#[test]
fn an_interrupt_saves_a_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("run"));
    let args = train(text(&data), text(&out), &["--preset", "tiny"]);
    let long = args.iter().map(|arg| if *arg == "12" { "100000" } else { arg });
    let child = Command::new(env!("CARGO_BIN_EXE_butterflyvit-trainer")).args(long).spawn().unwrap();
    /// Leaves no endless training behind when an assertion fails.
    struct Killed(std::process::Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
        }
    }
    let mut child = Killed(child);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default().is_empty() {
        assert!(std::time::Instant::now() < deadline, "no step within a minute");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let killed = Command::new("kill").args(["-INT", &child.0.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.0.wait().unwrap().code(), Some(130));
    assert!(out.join("checkpoint.safetensors").is_file());
    succeed(&["export", "--run", text(&out), "--store", text(&root.path().join("store"))]);
    assert!(root.path().join("store/expert-sets/default/1.safetensors").is_file());
}

#[test]
fn init_writes_as_many_sets_as_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let init = |more: &[&str]| {
        succeed(&[&["init", "--store", text(root.path()), "--preset", "tiny", "--sets", "3"], more].concat())
    };
    init(&[]);
    let set = |number: u32| fs::read(root.path().join(format!("expert-sets/set-000{number}/1.safetensors"))).unwrap();
    let (first, second) = (set(0), set(1));
    assert!(first != second && set(2).len() == first.len());
    init(&[]);
    assert_eq!(set(0), first, "the same seed gives the same files");
    let smaller = init(&["--experts", "2"]);
    assert!(smaller.status.success() && set(0).len() < first.len());
    init(&["--seed", "9"]);
    assert_ne!(set(0), first);

    let config = root.path().join("config.json");
    fs::write(&config, r#"{"backbone": 1}"#).unwrap();
    let error = fail(&["init", "--store", text(root.path()), "--config", text(&config)]);
    assert!(error.contains("config.json"), "{error}");
    assert!(fail(&["init", "--store", text(root.path()), "--preset", "huge"]).contains("no preset huge"));
}

#[test]
fn unusable_data_is_explained() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("run"));
    fs::write(data.join("train/red/broken.png"), "no picture").unwrap();
    let error = fail(&train(text(&data), text(&out), &["--preset", "tiny", "--strict"]));
    assert!(error.contains("broken.png") && error.contains("--strict"), "{error}");
    fs::create_dir(data.join("train/empty")).unwrap();
    let error = fail(&train(text(&data), text(&out), &["--preset", "tiny"]));
    assert!(error.contains("class empty has no usable image"), "{error}");
    let error = fail(&train(text(&root.path().join("nowhere")), text(&out), &["--preset", "tiny"]));
    assert!(error.contains("is not a folder"), "{error}");
}

/// A file that never ends is none, wherever one is named; and a name that no store takes is refused before a run begins.
#[cfg(target_os = "linux")]
#[test]
fn endless_files_and_impossible_names_are_refused_at_once() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("run"));
    let endless = root.path().join("endless");
    std::os::unix::fs::symlink("/dev/zero", &endless).unwrap();
    let file = text(&endless);
    let store = text(root.path());
    for args in [
        train(text(&data), text(&out), &["--config", file]),
        train(text(&data), text(&out), &["--preset", "tiny", "--stem", file]),
        train(text(&data), text(&out), &["--start-backbone", file, "--start-set", file]),
        vec!["import", "--weights", file, "--images", text(&data), "--images-source", "here", "--store", store],
        vec!["evaluate", "--data", text(&data), "--backbone", file, "--set", file],
        vec!["encode", "--backbone", file, "--store", store],
    ] {
        let error = fail(&args);
        assert!(error.contains(file) && error.contains("this is not a file"), "{args:?}: {error}");
    }
    succeed(&["init", "--preset", "tiny", "--store", store]);
    let (backbone, set) =
        (root.path().join("backbones/tiny.safetensors"), root.path().join("expert-sets/set-0000/1.safetensors"));
    let model = ["--backbone", text(&backbone), "--set", text(&set), "--store", store];
    let error = fail(&[&["calibrate", "--data", text(&data)][..], &model].concat());
    assert!(error.contains("it does not say how it was trained"), "{error}");
    for option in ["--set-name", "--backbone-name"] {
        let error = fail(&train(text(&data), text(&out), &["--preset", "tiny", option, "a/b"]));
        assert!(error.contains("a/b") && error.contains("a name has"), "{error}");
    }
    let error = fail(&train(text(&data), text(&out), &["--preset", "tiny", "--operations", "1000000000"]));
    assert!(error.contains("operations is 1000000000"), "{error}");
    assert!(!out.exists());
}

#[test]
fn calibrate_gives_trained_sets_a_temperature_and_what_knows_strangers() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("run"));
    let other = root.path().join("other");
    for class in ["red", "blue"] {
        fs::create_dir_all(other.join(class)).unwrap();
        for number in 0..20 {
            let name = format!("{class}/{number}.png");
            fs::copy(data.join("train").join(&name), other.join(&name)).unwrap();
        }
    }
    let more = ["--preset", "tiny", "--epochs", "2", "--batch-size", "12", "--shard-size", "6", "--threads", "2"];
    let (first, second) = (text(&data), text(&other));
    let train = ["train", "--quiet", "--data", first, "--data", second, "--out", text(&out), "--hold-out", "0.5"];
    succeed(&[&train[..], &more].concat());

    let store = root.path().join("store");
    let made = |kind: &str| out.join("store").join(kind);
    let (backbone, own) = (made("backbones/backbone.safetensors"), made("expert-sets/data/1.safetensors"));
    let borrower = made("expert-sets/other/1.safetensors");
    let given =
        ["calibrate", "--data", first, "--data", second, "--backbone", text(&backbone), "--store", text(&store)];
    let error = fail(&[&given[..], &["--set", text(&borrower)]].concat());
    assert!(error.contains("give the set that lends them"), "{error}");
    let error = fail(&[&given[..2], &[first], &given[5..], &["--set", text(&own), text(&borrower)]].concat());
    assert!(error.contains("the run learned from data, other; give just that as --data, in that order"), "{error}");
    let error = fail(&[&given[..], &["--data-source", "drawn", "--set", text(&own), text(&borrower)]].concat());
    assert!(error.contains("no model card, in which --data-source would stand"), "{error}");
    assert!(!store.exists());

    let everything = root.path().join("everything/all");
    fs::create_dir_all(&everything).unwrap();
    for number in 0..70 {
        let from = data.join(["train/red", "train/green", "train/blue", "test/red"][number % 4]);
        fs::copy(from.join(format!("{}.png", number / 4 % 5)), everything.join(format!("{number}.png"))).unwrap();
    }
    let everything = everything.parent().unwrap();
    let background = ["--background", text(everything), "--background-source", "drawn"];
    succeed(&[&given[..], &background, &["--set", text(&own), text(&borrower)]].concat());
    let written = read_backbone(&fs::read(store.join("backbones/backbone.safetensors")).unwrap()).unwrap();
    assert_eq!(written.weights.background.unwrap().source, "drawn");
    let read = |set: &str| {
        let path = store.join("expert-sets").join(set).join("1.safetensors");
        read_expert_set(&fs::read(path).unwrap()).unwrap()
    };
    let (lender, borrower) = (read("data"), read("other"));
    assert_eq!(borrower.borrowed_experts, Some(lender.digest));
    for (set, held_out) in [(lender, 30), (borrower, 20)] {
        assert_ne!(set.weights.temperature, 1.0);
        assert!(set.weights.familiarity.is_some());
        assert_eq!(set.report["images"], held_out, "{}", set.report);
    }
    let error = fail(&[&given[..], &["--no-unknown", "--set", text(&own)]].concat());
    assert!(error.contains("is another backbone") && error.contains("give another --store"), "{error}");
    let another = root.path().join("another");
    fs::remove_file(other.join("red/0.png")).unwrap();
    let error = fail(&[&given[..given.len() - 1], &[text(&another), "--set", text(&own)]].concat());
    assert!(error.contains("the data folder has changed"), "{error}");
    fs::copy(data.join("train/red/0.png"), other.join("red/0.png")).unwrap();
    let given = [&given[..given.len() - 1], &[text(&another)]].concat();
    succeed(&[&given[..], &["--no-unknown", "--set", text(&own)]].concat());
    let second = another.join("expert-sets/data/1.safetensors");
    assert!(read_expert_set(&fs::read(second).unwrap()).unwrap().weights.familiarity.is_none());
}

#[test]
fn what_no_memory_holds_and_what_is_nothing_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (images(root.path()), root.path().join("run"));
    let file = root.path().join("large.json");
    let (file, data, out, store) = (text(&file), text(&data), text(&out), text(root.path()));
    for (field, section) in [("d_model", "backbone"), ("d_ff", "backbone"), ("num_classes", "")] {
        let mut config = serde_json::to_value(ViTConfig::preset("photo").unwrap()).unwrap();
        config["backbone"]["image_size"] = 32.into();
        config["experts"]["num_experts"] = 4096.into();
        let place = if section.is_empty() { &mut config[field] } else { &mut config[section][field] };
        *place = 65536.into();
        config["backbone"]["stem"][0]["channels"] = config["backbone"]["d_model"].clone();
        config["backbone"]["num_heads"] = 1.into();
        if section.is_empty() {
            (config["backbone"]["d_model"], config["backbone"]["d_ff"]) = (16384.into(), 16384.into());
            config["backbone"]["stem"][0]["channels"] = 16384.into();
        }
        fs::write(file, config.to_string()).unwrap();
        for args in [
            train(data, out, &["--config", file]),
            vec!["compare", "--data", data, "--out", out, "--config", file],
            vec!["init", "--store", store, "--config", file],
            vec!["speed", "--seconds", "0", "--config", file],
        ] {
            let said = fail(&args);
            // In `train` a file says how many classes there are, elsewhere the images do.
            assert!(said.contains("parameters, more than 536870912"), "{field} {args:?}: {said}");
        }
    }
    let said = fail(&["speed", "--preset", "tiny", "--batch-size", "100000000"]);
    assert!(said.contains("batch_size is 100000000"), "{said}");
    for args in [
        &["evaluate", "--data", data, "--backbone", "b", "--set", "s", "--limit", "0"][..],
        &["import", "--weights", "w", "--images", data, "--store", store, "--calibration-images", "0"],
        &["import", "--weights", "w", "--images", data, "--store", store, "--background-images", "0"],
    ] {
        let said = fail(args);
        assert!(said.contains("it must be at least 1"), "{args:?}: {said}");
    }
}

/// A backbone that is a stem of two layers, whose outputs have steps.
fn stem_alone(path: &Path) {
    let layer = |channels| StemLayer { norm: false, activation: Activation::Relu6, ..StemLayer::conv3(channels, 2) };
    let config = BackboneConfig {
        image_size: 8,
        stem: vec![layer(8), StemLayer { groups: 8, ..layer(8) }, StemLayer::patch(16, 1)],
        d_model: 16,
        d_ff: 1,
        num_layers: 0,
        num_heads: 1,
        substrates: SubstrateConfig::default(),
    };
    let mut random = SplitMix64::at(3, 0);
    let stem = config.stem_inputs().map(|(layer, _, channels)| {
        let weights = layer.channels * layer.window_len(channels);
        let conv = Linear { weight: random.uniforms(weights, 0.4).into(), bias: vec![0.1; layer.channels] };
        StemWeights { conv, norm: None, step: Some(0.02) }
    });
    let weights = BackboneWeights {
        stem: stem.collect(),
        config: config.clone(),
        pos_embed: Vec::new(),
        blocks: Vec::new(),
        norm: Norm::default(),
        background: None,
    };
    fs::write(path, write_backbone("eyes", &weights, &Preprocess::default(), &Value::Null).unwrap()).unwrap();
}

/// A folder of two classes, dark and bright, of which the model knows nothing yet.
fn shades(root: &Path) -> PathBuf {
    let data = root.join("shades");
    for (class, base) in [("dark", 10), ("bright", 180)] {
        fs::create_dir_all(data.join(class)).unwrap();
        for number in 0..20u8 {
            let image = RgbImage::from_fn(8, 8, |x, y| [base + number + (x * 5 + y) as u8; 3].into());
            image.save(data.join(class).join(format!("{number}.png"))).unwrap();
        }
    }
    data
}

#[test]
fn several_data_sets_have_a_head_each() {
    let root = tempfile::tempdir().unwrap();
    let (colours, shades) = (images(root.path()), shades(root.path()));
    let (eyes, run) = (root.path().join("eyes.safetensors"), root.path().join("run"));
    stem_alone(&eyes);
    let both = ["--data", text(&shades), "--preset", "tiny", "--learning-rate", "0.01", "--stem", text(&eyes)];
    let stopped = [&both[..], &["--limit-seconds", "0"]].concat();
    let mut stopped = train(text(&colours), text(&run), &stopped);
    let mix = stopped.iter().position(|arg| *arg == "--mix").unwrap();
    stopped[mix + 1] = "0.5";
    succeed(&stopped);
    let resume = ["train", "--data", text(&colours), "--out", text(&run), "--resume", "--quiet", "--stem", text(&eyes)];
    let error = fail(&resume);
    assert!(error.contains("from other data sets: from data (3 classes), shades (2 classes), not from one"), "{error}");
    let output = succeed(&[&resume[..], &["--data", text(&shades)]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("data: ") && said.contains("% of 12 held-out images"), "{said}");
    assert!(said.contains("shades: ") && said.contains("% of 8 held-out images"), "{said}");
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert!(metrics.contains(r#""heads":[{"name":"data","images":12,"#), "{metrics}");

    // One set has the experts, the other borrows them; both answer, apart and through the engine in one forward.
    let store = run.join("store");
    let backbone = store.join("backbones/backbone.safetensors");
    let of = |name: &str| store.join(format!("expert-sets/{name}/1.safetensors"));
    let read = |name: &str| read_expert_set(&fs::read(of(name)).unwrap()).unwrap();
    let (lender, borrower) = (read("data"), read("shades"));
    assert_eq!(
        (&lender.weights.labels[..], lender.borrowed_experts),
        (&["blue", "green", "red"].map(String::from)[..], None)
    );
    assert_eq!(borrower.weights.labels, ["bright", "dark"]);
    assert_eq!((borrower.borrowed_experts, borrower.weights.layers.len()), (Some(lender.digest), 0));
    assert_eq!(borrower.training["held_out"]["name"], "shades");
    let evaluate = ["evaluate", "--json", "--backbone", text(&backbone)];
    let top1 = |more: &[&str]| {
        let report: Value = serde_json::from_slice(&succeed(&[&evaluate[..], more].concat()).stdout).unwrap();
        report["top1"].as_f64().unwrap()
    };
    let (first, second) = (of("data"), of("shades"));
    assert!(top1(&["--set", text(&first), "--data", text(&colours)]) > 0.8);
    let borrowed = ["--set", text(&second), "--data", text(&shades)];
    assert!(top1(&[&borrowed[..], &["--lender", text(&first)]].concat()) > 0.8);
    let start = ["--data", text(&shades), "--backbone", text(&backbone), "--start", text(&second), "--quiet"];
    let error = fail(&[&["specialise", "--out", text(&root.path().join("more"))], &start[..]].concat());
    assert!(error.contains("it borrows its experts; give the set that lends them"), "{error}");
    let error = fail(&[&evaluate[..], &borrowed].concat());
    assert!(error.contains("experts cannot be borrowed") && error.contains("it is not there"), "{error}");
    let packed = read_backbone(&fs::read(&backbone).unwrap()).unwrap();
    let BackboneArtifact { name, weights, preprocess, digest, .. } = packed;
    let packed = Backbone::from_weights(name, &weights, preprocess, digest, Isa::from_env().unwrap()).unwrap();
    let lender = ExpertSet::from_artifact(lender, &packed, None).unwrap();
    let borrower = ExpertSet::from_artifact(borrower, &packed, Some(&lender)).unwrap();
    let mut session = Session::new(&Arc::new(packed), 2, 1);
    let (pixels, mut three, mut two) = (vec![0.3; 192], [0.0; 3], [0.0; 2]);
    let mut rows = [
        Row { set: &lender, pixels: &pixels, logits: &mut three, routing: None, features: None },
        Row { set: &borrower, pixels: &pixels, logits: &mut two, routing: None, features: None },
    ];
    session.forward(&mut rows).unwrap();
    assert!(three != [0.0; 3] && two != [0.0; 2]);

    let other = root.path().join("other");
    let refused = |more: &[&str]| fail(&train(text(&colours), text(&other), &[&both[..], more].concat()));
    assert!(refused(&["--set-name", "mine"]).contains("--set-name names one expert set, and there are 2"));
    assert!(refused(&["--data", text(&colours)]).contains("two expert sets would be called data"));
    let twice = ["--data", text(&colours), "--data", text(&shades)];
    let compare = [&["compare", "--out", text(&other), "--preset", "tiny"], &twice[..]].concat();
    assert!(fail(&compare).contains("cannot be used multiple times"));
}

/// Soft labels that find red images warm and others cold.
fn soft_labels(path: &Path, data: &Path) {
    let (mut digests, mut probabilities) = (Vec::new(), Vec::new());
    for class in ["red", "green", "blue"] {
        for file in fs::read_dir(data.join("train").join(class)).unwrap() {
            let hex = Digest::of("", &fs::read(file.unwrap().path()).unwrap()).to_string();
            digests.extend((0..32).map(|i| u8::from_str_radix(&hex[2 * i..][..2], 16).unwrap()));
            let warm: f32 = if class == "red" { 0.9 } else { 0.1 };
            probabilities.extend([warm, 1.0 - warm].map(f32::to_le_bytes).concat());
        }
    }
    let images = digests.len() / 32;
    let tensors = [
        ("digests", TensorView::new(Dtype::U8, vec![images, 32], &digests).unwrap()),
        ("probabilities", TensorView::new(Dtype::F32, vec![images, 2], &probabilities).unwrap()),
    ];
    let metadata = HashMap::from([("labels".to_owned(), r#"["warm", "cold"]"#.to_owned())]);
    fs::write(path, safetensors::serialize(tensors, Some(metadata)).unwrap()).unwrap();
}

#[test]
fn soft_labels_are_learned_by_a_head_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let data = images(root.path());
    let file = |name: &str| root.path().join(name);
    let (eyes, soft, whole, pieces) = (file("eyes"), file("teacher.safetensors"), file("whole"), file("pieces"));
    stem_alone(&eyes);
    soft_labels(&soft, &data);
    let stem = ["--stem", text(&eyes), "--stem-cache", text(root.path())];
    let taught = [&["--preset", "tiny", "--learning-rate", "0.01", "--soft-labels", text(&soft)], &stem[..]].concat();
    let said = String::from_utf8(succeed(&train(text(&data), text(&whole), &taught)).stderr).unwrap();
    assert!(said.contains("soft labels of 2 classes, 0.5 of the loss"), "{said}");
    assert!(said.contains("teacher: ") && said.contains("% of 12 held-out images"), "{said}");
    succeed(&train(text(&data), text(&pieces), &[&taught[..], &["--limit-seconds", "0"]].concat()));
    let resume = ["train", "--data", text(&data), "--out", text(&pieces), "--resume", "--quiet"];
    let resume = [&resume[..], &stem].concat();
    assert!(fail(&resume).contains("give --soft-labels again"));
    succeed(&[&resume[..], &["--soft-labels", text(&soft)]].concat());
    let parameters = |run: &Path| Checkpoint::load(run).unwrap().parameters;
    assert_eq!(parameters(&whole), parameters(&pieces), "interrupted or not");

    let set = |name: &str| whole.join(format!("store/expert-sets/{name}/1.safetensors"));
    let backbone = whole.join("store/backbones/backbone.safetensors");
    let evaluate = ["evaluate", "--json", "--data", text(&data), "--backbone", text(&backbone), "--set"];
    let report: Value =
        serde_json::from_slice(&succeed(&[&evaluate[..], &[text(&set("data"))]].concat()).stdout).unwrap();
    assert!(report["top1"].as_f64().unwrap() > 0.8, "{report}");
    let (own, borrowed) = (set("data"), set("teacher"));
    for (class, expected) in [("red", "warm"), ("green", "cold")] {
        let image = data.join("test").join(class).join("0.png");
        let files = ["--backbone", text(&backbone), "--set", text(&borrowed), "--lender", text(&own), text(&image)];
        let line: Value = serde_json::from_slice(&succeed(&[&["logits"][..], &files].concat()).stdout).unwrap();
        assert_eq!(line["labels"].as_array().unwrap().len(), 2);
        let logit = |class: usize| line["logits"][class].as_f64().unwrap();
        assert_eq!(if logit(0) > logit(1) { "warm" } else { "cold" }, expected, "{line}");
        // Of 0.9 and 0.1.
        assert!(((logit(0) - logit(1)).abs() - 9f64.ln()).abs() < 1.0, "{line}");
    }

    let other = file("other");
    let refused = |data: &Path, more: &[&str]| fail(&train(text(data), text(&other), &[&taught[..], more].concat()));
    assert!(refused(&data, &["--soft-share", "1"]).contains("it must be above 0 and below 1"));
    let shades = shades(root.path());
    let error = refused(&shades, &[]);
    assert!(error.contains("they are of other images: of the 40 images"), "{error}");
    let error = refused(&data, &["--data", text(&shades)]);
    assert!(
        error.contains("it knows 60 of the 100 images of the data, but not") && error.contains("shades"),
        "{error}"
    );
    let bytes = fs::read(&soft).unwrap();
    fs::write(&soft, &bytes[..bytes.len() / 2]).unwrap();
    let error = refused(&data, &[]);
    assert!(error.contains("teacher.safetensors: it is no whole safetensors file"), "{error}");
}

/// A backbone whose stem has norms and no steps.
fn out_of_scratch(root: &Path, data: &Path) -> PathBuf {
    let run = root.join("scratch");
    succeed(&train(text(data), text(&run), &["--preset", "tiny"]));
    artifacts(&run).0
}

#[test]
fn a_model_learns_behind_a_frozen_stem() {
    let root = tempfile::tempdir().unwrap();
    let data = images(root.path());
    let (eyes, run, cache) = (root.path().join("eyes.safetensors"), root.path().join("run"), root.path().join("cache"));
    stem_alone(&eyes);
    let behind = ["--preset", "tiny", "--learning-rate", "0.01", "--stem", text(&eyes), "--stem-cache", text(&cache)];
    let views = ["--views", "3", "--crop-padding", "1"];
    let stopped = [&behind[..], &views, &["--limit-seconds", "0"]].concat();
    succeed(&train(text(&data), text(&run), &stopped));
    let written = || {
        let files = fs::read_dir(&cache).unwrap().map(|file| file.unwrap());
        files.map(|file| (file.path(), file.metadata().unwrap().modified().unwrap())).collect::<BTreeMap<_, _>>()
    };
    let before = written();
    // 60 images of 2 x 2 tokens of 16 features, and a digest.
    let sizes = before.keys().map(|path| fs::metadata(path).unwrap().len());
    assert!(sizes.eq([60 * 4 * 16 * 2 + 64; 3]), "{before:?}");

    let resume = ["train", "--data", text(&data), "--out", text(&run), "--resume", "--quiet"];
    assert!(fail(&resume).contains("give --stem again"));
    succeed(&[&resume[..], &behind[4..]].concat());
    assert_eq!(written(), before, "nothing is computed twice");
    let (backbone, set) = artifacts(&run);
    let stem = |path: &Path| read_backbone(&fs::read(path).unwrap()).unwrap().weights.stem;
    assert_eq!(stem(&backbone), stem(&eyes), "the stem keeps its weights and steps");
    let evaluate = ["evaluate", "--json", "--data", text(&data), "--backbone", text(&backbone), "--set", text(&set)];
    let report: Value = serde_json::from_slice(&succeed(&evaluate).stdout).unwrap();
    assert!(report["top1"].as_f64().unwrap() > 0.8, "{report}");
    let export = ["export", "--run", text(&run), "--store", text(root.path())];
    assert!(fail(&export).contains("--backbone is missing"));
    succeed(&[&export[..], &["--backbone", text(&eyes)]].concat());
    assert_eq!(fs::read(root.path().join("backbones/backbone.safetensors")).unwrap(), fs::read(&backbone).unwrap());

    let compared = root.path().join("compared");
    let variants =
        ["compare", "--data", text(&data), "--out", text(&compared), "--variants", "butterfly,dense", "--seeds=1"];
    succeed(&[&variants[..], &behind, &views, &FAST].concat());
    let table = fs::read_to_string(compared.join("table.md")).unwrap();
    for variant in ["| butterfly | integer |", "| dense | float |"] {
        let row = table.lines().find(|line| line.starts_with(variant)).unwrap_or_else(|| panic!("{table}"));
        let top1: f64 = row.split('|').nth(4).unwrap().trim().parse().unwrap();
        assert!(top1 > 80.0, "{row}");
    }
    assert_eq!(written().len(), 4, "the views of before, and one of the test images");

    let other = root.path().join("other");
    let refused = |more: &[&str]| fail(&train(text(&data), text(&other), &[&behind[..], more].concat()));
    assert!(refused(&["--stem-cache-bytes", "1000"]).contains("more than --stem-cache-bytes 1000"));
    let teacher = ["--teacher-backbone", text(&backbone), "--teacher-set", text(&set)];
    assert!(refused(&teacher).contains("a teacher looks at pixels"));
    let (path, _) = before.first_key_value().unwrap();
    let mut changed = fs::read(path).unwrap();
    changed[0] ^= 1;
    for damaged in [&[0; 100][..], &changed] {
        fs::write(path, damaged).unwrap();
        let error = refused(&views);
        assert!(error.contains(text(path)) && error.contains("it is damaged, delete it"), "{error}");
    }
    let narrow = ["--preset", "study", "--stem", text(&eyes)];
    let error = fail(&train(text(&data), text(&other), &narrow));
    assert!(error.contains("no layer of the stem of eyes has the model's 64 channels; there are {8, 16}"), "{error}");
    let plain = out_of_scratch(root.path(), &data);
    let error = fail(&train(text(&data), text(&other), &["--preset", "tiny", "--stem", text(&plain)]));
    assert!(error.contains("keeps no integers between its layers"), "{error}");
}
