//! Everything that decides what a training run computes, in one value that a checkpoint can hold.
//!
//! Two runs with equal recipes on equal data give equal weights, bit for bit, whatever the number of threads and
//! however often they were interrupted. Settings that do not change the result (threads, time limit, output folder) are
//! not part of it.

use std::f64::consts::PI;

use anyhow::{Context, Result, bail, ensure};
use model_core::config::{FeedForwardKind, ViTConfig};
use model_core::random::{AngleSpread, AngleStart};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use training::losses::LossWeights;
use training::matmul::Products;
use training::ops::Activations;
use training::optimizer::AdamWConfig;
use training::parameters::{Quantizers, is_expert_set_parameter};
use training::vit::ViT;

use crate::data::LabelColumn;
use crate::data::augment::Augment;
use crate::data::heads::Head;
use crate::data::loader::Mixing;

/// Where the parameters come from and which of them move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Origin {
    /// A new backbone with its first expert set; everything moves.
    Scratch,
    /// A finished backbone and expert set, both of which move on.
    Continue {
        /// Digest of the backbone.
        backbone: String,
        /// Digest of the expert set.
        start: String,
    },
    /// The latent parameters of another run, all of which move on from where they were.
    Run {
        /// [`crate::checkpoint::Checkpoint::digest`] of that run.
        checkpoint: String,
    },
    /// A new backbone behind the frozen stem of another, with its first expert set.
    Stem {
        /// Digest of the backbone that the stem is of.
        backbone: String,
    },
    /// A new expert set on a frozen backbone.
    Specialise {
        /// Digest of the backbone.
        backbone: String,
        /// Digest of the expert set, or of the run's checkpoint, that the angles and routers start from.
        start: String,
    },
}

/// Learning from a finished model beside the labels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distillation {
    /// Share of every target that is the teacher's answer.
    pub share: f64,
    /// Digest of the teacher's backbone.
    pub backbone: String,
    /// Digest of the teacher's expert set.
    pub set: String,
}

/// Learning from what another model made of the images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftLabelsOf {
    /// Share of the loss that is their head's cross-entropy.
    pub share: f64,
    /// SHA-256 of their file.
    pub digest: String,
}

/// What a training run computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub model: ViTConfig,
    /// The kind of feed-forward layer; all but butterfly experts exist for comparison.
    #[serde(default)]
    pub feed_forward: FeedForwardKind,
    /// How activations meet the substrates; float is there to be compared with.
    #[serde(default)]
    pub activations: Activations,
    /// The numbers that matrix products multiply; they decide roundings, hence part of the recipe.
    #[serde(default)]
    pub products: Products,
    /// Where the parameters come from.
    pub origin: Origin,
    /// How fresh angles are spread.
    #[serde(default)]
    pub angle_spread: AngleSpread,
    /// Decides initial weights, the held-out part, order and variation of the images.
    pub seed: u64,
    /// Passes over the training images.
    pub epochs: u64,
    /// Images in a step.
    pub batch_size: usize,
    /// Images whose gradient is computed at once; decides the order of summation, hence part of the recipe.
    pub shard_size: usize,
    /// At the end of the warm-up.
    pub learning_rate: f64,
    /// Length of the linear warm-up from zero.
    pub warmup_epochs: f64,
    /// The cosine ends at this share of the learning rate.
    pub final_rate: f64,
    /// The optimiser's own settings.
    pub optimizer: AdamWConfig,
    /// Weights of the losses beside cross-entropy.
    pub losses: LossWeights,
    /// Share of the target spread evenly over the classes.
    pub label_smoothing: f32,
    /// Variation of single images.
    pub augment: Augment,
    pub mixing: Mixing,
    /// Views of every image that a frozen stem is shown once, the image as it is among them; 0 where there is none.
    #[serde(default)]
    pub views: u64,
    /// Stochastic depth: the probability that the last block's branches are left out, less for earlier ones.
    #[serde(default)]
    pub drop_path: f64,
    /// Scale of Gumbel noise on the routers' logits in training.
    #[serde(default)]
    pub router_noise: f64,
    /// The teacher, where there is one.
    #[serde(default)]
    pub distillation: Option<Distillation>,
    /// Passes at the beginning without any rounding.
    #[serde(default)]
    pub float_epochs: u64,
    /// Decay of the moving average of the weights, which is what is validated and exported; 0 for none.
    pub ema_decay: f64,
    /// Share of the training images held out for validation.
    pub hold_out: f64,
    /// Which labels of CIFAR-100.
    pub labels: LabelColumn,
    /// The heads of several data sets, in the order of their classes; empty for one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<Head>,
    /// Where another model's answers are learned, too, by the last head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_labels: Option<SoftLabelsOf>,
}

