//! `GET /sets`: which expert sets there are and what they are doing.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::extract::ApiPath;
use crate::error::ApiError;
use crate::registry::{SetState, SetStatus};
use crate::state::AppState;

/// The routes of this resource.
pub fn router() -> Router<AppState> {
    Router::new().route("/sets", get(list)).route("/sets/{name}", get(show))
}

/// One version of an expert set.
#[derive(Debug, Serialize)]
pub struct SetView {
    name: String,
    version: u64,
    state: SetState,
    pinned: bool,
    /// Whether requests without a version get this one.
    current: bool,
    ready: bool,
    /// Accounted bytes when resident, 0 otherwise.
    resident_bytes: usize,
    file_bytes: u64,
    num_classes: usize,
    backbone: String,
    backbone_digest: String,
    generation: String,
    hits: u64,
    /// Seconds since 1970, or null.
    last_used: Option<f64>,
    /// Why the last load failed, or why it is not ready.
    reason: Option<String>,
}

impl From<SetStatus> for SetView {
    fn from(status: SetStatus) -> Self {
        let descriptor = &status.descriptor;
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64()).ok();
        Self {
            name: descriptor.name.clone(),
            version: descriptor.version,
            state: status.state,
            pinned: status.pinned,
            current: status.current,
            ready: status.ready,
            resident_bytes: status.resident_bytes,
            file_bytes: descriptor.file_bytes,
            num_classes: descriptor.num_classes,
            backbone: status.backbone_name,
            backbone_digest: descriptor.backbone.to_string(),
            generation: status.resident_generation.unwrap_or_else(|| descriptor.generation()),
            hits: status.hits,
            last_used: status.last_used.and_then(seconds),
            reason: status.reason,
        }
    }
}

/// A file of the store that could not be registered.
#[derive(Debug, Serialize)]
struct BrokenView {
    file: String,
    reason: String,
}

/// The listing.
#[derive(Debug, Serialize)]
struct Listing {
    default: String,
    sets: Vec<SetView>,
    broken: Vec<BrokenView>,
    memory: MemoryView,
}

#[derive(Debug, Serialize)]
struct MemoryView {
    budget_bytes: usize,
    accounted_bytes: usize,
}

async fn list(State(app): State<AppState>) -> Json<Listing> {
    let budget = app.registry.budget();
    let broken = app.broken.iter().map(|broken| BrokenView { file: broken.file_name(), reason: broken.reason.clone() });
    Json(Listing {
        default: app.default_set().to_owned(),
        sets: app.registry.list().into_iter().map(SetView::from).collect(),
        broken: broken.collect(),
        memory: MemoryView { budget_bytes: budget.limit(), accounted_bytes: budget.total() },
    })
}

async fn show(State(app): State<AppState>, name: ApiPath<String>) -> Result<Json<Vec<SetView>>, ApiError> {
    Ok(Json(app.registry.status(&name.0)?.into_iter().map(SetView::from).collect()))
}
