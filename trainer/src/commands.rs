//! What each command does, from arguments to files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use model_core::artifact::{
    BackboneArtifact, ExpertSetArtifact, read_backbone, read_expert_set, write_backbone, write_expert_set,
};
use model_core::config::ViTConfig;
use model_core::image::{DecodeLimits, Preprocess, decode};
use model_core::weights::Encodings;
use serde::Serialize;
use serde_json::{Value, json};
use training::parameters::{Quantizers, is_angle, is_router};
use training::vit::ViT;

use crate::checkpoint::{self, Checkpoint};
use crate::cli::{
    CompareArgs, DataArgs, EvaluateArgs, ExportArgs, InitArgs, LogitsArgs, NameArgs, SpecialiseArgs, SpeedArgs,
    StartArgs, TeacherArgs, TrainArgs, threads,
};
use crate::compare::{self, Outcome, SAMPLE_IMAGES, Sample, Variant};
use crate::data::{self, Dataset, LabelColumn, OpenOptions, Opened, Part};
use crate::diary;
use crate::evaluate::{Artifacts, Probe, Report, Tally, confusion_picture};
use crate::files::write_atomically;
use crate::plot::learning_curve;
use crate::predict::{Candle, Integer, Predictor, for_each_shard};
use crate::recipe::{Origin, Recipe, angle_start};
use crate::speed;
use crate::store::{Store, load_backbone, load_set};
use crate::teacher::Teacher;
use crate::train::{Ended, Run, Settings, averaged};

/// `init`: a random backbone with random expert sets.
///
/// # Errors
/// When the configuration is invalid or a file cannot be written.
pub fn init(args: &InitArgs) -> Result<()> {
    let (mut config, preset) = args.model.resolve()?;
    if let Some(num_experts) = args.experts {
        config.experts.num_experts = num_experts;
        config.validate()?;
    }
    let name = args.name.clone().unwrap_or(preset);
    let store = Store::new(&args.store);
    let labels: Vec<String> = (0..config.num_classes).map(|class| format!("class {class}")).collect();
    let summary = json!({ "random": true, "seed": args.seed });
    let (backbone, first) = ViT::init(&config, args.seed)?.to_weights(&labels)?;
    let (path, digest) = store.write_backbone(&name, &backbone, &Preprocess::default(), &summary)?;
    say(&format!("backbone {}", path.display()));
    let mut set = first;
    for number in 0..args.sets {
        if number > 0 {
            set = ViT::init(&config, args.seed.wrapping_add(u64::from(number)))?.to_weights(&labels)?.1;
        }
        let set_name = format!("set-{number:04}");
        store.write_set(&set_name, 1, &set, (&backbone.config, digest), &summary)?;
    }
    say(&format!("{} expert sets in {}", args.sets, args.store.join("expert-sets").display()));
    Ok(())
}

/// `train`: a backbone and its first expert set.
///
/// # Errors
/// When the data, the configuration or a checkpoint is unusable, the loss stops being a number, or the disk is full.
pub fn train(args: &TrainArgs, stop: &AtomicBool) -> Result<Ended> {
    let settings = args.run.settings();
    let checkpoint = starting_point(&settings, args.run.resume)?;
    let given = args.model.config.is_some() || args.model.preset.is_some();
    let mut recipe = match &checkpoint {
        Some(checkpoint) => {
            let mut recipe = checkpoint.state.recipe.clone();
            if given {
                recipe.model = args.model.resolve()?.0;
            }
            recipe
        }
        None => Recipe::scratch(args.model.resolve()?.0),
    };
    let start = Start::load(&args.start)?;
    if let Some(start) = &start {
        start.enter(&mut recipe, checkpoint.is_none());
    }
    args.recipe.apply(&mut recipe);
    let dataset = open_train(&args.data, recipe.model.backbone.image_size, recipe.labels)?;
    if args.model.config.is_none() {
        // A preset is a shape for any number of classes; a configuration file says exactly what it wants.
        recipe.model.num_classes = dataset.num_classes();
    }
    let teacher = teacher(&args.teacher, &mut recipe)?;
    recipe.validate()?;
    let (vit, preprocess) = match &start {
        Some(start) => (start.model(&recipe, &dataset)?, start.preprocess().clone()),
        None => (recipe.init_model()?, dataset.preprocess()),
    };
    let run = Run::new(recipe, settings, vit, Arc::new(dataset), preprocess, teacher)?;
    drive(run, checkpoint, &args.run.out, stop, |checkpoint| {
        export_backbone(checkpoint, &Store::new(args.run.out.join("store")), &args.names, &Encodings::default())
    })
}

