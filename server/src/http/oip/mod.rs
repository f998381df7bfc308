//! The Open Inference Protocol, version 2 (KServe, Triton): expert sets are its models.
//!
//! Bodies are read whatever their content type, since Triton's client sends none.

mod infer;
mod stats;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

pub use stats::Statistics;

use super::extract::{ApiPath, RequestContext};
use super::{auth, body, sets};
use crate::error::{ApiError, ErrorCode};
use crate::registry::{SetState, SetStatus, Target};
use crate::state::AppState;
use crate::store;

/// The routes of this resource; health is in [`super::health`].
pub fn router() -> Router<AppState> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/models/{set}", get(metadata))
        .route("/v2/models/{set}/versions/{version}", get(metadata))
        .route("/v2/models/{set}/ready", get(ready))
        .route("/v2/models/{set}/versions/{version}/ready", get(ready))
        .route("/v2/models/{set}/config", get(config))
        .route("/v2/models/{set}/versions/{version}/config", get(config))
        .route("/v2/models/{set}/infer", post(infer::infer))
        .route("/v2/models/{set}/versions/{version}/infer", post(infer::infer))
        // Shadows a set called `stats` here and nowhere else: Triton's client asks this path for all sets.
        .route("/v2/models/stats", get(stats::all))
        .route("/v2/models/{set}/stats", get(stats::model))
        .route("/v2/models/{set}/versions/{version}/stats", get(stats::model))
        .route("/v2/repository/index", post(index))
        .route("/v2/repository/models/{set}/load", post(load))
        .route("/v2/repository/models/{set}/unload", post(unload))
}

/// Which expert set a path names.
#[derive(Debug, Deserialize)]
struct ModelPath {
    set: String,
    version: Option<String>,
}

impl ModelPath {
    fn version(&self) -> Result<Option<u64>, ApiError> {
        let Some(text) = &self.version else { return Ok(None) };
        let unknown = || ApiError::new(ErrorCode::SetNotFound, "a version is a whole number without leading zeros");
        store::parse_version(text).map(Some).ok_or_else(unknown)
    }

    fn lookup(&self, app: &AppState) -> Result<Target, ApiError> {
        Ok(app.registry.lookup(&self.set, self.version()?)?)
    }
}

async fn server() -> Json<Value> {
    Json(json!({
        "name": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"],
    }))
}

async fn metadata(State(app): State<AppState>, path: ApiPath<ModelPath>) -> Result<Json<Value>, ApiError> {
    let target = path.0.lookup(&app)?;
    let versions: Vec<String> =
        app.registry.status(&path.0.set)?.iter().map(|status| status.descriptor.version.to_string()).collect();
    let side = target.backbone.image_size;
    Ok(Json(json!({
        "name": target.set.name,
        "versions": versions,
        "platform": "butterflyvit",
        // One input, though three are accepted: Triton's image client wants exactly one.
        "inputs": [{ "name": infer::PIXELS, "datatype": "UINT8", "shape": [-1, side, side, 3] }],
        "outputs": [{ "name": infer::SCORES, "datatype": "FP32", "shape": [-1, target.set.num_classes] }],
    })))
}

async fn config(State(app): State<AppState>, path: ApiPath<ModelPath>) -> Result<Json<Value>, ApiError> {
    let target = path.0.lookup(&app)?;
    let side = target.backbone.image_size;
    let input = json!({
        "name": infer::PIXELS, "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [side, side, 3],
    });
    Ok(Json(json!({
        "name": target.set.name,
        "platform": "butterflyvit",
        "backend": "butterflyvit",
        "max_batch_size": app.limits.max_images,
        "input": [input],
        "output": [{ "name": infer::SCORES, "data_type": "TYPE_FP32", "dims": [target.set.num_classes] }],
    })))
}

async fn ready(State(app): State<AppState>, path: ApiPath<ModelPath>) -> Result<Json<Value>, ApiError> {
    app.lifecycle.check()?;
    let version = path.0.lookup(&app)?.set.version;
    let statuses = app.registry.status(&path.0.set)?;
    match statuses.iter().find(|status| status.descriptor.version == version) {
        Some(status) if status.ready => Ok(Json(json!({ "ready": true }))),
        Some(status) if status.state == SetState::Loading => {
            Err(ApiError::new(ErrorCode::SetLoading, format!("expert set `{}` is still loading", path.0.set)))
        }
        status => {
            let reason = status.and_then(|status| status.reason.as_deref()).unwrap_or("unknown");
            Err(ApiError::new(ErrorCode::SetFailed, format!("expert set `{}` is not ready: {reason}", path.0.set)))
        }
    }
}

/// What the index is asked for.
#[derive(Debug, Default, Deserialize)]
struct IndexRequest {
    #[serde(default)]
    ready: bool,
}

async fn index(
    State(app): State<AppState>,
    context: RequestContext,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Vec<Value>>, ApiError> {
    let request: IndexRequest = read(&app, &context, &headers, body).await?;
    let statuses = app.registry.list();
    Ok(Json(statuses.iter().filter(|status| status.ready || !request.ready).map(index_entry).collect()))
}

fn index_entry(status: &SetStatus) -> Value {
    let state = match (status.ready, status.state) {
        (true, _) => "READY",
        (false, SetState::Loading) => "LOADING",
        (false, _) => "UNAVAILABLE",
    };
    json!({
        "name": status.descriptor.name,
        "version": status.descriptor.version.to_string(),
        "state": state,
        // Also of a set that is ready: an old generation goes on serving when a new one does not load.
        "reason": status.reason.as_deref().unwrap_or_default(),
    })
}

/// The parameters of load and unload.
#[derive(Debug, Default, Deserialize)]
struct RepositoryRequest {
    #[serde(default)]
    parameters: serde_json::Map<String, Value>,
}

async fn load(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let by = auth::require_admin(&app, &context, &headers)?;
    let request: RepositoryRequest = read(&app, &context, &headers, body).await?;
    if let Some(name) = request.parameters.keys().find(|name| *name == "config" || name.starts_with("file:")) {
        let message = format!("`{name}` cannot be given with a load; upload expert sets with PUT /sets/NAME/VERSION");
        return Err(ApiError::invalid(message));
    }
    sets::load_set(&app, by, &set.0).await?;
    Ok(Json(json!({})))
}

async fn unload(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let by = auth::require_admin(&app, &context, &headers)?;
    sets::unload_set(&app, by, &set.0)?;
    Ok(Json(json!({})))
}

/// A JSON body that may be left out.
async fn read<T: Default + serde::de::DeserializeOwned>(
    app: &AppState,
    context: &RequestContext,
    headers: &HeaderMap,
    body: Body,
) -> Result<T, ApiError> {
    let received = body::receive(app, headers, body, context.deadline).await?;
    if received.bytes.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&received.bytes).map_err(|error| ApiError::invalid(format!("the request's JSON: {error}")))
}
