//! The statistics extension of Triton's protocol.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::error::{ApiError, ErrorCode};
use super::super::extract::ApiPath;
use super::super::openapi::{commands, errors};
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

fn example() -> Value {
    let batch_stats = [];
    let entry =
        NamedStatistics { name: "cifar100".into(), version: "1".into(), statistics: Default::default(), batch_stats };
    json!(ModelStatistics { model_stats: vec![entry] })
}

/// Statistics of every expert set.
///
/// `inference_count` counts images and `execution_count` requests, since the server started.
#[utoipa::path(
    get,
    path = "/v2/models/stats",
    operation_id = "oip_stats",
    tag = "oip",
    responses((status = 200, description = "Done.", body = ModelStatistics, example = json!(example()))),
    extensions(
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2/models/stats"]))),
    ),
)]
pub(super) async fn all(State(app): State<AppState>) -> Json<ModelStatistics> {
    document(&app, &app.classifier.registry.list())
}

/// Statistics of one expert set.
///
/// `inference_count` counts images and `execution_count` requests, since the server started.
#[utoipa::path(
    get,
    path = "/v2/models/{set}/stats",
    operation_id = "oip_model_stats",
    tag = "oip",
    responses((status = 200, description = "Done.", body = ModelStatistics, example = json!(example()))),
    extensions(
        ("x-errors" = json!(errors(&[&[ErrorCode::SetNotFound]]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2/models/cifar100/stats"]))),
    ),
)]
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