impl Recipe {
    /// The defaults for training `model` from scratch.
    pub fn scratch(model: ViTConfig) -> Self {
        Self {
            model,
            feed_forward: FeedForwardKind::Butterfly,
            activations: Activations::Int8,
            products: Products::fastest(),
            origin: Origin::Scratch,
            angle_spread: AngleSpread::Narrow,
            seed: 1,
            epochs: 60,
            batch_size: 128,
            shard_size: 32,
            learning_rate: 2e-3,
            warmup_epochs: 2.0,
            final_rate: 0.01,
            optimizer: AdamWConfig::default(),
            losses: LossWeights { smoothness: 0.0, contiguity: 1.0, ..LossWeights::default() },
            label_smoothing: 0.1,
            augment: Augment { crop_padding: 4, reflect: true, flip: true, operations: 1, magnitude: 0.6, erase: 0.1 },
            mixing: Mixing { probability: 0.5, ..Mixing::NONE },
            views: 0,
            drop_path: 0.0,
            router_noise: 0.0,
            distillation: None,
            float_epochs: 0,
            ema_decay: 0.999,
            hold_out: 0.05,
            labels: LabelColumn::Fine,
            heads: Vec::new(),
            soft_labels: None,
        }
    }

    /// The defaults for a new expert set on a frozen backbone: a short run, little variation.
    pub fn specialise(model: ViTConfig, origin: Origin) -> Self {
        Self {
            origin,
            epochs: 10,
            learning_rate: 5e-3,
            warmup_epochs: 0.5,
            augment: Augment { crop_padding: 2, operations: 0, erase: 0.0, ..Self::scratch(model.clone()).augment },
            mixing: Mixing::NONE,
            losses: LossWeights::default(),
            ..Self::scratch(model)
        }
    }

    /// A model with fresh parameters.
    pub fn init_model(&self) -> Result<ViT> {
        Ok(ViT::init_kind(&self.model, self.feed_forward, self.angle_spread, self.seed)?)
    }

    /// Classes of each of several heads; empty for one.
    pub fn head_classes(&self) -> Vec<usize> {
        self.heads.iter().map(|head| head.classes).collect()
    }

    /// Whether training leaves the parameter of that name where it is: the backbone of a specialised set, a frozen stem, and
    /// what has a rate of 0.
    pub fn is_frozen(&self, name: &str) -> bool {
        let specialises = matches!(self.origin, Origin::Specialise { .. });
        let is_stem = matches!(self.origin, Origin::Stem { .. }) && name.starts_with("stem.");
        specialises && !is_expert_set_parameter(name) || is_stem || self.optimizer.rate_factor(name) == 0.0
    }

    /// The roundings that training makes, after [`Recipe::float_epochs`].
    pub fn quantizers(&self) -> Quantizers {
        let quantizers = match (self.feed_forward, &self.origin) {
            (FeedForwardKind::DenseExperts | FeedForwardKind::LowRankExperts | FeedForwardKind::Dense, _) => {
                Quantizers::NONE
            }
            (_, Origin::Scratch | Origin::Continue { .. } | Origin::Run { .. } | Origin::Stem { .. }) => {
                Quantizers::ALL
            }
            (_, Origin::Specialise { .. }) => Quantizers::EXPERTS,
        };
        match self.activations {
            Activations::Int8 => quantizers,
            Activations::Float => Quantizers { activations: Activations::Float, ..quantizers },
        }
    }

    /// Whether the trained model is what an artifact can hold and the integer engine runs.
    pub fn is_servable(&self) -> bool {
        self.feed_forward == FeedForwardKind::Butterfly && self.activations == Activations::Int8
    }

    /// [`Recipe::validate`] for what the CPU must multiply.
    fn validate_products(&self) -> Result<()> {
        ensure!(
            self.products.is_available(),
            "products are bf16, which this CPU does not multiply; a new run with --products f32 trains anywhere"
        );
        Ok(())
    }

