//! `export`: the artifacts of a run's checkpoint.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use model_core::artifact::{read_backbone, read_expert_set, write_backbone, write_expert_set};
use model_core::weights::{Encodings, ExpertSetWeights};
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::cli::{ExportArgs, NameArgs};
use crate::data::frozen_stem::FrozenStem;
use crate::data::heads::ranges;
use crate::recipe::Origin;
use crate::store::{Store, load_backbone};
use crate::terminal::say;
use crate::train::averaged;

/// `export`: the artifacts of a run's checkpoint.
///
/// # Errors
/// When there is no checkpoint or a file cannot be written.
pub fn export(args: &ExportArgs) -> Result<()> {
    let checkpoint = Checkpoint::load(&args.run)?;
    let store = Store::new(args.store.clone().unwrap_or_else(|| args.run.join("store")));
    let encodings = args.encodings.encodings();
    match (&checkpoint.state.recipe.origin, &args.backbone) {
        (Origin::Scratch | Origin::Continue { .. } | Origin::Run { .. }, None) => {
            export_backbone(&checkpoint, &store, &args.names, &encodings, None)
        }
        (Origin::Scratch | Origin::Continue { .. } | Origin::Run { .. }, Some(_)) => {
            bail!("--backbone is for runs on a finished backbone; this one trained its own")
        }
        (Origin::Stem { .. }, Some(path)) => {
            let stem = FrozenStem::of(&load_backbone(path)?, checkpoint.state.recipe.model.backbone.d_model)?;
            export_backbone(&checkpoint, &store, &args.names, &encodings, Some(&stem))
        }
        (Origin::Specialise { .. }, Some(path)) => {
            let [name] = &args.names.sets(&checkpoint.state.recipe)?[..] else {
                bail!("a specialised set has one head")
            };
            export_set(&checkpoint, &store, (path, name), &encodings)
        }
        (Origin::Stem { .. }, None) => bail!("--backbone is missing: the run is behind the stem of one"),
        (Origin::Specialise { .. }, None) => bail!("--backbone is missing: the run specialised one"),
    }
}

/// What an artifact remembers of its training.
fn summary(checkpoint: &Checkpoint) -> Result<Value> {
    let state = &checkpoint.state;
    Ok(json!({
        "recipe": serde_json::to_value(&state.recipe)?,
        "steps": state.step,
        "seconds": state.seconds.round(),
        "held_out": serde_json::to_value(&state.validation)?,
        "angle_start": serde_json::to_value(&state.angle_start)?,
        "data_fingerprint": format!("{:016x}", state.data_fingerprint),
    }))
}

/// What the held-out images say that a head's logits are to be divided by; 1 without such images.
pub(super) fn temperature(checkpoint: &Checkpoint, head: usize) -> f32 {
    checkpoint.state.validation.as_ref().map_or(1.0, |validation| validation.temperature_of(head))
}

pub(super) fn export_backbone(
    checkpoint: &Checkpoint,
    store: &Store,
    names: &NameArgs,
    encodings: &Encodings,
    stem: Option<&FrozenStem>,
) -> Result<()> {
    let state = &checkpoint.state;
    let vit = averaged(&state.recipe, &checkpoint.parameters, &checkpoint.average)?;
    let (mut backbone, set) = vit.to_weights(&state.labels)?;
    if let (Some(stem), Origin::Stem { backbone: digest }) = (stem, &state.recipe.origin) {
        ensure!(*digest == stem.digest.to_string(), "the run is behind the stem of another backbone, {digest}");
        // Its own integers and steps, not what they stand for.
        backbone.stem.clone_from(&stem.weights);
    }
    encodings.encode_backbone(&mut backbone);
    let summary = summary(checkpoint)?;
    let bytes = write_backbone(&names.backbone_name, &backbone, &state.preprocess, &summary)?;
    let mut artifact = read_backbone(&bytes)?;
    artifact.card = stem.and_then(|stem| stem.card.clone());
    let bytes = artifact.to_bytes()?;
    let digest = read_backbone(&bytes)?.digest;
    let path = store.put_backbone(&names.backbone_name, &bytes)?;
    say(&format!("backbone   {}", path.display()));
    // A new backbone starts its sets afresh: an earlier version belongs to an earlier backbone.
    let bound_to = (&backbone.config, digest);
    let sets = names.sets(&state.recipe)?;
    let classes = ranges(&state.recipe.head_classes(), set.labels.len());
    let mut lender = None;
    for (i, (name, classes)) in sets.iter().zip(classes).enumerate() {
        let mut set = with_head(&set, classes);
        encodings.encode_expert_set(&mut set);
        set.temperature = temperature(checkpoint, i);
        let mut summary = summary.clone();
        if let Some(own) = state.validation.as_ref().and_then(|validation| validation.heads.get(i)) {
            summary["held_out"] = serde_json::to_value(own)?;
        }
        let mut bytes = write_expert_set(name, &set, bound_to, &summary)?;
        let mut artifact = read_expert_set(&bytes)?;
        if let Some(lender) = lender {
            // All learned with the same experts, which are in the store and in memory once.
            artifact.weights.layers.clear();
            artifact.borrowed_experts = Some(lender);
            bytes = artifact.to_bytes()?;
        }
        let path = store.put_set(name, 1, &bytes)?;
        lender.get_or_insert(artifact.digest);
        say(&format!("expert set {}", path.display()));
    }
    Ok(())
}

/// The set with some rows of its head only.
fn with_head(set: &ExpertSetWeights, classes: Range<usize>) -> ExpertSetWeights {
    if classes.len() == set.labels.len() {
        return set.clone();
    }
    let mut own = set.clone();
    let weight = set.head.weight.to_f32();
    let features = weight.len() / set.labels.len();
    own.head.weight = weight[classes.start * features..classes.end * features].to_vec().into();
    own.head.bias = set.head.bias[classes.clone()].to_vec();
    own.labels = set.labels[classes].to_vec();
    own
}

pub(super) fn export_set(
    checkpoint: &Checkpoint,
    store: &Store,
    (backbone, name): (&Path, &str),
    encodings: &Encodings,
) -> Result<()> {
    let state = &checkpoint.state;
    let backbone = load_backbone(backbone)?;
    if let Origin::Specialise { backbone: digest, .. } = &state.recipe.origin {
        ensure!(*digest == backbone.digest.to_string(), "the run specialised another backbone, {digest}");
    }
    let vit = averaged(&state.recipe, &checkpoint.parameters, &checkpoint.average)?;
    let (_, mut set) = vit.to_weights(&state.labels)?;
    encodings.encode_expert_set(&mut set);
    set.temperature = temperature(checkpoint, 0);
    let version = store.next_version(name);
    let path =
        store.write_set(name, version, &set, (&backbone.weights.config, backbone.digest), &summary(checkpoint)?)?;
    say(&format!("expert set {}", path.display()));
    Ok(())
}
