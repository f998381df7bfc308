//! Random models written as real artifacts: fast to make, valid, and different for every seed.

use std::fs;
use std::path::Path;

use model_core::artifact::{
    Digest, ExpertSetArtifact, read_backbone, read_expert_set, write_backbone, write_expert_set,
};
use model_core::config::{BackboneConfig, ViTConfig};
use model_core::image::{Preprocess, RgbImage};
use model_core::random::SplitMix64;
use model_core::weights::{
    AngleCodes, BackboneWeights, BlockWeights, ExpertLayerWeights, ExpertSetWeights, Linear, Norm, StemWeights, Ternary,
};
use serde_json::json;

use crate::server::{png, root};

/// xorshift64*: enough for weights that only have to differ.
pub struct Random(u64);

impl Random {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next 32 random bits.
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32
    }

    /// Uniform in -1..1.
    pub fn signed(&mut self) -> f32 {
        self.bits() as f32 / 2f32.powi(31) - 1.0
    }

    fn floats(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.signed() * scale).collect()
    }

    fn linear(&mut self, rows: usize, cols: usize) -> Linear {
        let scale = (3.0 / cols as f32).sqrt();
        Linear { weight: self.floats(rows * cols, scale).into(), bias: self.floats(rows, 0.1) }
    }

    fn norm(&mut self, features: usize) -> Norm {
        Norm { gamma: self.floats(features, 0.2).iter().map(|g| g + 1.0).collect(), beta: self.floats(features, 0.1) }
    }

    fn ternary(&mut self, rows: usize, cols: usize) -> Ternary {
        let codes = (0..rows * cols).map(|_| (self.bits() % 3) as i8 - 1).collect();
        Ternary { codes, scale: vec![(1.5 / cols as f32).sqrt(); rows] }
    }

    fn angles(&mut self, len: usize, bits: u32) -> AngleCodes {
        AngleCodes { codes: (0..len).map(|_| (self.bits() & ((1 << bits) - 1)) as u16).collect() }
    }
}

pub fn backbone_weights(config: &BackboneConfig, seed: u64) -> BackboneWeights {
    let mut random = Random::new(seed);
    let (d_model, d_ff) = (config.d_model, config.d_ff);
    let stem = config
        .stem_inputs()
        .map(|(layer, _, channels)| StemWeights {
            conv: random.linear(layer.channels, layer.window_len(channels)),
            norm: layer.norm.then(|| random.norm(layer.channels)),
            step: None,
        })
        .collect();
    let blocks = (0..config.num_layers)
        .map(|_| BlockWeights {
            norm1: random.norm(d_model),
            qkv: random.linear(3 * d_model, d_model),
            proj: random.linear(d_model, d_model),
            norm2: random.norm(d_model),
            up: random.ternary(d_ff, d_model),
            down: random.ternary(d_model, d_ff),
        })
        .collect();
    BackboneWeights {
        config: config.clone(),
        stem,
        pos_embed: random.floats(config.num_tokens() * d_model, 0.5),
        blocks,
        norm: random.norm(d_model),
        background: None,
    }
}

/// A random expert set for a backbone of that shape.
pub fn expert_set_weights(config: &ViTConfig, seed: u64) -> ExpertSetWeights {
    let mut random = Random::new(seed);
    let (backbone, experts) = (&config.backbone, &config.experts);
    let (n, bits) = (experts.num_experts, experts.angle_bits);
    let layers = (0..backbone.num_layers)
        .map(|_| ExpertLayerWeights {
            router: (0..n * backbone.d_model).map(|_| (random.bits() % 255) as i16 - 127).collect(),
            router_scale: vec![0.01; n],
            rotation_in: random.angles(n * experts.stages_in * backbone.d_model / 2, bits),
            rotation_hidden: random.angles(n * experts.stages_hidden * backbone.d_ff / 2, bits),
            rotation_out: random.angles(n * experts.stages_out * backbone.d_model / 2, bits),
        })
        .collect();
    ExpertSetWeights {
        config: experts.clone(),
        layers,
        head: random.linear(config.num_classes, backbone.d_model),
        labels: (0..config.num_classes).map(|class| format!("class-{class}")).collect(),
        temperature: 1.0,
        familiarity: None,
    }
}

/// The bytes of a random backbone artifact, and its digest.
pub fn backbone_artifact(config: &BackboneConfig, seed: u64) -> (Vec<u8>, Digest) {
    let weights = backbone_weights(config, seed);
    let bytes = write_backbone("random", &weights, &Preprocess::default(), &json!({})).expect("valid weights");
    let digest = read_backbone(&bytes).expect("what was written reads back").digest;
    (bytes, digest)
}

/// The bytes of a random expert-set artifact.
pub fn expert_set_artifact(config: &ViTConfig, backbone: Digest, name: &str, seed: u64) -> Vec<u8> {
    let weights = expert_set_weights(config, seed);
    write_expert_set(name, &weights, (&config.backbone, backbone), &json!({})).expect("valid weights")
}

/// The bytes of an expert set that borrows the experts of the one with the bytes `lender`; `adjust` may change the rest.
pub fn borrower_artifact(lender: &[u8], name: &str, adjust: impl FnOnce(&mut ExpertSetArtifact)) -> Vec<u8> {
    let mut set = read_expert_set(lender).expect("a lender");
    (set.name, set.borrowed_experts) = (name.to_owned(), Some(set.digest));
    set.weights.layers.clear();
    adjust(&mut set);
    set.to_bytes().expect("valid weights")
}

/// Writes a model store with one backbone and version 1 of each named set.
pub fn write_store(root: &Path, config: &ViTConfig, sets: &[&str]) -> Digest {
    let (bytes, digest) = backbone_artifact(&config.backbone, 1);
    write(&root.join("backbones/main.safetensors"), &bytes);
    for (seed, name) in (2..).zip(sets) {
        let bytes = expert_set_artifact(config, digest, name, seed);
        write(&root.join("expert-sets").join(name).join("1.safetensors"), &bytes);
    }
    digest
}

/// A model store with the shipped backbone and the shipped expert set under other names, each `NAME/VERSION`.
pub fn shipped_store(sets: &[&str]) -> tempfile::TempDir {
    let store = tempfile::tempdir().expect("a folder");
    let models = root().join("models");
    let read = |name: &str| fs::read(models.join(name)).expect("a shipped artifact");
    write(&store.path().join("backbones/default.safetensors"), &read("default-backbone.safetensors"));
    for set in sets {
        let path = store.path().join("expert-sets").join(format!("{set}.safetensors"));
        write(&path, &read("cifar100.safetensors"));
    }
    store
}

/// Writes a file, making its folder.
pub fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("a file in a folder")).expect("the folder can be made");
    fs::write(path, bytes).expect("the file can be written");
}

/// A photograph of stripes in one of two directions as a PNG, noisy, unlike every other one of its seed.
pub fn striped(upright: bool, seed: u64) -> Vec<u8> {
    const SIDE: u32 = 64;
    let mut random = SplitMix64::at(seed, u64::from(upright));
    let period = 6 + (seed % 3) as u32;
    let image = RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let along = if upright { x } else { y };
        let base = if along % period < period / 2 { 40.0 } else { 200.0 };
        [0; 3].map(|_: u8| (base + 30.0 * random.uniform()) as u8).into()
    });
    png(&image)
}
