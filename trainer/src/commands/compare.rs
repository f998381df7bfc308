//! `compare`: variants of one recipe.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use model_core::artifact::{read_backbone, read_expert_set, write_backbone, write_expert_set};
use model_core::config::ViTConfig;
use model_core::image::Preprocess;
use serde_json::{Value, json};

use super::export::temperature;
use super::shared::{drive, frozen_stem, measure, open_options, open_train, teacher, unless_stopped};
use crate::checkpoint::{self, Checkpoint};
use crate::cli::{CompareArgs, DataArgs, threads};
use crate::compare::{self, Outcome, SAMPLE_IMAGES, Sample, Variant};
use crate::data::frozen_stem::{FrozenStem, StemOutputs, Views};
use crate::data::{self, Dataset, LabelColumn, Part};
use crate::evaluate::{Report, Tally};
use crate::files::write_atomically;
use crate::predict::{Candle, Integer, Predictor, by_shards};
use crate::recipe::Recipe;
use crate::stop::{Ended, Stop};
use crate::terminal::{print, say};
use crate::train::{Run, Settings, averaged};

/// Refuses what is named twice: a run that counts twice would narrow every interval.
fn check_named_once<T: Ord>(named: &[T], what: &str) -> Result<()> {
    let distinct: BTreeSet<&T> = named.iter().collect();
    ensure!(distinct.len() == named.len(), "--{what}s names a {what} twice");
    Ok(())
}

/// `compare`: variants of one recipe, each with every seed.
///
/// # Errors
/// When the data or the configuration is unusable, or a run fails.
pub fn compare(args: &CompareArgs, stop: &Stop) -> Result<Ended> {
    unless_stopped(compare_until(args, stop))
}

fn compare_until(args: &CompareArgs, stop: &Stop) -> Result<Ended> {
    check_named_once(&args.seeds, "seed").and_then(|()| check_named_once(&args.variants, "variant"))?;
    let mut base = Recipe::scratch(args.model.resolve()?.0);
    let stem = frozen_stem(&args.stem, &args.teacher, &mut base)?;
    args.recipe.apply(&mut base);
    let side = base.model.backbone.image_size;
    let dataset = Arc::new(open_train(&args.data.data, &args.data.reading, side, base.labels, stop)?);
    base.model.num_classes = dataset.num_classes();
    let teacher = teacher(&args.teacher, &mut base)?;
    base.validate()?;
    let test = open_test(&args.data, side, base.labels, &dataset, stop)?;
    crate::files::create_folder(&args.run.out)?;
    compare::write_memory(&args.run.out, &base.model, stem.as_ref().map(|stem| &stem.weights[..]))?;
    let views = args.stem.views(&base, &args.run.settings());
    let behind = stem.as_ref().map(|stem| Behind::new(stem, (&dataset, &test), &views, stop)).transpose()?;
    let preprocess = stem.as_ref().map_or_else(|| dataset.preprocess(), |stem| stem.preprocess.clone());
    let train = |folder: &str, recipe: Recipe| -> Result<Trained> {
        say(folder);
        let out = args.run.out.join(folder);
        let checkpoint = out.join(checkpoint::FILE_NAME).exists().then(|| Checkpoint::load(&out)).transpose()?;
        let vit = recipe.init_model()?;
        let settings = Settings { out: out.clone(), ..args.run.settings() };
        if let Some(behind) = &behind {
            behind.stem.begin(&vit)?;
        }
        let mut run = Run::new(recipe, settings, vit, dataset.clone(), preprocess.clone(), teacher.clone())?;
        if let Some(behind) = &behind {
            run = run.behind(behind.train.clone());
        }
        let mut finished = None;
        let ended = drive(run, checkpoint, &out, stop, |checkpoint| {
            finished = Some(checkpoint.clone());
            Ok(())
        })?;
        Ok((ended, finished))
    };
    let rates = match choose_rates(args, &base, &train)? {
        Rates::Chosen(rates) => rates,
        Rates::Unfinished(ended) => return Ok(ended),
    };
    let mut outcomes = Vec::new();
    for &seed in &args.seeds {
        for &variant in &args.variants {
            let mut recipe = Recipe { seed, ..base.clone() };
            variant.apply(&mut recipe);
            recipe.learning_rate = rates.get(&variant).copied().unwrap_or(recipe.learning_rate);
            let (ended, finished) = train(&format!("{}-seed-{seed}", variant.name()), recipe)?;
            let Some(checkpoint) = finished else { return Ok(ended) };
            outcomes.push(measure_run(variant, &checkpoint, &test, behind.as_ref(), threads(args.run.threads))?);
            // After every run, so that a long comparison can be watched.
            let table = compare::write(&args.run.out, &outcomes)?;
            print(&table)?;
        }
    }
    Ok(Ended::Finished)
}

/// The test images, with the labels of the training images.
fn open_test(args: &DataArgs, side: usize, labels: LabelColumn, train: &Dataset, stop: &Stop) -> Result<Dataset> {
    let mut test = data::open(&args.data, Part::Test, &open_options(&args.reading, side, labels), stop)?.dataset;
    test.take_labels(&train.class_names).with_context(|| format!("the test part of {}", args.data.display()))?;
    Ok(test)
}

/// The stem that all runs are behind, and what it made of the images.
struct Behind<'a> {
    stem: &'a FrozenStem,
    train: Arc<StemOutputs>,
    test: Arc<StemOutputs>,
}

