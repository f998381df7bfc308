//! Why a model could not be built or run.

use crate::artifact::{ArtifactError, Digest};
use crate::config::ConfigError;
use crate::kernels::KernelError;

/// Why a model could not be built or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The file is not a valid artifact of the expected kind.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The configuration describes no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A kernel refused a shape or value.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A tensor, or a slice handed to [`Session::forward`](crate::engine::Session::forward), does not have the size that the configuration asks for.
    #[error("{what}: expected {expected} values, got {got}")]
    Length {
        what: &'static str,
        /// Values that the configuration asks for.
        expected: usize,
        /// Values that it has.
        got: usize,
    },
    /// A row's expert set is bound to another backbone than the session's.
    #[error("the expert set is bound to backbone {expected}, but the session runs {got}")]
    ForeignSet {
        /// The backbone that the set names.
        expected: Digest,
        got: Digest,
    },
    /// More rows than the session has scratch for.
    #[error("{rows} rows are more than the session's {max_batch}")]
    BatchTooLarge {
        rows: usize,
        /// What the session was made for.
        max_batch: usize,
    },
}

/// Checks one tensor's length.
pub(crate) fn expect_len(what: &'static str, got: usize, expected: usize) -> Result<(), ModelError> {
    if got == expected { Ok(()) } else { Err(ModelError::Length { what, expected, got }) }
}
