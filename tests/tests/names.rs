//! Names that nobody knows, of parameters, fields, variables, methods and paths: refused or warned about by name.

use reqwest::blocking::multipart::{Form, Part};
use serde_json::{Value, json};
use system_tests::fixtures::shipped_store;
use system_tests::server::{Answer, Server, binary, image};

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Every path of the document with names that exist, and the methods that it takes.
fn routes(server: &Server) -> Vec<(String, String)> {
    let document = server.get("/openapi.json").json();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let concrete = path.replace("{set}", "spare").replace("{name}", "spare");
        let concrete = concrete.replace("{version}", "1").replace("{file}", "main.js");
        routes.extend(item.as_object().unwrap().keys().map(|method| (method.to_uppercase(), concrete.clone())));
    }
    assert!(routes.len() > 25, "{routes:?}");
    routes
}

#[test]
fn an_unknown_query_parameter_is_refused_by_name_on_every_route() {
    let store = shipped_store(&["cifar100/1", "spare/1"]);
    let server = Server::start(["--model-store", store.path().to_str().unwrap()]);
    for (method, path) in routes(&server) {
        for query in ["topk=1", "threshold=0.5", "function_to_apply=sigmoid", "Top_K=1", "top_k%20=1", "x"] {
            let answer = Answer::of(server.request(&method, &format!("{path}?{query}")).body("x"));
            answer.assert_refused(400, "invalid_request");
            let name = query.split('=').next().unwrap().replace("%20", " ");
            assert!(answer.text.contains(&format!("`{name}` is unknown")), "{method} {path}: {}", answer.text);
        }
    }
    let topk = Answer::of(server.post("/classify?top_k=1&topk=1").body(image("test-00.png")));
    assert!(topk.text.contains("did you mean `top_k`?") && topk.text.contains("`routing`"), "{}", topk.text);
    let known = server.post("/classify?set=spare&version=1&top_k=1&routing=false").body(image("test-00.png"));
    assert_eq!(Answer::of(known).status, 200);
    assert_eq!(server.get("/sets/spare").status, 200, "nothing was deleted");
}

#[test]
fn an_unknown_field_is_refused_by_name() {
    let server = Server::start([] as [&str; 0]);
    let picture = base64(&image("test-00.png"));
    let tensor = json!({"name": "image", "datatype": "BYTES", "shape": [1], "data": [picture]});
    let with = |mut tensor: Value, name: &str| {
        tensor[name] = json!(1);
        tensor
    };
    let hf = "/hf/cifar100";
    let infer = "/v2/models/cifar100/infer";
    let cases = [
        ("/classify", json!({"inputs": picture, "topk": 1}), "topk"),
        ("/classify", json!({"inputs": picture, "parameters": {"threshold": 0.5}}), "threshold"),
        (hf, json!({"inputs": picture, "parameters": {"topk": 1}}), "topk"),
        (hf, json!({"inputs": picture, "options": {"wait": true}}), "wait"),
        (hf, json!({"inputs": picture, "parameters": {"candidate_labels": ["cat", "dog"]}}), "zero-shot"),
        (hf, json!({"inputs": picture, "candidate_labels": ["cat", "dog"]}), "zero-shot"),
        (hf, json!({"inputs": {"image": picture, "candidateLabels": ["cat"]}}), "base64"),
        (infer, json!({"inputs": [tensor], "output": []}), "output"),
        (infer, json!({"inputs": [with(tensor.clone(), "dtype")]}), "dtype"),
        (infer, json!({"inputs": [tensor], "outputs": [{"name": "scores", "class_count": 1}]}), "class_count"),
        (
            infer,
            json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"shared_memory_region": "r"}}]}),
            "shared_memory_region",
        ),
        ("/v2/repository/index", json!({"redy": true}), "redy"),
        ("/v2/repository/models/cifar100/load", json!({"version": 2}), "version"),
        ("/v2/repository/models/cifar100/load", json!({"parameters": {"config": "{}"}}), "config"),
    ];
    for (path, body, named) in cases {
        let answer = Answer::of(server.post(path).json(&body));
        answer.assert_refused(400, "invalid_request");
        assert!(answer.text.contains(named), "{path}: {}", answer.text);
    }
    // The protocol lets a request have parameters that a server need not know.
    let open = json!({"inputs": [tensor], "parameters": {"priority": 1, "timeout": 5, "mine": "x"}, "model_name": "m"});
    assert_eq!(Answer::of(server.post(infer).json(&open)).status, 200);
    let hosted = json!({"inputs": picture, "options": {"wait_for_model": true, "use_cache": false}});
    assert_eq!(Answer::of(server.post(hf).json(&hosted)).status, 200);
}