/// The trained model that `train` starts from.
enum Start {
    /// Its codes, which become latent parameters in the middle of what rounds to them.
    Artifacts {
        backbone: Box<BackboneArtifact>,
        set: Box<ExpertSetArtifact>,
    },
    Run(Box<Checkpoint>),
}

impl Start {
    fn load(args: &StartArgs) -> Result<Option<Self>> {
        if let Some(folder) = &args.start_run {
            let checkpoint = Checkpoint::load(folder)?;
            ensure!(
                !matches!(checkpoint.state.recipe.origin, Origin::Specialise { .. }),
                "the run in {} specialised a backbone, and has no latent parameters of the backbone itself",
                folder.display()
            );
            return Ok(Some(Self::Run(Box::new(checkpoint))));
        }
        let (Some(backbone), Some(set)) = (&args.start_backbone, &args.start_set) else { return Ok(None) };
        let backbone = load_backbone(backbone)?;
        let set = load_set(set, &backbone)?;
        Ok(Some(Self::Artifacts { backbone: Box::new(backbone), set: Box::new(set) }))
    }

    /// Puts origin and shapes into `recipe`. What was held out of the run before stays held out of a new one, so that
    /// validation sees nothing that was learnt from.
    fn enter(&self, recipe: &mut Recipe, new: bool) {
        let before = match self {
            Self::Artifacts { backbone, set } => {
                recipe.origin =
                    Origin::Continue { backbone: backbone.digest.to_string(), start: set.digest.to_string() };
                recipe.model = set.weights.vit_config(&backbone.weights.config);
                let before = &backbone.training["recipe"];
                before["seed"].as_u64().zip(before["hold_out"].as_f64())
            }
            Self::Run(checkpoint) => {
                let before = &checkpoint.state.recipe;
                recipe.origin = Origin::Run { checkpoint: checkpoint.digest().to_string() };
                recipe.model = before.model.clone();
                (recipe.feed_forward, recipe.activations) = (before.feed_forward, before.activations);
                Some((before.seed, before.hold_out))
            }
        };
        if let Some((seed, hold_out)) = before.filter(|_| new) {
            (recipe.seed, recipe.hold_out) = (seed, hold_out);
        }
    }

    fn preprocess(&self) -> &Preprocess {
        match self {
            Self::Artifacts { backbone, .. } => &backbone.preprocess,
            Self::Run(checkpoint) => &checkpoint.state.preprocess,
        }
    }

    /// With a fresh head where the classes are others.
    fn model(&self, recipe: &Recipe, dataset: &Dataset) -> Result<ViT> {
        match self {
            Self::Artifacts { backbone, set } => {
                let mut weights = set.weights.clone();
                if weights.labels != dataset.class_names {
                    let fresh = ViT::init(&recipe.model, recipe.seed)?.to_weights(&dataset.class_names)?.1;
                    (weights.head, weights.labels) = (fresh.head, fresh.labels);
                }
                let vit = ViT::latent_from_weights(&backbone.weights, &weights)?;
                let start = angle_start(&set.training, vit.config())?;
                Ok(vit.with_angle_start(start))
            }
            Self::Run(checkpoint) => {
                let state = &checkpoint.state;
                let keeps_head = state.labels == dataset.class_names;
                let taken = |name: &str| keeps_head || !name.starts_with("head.");
                let vit = recipe.init_model()?.with_angle_start(state.angle_start.clone());
                take(&vit, &averaged(&state.recipe, &checkpoint.parameters, &checkpoint.average)?, taken)?;
                Ok(vit)
            }
        }
    }
}

/// Sets the parameters of `vit` that `taken` names to those of `from`.
fn take(vit: &ViT, from: &ViT, taken: impl Fn(&str) -> bool) -> Result<()> {
    for (name, var) in from.parameters().all().iter().filter(|(name, _)| taken(name)) {
        vit.parameters().set(name, &var.flatten_all()?.to_vec1::<f32>()?)?;
    }
    Ok(())
}

