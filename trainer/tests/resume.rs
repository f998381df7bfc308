//! A run that is stopped and resumed after every single step, with changing numbers of threads, ends with the same
//! bits as one that never stops.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use butterflyvit_trainer::checkpoint::Checkpoint;
use butterflyvit_trainer::data::Dataset;
use butterflyvit_trainer::data::heads::Head;
use butterflyvit_trainer::data::loader::Mixing;
use butterflyvit_trainer::recipe::{Origin, Recipe};
use butterflyvit_trainer::stop::{Ended, Stop};
use butterflyvit_trainer::store::Store;
use butterflyvit_trainer::teacher::Teacher;
use butterflyvit_trainer::train::{Run, Settings};
use model_core::config::ViTConfig;
use model_core::random::AngleSpread;
use serde_json::Value;
use training::optimizer::AdamWConfig;
use training::parameters::is_expert_set_parameter;
use training::vit::ViT;

/// 45 noisy images of 8x8 in 5 classes.
fn dataset() -> Arc<Dataset> {
    let pixel = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u8 / 4 + (i / 192 % 5 * 40) as u8;
    Arc::new(Dataset {
        images: (0..45 * 192).map(pixel).collect(),
        side: 8,
        labels: (0..45).map(|i| i % 5).collect(),
        class_names: (0..5).map(|class| format!("class {class}")).collect(),
    })
}

fn recipe() -> Recipe {
    let tiny = ViTConfig::preset("tiny").unwrap();
    Recipe {
        epochs: 3,
        batch_size: 8,
        shard_size: 3,
        hold_out: 0.2,
        mixing: Mixing { probability: 0.5, ..Mixing::NONE },
        ..Recipe::scratch(tiny)
    }
}

/// The five classes as those of two data sets.
fn heads() -> Vec<Head> {
    [("few", 2), ("more", 3)].map(|(name, classes)| Head { name: name.into(), classes }).into()
}

/// A teacher with random weights.
fn teacher() -> Teacher {
    let folder = tempfile::tempdir().unwrap();
    let (store, dataset) = (Store::new(folder.path()), dataset());
    let (backbone, set) =
        ViT::init(&ViTConfig::preset("tiny").unwrap(), 9).unwrap().to_weights(&dataset.class_names).unwrap();
    let (path, digest) = store.write_backbone("b", &backbone, &dataset.preprocess(), &Value::Null).unwrap();
    let set = store.write_set("s", 1, &set, (&backbone.config, digest), &Value::Null).unwrap();
    Teacher::load(&path, &set).unwrap()
}

fn run(recipe: &Recipe, out: &Path, threads: usize) -> Run {
    let settings = Settings {
        out: out.to_owned(),
        threads,
        checkpoint_every: Duration::from_secs(3600),
        validate_every: 1,
        log_every: 2,
        quiet: true,
    };
    let dataset = dataset();
    let vit = recipe.init_model().unwrap();
    let preprocess = dataset.preprocess();
    let teacher = recipe.distillation.as_ref().map(|_| Arc::new(teacher()));
    Run::new(recipe.clone(), settings, vit, dataset, preprocess, teacher).unwrap()
}

fn one_step() -> Stop {
    Stop::after(Some(Duration::ZERO))
}

/// Everything but the time, in bits.
fn bits(checkpoint: &Checkpoint) -> Vec<(String, Vec<u32>)> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    let moments = checkpoint.moments.iter().flat_map(|(name, m)| {
        [(format!("mean of {name}"), bits(&m.mean)), (format!("square of {name}"), bits(&m.square))]
    });
    let parameters = checkpoint.parameters.iter().map(|(name, v)| (name.clone(), bits(v)));
    let average = checkpoint.average.iter().map(|(name, v)| (format!("average of {name}"), bits(v)));
    parameters.chain(average).chain(moments).collect()
}

#[test]
fn interrupted_at_every_step_equals_uninterrupted() {
    let specialise = Origin::Specialise { backbone: "digest".into(), start: "digest".into() };
    let taught = Recipe {
        drop_path: 0.5,
        router_noise: 0.5,
        float_epochs: 1,
        distillation: Some(teacher().distillation(0.5)),
        ..recipe()
    };
    let several = Recipe { heads: heads(), ..recipe() };
    for recipe in [recipe(), Recipe { origin: specialise, ..recipe() }, taught, several] {
        let (whole, pieces) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut uninterrupted = run(&recipe, whole.path(), 2);
        assert_eq!(uninterrupted.train(&Stop::default()).unwrap(), Ended::Finished);

        let mut interruptions = 0;
        loop {
            let mut piece = run(&recipe, pieces.path(), 1 + interruptions % 3);
            if interruptions > 0 {
                piece.resume(&Checkpoint::load(pieces.path()).unwrap()).unwrap();
            }
            match piece.train(&one_step()).unwrap() {
                Ended::Finished => break,
                _ => interruptions += 1,
            }
        }
        assert_eq!(interruptions, 3 * 4 - 1, "36 - 9 held out = 36 images are 4 batches an epoch");
        let (whole, pieces) = (Checkpoint::load(whole.path()).unwrap(), Checkpoint::load(pieces.path()).unwrap());
        assert_eq!(whole.state.position, pieces.state.position);
        let validation = |checkpoint: &Checkpoint| checkpoint.state.validation.clone().unwrap();
        let (a, b) = (validation(&whole), validation(&pieces));
        assert_eq!((a.top1, a.cross_entropy, a.heads), (b.top1, b.cross_entropy, b.heads));
        assert_eq!(bits(&whole), bits(&pieces));
        assert!(!whole.moments.is_empty());
    }
}

