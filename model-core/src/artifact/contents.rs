//! What an artifact is, as its document says. The types of the public interface, without reading or checking.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digest::Digest;
use crate::config::{BackboneConfig, BackboneShape, ExpertConfig, FloatFormat};
use crate::image::{Preprocess, View};
use crate::projection::Projection;
use crate::weights::Precision;

/// Most bytes of a name or label.
pub const MAX_TEXT_BYTES: usize = 255;

/// What the header of a backbone says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct BackboneHeader {
    pub config: BackboneConfig,
    /// How the tensors are stored of which the configuration says nothing.
    pub encoding: BackboneEncoding,
    /// How an image becomes the model's input.
    pub preprocess: Preprocess,
    /// What the background was measured on, if there is one.
    pub background: Option<BackgroundSource>,
    /// Terms and origin.
    pub card: Option<Card>,
}

/// What the header of an expert set says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertSetHeader {
    pub config: ExpertConfig,
    /// How the tensors are stored of which the configuration says nothing.
    pub encoding: ExpertSetEncoding,
    /// What it relies on of the backbone that it was fitted to.
    pub backbone: BackboneShape,
    /// The whole configuration of that backbone, which version 1 repeats.
    pub backbone_config: Option<BackboneConfig>,
    /// Digest of that backbone.
    pub backbone_digest: Digest,
    /// The set whose experts and routers this one uses, having none of its own.
    pub borrowed_experts: Option<Digest>,
    /// One label per row of the head.
    pub labels: Vec<String>,
    /// What head and statistics see of the features, unless it is all of them.
    pub projection: Option<Projection>,
    /// What logits are divided by.
    pub temperature: f32,
    /// What the statistics for unknown images look like, if there are any.
    pub familiarity: Option<FamiliarityConfig>,
    /// The part of a picture that it looks at.
    pub view: View,
    /// What its maker measured, free-form.
    pub report: Value,
    /// Terms and origin.
    pub card: Option<Card>,
}

/// What an artifact is, as its header says.
#[derive(Debug, Clone, PartialEq)]
pub enum Contents {
    /// Everything expert sets share.
    Backbone(Box<BackboneHeader>),
    /// One task's head and labels, with experts and routers or the digest of the set that lends them.
    ExpertSet(Box<ExpertSetHeader>),
}

impl ExpertSetHeader {
    /// Columns of the head and of the statistics.
    pub fn features(&self) -> usize {
        self.projection.map_or(self.backbone.d_model, Projection::features)
    }
}

impl Contents {
    /// The kind in words.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Backbone(_) => "a backbone",
            Self::ExpertSet(_) => "an expert set",
        }
    }
}

/// How one stem layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StemEncoding {
    /// Of the convolution's weights.
    pub weights: Precision,
    /// Whether the step of the layer's output is stored.
    pub calibrated: bool,
}

/// How those tensors of a backbone are stored of which its configuration says nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneEncoding {
    /// One per layer of the stem.
    pub stem: Vec<StemEncoding>,
    /// Of the weights of attention.
    pub attention: Precision,
}

/// How those tensors of an expert set are stored of which its configuration says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertSetEncoding {
    /// Of the head's weights.
    pub head: Precision,
}

/// The images that a backbone's background was measured on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackgroundSource {
    /// Where they come from.
    pub source: String,
    /// How many they are.
    pub images: u64,
    /// Rows of the factor of a covariance that is `diagonal + factor^T factor`; without it the covariance is a triangle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
}

/// Where an artifact comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Terms of use, an SPDX expression where there is one.
    pub licence: String,
    /// Where the weights come from.
    pub origin: String,
    /// What they learned from.
    pub data: String,
}

/// Forms of a set's covariance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "snake_case", deny_unknown_fields)]
pub enum CovarianceForm {
    Packed,
    /// A diagonal and a factor.
    Diagonal {
        /// Rows of the factor.
        rank: usize,
    },
    /// The background's, scaled, and a factor.
    Background {
        /// What the background's covariance is multiplied by.
        scale: f32,
        /// Rows of the factor.
        rank: usize,
    },
    /// The same in all directions, and a factor, of features that are scaled.
    Even {
        /// Variance in all directions.
        scale: f32,
        /// Rows of the factor.
        rank: usize,
    },
}

/// Formats of a set's statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StatisticsFormat {
    F32,
    F16,
    /// Signed codes of four bits with a scale a row.
    Int4,
}

impl From<FloatFormat> for StatisticsFormat {
    fn from(format: FloatFormat) -> Self {
        match format {
            FloatFormat::F32 => Self::F32,
            FloatFormat::F16 => Self::F16,
        }
    }
}

impl StatisticsFormat {
    /// That of the values that are no codes.
    pub const fn float(self) -> FloatFormat {
        match self {
            Self::F16 => FloatFormat::F16,
            Self::F32 | Self::Int4 => FloatFormat::F32,
        }
    }
}

/// What the document says of a set's statistics; their tensors say the rest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FamiliarityConfig {
    /// Of all statistics.
    pub format: StatisticsFormat,
    pub means: usize,
    /// Shape of the covariance.
    pub covariance: CovarianceForm,
    /// Whether the distance to the backbone's background is subtracted.
    pub relative: bool,
    /// Largest distance of what is known.
    pub threshold: f32,
    /// Share of images of other things that pass.
    pub pass_share: f32,
}