    /// Checks the numbers that have a range.
    ///
    /// # Errors
    /// Naming the first that is out of it.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        ViT::check_size(&self.model, self.feed_forward)?;
        self.validate_memory()?;
        let share = |value: f64, name: &str| {
            ensure!((0.0..1.0).contains(&value), "{name} is {value}; it must be at least 0 and below 1");
            Ok(())
        };
        self.validate_products()?;
        ensure!(self.epochs > 0, "epochs is 0");
        let (heads, classes) = (self.head_classes(), self.model.num_classes);
        ensure!(
            heads.is_empty() || heads.iter().sum::<usize>() == classes,
            "the heads have {heads:?} classes, the model has {classes}"
        );
        let behind_stem = matches!(self.origin, Origin::Stem { .. });
        ensure!(
            behind_stem == (self.views > 0),
            "views is {}; a frozen stem sees at least one, others none",
            self.views
        );
        ensure!(self.batch_size > 0 && self.shard_size > 0, "a batch and a shard have at least one image");
        ensure!(
            self.learning_rate > 0.0 && self.learning_rate.is_finite(),
            "learning_rate is {}; it must be positive",
            self.learning_rate
        );
        for (value, name) in [(self.optimizer.angle_rate, "angle_rate"), (self.optimizer.router_rate, "router_rate")] {
            ensure!(value >= 0.0 && value.is_finite(), "optimizer.{name} is {value}; it must be a number from 0");
        }
        let (seed, rate) = (self.model.experts.angle_seed, self.optimizer.angle_rate);
        ensure!(
            seed.is_none() || rate == 0.0,
            "optimizer.angle_rate is {rate}; angles of a seed do not move: it must be 0"
        );
        ensure!(self.warmup_epochs >= 0.0, "warmup_epochs is {}; it must not be negative", self.warmup_epochs);
        share(f64::from(self.label_smoothing), "label_smoothing")?;
        share(self.hold_out, "hold_out")?;
        share(self.ema_decay, "ema_decay")?;
        share(self.drop_path, "drop_path")?;
        let noise = self.router_noise;
        ensure!(noise >= 0.0 && noise.is_finite(), "router_noise is {noise}; it must be a number from 0");
        let (float, all) = (self.float_epochs, self.epochs);
        ensure!(
            float < all,
            "float_epochs is {float} of {all} epochs; what is exported must have been trained rounded"
        );
        let goes_on = matches!(self.origin, Origin::Continue { .. });
        // Its latent weights are other numbers than what they round to.
        ensure!(!goes_on || float == 0, "float_epochs is {float}; a model that is started from is rounded already");
        if let Some(soft) = &self.soft_labels {
            let value = soft.share;
            ensure!(value > 0.0 && value < 1.0, "soft_labels.share is {value}; it must be above 0 and below 1");
            ensure!(heads.len() > 1, "soft labels have a head beside the data set's");
        }
        if let Some(distillation) = &self.distillation {
            let value = distillation.share;
            ensure!((0.0..=1.0).contains(&value), "distillation.share is {value}; it must be in 0..=1");
        }
        ensure!((0.0..=1.0).contains(&self.final_rate), "final_rate is {}; it must be in 0..=1", self.final_rate);
        self.validate_variation()
    }

    /// [`Recipe::validate`] for what a step takes beside the parameters.
    fn validate_memory(&self) -> Result<()> {
        /// Numbers of four bytes.
        const MOST: usize = 1 << 30;
        let (b, e) = (&self.model.backbone, &self.model.experts);
        let image = b.image_size.pow(2) * 3 + self.model.num_classes;
        let batch = image.saturating_mul(self.batch_size);
        ensure!(batch <= MOST, "batch_size is {}: a batch has {batch} numbers, more than {MOST}", self.batch_size);
        let stem: usize = b.stem_inputs().map(|(layer, side, _)| side * side * layer.channels).sum();
        let tokens = b.num_tokens();
        // Scores of attention and their softmax; what goes in and out of each matrix, and of each rotation.
        let rows = 12 * b.d_model + 4 * e.top_k * (b.d_ff + b.d_model) + e.num_experts;
        let block = tokens.saturating_mul(2 * b.num_heads * tokens + rows);
        let image = block.saturating_mul(b.num_layers).saturating_add(stem);
        let shard = image.saturating_mul(self.shard_size.min(self.batch_size));
        ensure!(
            shard <= MOST,
            "shard_size is {}: a shard computes with about {shard} numbers, more than {MOST}; take a smaller one",
            self.shard_size
        );
        Ok(())
    }

    /// [`Recipe::validate`] for the losses and for how images are varied.
    fn validate_variation(&self) -> Result<()> {
        let LossWeights { balance, smoothness, contiguity } = self.losses;
        for (value, name) in [(balance, "balance"), (smoothness, "smoothness"), (contiguity, "contiguity")] {
            ensure!(value >= 0.0 && value.is_finite(), "losses.{name} is {value}; it must be a number from 0");
        }
        for (value, name) in
            [(self.mixing.probability, "mixing.probability"), (self.mixing.cutmix_share, "mixing.cutmix_share")]
        {
            ensure!((0.0..=1.0).contains(&value), "{name} is {value}; it must be in 0..=1");
        }
        for (value, name) in [(self.mixing.mixup_alpha, "mixup_alpha"), (self.mixing.cutmix_alpha, "cutmix_alpha")] {
            // The sampler's acceptance falls off quickly above.
            ensure!((0.01..=4.0).contains(&value), "mixing.{name} is {value}; it must be in 0.01..=4");
        }
        let operations = self.augment.operations;
        ensure!(operations <= 16, "augment.operations is {operations}; it must be in 0..=16");
        for (value, name) in [(self.augment.magnitude, "magnitude"), (self.augment.erase, "erase")] {
            ensure!((0.0..=1.0).contains(&value), "augment.{name} is {value}; it must be in 0..=1");
        }
        Ok(())
    }

    /// The learning rate of step `step` (from 0) of `total`: linear warm-up, then a cosine.
    pub fn rate_at(&self, step: u64, steps_per_epoch: u64) -> f64 {
        let total = (self.epochs * steps_per_epoch) as f64;
        let warmup = (self.warmup_epochs * steps_per_epoch as f64).min(total);
        let done = step as f64 + 1.0;
        if done < warmup {
            return self.learning_rate * done / warmup;
        }
        let progress = ((done - warmup) / (total - warmup).max(1.0)).clamp(0.0, 1.0);
        self.learning_rate * (self.final_rate + (1.0 - self.final_rate) * 0.5 * (1.0 + (PI * progress).cos()))
    }

    /// Refuses to go on with another recipe than the one a checkpoint was made with.
    ///
    /// # Errors
    /// Naming the fields that differ, with both values.
    pub fn check_same(&self, checkpoint: &Self) -> Result<()> {
        let list = |recipe: &Self| match &recipe.heads[..] {
            [] => "one data set".to_owned(),
            heads => {
                let names = heads.iter().map(|head| format!("{} ({} classes)", head.name, head.classes));
                names.collect::<Vec<_>>().join(", ")
            }
        };
        let (before, now) = (list(checkpoint), list(self));
        ensure!(before == now, "the checkpoint learned from other data sets: from {before}, not from {now}");
        let mut differences = Vec::new();
        compare("", &serde_json::to_value(checkpoint)?, &serde_json::to_value(self)?, &mut differences);
        if differences.is_empty() {
            return Ok(());
        }
        bail!("the checkpoint was made with another configuration: {}", differences.join("; "))
    }
}

