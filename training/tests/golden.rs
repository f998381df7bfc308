//! The routing losses against golden vectors.

#[path = "../../model-core/tests/common/golden.rs"]
mod golden;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use golden::{Golden, for_each_file};
use model_core::config::{ExpertConfig, ViTConfig};
use training::layers::Router;
use training::losses::{balance_loss, expert_loads};
use training::ops;
use training::parameters::Parameters;
use training::vit::Output;

#[test]
fn routing_losses_are_those_of_the_definition() {
    for_each_file(|golden| match golden.spec["kind"].as_str() {
        Some("moe_layer") => check_balance(golden),
        Some("smoothness") => check_smoothness(golden),
        _ => {}
    });
}

fn assert_loss(golden: &Golden<'_>, loss: &Tensor, expected: f64) {
    let loss = f64::from(loss.to_scalar::<f32>().unwrap());
    let tolerance = golden.number("tolerance") * expected.max(1.0);
    assert!((loss - expected).abs() <= tolerance, "{}: {loss} is not {expected}", golden.name);
}

fn check_balance(golden: &Golden<'_>) {
    let [d_model, experts, top_k] = ["d_model", "experts", "top_k"].map(|key| golden.size(key));
    let mut parameters = Parameters::default();
    parameters.insert("moe.router", golden.f32("gate"), &[experts, d_model]).unwrap();
    let config = ExpertConfig { num_experts: experts, top_k, ..ViTConfig::preset("tiny").unwrap().experts };
    let router = Router::new(&parameters, "moe", &config).unwrap();
    let x = golden.f32("x");
    let rows = Tensor::from_slice(&x, (x.len() / d_model, d_model), &Device::Cpu).unwrap();
    let (mut routing, _) = router.forward(&rows, false, None).unwrap();
    // The reference's choices: where two logits are nearly equal, f32 may prefer the other.
    routing.experts = Arc::new(golden.i32("expert_ids").into_iter().map(|id| id as u16).collect());
    let output = Output { logits: rows, routing: vec![routing] };
    let loads = expert_loads(std::iter::once(&output));
    assert_loss(golden, &balance_loss(&output.routing[0], &loads[0]).unwrap(), golden.number("balance_loss"));
}

fn check_smoothness(golden: &Golden<'_>) {
    let shape = golden.tensors.tensor("probabilities").unwrap().shape().to_vec();
    let (height, width, experts) = (golden.size("height"), golden.size("width"), shape[shape.len() - 1]);
    let probabilities = golden.f32("probabilities");
    let images = probabilities.len() / (height * width * experts);
    let probabilities = Tensor::from_vec(probabilities, (images, height * width, experts), &Device::Cpu).unwrap();
    assert_loss(golden, &ops::smoothness(&probabilities, height, width).unwrap(), golden.number("loss"));
}
