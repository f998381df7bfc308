//! `calibrate`: temperature, and statistics of unknown images, for sets that were trained.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use model_core::artifact::{BackboneArtifact, ExpertSetArtifact};
use model_core::image::Preprocess;
use serde_json::Value;
use teaching::{Calibrated, Examples, MOST_IMAGES, Options, Share};

use super::shared::open_train;
use crate::background::background;
use crate::cli::{CalibrateArgs, threads};
use crate::data::Dataset;
use crate::data::heads::{join, set_name};
use crate::data::sample::sample;
use crate::data::split::{HeldOut, hold_out};
use crate::encode::put_sets;
use crate::predict::{Integer, features, for_each_shard};
use crate::recipe::Recipe;
use crate::stop::Stop;
use crate::store::{Store, load_backbone, load_set};
use crate::terminal::say;

/// What stands in a card's words about data in front of what the blocks, and the background, are from.
const BLOCKS: &str = ". Blocks: ";
const BACKGROUND: &str = ". Background: ";

/// `calibrate`: fits temperature and statistics to what was held out of a run, and writes its sets with them.
///
/// # Errors
/// When an artifact or the data is unusable, they do not belong together, or too little was held out.
pub fn calibrate(args: &CalibrateArgs) -> Result<()> {
    let store = Store::new(&args.store);
    let mut backbone = load_backbone(&args.backbone)?;
    ensure!(
        args.data_source.is_none() || backbone.card.is_some(),
        "the backbone {} has no model card, in which --data-source would stand",
        backbone.name
    );
    let mut sets = Vec::new();
    for path in &args.sets {
        sets.push(load_set(path, &backbone)?);
    }
    let lenders = sets.clone();
    let complete =
        |set: &ExpertSetArtifact, path: &Path| complete(set, &lenders).with_context(|| path.display().to_string());
    let threads = threads(args.threads);
    // Before minutes of work: folders that are not the run's are said at once.
    let data = Data::open(args, &sets, &backbone)?;
    if let (Some(folder), Some(first)) = (&args.background, sets.first()) {
        let first = complete(first, &args.sets[0])?;
        measure_background(&mut backbone, &first, folder, args, threads)?;
    }
    if let Some(card) = &mut backbone.card {
        let background = args.background.as_ref().map(|_| &*args.background_source);
        card.data = describe_data(&card.data, args.data_source.as_deref(), background);
    }
    for (set, path) in sets.iter_mut().zip(&args.sets) {
        let engine = Integer::new(&backbone, &complete(set, path)?)?;
        let calibrated =
            data.calibrate(&engine, set, &backbone, threads).with_context(|| path.display().to_string())?;
        say(&describe(&set.name, &calibrated));
        set.weights.temperature = calibrated.temperature;
        (set.weights.familiarity, set.report) = match args.no_unknown {
            true => (None, Value::Null),
            false => (Some(calibrated.familiarity), calibrated.report.summary()),
        };
    }
    put_sets(&store, &backbone, args.sets.iter().cloned().zip(sets))
}

/// The set with the experts that it borrows, as if it had not been calibrated before.
fn complete(set: &ExpertSetArtifact, lenders: &[ExpertSetArtifact]) -> Result<ExpertSetArtifact> {
    let mut set = set.clone();
    ensure!(set.weights.projection.is_none(), "`teach` made the set, and has calibrated it");
    let lender = set.borrowed_experts.and_then(|digest| lenders.iter().find(|lender| lender.digest == digest));
    if let (Some(digest), None) = (set.borrowed_experts, lender) {
        bail!("it borrows its experts; give the set that lends them, {digest}, too");
    }
    set.check_lender(lender.map(ExpertSetArtifact::as_lender))?;
    if let Some(lender) = lender {
        set.weights.layers.clone_from(&lender.weights.layers);
    }
    (set.weights.temperature, set.weights.familiarity) = (1.0, None);
    Ok(set)
}

