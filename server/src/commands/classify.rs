//! `butterflyvit classify`: labels for image files, without a server.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use model_core::image::{DecodeLimits, decode};
use serde::Serialize;

use crate::config::{ClassifyArgs, ModelArgs};
use crate::http::{Prediction, predictions};
use crate::sets::descriptor::{BackboneDescriptor, SetDescriptor};
use crate::sets::loaded::OfflineModel;
use crate::sets::store;

/// Classifies every file; one that cannot be classified is reported and makes the exit code 1.
///
/// # Errors
/// A sentence that names what is wrong with the model.
pub fn run(args: &ClassifyArgs) -> Result<ExitCode, String> {
    let (backbone, set) = find(&args.models, args.set.as_deref())?;
    let mut model = OfflineModel::load(&backbone, &set)?;
    let limits = DecodeLimits { max_pixels: args.max_pixels, ..DecodeLimits::default() };
    let mut out = std::io::stdout().lock();
    let mut exit = ExitCode::SUCCESS;
    for file in &args.files {
        match logits(&mut model, file, &limits) {
            Ok(logits) => print(&mut out, args, &set, &model, file, &logits)
                .map_err(|error| format!("standard output: {error}"))?,
            Err(reason) => {
                eprintln!("butterflyvit: {}: {reason}", file.display());
                exit = ExitCode::FAILURE;
            }
        }
    }
    Ok(exit)
}

/// The set asked for, or the one a server would use by default; its newest version, with its backbone.
fn find(models: &ModelArgs, set: Option<&str>) -> Result<(BackboneDescriptor, SetDescriptor), String> {
    let mut contents = match &models.model_store {
        Some(root) => store::scan(root)?,
        None => store::embedded()?,
    };
    contents.sets.sort_by(|a, b| (&a.name, b.version).cmp(&(&b.name, a.version)));
    let wanted = set.or(models.default_set.as_deref());
    let found = contents.sets.into_iter().find(|set| wanted.is_none_or(|wanted| wanted == set.name));
    let found = found.ok_or_else(|| match (wanted, contents.broken.first()) {
        (_, Some(broken)) => broken.reason.clone(),
        (Some(name), None) => format!("there is no expert set `{name}`"),
        (None, None) => "the model store holds no expert set".to_owned(),
    })?;
    let backbone = contents.backbones.into_iter().find(|backbone| backbone.digest == found.backbone);
    let backbone = backbone
        .ok_or_else(|| format!("{}: bound to backbone {}, which is not here", found.location, found.backbone))?;
    Ok((backbone, found))
}

fn logits(model: &mut OfflineModel, file: &Path, limits: &DecodeLimits) -> Result<Vec<f32>, String> {
    let bytes = std::fs::read(file).map_err(|error| error.to_string())?;
    let image = decode(&bytes, &limits.for_side(model.side())).map_err(|error| error.to_string())?;
    model.logits(&image)
}

/// A file's line of JSON. Scores have the digits that HTTP answers have, which a detour over `Value` would lengthen.
#[derive(Serialize)]
struct Classified<'a> {
    file: &'a str,
    set: &'a str,
    version: u64,
    generation: &'a str,
    predictions: &'a [Prediction],
    #[serde(skip_serializing_if = "Option::is_none")]
    logits: Option<&'a [f32]>,
}

fn print(
    out: &mut impl Write,
    args: &ClassifyArgs,
    set: &SetDescriptor,
    model: &OfflineModel,
    file: &Path,
    logits: &[f32],
) -> std::io::Result<()> {
    let predictions = predictions(logits, model.labels(), args.top_k);
    if args.json {
        let document = Classified {
            file: &file.display().to_string(),
            set: &set.name,
            version: set.version,
            generation: &set.generation(),
            predictions: &predictions,
            logits: args.logits.then_some(logits),
        };
        return writeln!(out, "{}", serde_json::to_string(&document)?);
    }
    writeln!(out, "{}", file.display())?;
    for prediction in &predictions {
        writeln!(out, "  {:>6.2}%  {}", prediction.score * 100.0, prediction.label)?;
    }
    if args.logits {
        writeln!(out, "  logits {logits:?}")?;
    }
    Ok(())
}
