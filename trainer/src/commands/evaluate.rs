//! `evaluate`: how good artifacts are.

use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use model_core::config::ViTConfig;

use super::shared::{measure, open_options, predictor, say_findings};
use crate::cli::{EvaluateArgs, threads};
use crate::data::{self, LabelColumn, Opened, Part};
use crate::evaluate::{Artifacts, Probe, Report, Tally, confusion_picture};
use crate::recipe::angle_start;
use crate::stop::Stop;
use crate::store::{load_backbone, load_complete_set};
use crate::terminal::print;

/// `evaluate`: how good artifacts are.
///
/// # Errors
/// When an artifact or the data is unusable, or they do not belong together.
pub fn evaluate(args: &EvaluateArgs) -> Result<()> {
    let backbone = load_backbone(&args.backbone)?;
    let set = load_complete_set(&args.set, args.lender.as_deref(), &backbone)?;
    let config = set.weights.vit_config(&backbone.weights.config);
    ensure!(
        !args.probe || config.backbone.has_blocks(),
        "--probe shows what experts have learned, and the backbone {} has no blocks, hence no experts",
        backbone.name
    );
    let part = if args.train_part { Part::Train } else { Part::Test };
    let Opened { dataset, skipped, warnings, .. } = open_labelled(args, part, &config, &set.weights.labels)?;
    say_findings(&skipped, &warnings);

    let count = args.limit.unwrap_or(usize::MAX).min(dataset.len());
    let path = if args.float { "float" } else { "integer" };
    let show = |model: &Artifacts| -> Result<Tally> {
        let predictor = predictor(&model.backbone, &model.set, args.float)?;
        measure(&*predictor, &config, &dataset, count, &model.backbone.preprocess, threads(args.threads))
    };
    let model = Artifacts { backbone, set };
    if args.probe {
        let start = angle_start(&model.set.training, &config)?;
        let some = PROBED_IMAGES.min(count);
        let side = dataset.side;
        let pixels = model.backbone.preprocess.normalize(&dataset.images[..some * dataset.image_bytes()]);
        let pixels = Tensor::from_vec(pixels, (some, side, side, 3), &Device::Cpu)?;
        let probe = Probe::new(&model, start.as_ref(), path, &pixels, show)?;
        return print(&if args.json { serde_json::to_string_pretty(&probe)? + "\n" } else { probe.text() });
    }
    let started = Instant::now();
    let tally = show(&model)?;
    let labels = &model.set.weights.labels;
    let report = Report::new(&tally, labels, path, skipped.len(), started.elapsed().as_secs_f64());
    if let Some(path) = &args.confusion {
        confusion_picture(path, &tally, labels)?;
    }
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() };
    print(&text)
}

/// Images of whose tokens a probe compares the experts' outputs.
const PROBED_IMAGES: usize = 32;

/// Opens the images with the label column whose names the expert set has, and gives them its labels.
fn open_labelled(args: &EvaluateArgs, part: Part, config: &ViTConfig, labels: &[String]) -> Result<Opened> {
    let (folder, side) = (&args.data.data, config.backbone.image_size);
    let columns = match args.labels {
        Some(column) => vec![column],
        None if data::has_columns(folder) => vec![LabelColumn::Fine, LabelColumn::Coarse],
        None => vec![LabelColumn::Fine],
    };
    let mut refused = None;
    for column in columns {
        let options = open_options(&args.data.reading, side, column);
        let mut opened = data::open(folder, part, &options, &Stop::default())?;
        match opened.dataset.take_labels(labels) {
            Ok(()) => return Ok(opened),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    let refused = refused.unwrap_or_else(|| anyhow!("there is no column of labels"));
    Err(refused.context(format!("{} and the expert set", folder.display())))
}
