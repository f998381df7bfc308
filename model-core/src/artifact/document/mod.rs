//! The JSON document in an artifact's metadata: of version 2, which is written, and of version 1, which is read as well.

mod check;
mod v1;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::contents::{
    BackboneEncoding, BackboneHeader, BackgroundSource, Card, Contents, ExpertSetEncoding, ExpertSetHeader,
    FamiliarityConfig,
};
use super::digest::Digest;
use super::error::ArtifactError;
use crate::config::{BackboneConfig, BackboneShape, ExpertConfig, MAX_SIZE};
use crate::image::{Preprocess, View};
use crate::projection::Projection;

/// The version of `FORMAT.md` that is written.
pub const FORMAT_VERSION: u32 = 2;

/// Most JSON values in a document, labels included: a value may take two bytes in the file but up to some 240
/// while it is parsed.
const MAX_DOCUMENT_VALUES: usize = MAX_SIZE + 4096;

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
        #[serde(default, skip_serializing_if = "Option::is_none")]
        projection: Option<Projection>,
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
                projection: header.projection,
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
                projection,
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
                    projection,
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
