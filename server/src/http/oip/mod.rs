//! The Open Inference Protocol, version 2 (KServe, Triton): expert sets are its models.
//!
//! Bodies are read whatever their content type, since Triton's client sends none.

mod infer;
mod path;
mod stats;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use infer::HEADER_LENGTH;
use path::ModelPath;

use super::auth::Admin;
use super::error::{ApiError, ErrorCode};
use super::extract::{ApiPath, RequestContext};
use super::health::Ready;
use super::openapi::{ADMIN, BODY, LIFECYCLE, LOAD, commands, errors, with_version};
use super::{body, json, sets};
use crate::admission::Client;
use crate::app::AppState;
use crate::sets::registry::{SetState, SetStatus};

/// The routes of this resource; health is in [`super::health`].
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default()
        .routes(routes!(server))
        .routes(routes!(metadata))
        .routes(with_version(routes!(metadata)))
        .routes(routes!(ready))
        .routes(with_version(routes!(ready)))
        .routes(routes!(config))
        .routes(with_version(routes!(config)))
        .routes(routes!(infer::infer))
        .routes(with_version(routes!(infer::infer)))
        // Shadows a set called `stats` here and nowhere else: Triton's client asks this path for all sets.
        .routes(routes!(stats::all))
        .routes(routes!(stats::model))
        .routes(with_version(routes!(stats::model)))
        .routes(routes!(index))
        .routes(routes!(load))
        .routes(routes!(unload))
}

/// What the protocol wants to know of a server.
#[derive(Serialize, ToSchema)]
struct Server {
    name: &'static str,
    version: &'static str,
    extensions: [&'static str; 5],
}

impl Server {
    const THIS: Self = Self {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        extensions: ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"],
    };
}

/// What an expert set takes and gives.
#[derive(Serialize, ToSchema)]
struct Metadata {
    name: String,
    versions: Vec<String>,
    platform: &'static str,
    /// One input, though `infer` takes any of three: Triton's image client wants exactly one.
    inputs: [TensorMetadata; 1],
    outputs: [TensorMetadata; 1],
}

#[derive(Serialize, ToSchema)]
struct TensorMetadata {
    name: &'static str,
    datatype: &'static str,
    /// -1 stands for any number.
    shape: Vec<i64>,
}

/// An expert set as Triton would configure it.
#[derive(Serialize, ToSchema)]
struct Config {
    name: String,
    platform: &'static str,
    backend: &'static str,
    max_batch_size: usize,
    input: [ConfigTensor; 1],
    output: [ConfigTensor; 1],
}

#[derive(Serialize, ToSchema)]
struct ConfigTensor {
    name: &'static str,
    data_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<&'static str>,
    dims: Vec<i64>,
}

/// What Triton calls a framework.
const PLATFORM: &str = "butterflyvit";
/// A dimension of any size.
const ANY: i64 = -1;

fn dimension(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

fn example_metadata() -> Value {
    json!(Metadata {
        name: "cifar100".into(),
        versions: vec!["1".into()],
        platform: PLATFORM,
        inputs: [TensorMetadata { name: infer::PIXELS, datatype: "UINT8", shape: vec![ANY, 32, 32, 3] }],
        outputs: [TensorMetadata { name: infer::SCORES, datatype: "FP32", shape: vec![ANY, 100] }],
    })
}

fn example_config() -> Value {
    let input = ConfigTensor {
        name: infer::PIXELS,
        data_type: "TYPE_UINT8",
        format: Some("FORMAT_NHWC"),
        dims: vec![32, 32, 3],
    };
    json!(Config {
        name: "cifar100".into(),
        platform: PLATFORM,
        backend: PLATFORM,
        max_batch_size: 32,
        input: [input],
        output: [ConfigTensor { name: infer::SCORES, data_type: "TYPE_FP32", format: None, dims: vec![100] }],
    })
}

/// Name, version and protocol extensions.
#[utoipa::path(
    get,
    path = "/v2",
    operation_id = "oip_server",
    tag = "oip",
    responses((status = 200, description = "Done.", body = Server, example = json!(Server::THIS))),
    extensions(
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2"]))),
    ),
)]
async fn server() -> Json<Server> {
    Json(Server::THIS)
}

