//! The header of an artifact: the JSON document in its metadata, and what every tensor must look like. Reading it
//! touches no tensor, so a registry can look at hundreds of files without decoding one.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digest::Digest;
use super::error::ArtifactError;
use super::layout::{
    Slot, TensorSize, TensorSpec, empty_backbone, empty_expert_set, sort_by_place, visit_backbone, visit_expert_set,
};
use crate::config::{BackboneConfig, ExpertConfig, MAX_SIZE, ViTConfig};
use crate::image::Preprocess;

/// The version of `FORMAT.md` this crate reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// Largest safetensors header accepted, in bytes. The largest honest ones carry some ten thousand labels.
pub const MAX_HEADER_BYTES: u64 = 1 << 20;
/// Most bytes of a name or label.
pub const MAX_TEXT_BYTES: usize = 255;

/// Key of the JSON document in `__metadata__`.
pub(super) const DOCUMENT_KEY: &str = "butterflyvit";
/// Key of the digest in `__metadata__`.
pub(super) const DIGEST_KEY: &str = "sha256";
/// Bytes before the header: its length.
pub(super) const LENGTH_BYTES: usize = 8;
/// Most JSON values in a document, labels included: a value may take two bytes in the file but up to some 240
/// while it is parsed.
const MAX_DOCUMENT_VALUES: usize = MAX_SIZE + 4096;

/// The JSON document that describes an artifact. Field order is the order in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Document {
    Backbone {
        format_version: u32,
        name: String,
        config: BackboneConfig,
        preprocess: Preprocess,
        training: Value,
    },
    ExpertSet {
        format_version: u32,
        name: String,
        config: ExpertConfig,
        backbone_config: BackboneConfig,
        backbone_digest: Digest,
        labels: Vec<String>,
        training: Value,
    },
}

/// What an artifact is, as its header says.
#[derive(Debug, Clone, PartialEq)]
pub enum Contents {
    /// Everything expert sets share.
    Backbone {
        config: BackboneConfig,
        /// How an image becomes the model's input.
        preprocess: Preprocess,
    },
    /// One task's experts, routers, head and labels.
    ExpertSet {
        config: ExpertConfig,
        /// Shapes of the backbone the set was fitted to.
        backbone_config: BackboneConfig,
        /// Digest of that backbone.
        backbone_digest: Digest,
        /// One label per row of the head.
        labels: Vec<String>,
    },
}

impl Contents {
    /// The kind in words.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Backbone { .. } => "a backbone",
            Self::ExpertSet { .. } => "an expert set",
        }
    }
}

/// The header of an artifact, every shape in it checked against the configuration; tensor values have not been seen,
/// so the digest is what the file *declares*.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Name given by whoever wrote the artifact.
    pub name: String,
    pub contents: Contents,
    /// Summary of the training run, free-form.
    pub training: Value,
    pub digest: Digest,
    /// Size of the file.
    pub file_bytes: u64,
}

impl Header {
    /// Reads and checks the header of a file, and nothing behind it.
    ///
    /// # Errors
    /// [`ArtifactError`] when the file cannot be read or its header does not follow `FORMAT.md`.
    pub fn read(path: &Path) -> Result<Self, ArtifactError> {
        let mut file = File::open(path)?;
        let file_bytes = file.metadata()?.len();
        let mut length = [0; LENGTH_BYTES];
        file.read_exact(&mut length).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                ArtifactError::Truncated { expected: LENGTH_BYTES as u64, got: file_bytes }
            }
            _ => error.into(),
        })?;
        let mut header = vec![0; header_bytes(length, file_bytes)?];
        file.read_exact(&mut header)?;
        Ok(RawHeader::parse(&header, file_bytes)?.header)
    }

    /// The header of an artifact in memory, and nothing behind it.
    ///
    /// # Errors
    /// [`ArtifactError`] when the header does not follow `FORMAT.md`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ArtifactError> {
        let file_bytes = bytes.len() as u64;
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(ArtifactError::Truncated { expected: LENGTH_BYTES as u64, got: file_bytes });
        };
        let (header, _) = rest.split_at(header_bytes(*length, file_bytes)?);
        Ok(RawHeader::parse(header, file_bytes)?.header)
    }
}