/// How the sets were trained, all of them in one run.
fn recipe_of_all(sets: &[ExpertSetArtifact]) -> Result<Recipe> {
    let mut recipes = sets.iter().map(|set| recipe(set).with_context(|| format!("the set {}", set.name)));
    let first = recipes.next().context("--set is missing")??;
    for (other, set) in recipes.zip(&sets[1..]) {
        ensure!(
            other? == first,
            "the sets {} and {} are not of one run; calibrate each by itself",
            sets[0].name,
            set.name
        );
    }
    Ok(first)
}

/// How the set was trained, by its own record.
fn recipe(set: &ExpertSetArtifact) -> Result<Recipe> {
    let recipe = set.training.get("recipe").context("it does not say how it was trained")?;
    serde_json::from_value(recipe.clone()).context("it does not say in words of this version how it was trained")
}

fn measure_background(
    backbone: &mut BackboneArtifact,
    set: &ExpertSetArtifact,
    folder: &Path,
    args: &CalibrateArgs,
    threads: usize,
) -> Result<()> {
    let config = &backbone.weights.config;
    let images = sample(folder, args.background_images, (&backbone.preprocess, config.image_size))?;
    say(&format!("the background of {} images", images.len()));
    let features = features(&Integer::new(backbone, set)?, &images, threads)?;
    let background =
        background(&features, config.d_model, &args.background_source).with_context(|| folder.display().to_string())?;
    backbone.weights.background = Some(background);
    Ok(())
}

/// What a card says of data, with these words of blocks and background in place of those before.
fn describe_data(before: &str, blocks: Option<&str>, background: Option<&str>) -> String {
    let (rest, background_before) = split(before, BACKGROUND);
    let (stem, blocks_before) = split(rest, BLOCKS);
    let mut data = stem.to_owned();
    for (part, text) in [(BLOCKS, blocks.or(blocks_before)), (BACKGROUND, background.or(background_before))] {
        data += &text.map_or_else(String::new, |text| format!("{part}{text}"));
    }
    data
}

fn split<'a>(text: &'a str, part: &str) -> (&'a str, Option<&'a str>) {
    text.split_once(part).map_or((text, None), |(rest, part)| (rest, Some(part)))
}

/// Which images were held out goes by the place of their class among all classes of the run.
fn check_order(folders: &[PathBuf], recipe: &Recipe) -> Result<()> {
    let soft = usize::from(recipe.soft_labels.is_some());
    let learned_from: Vec<&str> = recipe.heads.iter().map(|head| &*head.name).collect();
    let learned_from = &learned_from[..learned_from.len().saturating_sub(soft)];
    let given: Vec<String> = folders.iter().map(|folder| set_name(folder)).collect::<Result<_>>()?;
    ensure!(
        if learned_from.is_empty() { given.len() == 1 } else { given == learned_from },
        "the run learned from {}; give just that as --data, in that order",
        if learned_from.is_empty() { "one folder".to_owned() } else { learned_from.join(", ") }
    );
    Ok(())
}

/// The images of a run, as it saw them.
struct Data {
    dataset: Dataset,
    parts: HeldOut,
    /// Of each data set, the numbers of its classes.
    classes: Vec<Range<usize>>,
}

impl Data {
    fn open(args: &CalibrateArgs, of: &[ExpertSetArtifact], backbone: &BackboneArtifact) -> Result<Self> {
        let recipe = recipe_of_all(of)?;
        check_order(&args.data, &recipe)?;
        let (mut sets, mut classes, mut end) = (Vec::new(), Vec::new(), 0);
        for folder in &args.data {
            let set =
                open_train(folder, &args.reading, backbone.weights.config.image_size, recipe.labels, &Stop::default())?;
            classes.push(end..end + set.num_classes());
            end += set.num_classes();
            sets.push(set);
        }
        let dataset = join(sets)?;
        let before = of[0].training.get("data_fingerprint").and_then(Value::as_str);
        // Soft labels have classes that are not here.
        ensure!(
            recipe.soft_labels.is_some()
                || before.is_none_or(|before| before == format!("{:016x}", dataset.fingerprint())),
            "the images are not those that the run learned from: the data folder has changed"
        );
        let parts = hold_out(&dataset, recipe.hold_out, recipe.seed);
        Ok(Self { dataset, parts, classes })
    }

