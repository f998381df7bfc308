//! Teaching: from features of images with labels to a classifier on a frozen backbone.
//!
//! [`teach`] fits a head by logistic regression, its temperature, and the statistics that tell the set's images from others
//! (Mahalanobis distance of features that are scaled to the same length, arXiv 2505.18032). Everything that it claims comes from images that were held out: of each
//! fold, head, means *and* covariance are fitted without the images that they are then tried on.
//!
//! Nothing here reads or writes files, and time and memory are bounded by the images that are given.

mod calibrate;
mod examples;
mod fit;
mod folds;
mod logistic;
mod report;
mod spread;
mod statistics;
mod temperature;

use model_core::artifact::{Digest, ExpertSetArtifact};
use model_core::config::{BackboneShape, ExpertConfig};
use model_core::image::View;
use model_core::projection::Projection;
use model_core::weights::{ExpertLayerWeights, ExpertSetWeights, Familiarity, Linear};
use serde_json::Value;

pub use calibrate::calibrate;
pub use examples::{Examples, MOST_CLASSES, MOST_IMAGES, check_counts, is_none_label};
pub use fit::{memory, teach};
pub use report::{Calibration, ClassReport, Confusion, FEW_IMAGES, Report, Share, Suspect, UnknownReport};
pub use temperature::best_temperature;

/// How to fit a classifier to examples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Folds of images that are held out in turn; fewer when the smallest class has fewer images.
    pub folds: usize,
    /// Threads that fit folds.
    pub threads: usize,
    /// Directions of the covariance that are kept; each costs half a byte a feature.
    pub rank: usize,
    /// Share of the set's own images that must not be called unknown.
    pub known_share: f64,
    /// Features that suffice unless the held-out images say otherwise: each costs a byte and a half a class.
    pub features: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { folds: 5, threads: 1, rank: 16, known_share: 0.95, features: 320 }
    }
}

/// What was fitted, and what it is worth.
#[derive(Debug, Clone, PartialEq)]
pub struct Taught {
    /// `[classes, features]`, in int8.
    pub head: Linear,
    /// What the set sees of the backbone's features, unless it is all of them.
    pub projection: Option<Projection>,
    pub temperature: f32,
    pub familiarity: Familiarity,
    pub labels: Vec<String>,
    pub report: Report,
}

/// What a classifier that was trained elsewhere lacks.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrated {
    pub temperature: f32,
    pub familiarity: Familiarity,
    pub report: Report,
}

/// What a taught set rests on.
#[derive(Debug, Clone)]
pub struct Base {
    /// Shape of the backbone.
    pub backbone: BackboneShape,
    /// Identity of the backbone.
    pub backbone_digest: Digest,
    /// Of the set whose experts are borrowed; of no consequence on a backbone without blocks.
    pub experts: ExpertConfig,
    /// The set whose experts are borrowed, on a backbone with blocks.
    pub borrowed_experts: Option<Digest>,
    /// The part of a picture that was looked at.
    pub view: View,
}

impl Taught {
    /// The expert set, without a digest, which [`ExpertSetArtifact::to_bytes`] computes. What it says of itself is short:
    /// the report without the images it names, in numbers of four digits.
    pub fn into_artifact(self, name: &str, base: Base) -> ExpertSetArtifact {
        let report = self.report.summary();
        let weights = ExpertSetWeights {
            config: base.experts,
            layers: Vec::<ExpertLayerWeights>::new(),
            head: self.head,
            labels: self.labels,
            projection: self.projection,
            temperature: self.temperature,
            familiarity: Some(self.familiarity),
        };
        ExpertSetArtifact {
            name: name.to_owned(),
            weights,
            backbone: base.backbone,
            backbone_config: None,
            backbone_digest: base.backbone_digest,
            borrowed_experts: base.borrowed_experts,
            view: base.view,
            report,
            card: None,
            training: Value::Null,
            digest: Digest::of("", &[]),
        }
    }
}

/// Why nothing was taught.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TeachError {
    /// Whoever asked for it does not want it any more.
    #[error("teaching was cancelled")]
    Cancelled,
    /// Nothing to tell apart.
    #[error("a classifier needs two classes at least, and there {} {got}", if *got == 1 { "is" } else { "are" })]
    Classes {
        /// Classes that there are.
        got: usize,
    },
    /// A class whose images cannot be held out.
    #[error("the class `{label}` has {images} image{}; every class needs two at least", if *images == 1 { "" } else { "s" })]
    FewImages {
        /// The first such class.
        label: String,
        images: usize,
    },
    /// More than is fitted here.
    #[error("{got} {what} are too many; at most {limit} are taught")]
    TooMany {
        /// The things that are counted, in words.
        what: &'static str,
        got: usize,
        limit: usize,
    },
    /// Too little was kept back to say anything.
    #[error("{images} images were held out, and {needed} are needed at least")]
    FewHeldOut { images: usize, needed: usize },
    /// What is given does not belong together.
    #[error("{what}: {got} where {expected} are due")]
    Length {
        /// The things that are counted, in words.
        what: &'static str,
        expected: usize,
        got: usize,
    },
    /// A feature is not a number.
    #[error("the features of image {image} are not finite")]
    NotFinite {
        /// Its number among the images.
        image: usize,
    },
    /// What was fitted is of no use.
    #[error("the statistics of these images cannot be used: {0}")]
    Statistics(String),
}
