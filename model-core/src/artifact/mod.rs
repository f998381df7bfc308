//! Artifacts: the two kinds of safetensors file that hold a model, specified in `model-core/FORMAT.md`.
//!
//! A *backbone* is everything expert sets share; an *expert set* is one task's experts, routers, head and labels, and
//! names the digest of the backbone it was fitted to. Files are untrusted: [`read_backbone`] and [`read_expert_set`]
//! check sizes, dtypes, shapes, values and the digest before they build anything, and what they return is valid.
//! [`Header::read`] looks at the header of a file only.

mod digest;
mod error;
mod header;
mod layout;
mod pack;

use serde_json::{Map, Value, json};

pub use digest::{Digest, ParseDigestError};
pub use error::ArtifactError;
pub use header::{Contents, FORMAT_VERSION, Header, MAX_HEADER_BYTES, MAX_TEXT_BYTES};
use header::{DIGEST_KEY, DOCUMENT_KEY, Document, LENGTH_BYTES, RawHeader, header_bytes};
pub use layout::{Encoding, TensorSize};
use layout::{Slot, TensorSpec, empty_backbone, empty_expert_set, sort_by_place, visit_backbone, visit_expert_set};

use crate::config::BackboneConfig;
use crate::image::Preprocess;
use crate::weights::{BackboneWeights, ExpertSetWeights};

/// A backbone as read from a file.
#[derive(Debug, Clone, PartialEq)]
pub struct BackboneArtifact {
    /// Name given by whoever wrote it.
    pub name: String,
    pub weights: BackboneWeights,
    /// How an image becomes the model's input.
    pub preprocess: Preprocess,
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
    /// Shapes of the backbone the set was fitted to.
    pub backbone_config: BackboneConfig,
    /// Digest of that backbone.
    pub backbone_digest: Digest,
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
        if self.backbone_config != *config { Err(ArtifactError::BackboneConfig) } else { Ok(()) }
    }
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
    let Contents::Backbone { config, preprocess } = contents else {
        return Err(ArtifactError::Kind { expected: "a backbone", got: contents.kind() });
    };
    let tensors = Tensors { specs: &raw.tensors, data };
    let mut weights = empty_backbone(config);
    visit_backbone(&mut weights, |slot| tensors.decode(slot))?;
    Ok(BackboneArtifact { name, weights, preprocess, training, digest })
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
    let Contents::ExpertSet { config, backbone_config, backbone_digest, labels } = contents else {
        return Err(ArtifactError::Kind { expected: "an expert set", got: contents.kind() });
    };
    let tensors = Tensors { specs: &raw.tensors, data };
    let mut weights = empty_expert_set(config, &backbone_config, labels);
    visit_expert_set(&mut weights, &backbone_config, |slot| tensors.decode(slot))?;
    Ok(ExpertSetArtifact { name, weights, backbone_config, backbone_digest, training, digest })
}

/// The bytes of a backbone artifact. The same arguments give the same bytes.
///
/// # Errors
/// [`ArtifactError`] when configuration, weights or name could not be read back.
pub fn write_backbone(
    name: &str,
    weights: &BackboneWeights,
    preprocess: &Preprocess,
    training: &Value,
) -> Result<Vec<u8>, ArtifactError> {
    let document = Document::Backbone {
        format_version: FORMAT_VERSION,
        name: name.to_owned(),
        config: weights.config.clone(),
        preprocess: preprocess.clone(),
        training: training.clone(),
    };
    document.clone().check()?;
    check_count("stem", weights.config.stem.len(), weights.stem.len())?;
    for (i, (layer, stem)) in weights.config.stem.iter().zip(&weights.stem).enumerate() {
        let (expected, got) = (usize::from(layer.norm_gelu), usize::from(stem.norm.is_some()));
        check_count(&format!("stem.{i}.norm"), expected, got)?;
    }
    check_count("blocks", weights.config.num_layers, weights.blocks.len())?;
    let mut tensors = Vec::new();
    visit_backbone(&mut weights.clone(), |slot| {
        tensors.push((slot.spec(), slot.encode()?));
        Ok(())
    })?;
    assemble(&document, tensors)
}

/// The bytes of an expert-set artifact bound to the backbone with that configuration and digest. The same arguments
/// give the same bytes.
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
    let document = Document::ExpertSet {
        format_version: FORMAT_VERSION,
        name: name.to_owned(),
        config: weights.config.clone(),
        backbone_config: backbone_config.clone(),
        backbone_digest,
        labels: weights.labels.clone(),
        training: training.clone(),
    };
    document.clone().check()?;
    check_count("blocks", backbone_config.num_layers, weights.layers.len())?;
    let mut tensors = Vec::new();
    visit_expert_set(&mut weights.clone(), backbone_config, |slot| {
        tensors.push((slot.spec(), slot.encode()?));
        Ok(())
    })?;
    assemble(&document, tensors)
}

fn check_count(tensor: &str, expected: usize, got: usize) -> Result<(), ArtifactError> {
    if expected == got { Ok(()) } else { Err(ArtifactError::Length { tensor: tensor.to_owned(), expected, got }) }
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
            let end = offset + spec.bytes();
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
