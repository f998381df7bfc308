//! Random models written as real artifacts: fast to make, valid, and different for every seed.

use std::fs;
use std::path::Path;

use model_core::artifact::{
    Digest, ExpertSetArtifact, read_backbone, read_expert_set, write_backbone, write_expert_set,
};
use model_core::config::{BackboneConfig, ViTConfig};
use model_core::image::{Preprocess, RgbImage};
use model_core::random::SplitMix64;
use model_core::random_weights;
use model_core::weights::{BackboneWeights, ExpertSetWeights};
use serde_json::json;

use crate::server::{png, root};

/// A random backbone of that shape.
pub fn backbone_weights(config: &BackboneConfig, seed: u64) -> BackboneWeights {
    random_weights::backbone_weights(config, &mut SplitMix64::at(seed, 0))
}

/// A random expert set for a backbone of that shape.
pub fn expert_set_weights(config: &ViTConfig, seed: u64) -> ExpertSetWeights {
    let weights = random_weights::expert_set_weights(config, &mut SplitMix64::at(seed, 0));
    let labels = (0..config.num_classes).map(|class| format!("class-{class}")).collect();
    ExpertSetWeights { labels, ..weights }
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
