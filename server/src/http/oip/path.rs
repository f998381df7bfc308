//! Paths of the protocol's models.

use model_core::artifact::store_layout;
use serde::Deserialize;

use super::super::error::{ApiError, ErrorCode};
use crate::app::AppState;
use crate::sets::registry::Target;

/// Which expert set a path names.
#[derive(Debug, Deserialize)]
pub(super) struct ModelPath {
    pub(super) set: String,
    version: Option<String>,
}

impl ModelPath {
    pub(super) fn version(&self) -> Result<Option<u64>, ApiError> {
        let Some(text) = &self.version else { return Ok(None) };
        let unknown = || ApiError::new(ErrorCode::SetNotFound, "a version is a whole number without leading zeros");
        store_layout::parse_version(text).map(Some).ok_or_else(unknown)
    }

    pub(super) fn lookup(&self, app: &AppState) -> Result<Target, ApiError> {
        Ok(app.classifier.registry.lookup(&self.set, self.version()?)?)
    }
}
