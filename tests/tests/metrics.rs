//! `/metrics`, read by the parser of the official Python client.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;
use system_tests::server::{Server, image};

/// Families by name, each `{"type": .., "help": .., "samples": [[name, labels, value], ..]}`.
const PARSE: &str = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families
families = {}
for family in text_string_to_metric_families(sys.stdin.read()):
    assert family.name not in families, family.name
    samples = [[s.name, s.labels, str(s.value)] for s in family.samples]
    families[family.name] = {'type': family.type, 'help': family.documentation, 'samples': samples}
print(json.dumps(families))
";

fn parse(text: &str) -> Value {
    // Debian's interpreter, because `tests/run.sh` installs Debian's package.
    let mut python = Command::new("/usr/bin/python3")
        .args(["-c", PARSE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 runs");
    python.stdin.take().expect("piped").write_all(text.as_bytes()).expect("python3 reads");
    let output = python.wait_with_output().expect("python3 ends");
    assert!(output.status.success(), "the parser refused: {text}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn scrape(server: &Server) -> Value {
    let answer = server.get("/metrics");
    assert_eq!(answer.status, 200);
    assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")), "{answer:?}");
    parse(&answer.text)
}

/// The sum of the samples called `name` whose labels include `labels`.
fn value(families: &Value, name: &str, labels: &[(&str, &str)]) -> f64 {
    let family = name.trim_end_matches("_total").trim_end_matches("_count").trim_end_matches("_sum");
    let samples = families[family]["samples"].as_array().unwrap_or_else(|| panic!("{name} is missing"));
    let matching = samples.iter().filter(|sample| {
        sample[0] == name && labels.iter().all(|(label, value)| sample[1][label].as_str() == Some(value))
    });
    matching.map(|sample| sample[2].as_str().unwrap().parse::<f64>().unwrap()).sum()
}

#[test]
fn everything_is_there_before_the_first_request_with_help_and_type() {
    let families = scrape(&Server::start([] as [&str; 0]));
    for (name, kind) in [
        ("bvit_answers", "counter"),
        ("bvit_top_score", "histogram"),
        ("bvit_http_requests", "counter"),
        ("bvit_request_duration_seconds", "histogram"),
        ("bvit_decode_duration_seconds", "histogram"),
        ("bvit_queue_duration_seconds", "histogram"),
        ("bvit_inference_duration_seconds", "histogram"),
        ("bvit_images", "counter"),
        ("bvit_batches", "counter"),
        ("bvit_batch_size", "histogram"),
        ("bvit_batch_distinct_sets", "histogram"),
        ("bvit_queue_depth", "gauge"),
        ("bvit_queue_capacity", "gauge"),
        ("bvit_requests_in_flight", "gauge"),
        ("bvit_request_failures", "counter"),
        ("bvit_set_resident", "gauge"),
        ("bvit_sets_registered", "gauge"),
        ("bvit_sets_resident", "gauge"),
        ("bvit_sets_pinned", "gauge"),
        ("bvit_sets_failed", "gauge"),
        ("bvit_set_loads", "counter"),
        ("bvit_set_load_duration_seconds", "histogram"),
        ("bvit_set_evictions", "counter"),
        ("bvit_set_hits", "counter"),
        ("bvit_set_misses", "counter"),
        ("bvit_memory_budget_bytes", "gauge"),
        ("bvit_memory_bytes", "gauge"),
        ("bvit_process_memory_peak_bytes", "gauge"),
        ("bvit_cgroup_memory_bytes", "gauge"),
        ("bvit_cgroup_memory_limit_bytes", "gauge"),
        ("bvit_expert_tokens", "counter"),
        ("bvit_expert_load_imbalance", "gauge"),
        ("bvit_build_info", "gauge"),
        ("process_resident_memory_bytes", "gauge"),
        ("process_cpu_seconds", "counter"),
        ("process_open_fds", "gauge"),
        ("process_start_time_seconds", "gauge"),
    ] {
        assert_eq!(families[name]["type"], kind, "{name}");
        assert!(families[name]["help"].as_str().is_some_and(|help| !help.is_empty()), "{name}");
        assert!(families[name]["samples"].as_array().is_some_and(|samples| !samples.is_empty()), "{name}");
    }
    assert_eq!(value(&families, "bvit_sets_resident", &[]), 1.0);
    assert_eq!(value(&families, "bvit_request_duration_seconds_count", &[("route", "/classify")]), 0.0);
}

#[test]
fn requests_images_and_failures_are_counted_once() {
    let server = Server::start([] as [&str; 0]);
    for name in ["test-00.png", "test-01.png", "test-02.jpg"] {
        assert_eq!(server.classify(&image(name)).status, 200);
    }
    server.classify(b"").assert_refused(400, "empty_body");
    server.get("/no/such/route").assert_refused(404, "route_not_found");
    let after = scrape(&server);
    let classify = ("route", "/classify");
    assert_eq!(value(&after, "bvit_http_requests_total", &[classify, ("status", "200")]), 3.0);
    assert_eq!(value(&after, "bvit_http_requests_total", &[classify, ("status", "400")]), 1.0);
    assert_eq!(value(&after, "bvit_http_requests_total", &[("status", "404")]), 1.0);
    assert_eq!(value(&after, "bvit_request_duration_seconds_count", &[classify]), 4.0);
    assert_eq!(value(&after, "bvit_images_total", &[("set", "cifar100"), ("result", "ok")]), 3.0);
    assert_eq!(value(&after, "bvit_inference_duration_seconds_count", &[]), 3.0);
    assert_eq!(value(&after, "bvit_answers_total", &[("set", "cifar100")]), 3.0);
    assert_eq!(value(&after, "bvit_top_score_count", &[("set", "cifar100")]), 3.0);
    assert_eq!(value(&after, "bvit_decode_duration_seconds_count", &[]), 3.0);
    assert_eq!(value(&after, "bvit_request_failures_total", &[("reason", "empty_body")]), 1.0);
    assert_eq!(value(&after, "bvit_queue_depth", &[]), 0.0);
    assert_eq!(value(&after, "bvit_requests_in_flight", &[]), 1.0, "this scrape");
    assert!(value(&after, "bvit_memory_bytes", &[]) <= value(&after, "bvit_memory_budget_bytes", &[]));
    assert_eq!(value(&after, "bvit_build_info", &[]), 1.0);
}
