//! Artifacts: the two kinds of safetensors file that hold a model, specified in `model-core/FORMAT.md`.
//!
//! A *backbone* is everything expert sets share; an *expert set* is one task's experts, routers, head and labels, and
//! names the digest of the backbone it was fitted to. Files are untrusted: [`read_backbone`] and [`read_expert_set`]
//! check sizes, dtypes, shapes, values and the digest before they build anything, and what they return is valid.
//! [`Header::read`] looks at the header of a file only. [`store_layout`] says where files lie in a model store.

mod contents;
mod digest;
mod document;
mod entries;
mod error;
mod header;
mod layout;
mod pack;
pub mod store_layout;

use serde_json::{Map, Value, json};

pub use contents::{
    BackboneEncoding, BackboneHeader, BackgroundSource, Card, Contents, CovarianceForm, ExpertSetEncoding,
    ExpertSetHeader, FamiliarityConfig, MAX_TEXT_BYTES, StatisticsFormat, StemEncoding,
};
pub use digest::{Digest, ParseDigestError};
use document::Document;
pub use document::FORMAT_VERSION;
pub use error::ArtifactError;
use header::{DIGEST_KEY, DOCUMENT_KEY, LENGTH_BYTES, RawHeader, header_bytes};
pub use header::{Header, MAX_HEADER_BYTES, open_file, read_file};
pub use layout::{Encoding, TensorSize};
use layout::{Slot, TensorSpec, empty_backbone, empty_expert_set, sort_by_place, visit_backbone, visit_expert_set};

use crate::config::{BackboneConfig, BackboneShape, ExpertConfig};
use crate::image::{Preprocess, View};
use crate::projection::Projection;
use crate::weights::{BackboneWeights, Covariance, ExpertSetWeights, Familiarity, Rows};

/// A backbone as read from a file.
#[derive(Debug, Clone, PartialEq)]
pub struct BackboneArtifact {
    /// Name given by whoever wrote it.
    pub name: String,
    pub weights: BackboneWeights,
    /// How an image becomes the model's input.
    pub preprocess: Preprocess,
    /// Terms and origin.
    pub card: Option<Card>,
    /// Summary of the training run, free-form.
    pub training: Value,
    /// Identity of document and tensors.
    pub digest: Digest,
}

/// An expert set as read from a file.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertSetArtifact {
    /// Name given by whoever wrote it.
    pub name: String,
    /// The parameters, with the labels.
    pub weights: ExpertSetWeights,
    /// What it relies on of the backbone that it was fitted to.
    pub backbone: BackboneShape,
    /// The whole configuration of that backbone, which version 1 repeats.
    pub backbone_config: Option<BackboneConfig>,
    /// Digest of that backbone.
    pub backbone_digest: Digest,
    /// The set whose experts and routers this one uses, having none of its own.
    pub borrowed_experts: Option<Digest>,
    /// The part of a picture that it looks at.
    pub view: View,
    /// What its maker measured, free-form.
    pub report: Value,
    /// Terms and origin.
    pub card: Option<Card>,
    /// Summary of the training run, free-form.
    pub training: Value,
    /// Identity of document and tensors.
    pub digest: Digest,
}

impl ExpertSetArtifact {
    /// Checks that the set was fitted to this backbone.
    ///
    /// # Errors
    /// [`ArtifactError::BackboneDigest`] for another backbone; [`ArtifactError::BackboneConfig`] when the digest is
    /// right but the set lies about the shapes.
    pub fn check_backbone(&self, config: &BackboneConfig, digest: Digest) -> Result<(), ArtifactError> {
        if self.backbone_digest != digest {
            return Err(ArtifactError::BackboneDigest { expected: self.backbone_digest, got: digest });
        }
        let same = self.backbone == config.shape() && self.backbone_config.as_ref().is_none_or(|own| own == config);
        if same { Ok(()) } else { Err(ArtifactError::BackboneConfig) }
    }

