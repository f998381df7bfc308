//! `specialise`: a new expert set on a frozen backbone.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use model_core::artifact::{BackboneArtifact, ExpertSetArtifact};
use model_core::config::ViTConfig;
use model_core::weights::Encodings;
use training::parameters::{is_angle, is_router};
use training::vit::ViT;

use super::export::export_set;
use super::shared::{drive, open_train, starting_point, take, teacher, unless_stopped};
use crate::checkpoint::Checkpoint;
use crate::cli::SpecialiseArgs;
use crate::data::Dataset;
use crate::recipe::{Origin, Recipe, angle_start};
use crate::stop::{Ended, Stop};
use crate::store::{Store, load_backbone, load_own_set};
use crate::train::{Run, averaged};

/// `specialise`: a new expert set on a frozen backbone.
pub fn specialise(args: &SpecialiseArgs, stop: &Stop) -> Result<Ended> {
    unless_stopped(specialise_until(args, stop))
}

fn specialise_until(args: &SpecialiseArgs, stop: &Stop) -> Result<Ended> {
    let settings = args.run.settings();
    let checkpoint = starting_point(&settings, args.run.resume)?;
    let backbone = load_backbone(&args.backbone)?;
    let start = SetStart::load(args, &backbone)?;
    let origin = Origin::Specialise { backbone: backbone.digest.to_string(), start: start.digest() };
    let mut recipe = match &checkpoint {
        Some(checkpoint) => Recipe { origin, ..checkpoint.state.recipe.clone() },
        None => Recipe::specialise(start.config(&backbone), origin),
    };
    // Angles of a seed stay where they are, unless they are to move: then the set has codes of its own.
    match args.recipe.angle_rate {
        Some(rate) if rate > 0.0 => recipe.model.experts.angle_seed = None,
        None if recipe.model.experts.angle_seed.is_some() => recipe.optimizer.angle_rate = 0.0,
        _ => {}
    }
    args.recipe.apply(&mut recipe);
    let side = recipe.model.backbone.image_size;
    let dataset = open_train(&args.data.data, &args.data.reading, side, recipe.labels, stop)?;
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
            return Ok(Self::Set(Box::new(load_own_set(path, backbone)?)));
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
            let mut start = set.weights.clone();
            if recipe.model.experts.angle_seed.is_none() {
                start.own_angles(&backbone.weights.config.shape());
            }
            weights.layers = start.layers;
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
