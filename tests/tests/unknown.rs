//! Pictures that no expert set knows, on every front end.

use std::process::Command;
use std::sync::Arc;

use model_core::artifact::write_backbone;
use model_core::config::{FloatFormat, ViTConfig};
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::{DecodeLimits, Picture, Preprocess, RgbImage, decode};
use model_core::random::SplitMix64;
use model_core::weights::{BackboneWeights, Background, Covariance, Familiarity};
use serde_json::{Value, json};
use system_tests::fixtures::{backbone_weights, borrower_artifact, expert_set_artifact, write};
use system_tests::server::{Answer, Server, binary, image, png};

fn verdict(answer: &Value) -> (&Value, Option<&str>) {
    assert!(!answer["predictions"].as_array().unwrap().is_empty(), "predictions stay: {answer}");
    (&answer["unknown"], answer.get("unknown_reason").and_then(Value::as_str))
}

#[test]
fn a_flat_frame_and_an_unsure_answer_are_unknown_everywhere() {
    let server = Server::start([] as [&str; 0]);
    let (black, picture) = (png(&RgbImage::new(640, 480)), image("test-00.png"));
    let ask = |query: &str, body: &[u8]| {
        let answer = Answer::of(server.post(&format!("/classify/cifar100{query}")).body(body.to_vec()));
        assert_eq!(answer.status, 200, "{query}");
        answer.json()
    };
    assert_eq!(verdict(&ask("", &black)), (&json!(true), Some("flat")));
    assert_eq!(verdict(&ask("", &picture)), (&json!(null), None));
    assert_eq!(verdict(&ask("?min_score=0.999999", &picture)), (&json!(true), Some("unsure")));
    assert_eq!(verdict(&ask("?min_score=0", &picture)), (&json!(null), None));
    for score in ["2", "-0.1", "nan", "", "much"] {
        let answer = Answer::of(server.post(&format!("/classify?min_score={score}")).body(picture.clone()));
        answer.assert_refused(400, "invalid_request");
        assert!(answer.json()["error"].as_str().unwrap().contains("min_score"), "{score}");
    }

    let labels = |query: &str, body: &[u8]| {
        Answer::of(server.post(&format!("/hf/cifar100{query}")).body(body.to_vec())).json()[0]["label"].clone()
    };
    assert_ne!(labels("", &black), "unknown");
    assert_eq!(labels("?unknown=true", &black), "unknown");
    assert_eq!(labels("?unknown=true&min_score=0.999999", &picture), "unknown");
    assert_ne!(labels("?unknown=true", &picture), "unknown");

    let samples = vec![0u8; 64 * 64 * 3];
    let outputs = ["unknown", "unknown_reason", "scores"].map(|name| json!({ "name": name }));
    let request = json!({
        "inputs": [{ "name": "pixels", "datatype": "UINT8", "shape": [1, 64, 64, 3], "data": samples }],
        "outputs": outputs,
    });
    let answer = Answer::of(server.post("/v2/models/cifar100/infer").json(&request)).json();
    let output = |i: usize| (&answer["outputs"][i]["datatype"], &answer["outputs"][i]["data"]);
    assert_eq!(output(0), (&json!("BOOL"), &json!([true])), "{answer}");
    assert_eq!(output(1), (&json!("BYTES"), &json!(["flat"])));

    assert!(server.metric("bvit_unknown_total{reason=\"flat\",set=\"cifar100\"}") >= 3.0);
    assert!(server.metric("bvit_unknown_total{reason=\"unsure\",set=\"cifar100\"}") >= 2.0);
}