    /// Checks that a set which borrows its experts may have those of `lender`; one that has its own needs none.
    ///
    /// # Errors
    /// [`ArtifactError::Lender`] when the lender is missing, is the set itself or another one than the set names, borrows
    /// its experts in turn, or has another configuration or backbone.
    pub fn check_lender(&self, lender: Option<Lender<'_>>) -> Result<(), ArtifactError> {
        let Some(named) = self.borrowed_experts else { return Ok(()) };
        let reason = match lender {
            _ if named == self.digest => "it is the set itself",
            None => "it is not there",
            Some(Lender { digest, .. }) if digest != named => "another set was found in its place",
            Some(Lender { borrows: true, .. }) => "it borrows its experts itself",
            Some(Lender { config, .. }) if *config != self.weights.config => "its experts have another shape",
            Some(Lender { backbone_digest, .. }) if backbone_digest != self.backbone_digest => {
                "it is bound to another backbone"
            }
            Some(_) => return Ok(()),
        };
        Err(ArtifactError::Lender { lender: named, reason })
    }

    /// The set as one that lends its experts.
    pub fn as_lender(&self) -> Lender<'_> {
        Lender {
            digest: self.digest,
            borrows: self.borrowed_experts.is_some(),
            config: &self.weights.config,
            backbone_digest: self.backbone_digest,
        }
    }
}

/// What must be known of a set to lend its experts.
#[derive(Debug, Clone, Copy)]
pub struct Lender<'a> {
    pub digest: Digest,
    /// Whether it has no experts of its own.
    pub borrows: bool,
    pub config: &'a ExpertConfig,
    /// Identity of its backbone.
    pub backbone_digest: Digest,
}

/// Reads and checks a backbone.
///
/// Memory: what is allocated is at most a small multiple of `bytes`, whatever they contain (packed codes grow to one
/// or two bytes each).
///
/// # Errors
/// [`ArtifactError`] naming the tensor or field that does not follow `FORMAT.md`.
pub fn read_backbone(bytes: &[u8]) -> Result<BackboneArtifact, ArtifactError> {
    let (raw, data) = open(bytes)?;
    let Header { name, contents, training, digest, .. } = raw.header;
    let Contents::Backbone(header) = contents else {
        return Err(ArtifactError::Kind { expected: "a backbone", got: contents.kind() });
    };
    let tensors = Tensors { specs: &raw.tensors, data };
    let mut weights = empty_backbone(&header);
    let rank = header.background.as_ref().and_then(|background| background.rank);
    visit_backbone(&mut weights, rank, |slot| tensors.decode(slot))?;
    let BackboneHeader { preprocess, card, .. } = *header;
    Ok(BackboneArtifact { name, weights, preprocess, card, training, digest })
}

/// Reads and checks an expert set. Whether it belongs to a given backbone is
/// for [`ExpertSetArtifact::check_backbone`] to say.
///
/// Memory: as for [`read_backbone`].
///
/// # Errors
/// [`ArtifactError`] naming the tensor or field that does not follow `FORMAT.md`.
pub fn read_expert_set(bytes: &[u8]) -> Result<ExpertSetArtifact, ArtifactError> {
    let (raw, data) = open(bytes)?;
    let Header { name, contents, training, digest, .. } = raw.header;
    let Contents::ExpertSet(header) = contents else {
        return Err(ArtifactError::Kind { expected: "an expert set", got: contents.kind() });
    };
    let tensors = Tensors { specs: &raw.tensors, data };
    let mut weights = empty_expert_set(&header);
    visit_expert_set(&mut weights, &header, |slot| tensors.decode(slot))?;
    let ExpertSetHeader { backbone, backbone_config, backbone_digest, borrowed_experts, view, report, card, .. } =
        *header;
    Ok(ExpertSetArtifact {
        name,
        weights,
        backbone,
        backbone_config,
        backbone_digest,
        borrowed_experts,
        view,
        report,
        card,
        training,
        digest,
    })
}

/// The bytes of a backbone artifact without a model card. The same arguments give the same bytes.
///
/// # Errors
/// [`ArtifactError`] when configuration, weights or name could not be read back.
pub fn write_backbone(
    name: &str,
    weights: &BackboneWeights,
    preprocess: &Preprocess,
    training: &Value,
) -> Result<Vec<u8>, ArtifactError> {
    backbone_bytes(name, weights, (preprocess, None), training)
}

impl BackboneArtifact {
    /// The artifact's bytes, of the version that is written. The digest is computed anew.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ArtifactError> {
        backbone_bytes(&self.name, &self.weights, (&self.preprocess, self.card.as_ref()), &self.training)
    }
}

