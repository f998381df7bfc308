//! What can be wrong with an artifact. Every variant says where, what was expected and what was found.

use super::digest::Digest;
use crate::config::ConfigError;

/// Why an artifact was not read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// The file could not be read at all.
    #[error("cannot read the artifact: {0}")]
    Io(#[from] std::io::Error),
    /// The file ends before its header does.
    #[error("the file has {got} bytes, but the header alone needs {expected}")]
    Truncated { expected: u64, got: u64 },
    /// The declared header is longer than any header may be.
    #[error("the header claims {got} bytes; at most {limit} are allowed")]
    HeaderTooLong {
        /// The largest header accepted.
        limit: u64,
        /// What the file claims.
        got: u64,
    },
    /// The header is not the JSON of a safetensors file.
    #[error("not a safetensors header: {0}")]
    Header(serde_json::Error),
    /// The tensors of the header end elsewhere than the file.
    #[error("header and tensors take {expected} bytes, but the file has {got}")]
    FileSize {
        /// Bytes that header and tensors take.
        expected: u64,
        got: u64,
    },
    /// A key of `__metadata__` is missing: the file is a safetensors file, but not one of ours.
    #[error("`__metadata__` has no `{0}`: not a ButterflyViT artifact")]
    MissingMetadata(&'static str),
    /// `__metadata__` has a key that means nothing here.
    #[error("`__metadata__` has an unknown key `{0}`")]
    UnknownMetadata(String),
    /// The document has more values than any honest one; parsing it would take more memory than the file justifies.
    #[error("the document has about {got} JSON values; at most {limit} are allowed")]
    DocumentTooLarge { limit: usize, got: usize },
    /// The JSON document in the metadata has another shape than `FORMAT.md` says.
    #[error("the document in the metadata: {0}")]
    Document(serde_json::Error),
    /// Written by another version of the format.
    #[error("format version {got}; this program reads versions 1 to {expected}")]
    FormatVersion {
        /// The version that this crate writes; the ones before are read as well.
        expected: u32,
        /// The version of the file.
        got: u32,
    },
    /// An expert set where a backbone was asked for, or the other way round.
    #[error("expected {expected}, found {got}")]
    Kind {
        /// What was asked for.
        expected: &'static str,
        /// What the file is.
        got: &'static str,
    },
    /// The configuration describes no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A field of the document has a value that is not allowed.
    #[error("field `{field}`: {reason}")]
    Field {
        /// Path of the field in the document.
        field: &'static str,
        /// The fault, with the offending value.
        reason: String,
    },
    /// A tensor that the configuration requires is not there.
    #[error("tensor `{tensor}` is missing")]
    MissingTensor {
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor that the configuration does not know.
    #[error("tensor `{tensor}` does not belong in this artifact")]
    UnknownTensor {
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor has the wrong element type.
    #[error("tensor `{tensor}`: expected dtype {expected}, got {got}")]
    Dtype {
        /// Name of the tensor.
        tensor: String,
        /// The dtype of `FORMAT.md`.
        expected: String,
        /// The dtype in the header.
        got: String,
    },
    /// A tensor has the wrong shape.
    #[error("tensor `{tensor}`: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// Name of the tensor.
        tensor: String,
        /// The shape that follows from the configuration.
        expected: Vec<usize>,
        /// The shape in the header.
        got: Vec<usize>,
    },
    /// Tensors do not lie in the order of `FORMAT.md`, which would let two files share one digest.
    #[error("tensor `{got}` lies where `{expected}` belongs")]
    Order {
        /// The tensor that belongs there.
        expected: String,
        /// The tensor that is there.
        got: String,
    },
    /// One element of a tensor has a value it cannot have.
    #[error("tensor `{tensor}`, element {index}: {reason}")]
    Value {
        /// Name of the tensor.
        tensor: String,
        /// Flat index of the element; of the byte, for a packed tensor.
        index: usize,
        reason: String,
    },
    /// Document and tensors are not what the digest was taken over: the file was damaged or altered.
    #[error("the file's contents have digest {got}, but it declares {expected}")]
    Digest {
        /// The digest in the metadata.
        expected: Digest,
        /// The digest of what is there.
        got: Digest,
    },
    /// An expert set was put on another backbone than the one it was fitted to.
    #[error("the expert set is bound to backbone {expected}, not to {got}")]
    BackboneDigest {
        /// The digest the set names.
        expected: Digest,
        /// The digest of the backbone.
        got: Digest,
    },
    /// Digests agree but shapes do not; only a forged document gets here.
    #[error("the expert set describes its backbone with another configuration than the backbone itself")]
    BackboneConfig,
    /// A set cannot have the experts of the set that it names.
    #[error("experts cannot be borrowed from set {lender}: {reason}")]
    Lender {
        /// The digest that the set names.
        lender: Digest,
        reason: &'static str,
    },
    /// Weights to be written do not have the size their configuration says.
    #[error("tensor `{tensor}`: the configuration asks for {expected} elements, the weights have {got}")]
    Length {
        /// Name of the tensor.
        tensor: String,
        /// Elements the configuration asks for.
        expected: u64,
        got: u64,
    },
    /// Matrices of attention to be written are not all stored alike.
    #[error("tensor `{tensor}` has another precision than the first of its kind")]
    MixedPrecision {
        /// The first that differs.
        tensor: String,
    },
    /// The configuration says that all blocks share their ternary codes, but they do not.
    #[error("block {block} has other ternary codes than block 0, with which it shares them")]
    NotShared {
        /// The first block that differs.
        block: usize,
    },
}
