//! The candle model as a whole: determinism, gradients, and what rounding to an artifact keeps.

use candle_core::{Device, Tensor};
use model_core::config::{ExpertConfig, FeedForwardKind, ViTConfig};
use model_core::random::{AngleSpread, AngleStart};
use training::losses::LossWeights;
use training::matmul::Products;
use training::ops::{self, Activations};
use training::optimizer::{AdamW, AdamWConfig};
use training::parameters::{Quantizers, is_expert_set_parameter};
use training::quantize::router_snapped;
use training::step::{Batch, Inputs, gradients, gradients_in};
use training::vit::{Variation, ViT};

fn tiny() -> ViTConfig {
    ViTConfig::preset("tiny").unwrap()
}

fn batch(config: &ViTConfig, len: usize) -> Batch {
    let pixels = len * config.backbone.image_size.pow(2) * 3;
    let mut targets = vec![0.0; len * config.num_classes];
    for i in 0..len {
        targets[i * config.num_classes + i % config.num_classes] = 1.0;
    }
    let pixels = (0..pixels).map(|i| (i as f32 * 0.37).sin()).collect();
    Batch { inputs: Inputs::Pixels(pixels), targets, len, ..Batch::default() }
}

fn pixels(vit: &ViT, batch: &Batch) -> Tensor {
    let side = vit.config().backbone.image_size;
    let Inputs::Pixels(pixels) = &batch.inputs else { panic!("pixels") };
    Tensor::from_slice(pixels, (batch.len, side, side, 3), &Device::Cpu).unwrap()
}