/// Where the angles of an artifact of these shapes with this training record started. Artifacts made before the record said so hold the
/// seed in their recipe, which a run that went on from them inherited unless told otherwise; expert sets specialised then
/// hold nothing of it.
///
/// # Errors
/// When the record holds a start or a recipe that cannot be read.
pub fn angle_start(training: &Value, config: &ViTConfig) -> Result<Option<AngleStart>> {
    if let Some(start) = training.get("angle_start") {
        return serde_json::from_value(start.clone()).context("the training record's angle_start");
    }
    let Some(recipe) = training.get("recipe") else { return Ok(None) };
    let recipe: Recipe = serde_json::from_value(recipe.clone()).context("the training record's recipe")?;
    // Shapes that a file only claims to have are not worth any memory.
    ensure!(
        (&recipe.model.backbone, &recipe.model.experts) == (&config.backbone, &config.experts),
        "the training record's recipe has other shapes than the artifact"
    );
    recipe.model.validate()?;
    match recipe.origin {
        Origin::Scratch | Origin::Continue { .. } | Origin::Stem { .. } => {
            Ok(recipe.init_model()?.angle_start().cloned())
        }
        Origin::Run { .. } | Origin::Specialise { .. } => Ok(None),
    }
}

fn compare(path: &str, old: &Value, new: &Value, differences: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let value = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                compare(&path, &value(old), &value(new), differences);
            }
        }
        _ if old == new => {}
        _ => differences.push(format!("{path} was {old}, now {new}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::config::StemLayer;

    fn recipe() -> Recipe {
        Recipe {
            epochs: 10,
            warmup_epochs: 2.0,
            learning_rate: 1.0,
            ..Recipe::scratch(ViTConfig::preset("tiny").unwrap())
        }
    }

    #[test]
    fn the_rate_warms_up_and_follows_a_cosine() {
        let recipe = recipe();
        let rate = |step| recipe.rate_at(step, 10);
        assert!((rate(0) - 1.0 / 20.0).abs() < 1e-12);
        assert!((rate(19) - 1.0).abs() < 1e-12);
        // Half way between the end of the warm-up (20) and the end (100).
        assert!((rate(59) - (0.01 + 0.99 * 0.5)).abs() < 1e-12);
        assert!((rate(99) - 0.01).abs() < 1e-12);
        assert!((1..20).all(|step| rate(step) > rate(step - 1)));
        assert!((20..100).all(|step| rate(step) < rate(step - 1)));
    }

    #[test]
    fn a_warmup_longer_than_the_run_stays_finite() {
        let recipe = Recipe { warmup_epochs: 50.0, ..recipe() };
        assert!((0..100).all(|step| (0.0..=1.0).contains(&recipe.rate_at(step, 10))));
    }

    #[test]
    fn another_configuration_is_named_field_by_field() {
        let (old, mut new) = (recipe(), recipe());
        assert!(new.check_same(&old).is_ok());
        new.model.backbone.d_ff = 64;
        new.learning_rate = 0.5;
        let error = new.check_same(&old).unwrap_err().to_string();
        assert!(error.contains("model.backbone.d_ff was 32, now 64"), "{error}");
        assert!(error.contains("learning_rate was 1.0, now 0.5"), "{error}");
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        type Edit = fn(&mut Recipe);
        let cases: [(&str, Edit); 22] = [
            ("parameters, more than", |r| (r.model.backbone.d_ff, r.model.experts.num_experts) = (1 << 16, 4096)),
            ("parameters, more than", |r| {
                let backbone = &mut r.model.backbone;
                (backbone.d_model, backbone.stem) = (1 << 16, vec![StemLayer::patch(1 << 16, 2)]);
            }),
            ("parameters, more than", |r| {
                (r.model.backbone.d_ff, r.model.experts.num_experts) = (1 << 14, 4096);
                r.feed_forward = FeedForwardKind::DenseExperts;
            }),
            ("parameters, more than", |r| {
                let backbone = &mut r.model.backbone;
                (backbone.d_model, backbone.stem) = (1 << 14, vec![StemLayer::patch(1 << 14, 2)]);
                r.model.num_classes = 1 << 16;
            }),
            ("batch_size is", |r| r.batch_size = usize::MAX),
            ("batch_size is", |r| (r.batch_size, r.model.num_classes) = (1 << 17, 1 << 16)),
            ("shard_size is", |r| (r.shard_size, r.batch_size) = (1 << 22, 1 << 22)),
            ("shard_size is", |r| {
                r.model.backbone.image_size = 64;
                r.model.backbone.stem = vec![StemLayer::patch(16, 1)];
            }),
            ("epochs", |r| r.epochs = 0),
            ("learning_rate", |r| r.learning_rate = f64::NAN),
            ("optimizer.angle_rate", |r| r.optimizer.angle_rate = -1.0),
            ("optimizer.router_rate", |r| r.optimizer.router_rate = f64::INFINITY),
            ("hold_out", |r| r.hold_out = 1.0),
            ("ema_decay", |r| r.ema_decay = -0.1),
            ("router_noise", |r| r.router_noise = f64::NAN),
            ("losses.contiguity", |r| r.losses.contiguity = -1.0),
            ("float_epochs", |r| r.float_epochs = 10),
            ("float_epochs", |r| {
                r.float_epochs = 1;
                r.origin = Origin::Continue { backbone: "b".into(), start: "s".into() };
            }),
            ("drop_path", |r| r.drop_path = 1.0),
            ("distillation.share", |r| {
                r.distillation = Some(Distillation { share: 1.5, backbone: "b".into(), set: "s".into() });
            }),
            ("mixup_alpha", |r| r.mixing.mixup_alpha = 0.0),
            ("magnitude", |r| r.augment.magnitude = 1.5),
        ];
        for (name, edit) in cases {
            let mut recipe = recipe();
            edit(&mut recipe);
            let said = recipe.validate().map_err(|error| error.to_string());
            assert!(said.as_ref().is_err_and(|said| said.contains(name)), "{name}: {said:?}");
        }
    }
}
