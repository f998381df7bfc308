//! What several commands do: open images, find a teacher, drive a run, measure a model, print.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use model_core::artifact::{BackboneArtifact, ExpertSetArtifact};
use model_core::config::ViTConfig;
use model_core::image::Preprocess;
use training::parameters::Quantizers;
use training::vit::ViT;

use crate::checkpoint::{self, Checkpoint};
use crate::cli::{DataSetsArgs, ReadingArgs, SoftArgs, StemArgs, TeacherArgs};
use crate::data::frozen_stem::FrozenStem;
use crate::data::heads::{Head, add_classes, join, set_name};
use crate::data::soft_labels::{SoftLabels, SoftTargets};
use crate::data::{self, Dataset, LabelColumn, OpenOptions, Opened, Part};
use crate::diary::{self, HeadValidation};
use crate::evaluate::Tally;
use crate::plot::learning_curve;
use crate::predict::{Candle, Integer, Predictor, for_each_shard};
use crate::recipe::{Origin, Recipe, SoftLabelsOf};
use crate::stop::{Ended, Stop, Stopped};
use crate::store::load_backbone;
use crate::teacher::Teacher;
use crate::terminal::say;
use crate::train::{Run, Settings};

/// Sets the parameters of `vit` that `taken` names to those of `from`.
pub(super) fn take(vit: &ViT, from: &ViT, taken: impl Fn(&str) -> bool) -> Result<()> {
    for (name, var) in from.parameters().all().iter().filter(|(name, _)| taken(name)) {
        vit.parameters().set(name, &var.flatten_all()?.to_vec1::<f32>()?)?;
    }
    Ok(())
}

/// Shows the first `count` images of `dataset` to `model`.
pub(super) fn measure(
    model: &dyn Predictor,
    config: &ViTConfig,
    dataset: &Dataset,
    count: usize,
    preprocess: &Preprocess,
    threads: usize,
) -> Result<Tally> {
    let indices: Vec<u32> = (0..count.min(dataset.len()) as u32).collect();
    let mut tally = Tally::new(config);
    for_each_shard(model, dataset, &indices, preprocess, threads, &mut |shard, answer| {
        let labels: Vec<u16> = shard.iter().map(|&i| dataset.labels[i as usize]).collect();
        tally.add(&labels, &answer);
    })?;
    Ok(tally)
}

pub(super) fn open_options(args: &ReadingArgs, side: usize, labels: LabelColumn) -> OpenOptions {
    OpenOptions { side, labels, strict: args.strict, max_pixels: args.max_pixels }
}

/// The integer path that serves, or the float path over the artifacts' values.
pub(super) fn predictor(
    backbone: &BackboneArtifact,
    set: &ExpertSetArtifact,
    float: bool,
) -> Result<Box<dyn Predictor>> {
    if !float {
        return Ok(Box::new(Integer::new(backbone, set)?));
    }
    let vit = ViT::from_weights(&backbone.weights, &set.weights)?.freeze(|_| true)?;
    Ok(Box::new(Candle { vit, quantizers: Quantizers::NONE }))
}

/// Says what was left out of a data set, and what is odd about it.
pub(super) fn say_findings(skipped: &[String], warnings: &[String]) {
    const SHOWN: usize = 5;
    if !skipped.is_empty() {
        say(&format!("{} files and folders are no usable images and are skipped:", skipped.len()));
        skipped.iter().take(SHOWN).for_each(|reason| say(&format!("  {reason}")));
    }
    if skipped.len() > SHOWN {
        say(&format!("  and {} more", skipped.len() - SHOWN));
    }
    warnings.iter().take(SHOWN).for_each(|warning| say(&format!("warning: {warning}")));
    if warnings.len() > SHOWN {
        say(&format!("and {} more warnings", warnings.len() - SHOWN));
    }
}

/// Reads the training images and says what is wrong with them.
pub(super) fn open_train(
    folder: &Path,
    args: &ReadingArgs,
    side: usize,
    labels: LabelColumn,
    stop: &Stop,
) -> Result<Dataset> {
    Ok(open_with_files(folder, args, side, labels, stop)?.0)
}

fn open_with_files(
    folder: &Path,
    args: &ReadingArgs,
    side: usize,
    labels: LabelColumn,
    stop: &Stop,
) -> Result<(Dataset, Vec<PathBuf>)> {
    let Opened { dataset, files, skipped, warnings } =
        data::open(folder, Part::Train, &open_options(args, side, labels), stop)?;
    say_findings(&skipped, &warnings);
    say(&format!("{} training images in {} classes", dataset.len(), dataset.num_classes()));
    Ok((dataset, files))
}

