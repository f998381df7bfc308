//! What the registry knows about files, and the seam to whatever turns files into models.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use model_core::artifact::Digest;

/// Where an artifact's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of the model store.
    File(PathBuf),
    /// Part of this program.
    Embedded(&'static [u8]),
}

/// Tells whether a file changed without reading it; `None` for what cannot change.
pub type Stamp = Option<(u64, SystemTime)>;

impl Location {
    /// The file's present stamp.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn stamp(&self) -> std::io::Result<Stamp> {
        match self {
            Self::File(path) => {
                let metadata = std::fs::metadata(path)?;
                Ok(Some((metadata.len(), metadata.modified()?)))
            }
            Self::Embedded(_) => Ok(None),
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Embedded(_) => f.write_str("the embedded model"),
        }
    }
}

/// A backbone as its header tells.
#[derive(Debug, Clone)]
pub struct BackboneDescriptor {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub digest: Digest,
    /// Bytes it takes when resident, as far as the header tells.
    pub resident_bytes: usize,
    /// Side of its square input.
    pub image_size: usize,
    /// Where it is.
    pub location: Location,
}

/// One version of an expert set as its header tells: all that a registered set costs until it is used.
#[derive(Debug, Clone)]
pub struct SetDescriptor {
    /// Its name in paths and answers.
    pub name: String,
    /// Its version; larger is newer.
    pub version: u64,
    /// Its identity.
    pub digest: Digest,
    /// The backbone it was fitted to.
    pub backbone: Digest,
    /// Bytes it takes when resident, as far as the header tells.
    pub resident_bytes: usize,
    /// Bytes of its file.
    pub file_bytes: u64,
    /// Number of labels.
    pub num_classes: usize,
    /// Where it is.
    pub location: Location,
    /// The file when it was described.
    pub stamp: Stamp,
}

impl SetDescriptor {
    /// Name, version and content in one word: what a client compares to know which model answered.
    pub fn generation(&self) -> String {
        format!("{}:{}:{}", self.name, self.version, self.digest.short())
    }
}

/// A decoded model with the bytes it turned out to take.
#[derive(Debug)]
pub struct Loaded<T> {
    /// The model.
    pub value: T,
    /// Bytes of the model.
    pub bytes: usize,
    /// Bytes of working memory that come with it; for a set, what it makes its backbone's grow by.
    pub scratch: usize,
}

/// Turns files into models. The registry is generic over it so that its guarantees can be tested with models that
/// cost nothing to make.
pub trait Source: Send + Sync + 'static {
    /// A decoded backbone.
    type Backbone: Send + Sync + 'static;
    /// A decoded expert set, tied to its backbone.
    type Set: Send + Sync + 'static;

    /// Reads the header of a set's file again. Blocking.
    ///
    /// # Errors
    /// A sentence that names file and reason.
    fn describe_set(&self, name: &str, version: u64, location: &Location) -> Result<SetDescriptor, String>;

    /// Reads and decodes a backbone. Blocking.
    ///
    /// # Errors
    /// A sentence that names file and reason.
    fn load_backbone(&self, descriptor: &BackboneDescriptor) -> Result<Loaded<Self::Backbone>, String>;

    /// Reads and decodes an expert set. Blocking.
    ///
    /// # Errors
    /// A sentence that names file and reason.
    fn load_set(&self, descriptor: &SetDescriptor, backbone: &Arc<Self::Backbone>)
    -> Result<Loaded<Self::Set>, String>;
}