#[test]
fn the_command_line_says_so_too() {
    let file = tempfile::Builder::new().suffix(".png").tempfile().unwrap();
    std::fs::write(file.path(), png(&RgbImage::from_pixel(64, 64, [200, 190, 180].into()))).unwrap();
    let run = |flags: &[&str]| {
        let output = Command::new(binary()).arg("classify").args(flags).arg(file.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(run(&[]).contains(": unknown, flat"));
    let document: Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!(verdict(&document), (&json!(true), Some("flat")));
}

/// What a set with statistics calls unfamiliar, against the distances of `FORMAT.md` in double precision.
#[test]
fn an_unfamiliar_picture_is_unknown_to_a_set_with_statistics() {
    let config = ViTConfig::preset("tiny").unwrap();
    let d_model = config.backbone.d_model;
    let mut random = SplitMix64::at(7, 0);
    let mut values = |len: usize, least: f32| (0..len).map(|_| random.uniform() as f32 + least).collect::<Vec<_>>();
    let background = Background {
        mean: values(d_model, 0.0),
        covariance: Covariance::Diagonal { diagonal: values(d_model, 0.5), factor: Vec::new() },
        source: "none".into(),
        images: 1,
    };
    let means = values(2 * d_model, -0.5);
    let diagonal = values(d_model, 0.2);
    let weights = BackboneWeights { background: Some(background.clone()), ..backbone_weights(&config.backbone, 1) };
    let backbone_bytes = write_backbone("random", &weights, &Preprocess::default(), &json!({})).unwrap();
    let backbone = Arc::new(Backbone::from_bytes(&backbone_bytes).unwrap());
    let lender = expert_set_artifact(&config, backbone.digest(), "lender", 2);
    let lender_set = ExpertSet::from_bytes(&lender, &backbone).unwrap();

    let picture = image("test-00.png");
    let distance = {
        let decoded = Picture::from(decode(&picture, &DecodeLimits::default()).unwrap());
        let preprocess = backbone.preprocess();
        let samples = preprocess.see(&decoded, Default::default(), config.backbone.image_size).unwrap().samples;
        let (mut logits, mut features) = (vec![0.0; config.num_classes], vec![0.0; d_model]);
        let pixels = preprocess.normalize(&samples);
        let row = Row {
            set: &lender_set,
            pixels: &pixels,
            logits: &mut logits,
            routing: None,
            features: Some(&mut features),
        };
        Session::new(&backbone, 1, 1).forward(&mut [row]).unwrap();
        let squared = |mean: &[f32], variances: &[f32]| -> f64 {
            let pairs = features.iter().zip(mean).zip(variances);
            pairs.map(|((&f, &m), &v)| (f64::from(f) - f64::from(m)).powi(2) / f64::from(v)).sum()
        };
        let Covariance::Diagonal { diagonal: far, .. } = &background.covariance else { unreachable!() };
        let nearest = means.chunks_exact(d_model).map(|mean| squared(mean, &diagonal)).fold(f64::INFINITY, f64::min);
        nearest - squared(&background.mean, far)
    };

    let store = tempfile::tempdir().unwrap();
    let path = |name: &str| store.path().join("expert-sets").join(name).join("1.safetensors");
    write(&store.path().join("backbones/main.safetensors"), &backbone_bytes);
    write(&path("lender"), &lender);
    let slack = distance.abs().max(1.0) * 1e-4;
    for (name, threshold, temperature) in [("above", distance + slack, 4.0), ("below", distance - slack, 1.0)] {
        let set = borrower_artifact(&lender, name, |set| {
            set.weights.temperature = temperature;
            set.weights.familiarity = Some(Familiarity {
                format: FloatFormat::F32,
                relative: true,
                means: means.clone().into(),
                covariance: Covariance::Diagonal { diagonal: diagonal.clone(), factor: Vec::new() },
                threshold: threshold as f32,
                pass_share: 0.0,
            });
        });
        write(&path(name), &set);
    }
    let server = Server::start(["--model-store", store.path().to_str().unwrap()]);
    let ask = |set: &str, query: &str| {
        Answer::of(server.post(&format!("/classify/{set}?top_k=9{query}")).body(picture.clone())).json()
    };
    assert_eq!(verdict(&ask("lender", "")), (&json!(null), None));
    assert_eq!(verdict(&ask("above", "")), (&json!(false), None));
    assert_eq!(verdict(&ask("below", "")), (&json!(true), Some("unfamiliar")));
    assert_eq!(verdict(&ask("below", "&min_score=1")), (&json!(true), Some("unfamiliar")));
    assert_eq!(verdict(&ask("above", "&min_score=1")), (&json!(true), Some("unsure")));
    assert!(server.metric("bvit_unknown_total{reason=\"unfamiliar\",set=\"below\"}") >= 2.0);

    // The temperature divides the logits: differences of log-scores shrink by it.
    let log_scores = |answer: &Value| {
        let predictions = answer["predictions"].as_array().unwrap();
        let score = |i: usize| predictions[i]["score"].as_f64().unwrap().ln();
        score(0) - score(predictions.len() - 1)
    };
    let (hot, cold) = (log_scores(&ask("above", "")), log_scores(&ask("below", "")));
    assert!((hot * 4.0 - cold).abs() < 1e-3 * cold, "{hot} {cold}");
}

#[test]
fn deepstacks_clients_get_one_box_or_none() {
    let server = Server::start([] as [&str; 0]);
    let ask = |path: &str, fields: &[(&str, &str)], picture: Vec<u8>| {
        let file = reqwest::blocking::multipart::Part::bytes(picture).file_name("frame.jpg");
        let form = reqwest::blocking::multipart::Form::new().part("image", file);
        let form = fields.iter().fold(form, |form, (name, value)| form.text((*name).to_owned(), (*value).to_owned()));
        Answer::of(server.post(path).multipart(form))
    };
    let custom = "/v1/vision/custom/cifar100";
    let picture = image("photo-coffee.jpg");
    let (width, height) = model_core::image::upright_size(&picture).unwrap();
    let expected = server.classify(&picture).json();
    let answer = ask(custom, &[("api_key", "whatever")], picture.clone()).json();
    let found = &answer["predictions"][0];
    assert_eq!(answer["success"], true);
    assert_eq!(answer["predictions"].as_array().map(Vec::len), Some(1));
    assert_eq!(found["label"], expected["predictions"][0]["label"]);
    assert_eq!(found["confidence"], expected["predictions"][0]["score"]);
    let seen: Vec<f64> = expected["seen"]["crop"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect();
    let pixels = |share: f64, side: u32| (share * f64::from(side)).round();
    for (name, value) in [
        ("x_min", pixels(seen[0], width)),
        ("y_min", pixels(seen[1], height)),
        ("x_max", pixels(seen[0] + seen[2], width)),
        ("y_max", pixels(seen[1] + seen[3], height)),
    ] {
        assert_eq!(found[name].as_f64(), Some(value), "{name} of {answer}");
    }
    let none = ask(custom, &[("min_confidence", "1")], picture.clone()).json();
    assert_eq!((&none["success"], &none["predictions"]), (&true.into(), &serde_json::json!([])));
    let scene = ask("/v1/vision/scene", &[], picture.clone()).json();
    assert_eq!((&scene["label"], &scene["confidence"]), (&found["label"], &found["confidence"]));
    let scene = ask("/v1/vision/scene", &[("min_confidence", "1")], picture.clone()).json();
    assert_eq!((&scene["label"], &scene["confidence"]), (&"unknown".into(), &0.0.into()));
    let wrong = ask(custom, &[("min_confidence", "much")], picture.clone());
    wrong.assert_refused(400, "invalid_request");
    assert!(wrong.text.contains("min_confidence"), "{}", wrong.text);
    ask("/v1/vision/custom/nobody", &[], picture).assert_refused(404, "set_not_found");
    ask(custom, &[], b"no picture".to_vec()).assert_refused(415, "unsupported_media_type");
}