/// The images of all data sets as one, and their soft labels, where there are any. Their heads are entered in the recipe.
pub(super) fn open_all(
    args: &DataSetsArgs,
    soft: &SoftArgs,
    side: usize,
    recipe: &mut Recipe,
    stop: &Stop,
) -> Result<(Dataset, Option<SoftTargets>)> {
    let (mut sets, mut files) = (Vec::new(), Vec::new());
    recipe.heads.clear();
    for folder in &args.data {
        let (dataset, of_folder) = open_with_files(folder, &args.reading, side, recipe.labels, stop)?;
        if args.data.len() > 1 || soft.soft_labels.is_some() {
            recipe.heads.push(Head::of(folder, &dataset)?);
        }
        ensure!(
            soft.soft_labels.is_none() || of_folder.len() == dataset.len(),
            "soft labels know an image by its file, and the images in {} have none of their own",
            folder.display()
        );
        sets.push(dataset);
        files.extend(of_folder);
    }
    let mut dataset = join(sets)?;
    let Some(path) = &soft.soft_labels else {
        ensure!(recipe.soft_labels.is_none(), "the run learns from soft labels; give --soft-labels again");
        return Ok((dataset, None));
    };
    let (labels, digest) = SoftLabels::read(path, &files)?;
    let share = soft.soft_share.or(recipe.soft_labels.as_ref().map(|before| before.share)).unwrap_or(0.5);
    recipe.heads.push(Head { name: set_name(path)?, classes: labels.classes() });
    recipe.soft_labels = Some(SoftLabelsOf { share, digest: digest.to_string() });
    add_classes(&mut dataset, &labels.labels)?;
    say(&format!("soft labels of {} classes, {share} of the loss", labels.classes()));
    Ok((dataset, Some(SoftTargets { labels: Arc::new(labels), share: share as f32 })))
}

/// The teacher that was asked for, entered in the recipe.
pub(super) fn teacher(args: &TeacherArgs, recipe: &mut Recipe) -> Result<Option<Arc<Teacher>>> {
    let (Some(backbone), Some(set)) = (&args.teacher_backbone, &args.teacher_set) else {
        ensure!(
            recipe.distillation.is_none(),
            "the run learns from a teacher; give --teacher-backbone and --teacher-set again"
        );
        return Ok(None);
    };
    let teacher = Teacher::load(backbone, set)?;
    let before = recipe.distillation.as_ref().map(|distillation| distillation.share);
    recipe.distillation = Some(teacher.distillation(args.distil.or(before).unwrap_or(0.5)));
    Ok(Some(Arc::new(teacher)))
}

/// The stem that runs with this recipe are behind, entered in it.
pub(super) fn frozen_stem(args: &StemArgs, teacher: &TeacherArgs, recipe: &mut Recipe) -> Result<Option<FrozenStem>> {
    let Some(path) = &args.stem else {
        ensure!(!matches!(recipe.origin, Origin::Stem { .. }), "the run is behind a frozen stem; give --stem again");
        return Ok(None);
    };
    ensure!(teacher.teacher_backbone.is_none(), "a teacher looks at pixels, and a run behind a frozen stem has none");
    let stem = FrozenStem::of(&load_backbone(path)?, recipe.model.backbone.d_model)?;
    stem.enter(&mut recipe.model.backbone);
    recipe.origin = Origin::Stem { backbone: stem.digest.to_string() };
    recipe.views = args.views.unwrap_or(recipe.views).max(1);
    Ok(Some(stem))
}

/// The checkpoint to go on from; refuses to overwrite one by accident.
pub(super) fn starting_point(settings: &Settings, resume: bool) -> Result<Option<Checkpoint>> {
    if resume {
        return Checkpoint::load(&settings.out).map(Some);
    }
    ensure!(
        !settings.out.join(checkpoint::FILE_NAME).exists(),
        "{} already holds a run; add --resume to go on with it, or choose another --out",
        settings.out.display()
    );
    Ok(None)
}

/// What [`Stopped`] before the first step is no failure.
pub(super) fn unless_stopped(result: Result<Ended>) -> Result<Ended> {
    result.or_else(|error| {
        let Some(Stopped(ended)) = error.downcast_ref() else { return Err(error) };
        say("stopped before the first step; nothing is lost: the same command goes on");
        Ok(*ended)
    })
}

/// Trains, and leaves the run folder complete.
pub(super) fn drive(
    mut run: Run,
    checkpoint: Option<Checkpoint>,
    out: &Path,
    stop: &Stop,
    export: impl FnOnce(&Checkpoint) -> Result<()>,
) -> Result<Ended> {
    if let Some(checkpoint) = &checkpoint {
        run.resume(checkpoint)?;
        let state = &checkpoint.state;
        say(&format!("going on from step {} of epoch {}", state.step, state.position.epoch));
    }
    let ended = run.train(stop)?;
    match ended {
        Ended::Finished => {
            let checkpoint = run.checkpoint()?;
            for head in checkpoint.state.validation.iter().flat_map(|validation| &validation.heads) {
                let HeadValidation { name, images, top1, .. } = head;
                say(&format!("{name}: {:.2}% of {images} held-out images", 100.0 * top1));
            }
            export(&checkpoint)?;
        }
        Ended::OutOfTime | Ended::Interrupted => {
            say(&format!("stopped; the checkpoint is in {}; add --resume to go on", out.display()));
        }
    }
    if let Err(error) = learning_curve(&out.join("curve.png"), &diary::read(out)) {
        // The run is worth more than its picture.
        say(&format!("warning: no learning curve: {error:#}"));
    }
    Ok(ended)
}
