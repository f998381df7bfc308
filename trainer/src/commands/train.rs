//! `train`: a backbone with its first expert set.

use std::sync::Arc;

use anyhow::{Result, ensure};
use model_core::artifact::{BackboneArtifact, ExpertSetArtifact};
use model_core::image::Preprocess;
use model_core::weights::Encodings;
use training::vit::ViT;

use super::export::export_backbone;
use super::shared::{drive, frozen_stem, open_all, starting_point, take, teacher, unless_stopped};
use crate::checkpoint::Checkpoint;
use crate::cli::{StartArgs, TrainArgs};
use crate::data::Dataset;
use crate::data::frozen_stem::StemOutputs;
use crate::recipe::{Origin, Recipe, angle_start};
use crate::stop::{Ended, Stop};
use crate::store::{Store, load_backbone, load_own_set};
use crate::train::{Run, averaged};

/// `train`: a backbone and its first expert set.
///
/// # Errors
/// When the data, the configuration or a checkpoint is unusable, the loss stops being a number, or the disk is full.
pub fn train(args: &TrainArgs, stop: &Stop) -> Result<Ended> {
    unless_stopped(train_until(args, stop))
}

fn train_until(args: &TrainArgs, stop: &Stop) -> Result<Ended> {
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
    let stem = frozen_stem(&args.stem, &args.teacher, &mut recipe)?;
    let start = Start::load(&args.start)?;
    if let Some(start) = &start {
        start.enter(&mut recipe, checkpoint.is_none());
        if let Some(checkpoint) = &checkpoint {
            let before = &checkpoint.state.recipe.model.experts;
            let experts = &mut recipe.model.experts;
            (experts.angle_seed, experts.router_bits) = (before.angle_seed, before.router_bits);
        }
    }
    args.experts.apply(&mut recipe.model.experts);
    if recipe.model.experts.angle_seed.is_some() {
        recipe.optimizer.angle_rate = 0.0;
    }
    args.recipe.apply(&mut recipe);
    let (dataset, soft) = open_all(&args.data, &args.soft, recipe.model.backbone.image_size, &mut recipe, stop)?;
    args.names.sets(&recipe)?;
    if args.model.config.is_none() {
        // A preset is a shape for any number of classes; a configuration file says exactly what it wants.
        recipe.model.num_classes = dataset.num_classes();
    }
    let teacher = teacher(&args.teacher, &mut recipe)?;
    recipe.validate()?;
    let (vit, preprocess) = match (&start, &stem) {
        (Some(start), _) => (start.model(&recipe, &dataset)?, start.preprocess().clone()),
        (None, Some(stem)) => {
            let vit = recipe.init_model()?;
            stem.begin(&vit)?;
            (vit, stem.preprocess.clone())
        }
        (None, None) => (recipe.init_model()?, dataset.preprocess()),
    };
    let outputs = match &stem {
        Some(stem) => Some(Arc::new(StemOutputs::prepare(stem, &dataset, &args.stem.views(&recipe, &settings), stop)?)),
        None => None,
    };
    let mut run = Run::new(recipe, settings, vit, Arc::new(dataset), preprocess, teacher)?;
    if let Some(outputs) = outputs {
        run = run.behind(outputs);
    }
    if let Some(soft) = soft {
        run = run.with_soft_labels(soft);
    }
    drive(run, checkpoint, &args.run.out, stop, |checkpoint| {
        let store = Store::new(args.run.out.join("store"));
        export_backbone(checkpoint, &store, &args.names, &Encodings::default(), stem.as_ref())
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
        let set = load_own_set(set, &backbone)?;
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
                let experts = &recipe.model.experts;
                let start = match experts.angle_seed {
                    None => angle_start(&set.training, &weights.vit_config(&backbone.weights.config))?,
                    Some(_) => None,
                };
                weights.config.angle_seed = experts.angle_seed;
                Encodings { router_bits: Some(experts.router_bits), ..Encodings::default() }
                    .encode_expert_set(&mut weights);
                Ok(ViT::latent_from_weights(&backbone.weights, &weights)?.with_angle_start(start))
            }
            Self::Run(checkpoint) => {
                let state = &checkpoint.state;
                let keeps_head = state.labels == dataset.class_names;
                let is_seeded = recipe.model.experts.angle_seed.is_some();
                let taken = |name: &str| {
                    (keeps_head || !name.starts_with("head.")) && !(is_seeded && name.contains(".rotation_"))
                };
                let vit = recipe.init_model()?.with_angle_start(state.angle_start.clone());
                take(&vit, &averaged(&state.recipe, &checkpoint.parameters, &checkpoint.average)?, taken)?;
                Ok(vit)
            }
        }
    }
}
