//! Small models with random weights, for the tests of this folder.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use model_core::artifact::{Digest, read_backbone, write_backbone, write_expert_set};
use model_core::config::{BackboneConfig, ExpertConfig, StemLayer, ViTConfig};
use model_core::image::Preprocess;
use model_core::vit::ViT;
use serde_json::json;

/// A model small enough to try every byte of it: three odd sizes, all sites, codes that leave padding bits.
pub(crate) fn minute_config() -> ViTConfig {
    ViTConfig {
        backbone: BackboneConfig {
            image_size: 4,
            stem: vec![StemLayer { residual: false, ..StemLayer::conv3(3, 1) }, StemLayer::patch(6, 2)],
            d_model: 6,
            d_ff: 10,
            num_layers: 1,
            num_heads: 2,
        },
        experts: ExpertConfig {
            num_experts: 3,
            top_k: 2,
            stages_in: 1,
            stages_hidden: 1,
            stages_out: 1,
            angle_bits: 6,
            router_bits: 16,
        },
        num_classes: 2,
    }
}

/// Backbone and expert set with random weights, as files.
pub(crate) struct Files {
    pub(crate) backbone: Vec<u8>,
    pub(crate) expert_set: Vec<u8>,
}

/// Writes a model of that configuration with weights drawn from `seed`.
pub(crate) fn files(config: &ViTConfig, seed: u64) -> Files {
    let labels: Vec<String> = (0..config.num_classes).map(|i| format!("class \"{i}\" é")).collect();
    let (mut backbone, mut set) = ViT::init(config, seed).unwrap().to_weights(&labels).unwrap();
    // Fresh norms and biases are ones and zeros, which would hide that they are swapped or missing.
    let mut state = seed;
    let mut spread = |values: &mut Vec<f32>| {
        for value in values {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *value += ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.4;
        }
    };
    for layer in &mut backbone.stem {
        spread(&mut layer.conv.bias);
        if let Some(norm) = &mut layer.norm {
            spread(&mut norm.gamma);
            spread(&mut norm.beta);
        }
    }
    for block in &mut backbone.blocks {
        spread(&mut block.norm1.gamma);
        spread(&mut block.norm1.beta);
        spread(&mut block.qkv.bias);
        spread(&mut block.proj.bias);
        spread(&mut block.norm2.gamma);
        spread(&mut block.norm2.beta);
    }
    spread(&mut backbone.norm.gamma);
    spread(&mut backbone.norm.beta);
    spread(&mut set.head.bias);

    let preprocess = Preprocess { mean: [0.5071, 0.4865, 0.4409], std: [0.2673, 0.2564, 0.2762], ..Default::default() };
    let training = json!({ "seed": seed, "epochs": 0 });
    let backbone_file = write_backbone("random", &backbone, &preprocess, &training).unwrap();
    let digest: Digest = read_backbone(&backbone_file).unwrap().digest;
    let expert_set = write_expert_set("random", &set, (&config.backbone, digest), &training).unwrap();
    Files { backbone: backbone_file, expert_set }
}