    /// The classes that are those of the set.
    fn classes_of(&self, set: &ExpertSetArtifact) -> Result<Range<usize>> {
        let own =
            self.classes.iter().find(|classes| self.dataset.class_names[(*classes).clone()] == set.weights.labels);
        own.cloned().with_context(|| format!("its {} labels are the classes of no --data", set.weights.labels.len()))
    }

    fn calibrate(
        &self,
        engine: &Integer,
        set: &ExpertSetArtifact,
        backbone: &BackboneArtifact,
        threads: usize,
    ) -> Result<Calibrated> {
        let classes = self.classes_of(set)?;
        let own = |image: &u32| classes.contains(&usize::from(self.dataset.labels[*image as usize]));
        let held: Vec<u32> = self.parts.validation.iter().copied().filter(own).collect();
        // Where there are several heads, the record of each says it.
        let before = set.training.pointer("/held_out/images").and_then(Value::as_u64);
        ensure!(
            before.is_none_or(|before| before == held.len() as u64),
            "its run held out {} images, and of these folders {} would be: the data has changed",
            before.unwrap_or_default(),
            held.len()
        );
        ensure!(held.len() <= MOST_IMAGES / 2, "{} images are too many to hold out", held.len());
        let learned: Vec<u32> = self.parts.train.iter().copied().filter(own).collect();
        let some = learned.len().min(MOST_IMAGES - held.len());
        let chosen = (0..some).map(|i| learned[i * learned.len() / some]);
        let images: Vec<u32> = held.iter().copied().chain(chosen).collect();
        let (logits, features) = self.look(engine, &images, &backbone.preprocess, threads)?;
        let labels = images.iter().map(|&image| usize::from(self.dataset.labels[image as usize]) - classes.start);
        let labels: Vec<usize> = labels.collect();
        let examples = Examples {
            features: &features,
            views: 1,
            d_model: backbone.weights.config.d_model,
            labels: &labels,
            classes: &set.weights.labels,
        };
        let held: Vec<usize> = (0..held.len()).collect();
        let logits = &logits[..held.len() * classes.len()];
        let background = backbone.weights.background.as_ref();
        Ok(teaching::calibrate(&examples, (&held, logits), background, &Options::default())?)
    }

    /// Logits and features of images.
    fn look(
        &self,
        engine: &Integer,
        images: &[u32],
        preprocess: &Preprocess,
        threads: usize,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let (mut logits, mut features) = (Vec::new(), Vec::new());
        for_each_shard(engine, &self.dataset, images, preprocess, threads, &mut |_, answer| {
            logits.extend(answer.logits);
            features.extend(answer.features);
        })?;
        Ok((logits, features))
    }
}

fn describe(name: &str, calibrated: &Calibrated) -> String {
    let report = &calibrated.report;
    let percent = |share: &Share| format!("{:.1}% of {}", 100.0 * share.share, share.of);
    let mut text = format!(
        "{name}: held-out images: right {}, called unknown {}; temperature {:.2}, calibration error {:.1}%",
        percent(&report.accuracy),
        percent(&report.unknown.refused),
        calibrated.temperature,
        100.0 * report.calibration.expected_error,
    );
    for (what, share) in [
        ("of the background", &report.unknown.background_passes),
        ("of a class left out", &report.unknown.class_passes),
    ] {
        if let Some(share) = share {
            text += &format!("; not called unknown {what} {}", percent(share));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::describe_data;

    #[test]
    fn cards_say_once_what_blocks_and_background_are_from() {
        let said = describe_data("weights: A", None, Some("B"));
        assert_eq!(said, "weights: A. Background: B");
        let said = describe_data(&said, Some("C, MIT"), None);
        assert_eq!(said, "weights: A. Blocks: C, MIT. Background: B");
        assert_eq!(describe_data(&said, Some("D"), Some("E")), "weights: A. Blocks: D. Background: E");
        assert_eq!(describe_data(&said, None, None), said);
    }
}