#[test]
fn every_part_of_the_recipe_changes_the_result() {
    let trained = |recipe: Recipe| {
        let out = tempfile::tempdir().unwrap();
        let mut run = run(&recipe, out.path(), 2);
        run.train(&Stop::default()).unwrap();
        bits(&run.checkpoint().unwrap())
    };
    let plain = trained(recipe());
    assert!(trained(recipe()) == plain);
    let mut contiguous = recipe();
    contiguous.losses.contiguity += 1.0;
    let rates = |angle_rate, router_rate| Recipe {
        optimizer: AdamWConfig { angle_rate, router_rate, ..recipe().optimizer },
        ..recipe()
    };
    for (part, recipe) in [
        ("drop_path", Recipe { drop_path: 0.5, ..recipe() }),
        ("float_epochs", Recipe { float_epochs: 1, ..recipe() }),
        ("distillation", Recipe { distillation: Some(teacher().distillation(0.5)), ..recipe() }),
        ("contiguity", contiguous),
        ("router_noise", Recipe { router_noise: 1.0, ..recipe() }),
        ("angle_spread", Recipe { angle_spread: AngleSpread::Uniform, ..recipe() }),
        ("angle_rate", rates(30.0, 1.0)),
        ("router_rate", rates(1.0, 0.5)),
        ("frozen angles", rates(0.0, 1.0)),
        ("heads", Recipe { heads: heads(), ..recipe() }),
    ] {
        assert!(trained(recipe) != plain, "{part}");
    }
}

#[test]
fn a_frozen_backbone_does_not_move() {
    let recipe =
        Recipe { origin: Origin::Specialise { backbone: "digest".into(), start: "digest".into() }, ..recipe() };
    let out = tempfile::tempdir().unwrap();
    let mut run = run(&recipe, out.path(), 2);
    let before = run.checkpoint().unwrap().parameters;
    run.train(&Stop::default()).unwrap();
    for (name, after) in &run.checkpoint().unwrap().parameters {
        assert_eq!(*after == before[name], !is_expert_set_parameter(name), "{name}");
    }
}

#[test]
fn other_recipes_and_other_images_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let mut first = run(&recipe(), out.path(), 1);
    assert_eq!(first.train(&one_step()).unwrap(), Ended::OutOfTime);
    let mut checkpoint = Checkpoint::load(out.path()).unwrap();

    let other = Recipe { learning_rate: 0.5, ..recipe() };
    let error = run(&other, out.path(), 1).resume(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("another configuration: learning_rate"), "{error}");

    let several = Recipe { heads: heads(), ..recipe() };
    let error = run(&several, out.path(), 1).resume(&checkpoint).unwrap_err().to_string();
    let said = "learned from other data sets: from one data set, not from few (2 classes), more (3 classes)";
    assert!(error.contains(said), "{error}");

    checkpoint.state.data_fingerprint ^= 1;
    let error = run(&recipe(), out.path(), 1).resume(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("the data folder has changed"), "{error}");
}

#[test]
fn asking_to_stop_saves_a_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    let mut run = run(&recipe(), out.path(), 1);
    assert_eq!(run.train(&Stop::new(Arc::new(AtomicBool::new(true)), None)).unwrap(), Ended::Interrupted);
    assert_eq!(Checkpoint::load(out.path()).unwrap().state.step, 0);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    let mut first = run(&recipe(), out.path(), 1);
    first.train(&one_step()).unwrap();
    let mut checkpoint = Checkpoint::load(out.path()).unwrap();
    checkpoint.parameters.get_mut("head.bias").unwrap()[0] = f32::NAN;
    let mut second = run(&recipe(), out.path(), 1);
    second.resume(&checkpoint).unwrap();
    let error = second.train(&Stop::default()).unwrap_err().to_string();
    assert!(error.contains("stopped being a number at step 1"), "{error}");
    assert_eq!(Checkpoint::load(out.path()).unwrap().state.step, 1);
}
