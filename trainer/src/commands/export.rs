//! `export`: the artifacts of a run's checkpoint.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use model_core::artifact::{read_backbone, write_backbone};
use model_core::weights::Encodings;
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::cli::{ExportArgs, NameArgs};
use crate::data::frozen_stem::FrozenStem;
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
            export_set(&checkpoint, &store, (path, &args.names.set_name), &encodings)
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
        "held_out": serde_json::to_value(state.validation)?,
        "angle_start": serde_json::to_value(&state.angle_start)?,
    }))
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
    let (mut backbone, mut set) = vit.to_weights(&state.labels)?;
    if let (Some(stem), Origin::Stem { backbone: digest }) = (stem, &state.recipe.origin) {
        ensure!(*digest == stem.digest.to_string(), "the run is behind the stem of another backbone, {digest}");
        // Its own integers and steps, not what they stand for.
        backbone.stem.clone_from(&stem.weights);
    }
    encodings.encode_backbone(&mut backbone);
    encodings.encode_expert_set(&mut set);
    let summary = summary(checkpoint)?;
    let bytes = write_backbone(&names.backbone_name, &backbone, &state.preprocess, &summary)?;
    let mut artifact = read_backbone(&bytes)?;
    artifact.card = stem.and_then(|stem| stem.card.clone());
    let bytes = artifact.to_bytes()?;
    let digest = read_backbone(&bytes)?.digest;
    let path = store.put_backbone(&names.backbone_name, &bytes)?;
    say(&format!("backbone   {}", path.display()));
    // A new backbone starts its sets afresh: an earlier version belongs to an earlier backbone.
    let path = store.write_set(&names.set_name, 1, &set, (&backbone.config, digest), &summary)?;
    say(&format!("expert set {}", path.display()));
    Ok(())
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
    let version = store.next_version(name);
    let path =
        store.write_set(name, version, &set, (&backbone.weights.config, backbone.digest), &summary(checkpoint)?)?;
    say(&format!("expert set {}", path.display()));
    Ok(())
}