#[test]
fn scores_are_what_was_asked_for() {
    let server = Server::start([] as [&str; 0]);
    let picture = base64(&image("test-00.png"));
    let ask = |function: &str| -> Vec<f64> {
        let body = json!({"inputs": picture, "parameters": {"top_k": 100, "function_to_apply": function}});
        let answer = Answer::of(server.post("/hf/cifar100").json(&body)).json();
        answer.as_array().unwrap().iter().map(|label| label["score"].as_f64().unwrap()).collect()
    };
    let (softmax, sigmoid, logits) = (ask("softmax"), ask("sigmoid"), ask("none"));
    assert!((softmax.iter().sum::<f64>() - 1.0).abs() < 1e-4);
    let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
    for ((softmax, sigmoid), logit) in softmax.iter().zip(&sigmoid).zip(&logits) {
        assert!((logit.exp() / total - softmax).abs() < 1e-4);
        assert!((1.0 / (1.0 + (-logit).exp()) - sigmoid).abs() < 1e-4);
    }
    for wrong in ["relu", "", "Softmax"] {
        let body = json!({"inputs": picture, "parameters": {"function_to_apply": wrong}});
        Answer::of(server.post("/classify").json(&body)).assert_refused(400, "invalid_request");
    }
}

#[test]
fn text_fields_and_empty_files_of_a_form_are_no_images() {
    let server = Server::start([] as [&str; 0]);
    let picture = || Part::bytes(image("test-00.png")).file_name("a.png");
    let nothing = || Part::bytes(Vec::new()).file_name("").mime_str("application/octet-stream").unwrap();
    let send = |form: Form| Answer::of(server.post("/classify").multipart(form));
    let page =
        Form::new().text("csrf_token", "abc").part("image", picture()).part("second", nothing()).text("send", "Go");
    let answer = send(page);
    assert!(answer.json()["predictions"].is_array(), "one image, one object: {}", answer.text);
    for form in [Form::new().text("image", "cat"), Form::new().part("image", nothing())] {
        let answer = send(form);
        answer.assert_refused(400, "invalid_request");
        assert!(answer.text.contains("no image"), "{}", answer.text);
    }
    for (name, said) in [("topk", "top_k"), ("modle", "model"), ("routing", "query")] {
        let answer = send(Form::new().part("image", picture()).text(name, "1"));
        answer.assert_refused(400, "invalid_request");
        assert!(answer.text.contains(said), "{}", answer.text);
    }
    let one = send(Form::new().part("image", picture()).text("top_k", "1").text("function_to_apply", "none"));
    assert_eq!(one.json()["predictions"].as_array().map(Vec::len), Some(1), "{}", one.text);
}

#[test]
fn every_route_takes_a_trailing_slash_and_names_its_methods() {
    let store = shipped_store(&["cifar100/1", "spare/1"]);
    let server = Server::start(["--model-store", store.path().to_str().unwrap()]);
    for (method, path) in routes(&server) {
        let plain = Answer::of(server.request(&method, &path).body("x"));
        let slashed = Answer::of(server.request(&method, &format!("{}/", path.trim_end_matches('/'))).body("x"));
        // What is deleted once is gone the second time.
        if method != "DELETE" {
            assert_eq!(plain.status, slashed.status, "{method} {path}: {}", slashed.text);
        }
        // There is no camera, but the route is there to say so.
        let is_answered = ![404, 405].contains(&plain.status) || plain.text.contains("camera_not_found");
        assert!(is_answered || method == "DELETE", "{method} {path}: {}", plain.text);
        if method == "DELETE" && path.starts_with("/sets") {
            assert!(slashed.text.contains("expert set"), "{}", slashed.text);
            let again = std::fs::read(store.path().join("expert-sets/cifar100/1.safetensors")).unwrap();
            assert!(Answer::of(server.request("PUT", "/sets/spare/1/").body(again)).status < 300);
        }
    }
    let wrong = Answer::of(server.request("PATCH", "/sets/spare/1"));
    wrong.assert_refused(405, "method_not_allowed");
    assert!(wrong.text.contains("this path takes DELETE, GET and PUT, not PATCH"), "{}", wrong.text);
    let query = Answer::of(server.post("/classify/?top_k=1").body(image("test-00.png")));
    assert_eq!(query.json()["predictions"].as_array().map(Vec::len), Some(1), "{}", query.text);
}

#[test]
fn a_variable_that_is_no_setting_is_warned_about_by_name() {
    let variables = [("BVIT_MAXBODY", "1MiB"), ("BVIT_ADMIN_KEY", "a-secret-that-is-not-said")];
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let mut command = std::process::Command::new(binary());
    command.args(["--listen", "127.0.0.1:0", "--trust-loopback", "--default-set", "nobody"]).envs(variables);
    let status = command.stdout(std::fs::File::create(&log).unwrap()).status().unwrap();
    assert_eq!(status.code(), Some(2), "it does not know the set, and ends");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("`BVIT_MAXBODY`; did you mean `BVIT_MAX_BODY`?"), "{log}");
    assert!(log.contains("`BVIT_ADMIN_KEY`; did you mean `BVIT_ADMIN_KEYS`?"), "{log}");
    assert!(!log.contains("a-secret") && !log.contains("BVIT_LISTEN"), "{log}");
}