/// A header with what the reader of the tensors needs besides.
pub(super) struct RawHeader {
    pub(super) header: Header,
    /// The document as it stands in the file.
    pub(super) document: String,
    /// Tensors in the order in which they lie in the data section.
    pub(super) tensors: Vec<TensorSpec>,
}

/// The length of the header, once it is known to fit both the limit and the file.
pub(super) fn header_bytes(length: [u8; LENGTH_BYTES], file_bytes: u64) -> Result<usize, ArtifactError> {
    let got = u64::from_le_bytes(length);
    if got > MAX_HEADER_BYTES {
        return Err(ArtifactError::HeaderTooLong { limit: MAX_HEADER_BYTES, got });
    }
    let expected = got + LENGTH_BYTES as u64;
    if expected > file_bytes {
        return Err(ArtifactError::Truncated { expected, got: file_bytes });
    }
    Ok(got as usize)
}

impl RawHeader {
    /// Parses and checks the header of a file of `file_bytes` bytes.
    pub(super) fn parse(header: &[u8], file_bytes: u64) -> Result<Self, ArtifactError> {
        // Deserialising `Metadata` also checks that the tensors cover the data section without gap or overlap.
        let metadata: Metadata = serde_json::from_slice(header).map_err(ArtifactError::Header)?;
        let expected = (LENGTH_BYTES as u64 + header.len() as u64).checked_add(metadata.data_len() as u64);
        if expected != Some(file_bytes) {
            return Err(ArtifactError::FileSize { expected: expected.unwrap_or(u64::MAX), got: file_bytes });
        }
        let (document, digest) = metadata_values(&metadata)?;
        let (name, contents, training) = parse_document(&document)?.check()?;
        let tensors = contents.tensors();
        check_tensors(&metadata, &tensors)?;
        Ok(Self { header: Header { name, contents, training, digest, file_bytes }, document, tensors })
    }
}

fn metadata_values(metadata: &Metadata) -> Result<(String, Digest), ArtifactError> {
    let mut map = metadata.metadata().clone().unwrap_or_default();
    let document = map.remove(DOCUMENT_KEY).ok_or(ArtifactError::MissingMetadata(DOCUMENT_KEY))?;
    let digest = map.remove(DIGEST_KEY).ok_or(ArtifactError::MissingMetadata(DIGEST_KEY))?;
    if let Some(key) = map.into_keys().next() {
        return Err(ArtifactError::UnknownMetadata(key));
    }
    let digest = digest
        .parse()
        .map_err(|error| ArtifactError::Field { field: DIGEST_KEY, reason: format!("{digest:?}: {error}") })?;
    Ok((document, digest))
}

fn parse_document(document: &str) -> Result<Document, ArtifactError> {
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
    if format_version != FORMAT_VERSION {
        return Err(ArtifactError::FormatVersion { expected: FORMAT_VERSION, got: format_version });
    }
    serde_json::from_str(document).map_err(ArtifactError::Document)
}

impl Document {
    /// Checks every field, and takes the document apart into name, contents and training summary.
    pub(super) fn check(self) -> Result<(String, Contents, Value), ArtifactError> {
        match self {
            Self::Backbone { name, config, preprocess, training, .. } => {
                check_text("name", &name)?;
                config.validate()?;
                check_preprocess(&preprocess)?;
                Ok((name, Contents::Backbone { config, preprocess }, training))
            }
            Self::ExpertSet { name, config, backbone_config, backbone_digest, labels, training, .. } => {
                check_text("name", &name)?;
                let whole = ViTConfig { backbone: backbone_config, experts: config, num_classes: labels.len() };
                whole.validate()?;
                check_labels(&labels)?;
                let ViTConfig { backbone: backbone_config, experts: config, .. } = whole;
                Ok((name, Contents::ExpertSet { config, backbone_config, backbone_digest, labels }, training))
            }
        }
    }
}

