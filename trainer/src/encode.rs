//! `encode`: the same model in other encodings, without training. Also how artifacts of version 1 become version 2.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use model_core::artifact::{BackboneArtifact, Digest, ExpertSetArtifact, read_backbone, read_expert_set};
use model_core::config::{FloatFormat, TernaryPacking};
use model_core::weights::{Encodings, Precision};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::store::{Store, load_backbone, load_set};
use crate::terminal::say;

/// How tensors are stored; what is not given stays as it is.
#[derive(Debug, Clone, Default, Args)]
pub struct EncodingArgs {
    /// Packing of ternary codes, without loss: two_bits or five_trits.
    #[arg(long, value_name = "PACKING", value_parser = named::<TernaryPacking>)]
    pub substrates: Option<TernaryPacking>,
    /// Scales of substrates and routers: f32 or f16.
    #[arg(long, value_name = "FORMAT", value_parser = named::<FloatFormat>)]
    pub scales: Option<FloatFormat>,
    /// Weights of attention: f32, f16 or int8, to which the engine rounds in any case.
    #[arg(long, value_name = "FORMAT", value_parser = named::<Precision>)]
    pub attention: Option<Precision>,
    /// Weights of the stem behind its first layer: f32, f16 or int8, to which the engine rounds in any case.
    #[arg(long, value_name = "FORMAT", value_parser = named::<Precision>)]
    pub stem: Option<Precision>,
    /// Bits of a router weight.
    #[arg(long, value_name = "BITS", value_parser = ["4", "8", "16"])]
    pub router_bits: Option<String>,
    /// Weights of the head: f32, f16 or int8.
    #[arg(long, value_name = "FORMAT", value_parser = named::<Precision>)]
    pub head: Option<Precision>,
}

/// A value by the name that it has in artifacts.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(Value::String(text.to_owned())).map_err(|error| error.to_string())
}

impl EncodingArgs {
    pub fn encodings(&self) -> Encodings {
        Encodings {
            packing: self.substrates,
            scales: self.scales,
            attention: self.attention,
            stem: self.stem,
            router_bits: self.router_bits.as_ref().and_then(|bits| bits.parse().ok()),
            head: self.head,
        }
    }
}

#[derive(Debug, Args)]
pub struct EncodeArgs {
    /// The backbone's artifact, a .safetensors file.
    #[arg(long, value_name = "FILE")]
    pub backbone: PathBuf,
    /// Files of expert sets on that backbone; a set that borrows its experts after the one that lends them.
    #[arg(long = "set", value_name = "FILE", num_args = 1..)]
    pub sets: Vec<PathBuf>,
    /// The model store to write to.
    #[arg(long, value_name = "DIR")]
    pub store: PathBuf,
    #[command(flatten)]
    pub encodings: EncodingArgs,
}

/// Writes a backbone and its sets in other encodings into a store. The sets are bound to the new backbone.
///
/// # Errors
/// When an artifact cannot be read or written, or a borrowed set was not encoded before.
pub fn run(args: &EncodeArgs) -> Result<()> {
    let encodings = args.encodings.encodings();
    let mut backbone = load_backbone(&args.backbone)?;
    let mut sets = Vec::new();
    for path in &args.sets {
        let mut set = load_set(path, &backbone)?;
        encodings.encode_expert_set(&mut set.weights);
        sets.push((path.clone(), set));
    }
    encodings.encode_backbone(&mut backbone.weights);
    put_sets(&Store::new(&args.store), &backbone, sets)
}

/// Writes a changed backbone and its changed sets into a store, each bound to what was written before.
///
/// # Errors
/// When an artifact cannot be written, the store has another backbone of that name, or a set that borrows its experts comes before the one that lends them.
pub fn put_sets(
    store: &Store,
    backbone: &BackboneArtifact,
    sets: impl IntoIterator<Item = (PathBuf, ExpertSetArtifact)>,
) -> Result<()> {
    let bytes = backbone.to_bytes().with_context(|| format!("the backbone {}", backbone.name))?;
    let digest = read_backbone(&bytes)?.digest;
    let path = store.backbone_path(&backbone.name);
    if path.exists() {
        let there = load_backbone(&path)?.digest;
        ensure!(
            there == digest,
            "{} is another backbone, {there}, on which its sets rest; give another --store",
            path.display()
        );
    }
    say(&format!("{} {digest}", store.put_backbone(&backbone.name, &bytes)?.display()));
    let mut lenders: HashMap<Digest, Digest> = HashMap::new();
    for (path, mut set) in sets {
        (set.backbone, set.backbone_digest, set.backbone_config) = (backbone.weights.config.shape(), digest, None);
        if let Some(lender) = &mut set.borrowed_experts {
            let written = lenders.get(lender).with_context(|| {
                format!("{}: the set {lender}, which lends the experts, must be given before", path.display())
            })?;
            *lender = *written;
        }
        let ExpertSetArtifact { name, digest: before, .. } = &set;
        let bytes = set.to_bytes().with_context(|| path.display().to_string())?;
        let digest = read_expert_set(&bytes)?.digest;
        say(&format!("{} {digest}", store.put_set(name, store.next_version(name), &bytes)?.display()));
        lenders.insert(*before, digest);
    }
    Ok(())
}
