//! The JSON document in an artifact's metadata: of version 2, which is written, and of version 1, which is read as well.

mod check;
mod v1;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digest::Digest;
use super::error::ArtifactError;
use super::header::{BackboneHeader, Contents, ExpertSetHeader};
use crate::config::{BackboneConfig, BackboneShape, ExpertConfig, FloatFormat, MAX_SIZE};
use crate::image::Preprocess;
use crate::weights::Precision;

/// The version of `FORMAT.md` that is written.
pub const FORMAT_VERSION: u32 = 2;

/// Most JSON values in a document, labels included: a value may take two bytes in the file but up to some 240 while
/// it is parsed.
const MAX_DOCUMENT_VALUES: usize = MAX_SIZE + 4096;

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

/// How a picture becomes a square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// Its largest centred square.
    #[default]
    Crop,
    /// All of it, between bars of black.
    Pad,
    /// All of it, its sides scaled apart.
    Stretch,
}

/// The part of a picture that a set looks at, unless a request says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Left edge, top edge, width and height, as shares of the upright picture.
    pub crop: [f64; 4],
    /// How that part becomes a square.
    pub fit: Fit,
}

impl Default for View {
    fn default() -> Self {
        Self { crop: [0.0, 0.0, 1.0, 1.0], fit: Fit::Crop }
    }
}

/// Forms of a set's covariance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "snake_case", deny_unknown_fields)]
pub enum CovarianceForm {
    /// All of it.
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
}

/// What the document says of a set's statistics; their tensors say the rest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FamiliarityConfig {
    /// Of all statistics.
    pub format: FloatFormat,
    /// Number of means.
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

/// The document of version 2. Field order is the order in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Document {
    Backbone {
        format_version: u32,
        name: String,
        config: BackboneConfig,
        encoding: BackboneEncoding,
        preprocess: Preprocess,
        background: Option<BackgroundSource>,
        card: Option<Card>,
        training: Value,
    },
    ExpertSet {
        format_version: u32,
        name: String,
        config: ExpertConfig,
        encoding: ExpertSetEncoding,
        backbone: BackboneShape,
        backbone_digest: Digest,
        borrowed_experts: Option<Digest>,
        labels: Vec<String>,
        temperature: f32,
        familiarity: Option<FamiliarityConfig>,
        view: View,
        report: Value,
        card: Option<Card>,
        training: Value,
    },
}

/// Name, contents and training summary.
pub(super) type Parts = (String, Contents, Value);

/// Parses and checks the document of any version that is read.
pub(super) fn parse(document: &str) -> Result<Parts, ArtifactError> {
    /// All that is certain to be in a document of any version.
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }

    // Every value but the first follows one of these characters.
    let values = document.bytes().filter(|byte| b",:[{".contains(byte)).count();
    if values > MAX_DOCUMENT_VALUES {
        return Err(ArtifactError::DocumentTooLarge { limit: MAX_DOCUMENT_VALUES, got: values });
    }
    let Version { format_version } = serde_json::from_str(document).map_err(ArtifactError::Document)?;
    let parts = match format_version {
        1 => serde_json::from_str::<v1::Document>(document).map_err(ArtifactError::Document)?.into_parts()?,
        FORMAT_VERSION => serde_json::from_str::<Document>(document).map_err(ArtifactError::Document)?.into_parts(),
        got => return Err(ArtifactError::FormatVersion { expected: FORMAT_VERSION, got }),
    };
    check::parts(&parts)?;
    Ok(parts)
}

impl Document {
    /// The document of version 2 that says so, once it is checked.
    pub(super) fn new(parts: Parts) -> Result<Self, ArtifactError> {
        check::parts(&parts)?;
        let (name, contents, training) = parts;
        let format_version = FORMAT_VERSION;
        Ok(match contents {
            Contents::Backbone(header) => {
                let BackboneHeader { config, encoding, preprocess, background, card } = *header;
                Self::Backbone { format_version, name, config, encoding, preprocess, background, card, training }
            }
            Contents::ExpertSet(header) => Self::ExpertSet {
                format_version,
                name,
                config: header.config,
                encoding: header.encoding,
                backbone: header.backbone,
                backbone_digest: header.backbone_digest,
                borrowed_experts: header.borrowed_experts,
                labels: header.labels,
                temperature: header.temperature,
                familiarity: header.familiarity,
                view: header.view,
                report: header.report,
                card: header.card,
                training,
            },
        })
    }

    fn into_parts(self) -> Parts {
        match self {
            Self::Backbone { name, config, encoding, preprocess, background, card, training, .. } => {
                let header = BackboneHeader { config, encoding, preprocess, background, card };
                (name, Contents::Backbone(header.into()), training)
            }
            Self::ExpertSet {
                name,
                config,
                encoding,
                backbone,
                backbone_digest,
                borrowed_experts,
                labels,
                temperature,
                familiarity,
                view,
                report,
                card,
                training,
                ..
            } => {
                let header = ExpertSetHeader {
                    config,
                    encoding,
                    backbone,
                    backbone_config: None,
                    backbone_digest,
                    borrowed_experts,
                    labels,
                    temperature,
                    familiarity,
                    view,
                    report,
                    card,
                };
                (name, Contents::ExpertSet(header.into()), training)
            }
        }
    }
}