/// `specialise`: a new expert set on a frozen backbone.
pub fn specialise(args: &SpecialiseArgs, stop: &AtomicBool) -> Result<Ended> {
    let settings = args.run.settings();
    let checkpoint = starting_point(&settings, args.run.resume)?;
    let backbone = load_backbone(&args.backbone)?;
    let start = SetStart::load(args, &backbone)?;
    let origin = Origin::Specialise { backbone: backbone.digest.to_string(), start: start.digest() };
    let mut recipe = match &checkpoint {
        Some(checkpoint) => Recipe { origin, ..checkpoint.state.recipe.clone() },
        None => Recipe::specialise(start.config(&backbone), origin),
    };
    args.recipe.apply(&mut recipe);
    let dataset = open_train(&args.data, recipe.model.backbone.image_size, recipe.labels)?;
    recipe.model.num_classes = dataset.num_classes();
    let teacher = teacher(&args.teacher, &mut recipe)?;
    recipe.validate()?;

    let vit = start.model(&recipe, &backbone, &dataset)?;
    let run = Run::new(recipe, settings, vit, Arc::new(dataset), backbone.preprocess.clone(), teacher)?;
    drive(run, checkpoint, &args.run.out, stop, |checkpoint| {
        let store = Store::new(args.run.out.join("store"));
        export_set(checkpoint, &store, (&args.backbone, &args.set_name), &Encodings::default())
    })
}

/// Whose angles and routers `specialise` starts from.
enum SetStart {
    /// The codes of an expert set.
    Set(Box<ExpertSetArtifact>),
    /// The latent ones of a run.
    Run(Box<Checkpoint>),
}

impl SetStart {
    fn load(args: &SpecialiseArgs, backbone: &BackboneArtifact) -> Result<Self> {
        let Some(folder) = &args.start_run else {
            let path = args.start.as_ref().context("--start or --start-run is missing")?;
            return Ok(Self::Set(Box::new(load_set(path, backbone)?)));
        };
        let checkpoint = Checkpoint::load(folder)?;
        let state = &checkpoint.state;
        let fits = match &state.recipe.origin {
            Origin::Specialise { backbone: digest, .. } => *digest == backbone.digest.to_string(),
            _ => {
                let model = averaged(&state.recipe, &checkpoint.parameters, &checkpoint.average)?;
                model.to_weights(&state.labels)?.0 == backbone.weights
            }
        };
        ensure!(fits, "the run in {} neither made nor specialised the backbone {}", folder.display(), backbone.digest);
        Ok(Self::Run(Box::new(checkpoint)))
    }

    fn digest(&self) -> String {
        match self {
            Self::Set(set) => set.digest.to_string(),
            Self::Run(checkpoint) => checkpoint.digest().to_string(),
        }
    }

    fn config(&self, backbone: &BackboneArtifact) -> ViTConfig {
        match self {
            Self::Set(set) => set.weights.vit_config(&backbone.weights.config),
            Self::Run(checkpoint) => checkpoint.state.recipe.model.clone(),
        }
    }

    /// On `backbone`, with a fresh head.
    fn model(&self, recipe: &Recipe, backbone: &BackboneArtifact, dataset: &Dataset) -> Result<ViT> {
        let mut weights = ViT::init(&recipe.model, recipe.seed)?.to_weights(&dataset.class_names)?.1;
        if let Self::Set(set) = self {
            weights.layers = set.weights.layers.clone();
        }
        let vit = ViT::from_weights(&backbone.weights, &weights)?;
        Ok(match self {
            Self::Set(set) => {
                let start = angle_start(&set.training, &set.weights.vit_config(&backbone.weights.config))?;
                vit.with_angle_start(start)
            }
            Self::Run(checkpoint) => {
                let state = &checkpoint.state;
                let from = averaged(&state.recipe, &checkpoint.parameters, &checkpoint.average)?;
                take(&vit, &from, |name| is_angle(name) || is_router(name))?;
                vit.with_angle_start(state.angle_start.clone())
            }
        })
    }
}

