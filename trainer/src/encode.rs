//! `encode`: the same model in other encodings, without training. Also how artifacts of version 1 become version 2.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use model_core::artifact::{Digest, ExpertSetArtifact, read_backbone};
use model_core::config::{FloatFormat, TernaryPacking};
use model_core::weights::{Encodings, ExpertLayerWeights, Precision};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::store::{Store, load_backbone, load_set};
use crate::temperature;
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
    /// Also fit the temperature of each set to the images in this folder that its training held out, and to no others. The
    /// folder is the one that the set was trained on.
    #[arg(long, value_name = "DIR")]
    pub temperature_data: Option<PathBuf>,
    #[command(flatten)]
    pub encodings: EncodingArgs,
}

/// Writes a backbone and its sets in other encodings, or with other temperatures, into a store. The sets are bound to the new backbone.
///
/// # Errors
/// When an artifact cannot be read or written, or a borrowed set was not encoded before.
pub fn run(args: &EncodeArgs) -> Result<()> {
    let (store, encodings) = (Store::new(&args.store), args.encodings.encodings());
    let original = load_backbone(&args.backbone)?;
    let mut backbone = original.clone();
    encodings.encode_backbone(&mut backbone.weights);
    let bytes = backbone.to_bytes().with_context(|| args.backbone.display().to_string())?;
    let encoded_backbone = read_backbone(&bytes)?;
    let digest = encoded_backbone.digest;
    say(&format!("{} {digest}", store.put_backbone(&backbone.name, &bytes)?.display()));
    let mut lenders: HashMap<Digest, (Digest, Vec<ExpertLayerWeights>)> = HashMap::new();
    for path in &args.sets {
        let mut set = load_set(path, &original)?;
        encodings.encode_expert_set(&mut set.weights);
        (set.backbone, set.backbone_digest, set.backbone_config) = (backbone.weights.config.shape(), digest, None);
        let mut layers = set.weights.layers.clone();
        if let Some(lender) = &mut set.borrowed_experts {
            let (encoded, lent) = lenders.get(lender).with_context(|| {
                format!("{}: the set {lender}, which lends the experts, must be encoded before", path.display())
            })?;
            *lender = *encoded;
            layers.clone_from(lent);
        }
        if let Some(folder) = &args.temperature_data {
            let mut complete = set.clone();
            complete.weights.layers.clone_from(&layers);
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            let (fitted, images) = temperature::fit(&encoded_backbone, &complete, folder, threads)
                .with_context(|| format!("{}: its temperature", path.display()))?;
            say(&format!("{}: temperature {fitted:.3}, fitted on {images} held-out images", set.name));
            set.weights.temperature = fitted;
        }
        let ExpertSetArtifact { name, digest: before, .. } = &set;
        let bytes = set.to_bytes().with_context(|| path.display().to_string())?;
        let digest = model_core::artifact::read_expert_set(&bytes)?.digest;
        say(&format!("{} {digest}", store.put_set(name, store.next_version(name), &bytes)?.display()));
        lenders.insert(*before, (digest, layers));
    }
    Ok(())
}
