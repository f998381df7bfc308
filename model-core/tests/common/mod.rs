//! Small models with random weights, for the tests of this folder.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use model_core::artifact::{Digest, read_backbone, write_backbone, write_expert_set};
use model_core::config::{
    Activation, AngleSeed, BackboneConfig, ExpertConfig, FloatFormat, Generator, StemLayer, SubstrateConfig,
    TernaryPacking, ViTConfig,
};
use model_core::image::Preprocess;
use model_core::random::SplitMix64;
use model_core::random_weights::{backbone_weights, expert_set_weights};
use model_core::weights::{BackboneWeights, ExpertSetWeights, Matrix, Precision};
use serde_json::json;

/// A model small enough to try every byte of it: three odd sizes, all sites, codes that leave padding bits.
pub(crate) fn minute_config() -> ViTConfig {
    ViTConfig {
        backbone: BackboneConfig {
            image_size: 4,
            stem: vec![StemLayer::conv3(3, 1), StemLayer::patch(6, 2)],
            d_model: 6,
            d_ff: 10,
            num_layers: 1,
            num_heads: 2,
            substrates: SubstrateConfig::default(),
        },
        experts: ExpertConfig {
            num_experts: 3,
            top_k: 2,
            stages_in: 1,
            stages_hidden: 1,
            stages_out: 1,
            angle_bits: 6,
            angle_seed: None,
            router_bits: 16,
            router_scales: FloatFormat::F32,
        },
        num_classes: 2,
    }
}

/// A calibrated stem alone: asymmetric padding, depthwise windows of both sizes, residuals from earlier layers, channels
/// that fill no vector.
pub(crate) fn calibrated_config() -> ViTConfig {
    let pointwise =
        |channels, activation, residual| StemLayer { activation, residual, ..StemLayer::patch(channels, 1) };
    let depthwise = |channels, kernel, stride, padding| StemLayer {
        kernel,
        stride,
        padding,
        groups: channels,
        activation: Activation::Relu6,
        ..StemLayer::patch(channels, 1)
    };
    let first = StemLayer { kernel: 3, stride: 2, padding: [0, 0, 1, 1], ..StemLayer::patch(10, 1) };
    ViTConfig {
        backbone: BackboneConfig {
            image_size: 18,
            stem: vec![
                StemLayer { activation: Activation::Relu6, ..first },
                depthwise(10, 3, 1, [1; 4]),
                pointwise(7, Activation::None, None),
                pointwise(40, Activation::Relu6, None),
                depthwise(40, 5, 1, [2; 4]),
                pointwise(7, Activation::None, Some(3)),
                StemLayer { kernel: 3, padding: [1; 4], ..pointwise(20, Activation::Relu6, None) },
                depthwise(20, 5, 2, [2, 2, 2, 2]),
                pointwise(20, Activation::Relu6, Some(8)),
                pointwise(33, Activation::Relu6, None),
            ],
            d_model: 33,
            d_ff: 1,
            num_layers: 0,
            num_heads: 1,
            substrates: SubstrateConfig::default(),
        },
        experts: ExpertConfig {
            num_experts: 1,
            top_k: 1,
            stages_in: 0,
            stages_hidden: 0,
            stages_out: 0,
            ..ViTConfig::preset("tiny").unwrap().experts
        },
        num_classes: 5,
    }
}

/// Weights of [`calibrated_config`] with the steps that its outputs need.
pub(crate) fn calibrated_weights(seed: u64) -> (BackboneWeights, ExpertSetWeights) {
    let config = calibrated_config();
    let mut random = SplitMix64::at(seed, 0);
    let mut backbone = backbone_weights(&config.backbone, &mut random);
    for (weights, layer) in backbone.stem.iter_mut().zip(&config.backbone.stem) {
        let rows = weights.conv.bias.len();
        weights.conv.weight = Matrix::encode(&weights.conv.weight.to_f32(), rows, Precision::Int8);
        let positive = layer.activation == Activation::Relu6 && layer.residual.is_none();
        weights.step = Some(if positive { 3.0 / 255.0 } else { 4.0 / 127.0 });
    }
    (backbone, expert_set_weights(&config, &mut random))
}

/// A model whose substrates are packed as tightly as they can be.
pub(crate) fn packed_config(shared: bool) -> ViTConfig {
    let mut config = ViTConfig::preset("tiny").unwrap();
    config.backbone.substrates =
        SubstrateConfig { shared, packing: TernaryPacking::FiveTrits, scales: FloatFormat::F16 };
    config
}

/// Shapes that differ in everything a set may choose.
pub(crate) fn expert_configs() -> Vec<ExpertConfig> {
    let base = ViTConfig::preset("tiny").unwrap().experts;
    let seed = |spread_bits| Some(AngleSeed { generator: Generator::SplitMix64, seed: 3, spread_bits });
    vec![
        base.clone(),
        ExpertConfig { num_experts: 1, top_k: 1, stages_in: 0, stages_hidden: 5, stages_out: 0, ..base.clone() },
        ExpertConfig { num_experts: 7, top_k: 7, stages_in: 1, stages_out: 0, angle_bits: 6, ..base.clone() },
        ExpertConfig { num_experts: 40, top_k: 3, stages_out: 4, angle_bits: 16, router_bits: 16, ..base.clone() },
        ExpertConfig { stages_in: 0, stages_hidden: 0, stages_out: 0, angle_bits: 4, ..base.clone() },
        ExpertConfig { router_bits: 4, router_scales: FloatFormat::F16, angle_seed: seed(8), ..base.clone() },
        ExpertConfig { num_experts: 35, router_bits: 4, angle_bits: 6, angle_seed: seed(5), ..base },
    ]
}

/// `|got - expected| / |expected|`.
pub(crate) fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    norm(&mut got.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

/// Backbone and expert set with random weights, as files.
pub(crate) struct Files {
    pub(crate) backbone: Vec<u8>,
    pub(crate) expert_set: Vec<u8>,
}

/// Writes a model of that configuration with weights drawn from `seed`.
pub(crate) fn files(config: &ViTConfig, seed: u64) -> Files {
    let mut random = SplitMix64::at(seed, 0);
    let backbone = backbone_weights(&config.backbone, &mut random);
    let mut set = expert_set_weights(config, &mut random);
    set.labels = (0..config.num_classes).map(|i| format!("class \"{i}\" é")).collect();
    written(&backbone, &set, seed)
}

/// The model of [`calibrated_weights`].
pub(crate) fn calibrated_files(seed: u64) -> Files {
    let (backbone, set) = calibrated_weights(seed);
    written(&backbone, &set, seed)
}

fn written(backbone: &BackboneWeights, set: &ExpertSetWeights, seed: u64) -> Files {
    let preprocess = Preprocess { mean: [0.5071, 0.4865, 0.4409], std: [0.2673, 0.2564, 0.2762], ..Default::default() };
    let training = json!({ "seed": seed, "epochs": 0 });
    let backbone_file = write_backbone("random", backbone, &preprocess, &training).unwrap();
    let digest: Digest = read_backbone(&backbone_file).unwrap().digest;
    let expert_set = write_expert_set("random", set, (&backbone.config, digest), &training).unwrap();
    Files { backbone: backbone_file, expert_set }
}
