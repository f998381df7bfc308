//! Facts about an artifact from its header, without loading the artifact.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, bail};
use model_core::artifact::{self, Contents, Digest, Header, Lender, read_backbone, read_expert_set};
use model_core::config::{BackboneConfig, ExpertConfig};
use model_core::footprint::{Footprint, loading_bytes};

use crate::pages::Included;

/// Where an artifact's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of the model store.
    File(PathBuf),
    /// Part of this program.
    Embedded(Included),
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

    /// All of the artifact's bytes.
    pub fn read(&self) -> anyhow::Result<Bytes> {
        match self {
            Self::File(path) => Ok(Bytes::Owned(artifact::read_file(path).with_context(|| self.to_string())?)),
            Self::Embedded(file) => Ok(Bytes::Embedded(*file)),
        }
    }
}

/// An artifact's bytes, which leave memory when they are dropped.
pub enum Bytes {
    Owned(Vec<u8>),
    Embedded(Included),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Embedded(file) => file.bytes(),
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Self::Embedded(file) = self {
            file.give_back();
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
    pub name: String,
    pub digest: Digest,
    /// Bytes it takes when resident, as far as the header tells.
    pub resident_bytes: usize,
    /// Most bytes that loading it takes beside those.
    pub loading_bytes: usize,
    pub config: BackboneConfig,
    pub location: Location,
}

/// One version of an expert set as its header tells: all that a registered set costs until it is used.
#[derive(Debug, Clone)]
pub struct SetDescriptor {
    /// Its name in paths and answers.
    pub name: String,
    /// Its version; larger is newer.
    pub version: u64,
    pub digest: Digest,
    /// The backbone it was fitted to.
    pub backbone: Digest,
    /// The set whose experts it borrows, unless it has its own.
    pub lender: Option<Digest>,
    /// Bytes it takes when resident, as far as the header tells.
    pub resident_bytes: usize,
    /// Most bytes that loading it takes beside those.
    pub loading_bytes: usize,
    /// Bytes of its file.
    pub file_bytes: u64,
    pub experts: ExpertConfig,
    pub num_classes: usize,
    pub location: Location,
    /// The file when it was described.
    pub stamp: Stamp,
}

impl SetDescriptor {
    /// Name, version and content in one word: what a client compares to know which model answered.
    pub fn generation(&self) -> String {
        format!("{}:{}:{}", self.name, self.version, self.digest.short())
    }

    /// The set as one that lends its experts.
    pub fn as_lender(&self) -> Lender<'_> {
        Lender {
            digest: self.digest,
            borrows: self.lender.is_some(),
            config: &self.experts,
            backbone_digest: self.backbone,
        }
    }
}

/// The header of an artifact, and nothing behind it.
pub fn header(location: &Location) -> anyhow::Result<Header> {
    let header = match location {
        Location::File(path) => Header::read(path),
        Location::Embedded(file) => Header::from_bytes(file.bytes()),
    };
    header.with_context(|| location.to_string())
}

/// Describes an expert set from its header, under the name and version of its place in the store.
pub fn describe_set(name: &str, version: u64, location: &Location) -> anyhow::Result<SetDescriptor> {
    // Before the header is read: a file replaced in between is then seen as changed, not as known.
    let stamp = location.stamp().with_context(|| location.to_string())?;
    let header = header(location)?;
    let (resident_bytes, loading_bytes) = memory(&header);
    let Contents::ExpertSet(set) = header.contents else {
        bail!("{location}: expected an expert set, found {}", header.contents.kind());
    };
    Ok(SetDescriptor {
        name: name.to_owned(),
        version,
        digest: header.digest,
        backbone: set.backbone_digest,
        lender: set.borrowed_experts,
        resident_bytes,
        loading_bytes,
        file_bytes: header.file_bytes,
        experts: set.config,
        num_classes: set.labels.len(),
        location: location.clone(),
        stamp,
    })
}

/// Checks an expert set's file from its first byte to its last, without keeping it. `lender` is the set whose experts it
/// borrows, if it does.
pub fn check_set(
    location: &Location,
    backbone: &BackboneDescriptor,
    lender: Option<&SetDescriptor>,
) -> anyhow::Result<()> {
    let set = read_expert_set(&location.read()?).with_context(|| location.to_string())?;
    let Contents::Backbone(own) = header(&backbone.location)?.contents else {
        bail!("{}: this file was a backbone when the server started and is none now", backbone.name);
    };
    set.check_backbone(&own.config, backbone.digest).with_context(|| location.to_string())?;
    set.check_lender(lender.map(SetDescriptor::as_lender)).with_context(|| location.to_string())
}

/// Checks a backbone from its first byte to its last.
///
/// # Errors
/// Names what is wrong with it.
pub fn check_backbone(location: &Location) -> anyhow::Result<()> {
    read_backbone(&location.read()?).map(drop).with_context(|| location.to_string())
}

/// Describes a backbone from its header.
pub fn describe_backbone(name: &str, location: &Location) -> anyhow::Result<BackboneDescriptor> {
    let header = header(location)?;
    let (resident_bytes, loading_bytes) = memory(&header);
    let Contents::Backbone(backbone) = header.contents else {
        bail!("{location}: expected a backbone, found {}", header.contents.kind());
    };
    Ok(BackboneDescriptor {
        name: name.to_owned(),
        digest: header.digest,
        resident_bytes,
        loading_bytes,
        config: backbone.config,
        location: location.clone(),
    })
}

/// Bytes that stay, and most bytes that loading takes beside them.
fn memory(header: &Header) -> (usize, usize) {
    let (_, resident) = Footprint::of_artifact(&header.contents, header.file_bytes).totals();
    let loading = loading_bytes(&header.contents, header.file_bytes);
    (usize::try_from(resident).unwrap_or(usize::MAX), usize::try_from(loading).unwrap_or(usize::MAX))
}