fn backbone_bytes(
    name: &str,
    weights: &BackboneWeights,
    (preprocess, card): (&Preprocess, Option<&Card>),
    training: &Value,
) -> Result<Vec<u8>, ArtifactError> {
    check_count("stem", weights.config.stem.len(), weights.stem.len())?;
    check_count("blocks", weights.config.num_layers, weights.blocks.len())?;
    let attention = weights.blocks.first().map_or_else(Default::default, |block| block.qkv.weight.precision());
    let stem = weights
        .stem
        .iter()
        .map(|layer| StemEncoding { weights: layer.conv.weight.precision(), calibrated: layer.step.is_some() });
    let background = weights.background.as_ref().map(|b| BackgroundSource {
        source: b.source.clone(),
        images: b.images,
        rank: match &b.covariance {
            Covariance::Diagonal { factor, .. } => Some(factor.len() / weights.config.d_model.max(1)),
            _ => None,
        },
    });
    let rank = background.as_ref().and_then(|background| background.rank);
    let header = BackboneHeader {
        config: weights.config.clone(),
        encoding: BackboneEncoding { stem: stem.collect(), attention },
        preprocess: preprocess.clone(),
        background,
        card: card.cloned(),
    };
    let document = Document::new((name.to_owned(), Contents::Backbone(header.into()), training.clone()))?;
    for (i, (layer, stem)) in weights.config.stem.iter().zip(&weights.stem).enumerate() {
        check_count(&format!("stem.{i}.norm"), usize::from(layer.norm), usize::from(stem.norm.is_some()))?;
    }
    for (i, block) in weights.blocks.iter().enumerate() {
        for (site, matrix) in [("qkv", &block.qkv), ("proj", &block.proj)] {
            if matrix.weight.precision() != attention {
                return Err(ArtifactError::MixedPrecision { tensor: format!("blocks.{i}.attention.{site}.weight") });
            }
        }
    }
    if let Some(block) = weights.unshared_block() {
        return Err(ArtifactError::NotShared { block });
    }
    let mut tensors = Vec::new();
    visit_backbone(&mut weights.clone(), rank, |slot| {
        tensors.push((slot.spec(), slot.encode()?));
        Ok(())
    })?;
    assemble(&document, tensors)
}

/// The bytes of an expert-set artifact with experts of its own, bound to the backbone with that configuration and digest,
/// with the usual view and neither report nor model card. The same arguments give the same bytes.
///
/// # Errors
/// [`ArtifactError`] when configuration, weights, labels or name could not be read back.
pub fn write_expert_set(
    name: &str,
    weights: &ExpertSetWeights,
    backbone: (&BackboneConfig, Digest),
    training: &Value,
) -> Result<Vec<u8>, ArtifactError> {
    let (backbone_config, backbone_digest) = backbone;
    let header = ExpertSetHeader {
        config: weights.config.clone(),
        encoding: ExpertSetEncoding { head: weights.head.weight.precision() },
        backbone: backbone_config.shape(),
        backbone_config: None,
        backbone_digest,
        borrowed_experts: None,
        labels: weights.labels.clone(),
        projection: weights.projection,
        temperature: weights.temperature,
        familiarity: familiarity_config(weights, backbone_config.d_model),
        view: View::default(),
        report: Value::Null,
        card: None,
    };
    expert_set_bytes(name, weights, header, training)
}

impl ExpertSetArtifact {
    /// The artifact's bytes, of the version that is written. The digest is computed anew.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ArtifactError> {
        let weights = &self.weights;
        let header = ExpertSetHeader {
            config: weights.config.clone(),
            encoding: ExpertSetEncoding { head: weights.head.weight.precision() },
            backbone: self.backbone,
            backbone_config: None,
            backbone_digest: self.backbone_digest,
            borrowed_experts: self.borrowed_experts,
            labels: weights.labels.clone(),
            projection: weights.projection,
            temperature: weights.temperature,
            familiarity: familiarity_config(weights, self.backbone.d_model),
            view: self.view,
            report: self.report.clone(),
            card: self.card.clone(),
        };
        expert_set_bytes(&self.name, weights, header, &self.training)
    }
}

fn expert_set_bytes(
    name: &str,
    weights: &ExpertSetWeights,
    header: ExpertSetHeader,
    training: &Value,
) -> Result<Vec<u8>, ArtifactError> {
    let document = Document::new((name.to_owned(), Contents::ExpertSet(header.clone().into()), training.clone()))?;
    let num_layers = if header.borrowed_experts.is_some() { 0 } else { header.backbone.num_layers };
    check_count("blocks", num_layers, weights.layers.len())?;
    let mut tensors = Vec::new();
    visit_expert_set(&mut weights.clone(), &header, |slot| {
        tensors.push((slot.spec(), slot.encode()?));
        Ok(())
    })?;
    assemble(&document, tensors)
}

