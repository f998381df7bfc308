//! The header of an artifact: the JSON document in its metadata, and what every tensor must look like. Reading it
//! touches no tensor, so a registry can look at hundreds of files without decoding one.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::Metadata;
use serde_json::Value;

use super::contents::Contents;
use super::digest::Digest;
use super::document;
use super::entries;
use super::error::ArtifactError;
use super::layout::{
    Slot, TensorSize, TensorSpec, empty_backbone, empty_expert_set, sort_by_place, visit_backbone, visit_expert_set,
};

/// Largest safetensors header accepted, in bytes. The largest honest ones carry some ten thousand labels.
pub const MAX_HEADER_BYTES: u64 = 1 << 20;

/// Key of the JSON document in `__metadata__`.
pub(super) const DOCUMENT_KEY: &str = "butterflyvit";
/// Key of the digest in `__metadata__`.
pub(super) const DIGEST_KEY: &str = "sha256";
/// Bytes before the header: its length.
pub(super) const LENGTH_BYTES: usize = 8;

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

/// Opens an artifact's file. Folders, named pipes and devices are refused:
/// opening a named pipe waits for a writer, and a device never ends.
///
/// # Errors
/// When `path` cannot be opened or is not a file.
pub fn open_file(path: &Path) -> std::io::Result<File> {
    if std::fs::metadata(path)?.is_file() {
        File::open(path)
    } else {
        Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "this is not a file"))
    }
}

/// All bytes of a file as long as it is now, and nothing that is added meanwhile.
///
/// # Errors
/// As [`open_file`], and when there is no memory for so many bytes.
pub fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = open_file(path)?;
    let len = file.metadata()?.len();
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(len).unwrap_or(usize::MAX))?;
    file.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Header {
    /// Reads and checks the header of a file, and nothing behind it.
    ///
    /// # Errors
    /// [`ArtifactError`] when the file cannot be read or its header does not follow `FORMAT.md`.
    pub fn read(path: &Path) -> Result<Self, ArtifactError> {
        let mut file = open_file(path)?;
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
        let metadata = entries::parse(header)?;
        let expected = (LENGTH_BYTES as u64 + header.len() as u64).checked_add(metadata.data_len() as u64);
        if expected != Some(file_bytes) {
            return Err(ArtifactError::FileSize { expected: expected.unwrap_or(u64::MAX), got: file_bytes });
        }
        let (document, digest) = metadata_values(&metadata)?;
        let (name, contents, training) = document::parse(&document)?;
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

impl Contents {
    /// Hands every tensor the artifact has to `visit`, in the order of the forward pass.
    fn visit(&self, mut visit: impl FnMut(&Slot<'_>)) {
        let visit = |slot: Slot<'_>| {
            visit(&slot);
            Ok(())
        };
        let visited = match self {
            Self::Backbone(backbone) => {
                let rank = backbone.background.as_ref().and_then(|background| background.rank);
                visit_backbone(&mut empty_backbone(backbone), rank, visit)
            }
            Self::ExpertSet(set) => visit_expert_set(&mut empty_expert_set(set), set, visit),
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