fn logits(vit: &ViT, batch: &Batch, quantizers: Quantizers) -> Vec<f32> {
    let pixels = pixels(vit, batch);
    vit.forward(&pixels, quantizers).unwrap().logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_parameter_receives_gradient_the_router_included() {
    let config = tiny();
    let vit = ViT::init(&config, 1).unwrap();
    // Without routing losses: what reaches the router here came through the weights of the chosen experts.
    let weights = LossWeights { balance: 0.0, smoothness: 0.0, contiguity: 0.0 };
    let (gradients, _) = gradients(&vit, Quantizers::ALL, &batch(&config, 8), weights, 8, 1).unwrap();
    for name in vit.parameters().all().keys() {
        let largest = gradients[name].iter().fold(0f32, |m, g| m.max(g.abs()));
        assert!(largest > 1e-6, "{name}: largest gradient {largest}");
    }
}

#[test]
fn a_head_gets_no_gradient_from_another_ones_images() {
    let config = tiny();
    let vit = ViT::init(&config, 1).unwrap();
    // All images are of class 0 or 1, which one head has; the other has the remaining three.
    let mut batch = Batch { heads: vec![2, 3], ..batch(&config, 6) };
    for (i, row) in batch.targets.chunks_exact_mut(5).enumerate() {
        row.fill(0.0);
        row[i % 2] = 1.0;
    }
    let weights = LossWeights { balance: 0.0, smoothness: 0.0, contiguity: 0.0 };
    let of = |batch: &Batch| gradients(&vit, Quantizers::NONE, batch, weights, 6, 1).unwrap();
    let (apart, stats) = of(&batch);
    let d_model = config.backbone.d_model;
    for (name, width) in [("head.weight", d_model), ("head.bias", 1)] {
        let (own, others) = apart[name].split_at(2 * width);
        assert!(own.iter().any(|g| g.abs() > 1e-4), "{name}");
        assert!(others.iter().all(|g| *g == 0.0), "{name}: {others:?}");
    }
    // The first head's own softmax, and nothing of the second's logits.
    let logits = logits(&vit, &batch, Quantizers::NONE);
    let expected = logits.chunks_exact(5).enumerate().map(|(i, row)| {
        let own = row[i % 2];
        f64::from(((row[0] - own).exp() + (row[1] - own).exp()).ln())
    });
    let expected = expected.sum::<f64>() / 6.0;
    assert!((stats.cross_entropy - expected).abs() < 1e-5, "{} and {expected}", stats.cross_entropy);
    let hits = logits.chunks_exact(5).enumerate().filter(|(i, row)| row[i % 2] > row[1 - i % 2]).count();
    assert!((stats.accuracy - hits as f64 / 6.0).abs() < 1e-9);
    let one = Batch { heads: vec![5], ..batch.clone() };
    let none = Batch { heads: Vec::new(), ..batch };
    assert_eq!(of(&one), of(&none), "a head alone is what there was before");
}

#[test]
fn loss_gradient_matches_finite_differences_through_the_whole_model() {
    let config = tiny();
    let vit = ViT::init(&config, 2).unwrap();
    let batch = batch(&config, 4);
    // Without rounding the loss is smooth except where a routing choice flips.
    let loss = |vit: &ViT| gradients(vit, Quantizers::NONE, &batch, LossWeights::default(), 4, 1).unwrap();
    let (analytic, _) = loss(&vit);
    let names = [
        "stem.0.conv.weight",
        "blocks.0.moe.router",
        "blocks.0.moe.rotation_in",
        "blocks.1.moe.rotation_out",
        "blocks.1.moe.up",
        "head.bias",
    ];
    for name in names {
        check_largest(&vit, name, &analytic[name], |vit| loss(vit).1.loss);
    }
}

/// Checks the largest element of a parameter's gradient against a central difference of `loss`.
fn check_largest(vit: &ViT, name: &str, analytic: &[f32], loss: impl Fn(&ViT) -> f64) {
    let values = vit.parameters().var(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let largest = |best: (usize, f32), (i, g): (usize, &f32)| if g.abs() > best.1.abs() { (i, *g) } else { best };
    let (at, gradient) = analytic.iter().enumerate().fold((0, 0.0), largest);
    let step = 5e-3;
    let shifted = |delta: f32| {
        let mut moved = values.clone();
        moved[at] += delta;
        vit.parameters().set(name, &moved).unwrap();
        loss(vit)
    };
    let numeric = (shifted(step) - shifted(-step)) / f64::from(2.0 * step);
    vit.parameters().set(name, &values).unwrap();
    // f32 rounding of a loss near 2 is about 2e-7 times a few dozen operations, over 2 * step = 1e-2: 1e-3. The
    // truncation error, of order step^2, is below that.
    assert!((numeric - f64::from(gradient)).abs() < 2e-3, "{name}[{at}]: {gradient} but numerically {numeric}");
}

#[test]
fn dense_kinds_have_their_parameters_and_a_gradient_that_finite_differences_confirm() {
    let config = tiny();
    let batch = batch(&config, 4);
    for (kind, has_router) in [(FeedForwardKind::DenseExperts, true), (FeedForwardKind::Dense, false)] {
        let vit = ViT::init_kind(&config, kind, AngleSpread::Narrow, 7).unwrap();
        let loss = |vit: &ViT| gradients(vit, Quantizers::ALL, &batch, LossWeights::default(), 4, 1).unwrap();
        let (analytic, stats) = loss(&vit);
        assert_eq!(stats.balance > 0.0, has_router);
        assert!(analytic.keys().all(|name| !name.contains("rotation")));
        assert_eq!(analytic.contains_key("blocks.0.moe.router"), has_router);
        let experts = if has_router { config.experts.num_experts } else { 1 };
        assert_eq!(analytic["blocks.0.moe.up"].len(), experts * config.backbone.d_ff * config.backbone.d_model);
        let names = ["blocks.0.moe.up", "blocks.1.moe.down", "stem.0.conv.weight", "blocks.0.moe.router"];
        for name in names.into_iter().take(3 + usize::from(has_router)) {
            check_largest(&vit, name, &analytic[name], |vit| loss(vit).1.loss);
        }
        let labels: Vec<String> = (0..config.num_classes).map(|i| i.to_string()).collect();
        assert!(vit.to_weights(&labels).unwrap_err().to_string().contains("butterfly experts"));
    }
}

#[test]
fn low_rank_experts_have_a_gradient_that_finite_differences_confirm() {
    let config = tiny();
    let batch = batch(&config, 4);
    let vit = ViT::init_kind(&config, FeedForwardKind::LowRankExperts, AngleSpread::Narrow, 7).unwrap();
    let loss = |vit: &ViT| gradients(vit, Quantizers::ALL, &batch, LossWeights::default(), 4, 1).unwrap();
    let analytic = loss(&vit).0;
    // Rank 2, an eighth of 16.
    assert_eq!(analytic["blocks.0.moe.up_out"].len(), 4 * 32 * 2);
    for name in ["blocks.0.moe.up_in", "blocks.1.moe.up_out", "blocks.0.moe.down_in", "blocks.1.moe.down_out"] {
        check_largest(&vit, name, &analytic[name], |vit| loss(vit).1.loss);
    }
}

/// Experts of few bits compute what fp32 experts of the rounded matrices compute.
#[test]
fn experts_of_few_bits_are_dense_experts_that_were_rounded() {
    let config = tiny();
    let batch = batch(&config, 4);
    let rounded = Quantizers { experts: false, activations: Activations::Float, ..Quantizers::ALL };
    let dense = ViT::init_kind(&config, FeedForwardKind::DenseExperts, AngleSpread::Narrow, 7).unwrap();
    let exact = logits(&dense, &batch, Quantizers::NONE);
    type Round = fn(&[f32], usize) -> Vec<f32>;
    let kinds: [(FeedForwardKind, Round, usize); 3] = [
        (FeedForwardKind::TernaryExperts, |w, cols| ops::ternarized(w, cols), 3),
        (FeedForwardKind::Int4Experts, |w, cols| router_snapped(w, cols, 4), 15),
        (FeedForwardKind::Int8Experts, |w, cols| router_snapped(w, cols, 8), 255),
    ];
    for (kind, round, levels) in kinds {
        let few = ViT::init_kind(&config, kind, AngleSpread::Narrow, 7).unwrap();
        let of_few = logits(&few, &batch, rounded);
        let reference = ViT::init_kind(&config, FeedForwardKind::DenseExperts, AngleSpread::Narrow, 7).unwrap();
        for l in 0..config.backbone.num_layers {
            for (part, cols) in [("up", config.backbone.d_model), ("down", config.backbone.d_ff)] {
                let name = format!("blocks.{l}.moe.{part}");
                let values = few.parameters().var(&name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let values = round(&values, cols);
                let mut row: Vec<u32> = values[..cols].iter().map(|v| v.to_bits()).collect();
                row.sort_unstable();
                row.dedup();
                assert!(row.len() <= levels + 1, "{kind:?}: {} values in a row", row.len());
                reference.parameters().set(&name, &values).unwrap();
            }
        }
        for (a, b) in of_few.iter().zip(logits(&reference, &batch, Quantizers::NONE)) {
            // w + (round(w) - w) differs from round(w) by a rounding of 2^-24 of w, in sums of 32 products.
            assert!((a - b).abs() < 1e-4, "{kind:?}: {a} and {b}");
        }
        assert!(of_few.iter().zip(&exact).any(|(a, b)| (a - b).abs() > 1e-3), "{kind:?} rounds nothing");
        let all = logits(&few, &batch, Quantizers::ALL);
        assert!(all.iter().zip(&of_few).any(|(a, b)| a != b), "{kind:?}: activations stay in float");
    }
}

#[test]
fn gains_and_tied_substrates_have_gradients_that_finite_differences_confirm() {
    let config = ViTConfig { experts: ExpertConfig { stages_out: 0, ..tiny().experts }, ..tiny() };
    let batch = batch(&config, 4);
    for (kind, names) in [
        (FeedForwardKind::ButterflyGains, ["blocks.0.moe.gains", "blocks.1.moe.down"]),
        (FeedForwardKind::ButterflyTied, ["blocks.0.moe.up", "blocks.1.moe.down_scale"]),
    ] {
        let vit = ViT::init_kind(&config, kind, AngleSpread::Narrow, 9).unwrap();
        let loss = |vit: &ViT, quantizers| gradients(vit, quantizers, &batch, LossWeights::default(), 4, 1).unwrap();
        let (analytic, _) = loss(&vit, Quantizers::NONE);
        for name in names {
            check_largest(&vit, name, &analytic[name], |vit| loss(vit, Quantizers::NONE).1.loss);
        }
        let (rounded, _) = loss(&vit, Quantizers::ALL);
        assert!(rounded.values().flatten().all(|g| g.is_finite()));
    }
}

#[test]
fn every_kind_shares_the_rest_of_its_initial_parameters() {
    let config = tiny();
    let [butterfly, experts, dense] =
        [FeedForwardKind::Butterfly, FeedForwardKind::DenseExperts, FeedForwardKind::Dense]
            .map(|kind| ViT::init_kind(&config, kind, AngleSpread::Narrow, 8).unwrap());
    let values =
        |vit: &ViT, name: &str| vit.parameters().var(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for name in butterfly.parameters().all().keys().filter(|name| !name.contains(".moe.")) {
        assert_eq!(values(&butterfly, name), values(&experts, name), "{name}");
        assert_eq!(values(&butterfly, name), values(&dense, name), "{name}");
    }
    let uniform = ViT::init_kind(&config, FeedForwardKind::Butterfly, AngleSpread::Uniform, 8).unwrap();
    for name in butterfly.parameters().all().keys() {
        assert_eq!(values(&butterfly, name) == values(&uniform, name), !name.contains(".rotation_"), "{name}");
    }
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let config = tiny();
    let vit = ViT::init(&config, 3).unwrap();
    let batch = batch(&config, 12);
    let run = |threads| gradients(&vit, Quantizers::ALL, &batch, LossWeights::default(), 4, threads).unwrap();
    assert_eq!(run(1), run(3));
}

/// Factors of products lose up to 2^-9 of themselves, at random: a percent of a gradient's norm after the dozen products of
/// a block is what that adds up to; a wrong operand, sign or scale would be off by all of it. Without what flips with the
/// last bits: roundings to codes, and a choice among experts.
#[test]
fn gradients_by_products_of_bf16_are_those_of_f32() {
    for preset in ["tiny", "study"] {
        let config = ViTConfig::preset(preset).unwrap();
        let experts = ExpertConfig { num_experts: 2, top_k: 2, ..config.experts };
        let config = ViTConfig { experts, ..config };
        let vit = ViT::init(&config, 3).unwrap();
        let batch = batch(&config, 8);
        let run = |products, quantizers| {
            gradients_in(products, &vit, quantizers, &batch, LossWeights::default(), (4, 2)).unwrap()
        };
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let (expected, stats) = run(Products::F32, Quantizers::NONE);
        let (got, got_stats) = run(Products::fastest(), Quantizers::NONE);
        assert!((stats.cross_entropy - got_stats.cross_entropy).abs() < 0.01 * stats.cross_entropy);
        let all: f64 = expected.values().map(|g| norm(&mut g.iter().copied()).powi(2)).sum::<f64>().sqrt();
        for (name, expected) in &expected {
            let difference = norm(&mut expected.iter().zip(&got[name]).map(|(a, b)| a - b));
            // What is small beside the whole gradient is a difference of larger things.
            let size = norm(&mut expected.iter().copied()).max(0.01 * all);
            println!("{preset} {name}: {:.4}", difference / size);
            assert!(difference < 0.05 * size, "{preset} {name}: {difference} of {size}");
        }
        assert_eq!(run(Products::fastest(), Quantizers::ALL), run(Products::fastest(), Quantizers::ALL));
    }
}

/// What the loss says of a batch does not depend on how it is cut, so that small shards do not force every few images
/// to use all experts.
#[test]
fn experts_are_balanced_over_the_whole_batch() {
    let config = tiny();
    let vit = ViT::init(&config, 3).unwrap();
    let batch = batch(&config, 12);
    let only_balance = LossWeights { balance: 1e4, smoothness: 0.0, contiguity: 0.0 };
    let run = |shard_size| gradients(&vit, Quantizers::NONE, &batch, only_balance, shard_size, 2).unwrap();
    let ((whole, stats), (cut, stats_cut)) = (run(12), run(2));
    // Sums of twelve parts in another order: a few roundings of 2^-24 each.
    assert!((stats.balance - stats_cut.balance).abs() < 1e-5 * stats.balance, "{stats:?} {stats_cut:?}");
    let name = "blocks.0.moe.router";
    let norm = |g: &[f32]| g.iter().map(|v| v * v).sum::<f32>().sqrt();
    let difference: Vec<f32> = whole[name].iter().zip(&cut[name]).map(|(a, b)| a - b).collect();
    assert!(norm(&difference) < 1e-4 * norm(&whole[name]), "{} of {}", norm(&difference), norm(&whole[name]));
}

#[test]
fn angles_and_routers_move_at_rates_of_their_own() {
    let config = tiny();
    let batch = batch(&config, 8);
    // Adam's first step is the rate whatever the gradient, unless that is zero.
    let largest_step = |factors: AdamWConfig, part: &str| {
        let vit = ViT::init(&config, 4).unwrap();
        let values = |vit: &ViT| -> Vec<f32> {
            let of_part = vit.parameters().all().iter().filter(|(name, _)| name.contains(part));
            of_part.flat_map(|(_, var)| var.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
        };
        let before = values(&vit);
        let (gradients, _) = gradients(&vit, Quantizers::ALL, &batch, LossWeights::default(), 8, 1).unwrap();
        AdamW::new(factors).step(vit.parameters(), &gradients, 1e-3, 1).unwrap();
        before.iter().zip(values(&vit)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    let factors = AdamWConfig { angle_rate: 30.0, router_rate: 0.5, weight_decay: 0.0, ..AdamWConfig::default() };
    for (part, expected) in [(".rotation_in", 30e-3), (".rotation_out", 30e-3), (".router", 0.5e-3), (".up", 1e-3)] {
        let step = largest_step(factors, part);
        // Values of up to 4 are rounded to 2^-22.
        assert!((step - expected).abs() < 1e-6, "{part}: {step}");
    }
    assert_eq!(largest_step(AdamWConfig { angle_rate: 0.0, ..factors }, ".rotation_"), 0.0);
}

#[test]
fn a_gradient_that_is_not_finite_moves_nothing() {
    let vit = ViT::init(&tiny(), 4).unwrap();
    let values = |vit: &ViT| -> Vec<f32> {
        vit.parameters().all().values().flat_map(|var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
    };
    let before = values(&vit);
    let (good, _) = gradients(&vit, Quantizers::ALL, &batch(&tiny(), 8), LossWeights::default(), 8, 1).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default());
    for bad in [f32::NAN, f32::INFINITY] {
        let mut gradients = good.clone();
        *gradients.values_mut().last().unwrap().last_mut().unwrap() = bad;
        assert!(!optimizer.step(vit.parameters(), &gradients, 1e-3, 2).unwrap().is_finite());
        assert_eq!((optimizer.step, values(&vit) == before), (0, true), "{bad}");
    }
    optimizer.step(vit.parameters(), &good, 1e-3, 2).unwrap();
    assert_ne!(values(&vit), before);
}

/// The start that an artifact's training record names is the start that the model had.
#[test]
fn the_start_of_the_angles_can_be_rebuilt() {
    let config = tiny();
    for spread in [AngleSpread::Narrow, AngleSpread::Uniform] {
        let vit = ViT::init_kind(&config, FeedForwardKind::Butterfly, spread, 9).unwrap();
        let record = serde_json::to_value(vit.angle_start().unwrap()).unwrap();
        let start: AngleStart = serde_json::from_value(record).unwrap();
        for (layer, site, name) in [(0, 0, "in"), (0, 2, "out"), (1, 0, "in"), (1, 1, "hidden"), (1, 2, "out")] {
            let var = vit.parameters().var(&format!("blocks.{layer}.moe.rotation_{name}")).unwrap();
            let angles = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(start.angles(layer, site, angles.len(), config.experts.angle_bits).unwrap(), angles);
        }
        assert_eq!(start.angles(2, 0, 1, 8), None);
    }
}

#[test]
fn a_few_steps_lower_the_loss() {
    let config = tiny();
    let vit = ViT::init(&config, 4).unwrap();
    let batch = batch(&config, 10);
    let mut optimizer = AdamW::new(AdamWConfig::default());
    let mut losses = Vec::new();
    for _ in 0..40 {
        let (gradients, stats) = gradients(&vit, Quantizers::ALL, &batch, LossWeights::default(), 5, 2).unwrap();
        optimizer.step(vit.parameters(), &gradients, 3e-3, 2).unwrap();
        losses.push(stats.loss);
    }
    assert!(losses[39] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn rounding_to_codes_keeps_the_float_logits() {
    let config = tiny();
    let vit = ViT::init(&config, 5).unwrap();
    let batch = batch(&config, 4);
    let labels: Vec<String> = (0..config.num_classes).map(|i| format!("class {i}")).collect();
    let (backbone, set) = vit.to_weights(&labels).unwrap();
    let stored = ViT::from_weights(&backbone, &set).unwrap();
    let rounded = Quantizers { activations: Activations::Float, ..Quantizers::ALL };
    for (a, b) in logits(&vit, &batch, rounded).iter().zip(logits(&stored, &batch, Quantizers::NONE)) {
        // The same numbers but for angles that pass through one f32 rounding more (2^-24 * 2 pi each).
        assert!((a - b).abs() < 1e-4, "{a} and {b}");
    }
}

#[test]
fn training_that_goes_on_from_an_artifact_begins_with_its_codes() {
    let config = tiny();
    let labels: Vec<String> = (0..config.num_classes).map(|i| format!("class {i}")).collect();
    let (backbone, set) = ViT::init(&config, 5).unwrap().to_weights(&labels).unwrap();
    let (again, same_set) = ViT::latent_from_weights(&backbone, &set).unwrap().to_weights(&labels).unwrap();
    for (before, after) in backbone.blocks.iter().zip(&again.blocks) {
        for (before, after) in [(&before.up, &after.up), (&before.down, &after.down)] {
            assert_eq!(before.codes, after.codes);
            for (before, after) in before.scale.iter().zip(&after.scale) {
                // The latent value and its mean are each rounded to f32 once.
                assert!((before - after).abs() <= 2.0 * f32::EPSILON * before, "{before} and {after}");
            }
        }
    }
    for (before, after) in set.layers.iter().zip(&same_set.layers) {
        assert_eq!(before.router, after.router);
        assert_eq!((&before.rotation_in, &before.rotation_hidden), (&after.rotation_in, &after.rotation_hidden));
    }
    assert_eq!((&backbone.stem, &backbone.pos_embed, &set.head), (&again.stem, &again.pos_embed, &same_set.head));
}

#[test]
fn a_frozen_backbone_stays_out_of_the_gradient_and_does_not_change_the_rest() {
    let config = tiny();
    let batch = batch(&config, 4);
    let gradients = |vit: &ViT| gradients(vit, Quantizers::ALL, &batch, LossWeights::default(), 4, 1).unwrap().0;
    let whole = gradients(&ViT::init(&config, 6).unwrap());
    let part = gradients(&ViT::init(&config, 6).unwrap().freeze(|name| !is_expert_set_parameter(name)).unwrap());
    assert!(part.keys().all(|name| is_expert_set_parameter(name)));
    for name in ["head.weight", "blocks.0.moe.router", "blocks.1.moe.rotation_hidden"] {
        assert!(part.contains_key(name), "{name} is trainable");
    }
    for (name, gradient) in &part {
        assert_eq!(*gradient, whole[name], "{name}");
    }
}

/// A branch whose scale is zero is not there, image by image; the attention of block 0 without its projection is as good.
#[test]
fn a_scale_of_zero_leaves_a_branch_out() {
    let config = ViTConfig::preset("tiny").unwrap();
    let vit = ViT::init(&config, 5).unwrap();
    let pixels = pixels(&vit, &batch(&config, 2));
    let logits = |vit: &ViT, scales: [[f32; 4]; 2]| {
        let scales = Tensor::new(&scales, &Device::Cpu).unwrap();
        let variation = Variation { branch_scales: Some(&scales), ..Variation::default() };
        let output = vit.forward_varied(&pixels, Quantizers::NONE, variation).unwrap();
        output.logits.to_vec2::<f32>().unwrap()
    };
    let ones = [1.0; 4];
    let whole = vit.forward(&pixels, Quantizers::NONE).unwrap().logits.to_vec2::<f32>().unwrap();
    assert_eq!(logits(&vit, [ones; 2]), whole);
    let dropped = logits(&vit, [ones, [0.0, 1.0, 1.0, 1.0]]);
    assert_eq!(dropped[0], whole[0], "the other image keeps its branch");
    let second = logits(&vit, [ones, [1.0, 1.0, 1.0, 0.0]]);
    assert!(dropped[1] != whole[1] && second[1] != whole[1] && second[1] != dropped[1]);
    for part in ["weight", "bias"] {
        let name = format!("blocks.0.attention.proj.{part}");
        let count = vit.parameters().var(&name).unwrap().elem_count();
        vit.parameters().set(&name, &vec![0.0; count]).unwrap();
    }
    assert_eq!(logits(&vit, [ones; 2])[1], dropped[1]);
}
