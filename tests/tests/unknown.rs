//! Pictures that no expert set knows, on every front end.

use std::process::Command;

use model_core::image::RgbImage;
use serde_json::{Value, json};
use system_tests::server::{Answer, Server, binary, image};

fn png(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(image.as_raw()).unwrap();
    bytes
}

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