impl<'a> Behind<'a> {
    fn new(stem: &'a FrozenStem, (train, test): (&Dataset, &Dataset), views: &Views, stop: &Stop) -> Result<Self> {
        let train = StemOutputs::prepare(stem, train, views, stop)?;
        let test = StemOutputs::prepare(stem, test, &Views { count: 1, ..views.clone() }, stop)?;
        Ok(Self { stem, train: Arc::new(train), test: Arc::new(test) })
    }
}

/// How a run ended, and its last checkpoint if it is done.
type Trained = (Ended, Option<Checkpoint>);

/// What came of [`choose_rates`].
enum Rates {
    /// By variant; empty where none were asked for.
    Chosen(BTreeMap<Variant, f64>),
    /// A trial was interrupted.
    Unfinished(Ended),
}

/// Tries every variant at every rate of `--rates` with the first seed, and chooses by cross-entropy on the held-out images.
/// Every trial is in `rates.json`.
fn choose_rates(args: &CompareArgs, base: &Recipe, train: &impl Fn(&str, Recipe) -> Result<Trained>) -> Result<Rates> {
    let mut chosen = BTreeMap::new();
    let mut trials = Vec::new();
    for &variant in args.variants.iter().filter(|_| !args.rates.is_empty()) {
        let mut best = f64::INFINITY;
        for &rate in &args.rates {
            let seed = args.seeds.first().copied().context("--seeds is empty")?;
            let mut recipe = Recipe { seed, epochs: args.rate_epochs, learning_rate: rate, ..base.clone() };
            variant.apply(&mut recipe);
            recipe.learning_rate = rate;
            let (ended, finished) = train(&format!("rates/{}-{rate}", variant.name()), recipe)?;
            let Some(checkpoint) = finished else { return Ok(Rates::Unfinished(ended)) };
            let held_out = checkpoint.state.validation.context("--rates choose by held-out images; --hold-out is 0")?;
            trials.push(json!({ "variant": variant, "learning_rate": rate, "held_out": held_out }));
            if held_out.cross_entropy < best {
                best = held_out.cross_entropy;
                chosen.insert(variant, rate);
            }
            write_atomically(&args.run.out.join("rates.json"), serde_json::to_string_pretty(&trials)?.as_bytes())?;
        }
    }
    Ok(Rates::Chosen(chosen))
}

/// Measures a finished run on the test part: through an artifact and the integer engine where it can be served.
fn measure_run(
    variant: Variant,
    checkpoint: &Checkpoint,
    test: &Dataset,
    behind: Option<&Behind<'_>>,
    threads: usize,
) -> Result<Outcome> {
    let state = &checkpoint.state;
    let recipe = &state.recipe;
    let vit = averaged(recipe, &checkpoint.parameters, &checkpoint.average)?;
    let model: Box<dyn Predictor> = if recipe.is_servable() {
        let (mut backbone, mut set) = vit.to_weights(&state.labels)?;
        if let Some(behind) = behind {
            backbone.stem.clone_from(&behind.stem.weights);
        }
        set.temperature = temperature(checkpoint, 0);
        let backbone = read_backbone(&write_backbone("run", &backbone, &state.preprocess, &Value::Null)?)?;
        let bound_to = (&backbone.weights.config, backbone.digest);
        let set = read_expert_set(&write_expert_set("run", &set, bound_to, &Value::Null)?)?;
        Box::new(Integer::new(&backbone, &set)?)
    } else {
        Box::new(Candle { vit: vit.clone(), quantizers: recipe.quantizers() })
    };
    let tally = match behind.filter(|_| !recipe.is_servable()) {
        None => measure(&*model, &recipe.model, test, test.len(), &state.preprocess, threads)?,
        // The stem's integers are in its outputs; its float path would be another stem.
        Some(behind) => {
            let candle = Candle { vit, quantizers: recipe.quantizers() };
            let answer = |shard: &[u32]| candle.predict_behind_stem(behind.test.tokens(0, shard), shard.len());
            let mut tally = Tally::new(&recipe.model);
            let all: Vec<u32> = (0..test.len() as u32).collect();
            by_shards(&all, threads, answer, &mut |shard, answer| {
                let labels: Vec<u16> = shard.iter().map(|&i| test.labels[i as usize]).collect();
                tally.add(&labels, &answer);
            })?;
            tally
        }
    };
    let scores = tally.scores();
    let routed = scores.routing_agreement.is_some();
    let report = Report::new(&tally, &state.labels, "", 0, 1.0);
    Ok(Outcome {
        variant,
        recipe: recipe.clone(),
        parameters: checkpoint.parameters.values().map(Vec::len).sum(),
        top1: scores.top1,
        top5: scores.top5,
        right: tally.right().to_vec(),
        routing_agreement: scores.routing_agreement,
        far_agreement: scores.far_agreement,
        images_per_second: state.step as f64 * recipe.batch_size as f64 / state.seconds.max(1e-9),
        load: if routed { report.layers.into_iter().map(|layer| layer.load).collect() } else { Vec::new() },
        sample: if routed { Some(sample(&*model, &recipe.model, test, &state.preprocess)?) } else { None },
    })
}

/// Where the patches of the first images go.
fn sample(model: &dyn Predictor, config: &ViTConfig, test: &Dataset, preprocess: &Preprocess) -> Result<Sample> {
    let count = SAMPLE_IMAGES.min(test.len());
    let images = test.images[..count * test.image_bytes()].to_vec();
    let answer = model.predict(preprocess.normalize(&images), count)?;
    let top_k = config.experts.top_k;
    let first = |experts: Vec<u16>| experts.into_iter().step_by(top_k).collect();
    Ok(Sample {
        side: test.side,
        images,
        grid_side: config.backbone.grid_side(),
        first_choices: answer.experts.into_iter().map(first).collect(),
    })
}