/// `compare`: variants of one recipe, each with every seed.
pub fn compare(args: &CompareArgs, stop: &AtomicBool) -> Result<Ended> {
    let mut base = Recipe::scratch(args.model.resolve()?.0);
    args.recipe.apply(&mut base);
    let side = base.model.backbone.image_size;
    let dataset = Arc::new(open_train(&args.data, side, base.labels)?);
    base.model.num_classes = dataset.num_classes();
    let teacher = teacher(&args.teacher, &mut base)?;
    let test = data::open(&args.data.data, Part::Test, &open_options(&args.data, side, base.labels))?.dataset;
    crate::files::create_folder(&args.run.out)?;
    compare::write_memory(&args.run.out, &base.model)?;
    let train = |folder: &str, recipe: Recipe| -> Result<Trained> {
        say(folder);
        let out = args.run.out.join(folder);
        let checkpoint = out.join(checkpoint::FILE_NAME).exists().then(|| Checkpoint::load(&out)).transpose()?;
        let vit = recipe.init_model()?;
        let settings = Settings { out: out.clone(), ..args.run.settings() };
        let run = Run::new(recipe, settings, vit, dataset.clone(), dataset.preprocess(), teacher.clone())?;
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
            outcomes.push(measure_run(variant, &checkpoint, &test, threads(args.run.threads))?);
            // After every run, so that a long comparison can be watched.
            let table = compare::write(&args.run.out, &outcomes)?;
            print(&table)?;
        }
    }
    Ok(Ended::Finished)
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
fn measure_run(variant: Variant, checkpoint: &Checkpoint, test: &Dataset, threads: usize) -> Result<Outcome> {
    let state = &checkpoint.state;
    let recipe = &state.recipe;
    let vit = averaged(recipe, &checkpoint.parameters, &checkpoint.average)?;
    let model: Box<dyn Predictor> = if recipe.is_servable() {
        let (backbone, set) = vit.to_weights(&state.labels)?;
        let backbone = read_backbone(&write_backbone("run", &backbone, &state.preprocess, &Value::Null)?)?;
        let bound_to = (&backbone.weights.config, backbone.digest);
        let set = read_expert_set(&write_expert_set("run", &set, bound_to, &Value::Null)?)?;
        Box::new(Integer::new(&backbone, &set)?)
    } else {
        Box::new(Candle { vit, quantizers: recipe.quantizers() })
    };
    let tally = measure(&*model, &recipe.model, test, test.len(), &state.preprocess, threads)?;
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

/// Shows the first `count` images of `dataset` to `model`.
fn measure(
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

fn open_options(args: &DataArgs, side: usize, labels: LabelColumn) -> OpenOptions {
    OpenOptions { side, labels, strict: args.strict, max_pixels: args.max_pixels }
}

/// `export`: the artifacts of a run's checkpoint.
///
/// # Errors
/// When there is no checkpoint or a file cannot be written.
pub fn export(args: &ExportArgs) -> Result<()> {
    let checkpoint = Checkpoint::load(&args.run)?;
    let store = Store::new(args.store.clone().unwrap_or_else(|| args.run.join("store")));
    match (&checkpoint.state.recipe.origin, &args.backbone) {
        (Origin::Scratch | Origin::Continue { .. } | Origin::Run { .. }, None) => {
            export_backbone(&checkpoint, &store, &args.names, &args.encodings.encodings())
        }
        (Origin::Scratch | Origin::Continue { .. } | Origin::Run { .. }, Some(_)) => {
            bail!("--backbone is for specialised runs; this one trained its own")
        }
        (Origin::Specialise { .. }, Some(path)) => {
            export_set(&checkpoint, &store, (path, &args.names.set_name), &args.encodings.encodings())
        }
        (Origin::Specialise { .. }, None) => bail!("--backbone is missing: the run specialised one"),
    }
}

/// `evaluate`: how good artifacts are.
///
/// # Errors
/// When an artifact or the data is unusable, or they do not belong together.
pub fn evaluate(args: &EvaluateArgs) -> Result<()> {
    let backbone = load_backbone(&args.backbone)?;
    let set = load_set(&args.set, &backbone)?;
    let config = set.weights.vit_config(&backbone.weights.config);
    let part = if args.train_part { Part::Train } else { Part::Test };
    let Opened { dataset, skipped, warnings } = open_labelled(args, part, &config, &set.weights.labels)?;
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

/// The integer path that serves, or the float path over the artifacts' values.
fn predictor(backbone: &BackboneArtifact, set: &ExpertSetArtifact, float: bool) -> Result<Box<dyn Predictor>> {
    if !float {
        return Ok(Box::new(Integer::new(backbone, set)?));
    }
    let vit = ViT::from_weights(&backbone.weights, &set.weights)?.freeze(|_| true)?;
    Ok(Box::new(Candle { vit, quantizers: Quantizers::NONE }))
}

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
    let mut set = load_set(&args.set, &backbone)?;
    let lender = args.lender.as_ref().map(|path| load_set(path, &backbone)).transpose()?;
    set.check_lender(lender.as_ref().map(ExpertSetArtifact::as_lender))
        .with_context(|| args.set.display().to_string())?;
    if let Some(lender) = lender.filter(|_| set.borrowed_experts.is_some()) {
        set.weights.layers = lender.weights.layers;
    }
    let model = predictor(&backbone, &set, args.float)?;
    let side = backbone.weights.config.image_size;
    let mut unusable = 0;
    for file in &args.files {
        let image = fs::read(file).map_err(anyhow::Error::from);
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

/// `speed`: images/s.
pub fn speed(args: &SpeedArgs) -> Result<()> {
    let mut recipe = Recipe::scratch(args.model.resolve()?.0);
    args.recipe.apply(&mut recipe);
    args.variant.apply(&mut recipe);
    let speed = speed::measure(&recipe, threads(args.threads), Duration::from_secs(args.seconds))?;
    print(&if args.json { serde_json::to_string_pretty(&speed)? + "\n" } else { speed.to_string() })
}

/// Opens the images with the label column whose names are the expert set's.
fn open_labelled(args: &EvaluateArgs, part: Part, config: &ViTConfig, labels: &[String]) -> Result<Opened> {
    let side = config.backbone.image_size;
    let columns = args.labels.map_or(vec![LabelColumn::Fine, LabelColumn::Coarse], |column| vec![column]);
    for column in columns {
        let opened = data::open(&args.data.data, part, &open_options(&args.data, side, column))?;
        if opened.dataset.class_names == labels {
            return Ok(opened);
        }
    }
    bail!("the expert set's {} labels are not the classes of {}", labels.len(), args.data.data.display())
}

/// Says what was left out of a data set, and what is odd about it.
fn say_findings(skipped: &[String], warnings: &[String]) {
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
fn open_train(args: &DataArgs, side: usize, labels: LabelColumn) -> Result<Dataset> {
    let Opened { dataset, skipped, warnings } = data::open(&args.data, Part::Train, &open_options(args, side, labels))?;
    say_findings(&skipped, &warnings);
    say(&format!("{} training images in {} classes", dataset.len(), dataset.num_classes()));
    Ok(dataset)
}

/// The teacher that was asked for, entered in the recipe.
fn teacher(args: &TeacherArgs, recipe: &mut Recipe) -> Result<Option<Arc<Teacher>>> {
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

/// The checkpoint to go on from; refuses to overwrite one by accident.
fn starting_point(settings: &Settings, resume: bool) -> Result<Option<Checkpoint>> {
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

/// Trains, and leaves the run folder complete.
fn drive(
    mut run: Run,
    checkpoint: Option<Checkpoint>,
    out: &Path,
    stop: &AtomicBool,
    export: impl FnOnce(&Checkpoint) -> Result<()>,
) -> Result<Ended> {
    if let Some(checkpoint) = &checkpoint {
        run.resume(checkpoint)?;
        let state = &checkpoint.state;
        say(&format!("going on from step {} of epoch {}", state.step, state.position.epoch));
    }
    let ended = run.train(stop)?;
    match ended {
        Ended::Finished => export(&run.checkpoint()?)?,
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

fn export_backbone(checkpoint: &Checkpoint, store: &Store, names: &NameArgs, encodings: &Encodings) -> Result<()> {
    let state = &checkpoint.state;
    let vit = averaged(&state.recipe, &checkpoint.parameters, &checkpoint.average)?;
    let (mut backbone, mut set) = vit.to_weights(&state.labels)?;
    encodings.encode_backbone(&mut backbone);
    encodings.encode_expert_set(&mut set);
    let summary = summary(checkpoint)?;
    let (path, digest) = store.write_backbone(&names.backbone_name, &backbone, &state.preprocess, &summary)?;
    say(&format!("backbone   {}", path.display()));
    // A new backbone starts its sets afresh: an earlier version belongs to an earlier backbone.
    let path = store.write_set(&names.set_name, 1, &set, (&backbone.config, digest), &summary)?;
    say(&format!("expert set {}", path.display()));
    Ok(())
}

fn export_set(
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

/// To the person at the terminal; results go to standard output, everything else here.
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}

/// Results to standard output. A reader that has gone (`| head`) is no failure.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("writing the result"),
        _ => Ok(()),
    }
}
