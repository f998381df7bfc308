//! `logits`: what a model makes of image files.

use anyhow::{Result, ensure};
use model_core::artifact::read_file;
use model_core::image::{DecodeLimits, decode};
use serde::Serialize;

use super::shared::predictor;
use crate::cli::LogitsArgs;
use crate::store::{load_backbone, load_complete_set};
use crate::terminal::{print, say};

/// A line of `logits`. Numbers have the digits that lead back to the same f32, which a detour over `Value` would lengthen.
#[derive(Serialize)]
struct Logits<'a> {
    file: String,
    labels: &'a [String],
    logits: Vec<f32>,
}

/// `logits`: a line of JSON for every image file, with its logits in the order of the set's labels.
///
/// # Errors
/// When an artifact is unusable or the two do not belong together; at the end, when a file held no image.
pub fn logits(args: &LogitsArgs) -> Result<()> {
    let backbone = load_backbone(&args.backbone)?;
    let set = load_complete_set(&args.set, args.lender.as_deref(), &backbone)?;
    let model = predictor(&backbone, &set, args.float)?;
    let side = backbone.weights.config.image_size;
    let mut unusable = 0;
    for file in &args.files {
        let image = read_file(file).map_err(anyhow::Error::from);
        match image.and_then(|bytes| Ok(decode(&bytes, &DecodeLimits::default())?)) {
            Ok(image) => {
                let logits = model.predict(backbone.preprocess.pixels(&image, side), 1)?.logits;
                let line = Logits { file: file.display().to_string(), labels: &set.weights.labels, logits };
                print(&(serde_json::to_string(&line)? + "\n"))?;
            }
            Err(error) => {
                say(&format!("{}: {error}", file.display()));
                unusable += 1;
            }
        }
    }
    ensure!(unusable == 0, "{unusable} of {} files hold no image", args.files.len());
    Ok(())
}