/// What the document says of the statistics.
fn familiarity_config(weights: &ExpertSetWeights, d_model: usize) -> Option<FamiliarityConfig> {
    let Familiarity { format, relative, means, covariance, threshold, pass_share } = weights.familiarity.as_ref()?;
    let features = weights.projection.map_or(d_model, Projection::features).max(1);
    let rows = |values: &[f32]| values.len() / features;
    Some(FamiliarityConfig {
        format: match means {
            Rows::Float(_) => (*format).into(),
            Rows::Int4(_) => StatisticsFormat::Int4,
        },
        means: means.len() / features,
        covariance: match covariance {
            Covariance::Packed(_) => CovarianceForm::Packed,
            Covariance::Diagonal { factor, .. } => CovarianceForm::Diagonal { rank: rows(factor) },
            Covariance::Background { scale, factor } => {
                CovarianceForm::Background { scale: *scale, rank: rows(factor) }
            }
            Covariance::Even { scale, factor } => {
                CovarianceForm::Even { scale: *scale, rank: factor.codes.len() / features }
            }
        },
        relative: *relative,
        threshold: *threshold,
        pass_share: *pass_share,
    })
}

fn check_count(tensor: &str, expected: usize, got: usize) -> Result<(), ArtifactError> {
    if expected == got {
        return Ok(());
    }
    let (expected, got) = (expected as u64, got as u64);
    Err(ArtifactError::Length { tensor: tensor.to_owned(), expected, got })
}

/// Checks header and digest, and returns them with the data section.
fn open(bytes: &[u8]) -> Result<(RawHeader, &[u8]), ArtifactError> {
    let file_bytes = bytes.len() as u64;
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(ArtifactError::Truncated { expected: LENGTH_BYTES as u64, got: file_bytes });
    };
    let (header, data) = rest.split_at(header_bytes(*length, file_bytes)?);
    let raw = RawHeader::parse(header, file_bytes)?;
    let (expected, got) = (raw.header.digest, Digest::of(&raw.document, data));
    if expected == got { Ok((raw, data)) } else { Err(ArtifactError::Digest { expected, got }) }
}

/// The data section, with the places of its tensors.
struct Tensors<'a> {
    specs: &'a [TensorSpec],
    data: &'a [u8],
}

impl Tensors<'_> {
    fn decode(&self, slot: Slot<'_>) -> Result<(), ArtifactError> {
        let mut offset = 0;
        for spec in self.specs {
            // The header was checked against the file, so that offsets fit a `usize`.
            let end = offset + spec.bytes() as usize;
            if spec.name == slot.name {
                return slot.decode(&self.data[offset..end]);
            }
            offset = end;
        }
        Err(ArtifactError::MissingTensor { tensor: slot.name })
    }
}

/// Puts a safetensors file together. Written out here rather than by the library because the library keeps
/// `__metadata__` in a hash map, whose order changes from run to run.
fn assemble(document: &Document, mut tensors: Vec<(TensorSpec, Vec<u8>)>) -> Result<Vec<u8>, ArtifactError> {
    sort_by_place(&mut tensors, |(spec, _)| spec);
    let data: Vec<u8> = tensors.iter().flat_map(|(_, bytes)| bytes).copied().collect();
    let document = serde_json::to_string(document).map_err(ArtifactError::Document)?;
    let digest = Digest::of(&document, &data).to_string();

    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ DOCUMENT_KEY: document, DIGEST_KEY: digest }));
    let mut offset = 0;
    for (TensorSpec { name, dtype, shape }, bytes) in &tensors {
        let end = offset + bytes.len();
        let info = json!({ "dtype": dtype.to_string(), "shape": shape, "data_offsets": [offset, end] });
        header.insert(name.clone(), info);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The data section starts at a multiple of eight, for readers that map it.
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');

    let length = header.len() as u64;
    if length > MAX_HEADER_BYTES {
        return Err(ArtifactError::HeaderTooLong { limit: MAX_HEADER_BYTES, got: length });
    }
    Ok([&length.to_le_bytes()[..], &header, &data].concat())
}
