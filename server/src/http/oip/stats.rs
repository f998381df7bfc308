//! Triton's statistics extension.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::super::error::ApiError;
use super::super::extract::ApiPath;
use super::super::openapi::{Operation, Shape};
use super::path::ModelPath;
use crate::app::AppState;
use crate::sets::registry::SetStatus;
use crate::statistics::{CountAndTime, SetStatistics};

/// What each version of an expert set has answered.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelStatistics {
    model_stats: Vec<NamedStatistics>,
}

#[derive(Serialize, ToSchema)]
struct NamedStatistics {
    name: String,
    version: String,
    #[serde(flatten)]
    statistics: SetStatistics,
    /// Always empty: forward passes carry images of many sets.
    #[schema(max_items = 0)]
    batch_stats: [CountAndTime; 0],
}

pub(super) fn describe(id: &'static str, summary: &'static str) -> Operation {
    let batch_stats = [];
    let entry =
        NamedStatistics { name: "cifar100".into(), version: "1".into(), statistics: Default::default(), batch_stats };
    Operation::new("oip", id, summary)
        .description("`inference_count` counts images and `execution_count` requests, since the server started.")
        .json(Shape::of::<ModelStatistics>(), json!(ModelStatistics { model_stats: vec![entry] }))
}

/// All versions of all sets.
pub(super) async fn all(State(app): State<AppState>) -> Json<ModelStatistics> {
    document(&app, &app.classifier.registry.list())
}

/// One version, or all versions of a set.
pub(super) async fn model(
    State(app): State<AppState>,
    path: ApiPath<ModelPath>,
) -> Result<Json<ModelStatistics>, ApiError> {
    path.0.lookup(&app)?;
    let mut statuses = app.classifier.registry.status(&path.0.set)?;
    if let Some(version) = path.0.version()? {
        statuses.retain(|status| status.descriptor.version == version);
    }
    Ok(document(&app, &statuses))
}

fn document(app: &AppState, statuses: &[SetStatus]) -> Json<ModelStatistics> {
    let entry = |status: &SetStatus| {
        let (name, version) = (&status.descriptor.name, status.descriptor.version);
        let statistics = app.classifier.statistics.of(name, version);
        NamedStatistics { name: name.clone(), version: version.to_string(), statistics, batch_stats: [] }
    };
    Json(ModelStatistics { model_stats: statuses.iter().map(entry).collect() })
}
