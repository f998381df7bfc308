//! Models of random weights, for measurements and tests. Layers keep the size of what goes through them, so that no
//! activation vanishes or overflows.

use std::sync::Arc;

use crate::config::{BackboneConfig, FloatFormat, ViTConfig};
use crate::random::SplitMix64;
use crate::weights::{
    AngleCodes, BackboneWeights, BlockWeights, ExpertLayerWeights, ExpertSetWeights, Linear, Norm, StemWeights, Ternary,
};

/// A backbone of random weights.
pub fn backbone_weights(config: &BackboneConfig, random: &mut SplitMix64) -> BackboneWeights {
    let BackboneConfig { d_model, d_ff, .. } = *config;
    let stem = config.stem_inputs().map(|(layer, _, channels)| StemWeights {
        conv: linear(random, layer.channels, layer.window_len(channels)),
        norm: layer.norm.then(|| norm(random, layer.channels)),
        step: None,
    });
    let stem = stem.collect();
    let block = |random: &mut SplitMix64| BlockWeights {
        norm1: norm(random, d_model),
        qkv: linear(random, 3 * d_model, d_model),
        proj: linear(random, d_model, d_model),
        norm2: norm(random, d_model),
        up: ternary(random, d_ff, d_model, config.substrates.scales),
        down: ternary(random, d_model, d_ff, config.substrates.scales),
    };
    let mut blocks: Vec<_> = (0..config.num_layers).map(|_| block(random)).collect();
    if let (true, [first, rest @ ..]) = (config.substrates.shared, &mut blocks[..]) {
        for block in rest {
            block.up.codes = Arc::clone(&first.up.codes);
            block.down.codes = Arc::clone(&first.down.codes);
        }
    }
    BackboneWeights {
        config: config.clone(),
        stem,
        pos_embed: random.uniforms(if config.has_blocks() { config.num_tokens() * d_model } else { 0 }, 0.3),
        blocks,
        norm: if config.has_blocks() { norm(random, d_model) } else { Norm::default() },
        background: None,
    }
}

/// An expert set of random weights, with labels `class 0` and so on.
pub fn expert_set_weights(config: &ViTConfig, random: &mut SplitMix64) -> ExpertSetWeights {
    let (backbone, e) = (&config.backbone, &config.experts);
    // Codes that use the whole range of their width; logits of about one for tokens of about one.
    let limit = (1i32 << (e.router_bits - 1)) - 1;
    let scale = e.router_scales.round((3.0 / backbone.d_model as f32).sqrt() / limit as f32);
    let layer = |random: &mut SplitMix64| {
        let angles = |random: &mut SplitMix64, stages: usize, features: usize| {
            let count = if e.angle_seed.is_some() { 0 } else { e.num_experts * stages * (features / 2) };
            AngleCodes { codes: (0..count).map(|_| (random.bits() >> (64 - e.angle_bits)) as u16).collect() }
        };
        let codes = (0..e.num_experts * backbone.d_model)
            .map(|_| (random.bits() % (2 * limit as u64 + 1)) as i32 - limit)
            .map(|code| code as i16);
        ExpertLayerWeights {
            router: codes.collect(),
            router_scale: vec![scale; e.num_experts],
            rotation_in: angles(random, e.stages_in, backbone.d_model),
            rotation_hidden: angles(random, e.stages_hidden, backbone.d_ff),
            rotation_out: angles(random, e.stages_out, backbone.d_model),
        }
    };
    ExpertSetWeights {
        config: e.clone(),
        layers: (0..backbone.num_layers).map(|_| layer(random)).collect(),
        head: linear(random, config.num_classes, backbone.d_model),
        labels: (0..config.num_classes).map(|i| format!("class {i}")).collect(),
        projection: None,
        temperature: 1.0,
        familiarity: None,
    }
}

/// A layer `[rows, cols]`.
pub fn linear(random: &mut SplitMix64, rows: usize, cols: usize) -> Linear {
    Linear { weight: random.uniforms(rows * cols, (cols as f64).powf(-0.5)).into(), bias: random.uniforms(rows, 0.05) }
}

fn norm(random: &mut SplitMix64, features: usize) -> Norm {
    let mut gamma = random.uniforms(features, 0.1);
    gamma.iter_mut().for_each(|gamma| *gamma += 1.0);
    Norm { gamma, beta: random.uniforms(features, 0.05) }
}

fn ternary(random: &mut SplitMix64, rows: usize, cols: usize, scales: FloatFormat) -> Ternary {
    let codes = (0..rows * cols).map(|_| (random.bits() % 3) as i8 - 1).collect();
    Ternary { codes, scale: vec![scales.round((1.5 / cols as f32).sqrt()); rows] }
}