fn check_text(field: &'static str, text: &str) -> Result<(), ArtifactError> {
    let reason = if text.is_empty() {
        "it is empty".to_owned()
    } else if text.len() > MAX_TEXT_BYTES {
        format!("it has {} bytes, more than {MAX_TEXT_BYTES}", text.len())
    } else if text.chars().any(char::is_control) {
        format!("{text:?} contains a control character")
    } else {
        return Ok(());
    };
    Err(ArtifactError::Field { field, reason })
}

/// Bounds that keep every pixel a reasonable finite number.
fn check_preprocess(preprocess: &Preprocess) -> Result<(), ArtifactError> {
    let check = |field, values: &[f32; 3], range: std::ops::RangeInclusive<f32>| match values
        .iter()
        .find(|value| !range.contains(value))
    {
        Some(value) => Err(ArtifactError::Field { field, reason: format!("{value} is not in {range:?}") }),
        None => Ok(()),
    };
    check("preprocess.mean", &preprocess.mean, -10.0..=10.0)?;
    check("preprocess.std", &preprocess.std, 1e-3..=10.0)
}

fn check_labels(labels: &[String]) -> Result<(), ArtifactError> {
    labels.iter().try_for_each(|label| check_text("labels", label))?;
    let mut sorted: Vec<&str> = labels.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ArtifactError::Field { field: "labels", reason: format!("{:?} occurs twice", pair[0]) }),
        None => Ok(()),
    }
}

impl Contents {
    /// Hands every tensor the artifact has to `visit`, in the order of the forward pass.
    fn visit(&self, mut visit: impl FnMut(&Slot<'_>)) {
        let visit = |slot: Slot<'_>| {
            visit(&slot);
            Ok(())
        };
        let visited = match self {
            Self::Backbone { config, .. } => visit_backbone(&mut empty_backbone(config.clone()), visit),
            Self::ExpertSet { config, backbone_config, labels, .. } => {
                let mut empty = empty_expert_set(config.clone(), backbone_config, labels.clone());
                visit_expert_set(&mut empty, backbone_config, visit)
            }
        };
        visited.expect("a visitor that returns no error causes none");
    }

    /// Every tensor in its place in the file.
    fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = Vec::new();
        self.visit(|slot| tensors.push(slot.spec()));
        sort_by_place(&mut tensors, |spec| spec);
        tensors
    }

    /// The size of every tensor, in the order of the forward pass. The configuration must be valid, as it
    /// is in a [`Header`].
    pub fn tensor_sizes(&self) -> Vec<TensorSize> {
        let mut sizes = Vec::new();
        self.visit(|slot| sizes.push(slot.size()));
        sizes
    }
}

fn check_tensors(metadata: &Metadata, expected: &[TensorSpec]) -> Result<(), ArtifactError> {
    let names = metadata.offset_keys();
    for TensorSpec { name, dtype, shape } in expected {
        let info = metadata.info(name).ok_or_else(|| ArtifactError::MissingTensor { tensor: name.clone() })?;
        if info.dtype != *dtype {
            return Err(ArtifactError::Dtype {
                tensor: name.clone(),
                expected: dtype.to_string(),
                got: info.dtype.to_string(),
            });
        }
        if info.shape != *shape {
            let (expected, got) = (shape.clone(), info.shape.clone());
            return Err(ArtifactError::Shape { tensor: name.clone(), expected, got });
        }
    }
    if let Some(tensor) = names.iter().find(|name| expected.iter().all(|spec| spec.name != **name)) {
        return Err(ArtifactError::UnknownTensor { tensor: tensor.clone() });
    }
    match names.iter().zip(expected).find(|(got, spec)| **got != spec.name) {
        Some((got, spec)) => Err(ArtifactError::Order { expected: spec.name.clone(), got: got.clone() }),
        None => Ok(()),
    }
}