/// Inputs and outputs of a set.
#[utoipa::path(
    get,
    path = "/v2/models/{set}",
    operation_id = "oip_metadata",
    tag = "oip",
    responses((status = 200, description = "Done.", body = Metadata, example = json!(example_metadata()))),
    extensions(
        ("x-errors" = json!(errors(&[&[ErrorCode::SetNotFound]]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2/models/cifar100"]))),
    ),
)]
async fn metadata(State(app): State<AppState>, path: ApiPath<ModelPath>) -> Result<Json<Metadata>, ApiError> {
    let target = path.0.lookup(&app)?;
    let versions: Vec<String> = app
        .classifier
        .registry
        .status(&path.0.set)?
        .iter()
        .map(|status| status.descriptor.version.to_string())
        .collect();
    let side = dimension(target.backbone.config.image_size);
    let outputs = vec![ANY, dimension(target.set.num_classes)];
    Ok(Json(Metadata {
        name: target.set.name.clone(),
        versions,
        platform: PLATFORM,
        inputs: [TensorMetadata { name: infer::PIXELS, datatype: "UINT8", shape: vec![ANY, side, side, 3] }],
        outputs: [TensorMetadata { name: infer::SCORES, datatype: "FP32", shape: outputs }],
    }))
}

/// Configuration, in Triton's form.
#[utoipa::path(
    get,
    path = "/v2/models/{set}/config",
    operation_id = "oip_config",
    tag = "oip",
    responses((status = 200, description = "Done.", body = Config, example = json!(example_config()))),
    extensions(
        ("x-errors" = json!(errors(&[&[ErrorCode::SetNotFound]]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2/models/cifar100/config"]))),
    ),
)]
async fn config(State(app): State<AppState>, path: ApiPath<ModelPath>) -> Result<Json<Config>, ApiError> {
    let target = path.0.lookup(&app)?;
    let side = dimension(target.backbone.config.image_size);
    let dims = vec![side, side, 3];
    let input = ConfigTensor { name: infer::PIXELS, data_type: "TYPE_UINT8", format: Some("FORMAT_NHWC"), dims };
    let dims = vec![dimension(target.set.num_classes)];
    let output = ConfigTensor { name: infer::SCORES, data_type: "TYPE_FP32", format: None, dims };
    Ok(Json(Config {
        name: target.set.name.clone(),
        platform: PLATFORM,
        backend: PLATFORM,
        max_batch_size: app.limits.max_images,
        input: [input],
        output: [output],
    }))
}

/// Whether a request would be answered now or after a load.
#[utoipa::path(
    get,
    path = "/v2/models/{set}/ready",
    operation_id = "oip_ready",
    tag = "oip",
    responses((status = 200, description = "Done.", body = Ready, example = json!(Ready::YES))),
    extensions(
        ("x-errors" = json!(errors(&[LIFECYCLE, &[ErrorCode::SetNotFound, ErrorCode::SetLoading, ErrorCode::SetFailed]]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2/models/cifar100/ready"]))),
    ),
)]
async fn ready(State(app): State<AppState>, path: ApiPath<ModelPath>) -> Result<Json<Ready>, ApiError> {
    app.classifier.admission.lifecycle.check()?;
    let version = path.0.lookup(&app)?.set.version;
    let statuses = app.classifier.registry.status(&path.0.set)?;
    match statuses.iter().find(|status| status.descriptor.version == version) {
        Some(status) if status.ready => Ok(Json(Ready::YES)),
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
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct IndexRequest {
    /// Only those that are ready.
    #[serde(default)]
    ready: bool,
}

/// Expert sets with their states.
///
/// The body may be left out.
#[utoipa::path(
    post,
    path = "/v2/repository/index",
    operation_id = "oip_index",
    tag = "oip",
    request_body(content = Option<IndexRequest>, content_type = "application/json", example = json!({ "ready": true })),
    responses((status = 200, description = "Done.", body = Vec<IndexEntry>, example = json!([{ "name": "cifar100", "version": "1", "state": "READY", "reason": "" }]))),
    extensions(
        ("x-errors" = json!(errors(&[BODY]))),
        ("x-codeSamples" = json!(commands(&["curl -X POST http://127.0.0.1:8000/v2/repository/index"]))),
    ),
)]
async fn index(
    State(app): State<AppState>,
    context: RequestContext,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Vec<IndexEntry>>, ApiError> {
    let request: IndexRequest = read(&app, context.client, &headers, body).await?;
    let statuses = app.classifier.registry.list();
    Ok(Json(statuses.iter().filter(|status| status.ready || !request.ready).map(index_entry).collect()))
}

/// A version of an expert set.
#[derive(Serialize, ToSchema)]
struct IndexEntry {
    name: String,
    version: String,
    state: IndexState,
    /// Why it is not ready; also of a set that is ready, since an old generation goes on serving when a new
    /// one does not load.
    reason: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
enum IndexState {
    Ready,
    Loading,
    Unavailable,
}

fn index_entry(status: &SetStatus) -> IndexEntry {
    let state = match (status.ready, status.state) {
        (true, _) => IndexState::Ready,
        (false, SetState::Loading) => IndexState::Loading,
        (false, _) => IndexState::Unavailable,
    };
    IndexEntry {
        name: status.descriptor.name.clone(),
        version: status.descriptor.version.to_string(),
        state,
        reason: status.reason.clone().unwrap_or_default(),
    }
}

/// How a set is to be loaded.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RepositoryRequest {
    #[serde(default)]
    #[schema(value_type = Object)]
    parameters: serde_json::Map<String, Value>,
}

/// Done, and there is nothing to say.
#[derive(Serialize, ToSchema)]
struct Done {}

/// Load the newest version there is on the disk.
///
/// The body may be left out. Parameters, such as Triton's `config` and `file:`, are refused.
#[utoipa::path(
    post,
    path = "/v2/repository/models/{set}/load",
    operation_id = "oip_load",
    tag = "oip",
    request_body(content = Option<RepositoryRequest>, content_type = "application/json", example = json!({ "parameters": {} })),
    responses((status = 200, description = "Done.", body = Done, example = json!({}))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, BODY, LOAD]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X POST http://127.0.0.1:8000/v2/repository/models/flowers/load"]))),
    ),
)]
async fn load(
    State(app): State<AppState>,
    set: ApiPath<String>,
    context: RequestContext,
    Admin(by): Admin,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Done>, ApiError> {
    let request: RepositoryRequest = read(&app, context.client, &headers, body).await?;
    if let Some(name) = request.parameters.keys().next() {
        let message = format!("`{name}` cannot be given with a load; upload expert sets with PUT /sets/NAME/VERSION");
        return Err(ApiError::invalid(message));
    }
    sets::load_set(&app, &by, &set.0).await?;
    Ok(Json(Done {}))
}

/// Drop an expert set from memory.
///
/// A pinned set stays. A body is not read.
#[utoipa::path(
    post,
    path = "/v2/repository/models/{set}/unload",
    operation_id = "oip_unload",
    tag = "oip",
    responses((status = 200, description = "Done.", body = Done, example = json!({}))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::SetNotFound, ErrorCode::Conflict]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X POST http://127.0.0.1:8000/v2/repository/models/flowers/unload"]))),
    ),
)]
async fn unload(State(app): State<AppState>, set: ApiPath<String>, Admin(by): Admin) -> Result<Json<Done>, ApiError> {
    sets::unload_set(&app, &by, &set.0)?;
    Ok(Json(Done {}))
}

/// A JSON body that may be left out.
async fn read<T: Default + serde::de::DeserializeOwned>(
    app: &AppState,
    client: Client,
    headers: &HeaderMap,
    body: Body,
) -> Result<T, ApiError> {
    let received = body::receive(app, client, headers, body).await?;
    if received.bytes.is_empty() {
        return Ok(T::default());
    }
    json::read(&received.bytes)
}
