//! What one version of an expert set is in itself: what its file says, and the file.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use model_core::artifact::{Contents, open_file, store_layout};
use model_core::image::View;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Viewer;
use super::error::{ApiError, ErrorCode};
use super::extract::ApiPath;
use super::openapi::{commands, errors};
use crate::app::{App, AppState};
use crate::sentence::sentence;
use crate::sets::descriptor::{Location, SetDescriptor, header};

/// Bytes of a file that are in memory at once.
const PIECE: usize = 64 << 10;

/// In place of a version, the one that answers requests without one.
const CURRENT: &str = "current";

const NAMED: &[ErrorCode] = &[ErrorCode::SetNotFound, ErrorCode::InvalidRequest, ErrorCode::Conflict];

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(details)).routes(routes!(file)).routes(routes!(current_file))
}

/// What the file of a set says of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct SetDetails {
    pub set: String,
    pub version: u64,
    /// Digest of its content.
    pub digest: String,
    /// One for each class, in the order of their indices.
    pub labels: Vec<String>,
    /// Digest of the set whose experts it borrows, or null.
    pub base: Option<String>,
    /// What logits are divided by.
    pub temperature: f32,
    /// Whether it has statistics of its own images, by which others are unknown.
    pub knows_unknown: bool,
    /// The part of a picture that it looks at: `crop` in shares, and `fit`.
    #[schema(value_type = Object)]
    pub view: View,
    /// Share of held-out images that got their own label, where its maker measured that, with the interval that holds the
    /// true share in 95 of 100 cases.
    #[schema(value_type = Option<Object>)]
    pub accuracy: Option<Value>,
    /// What its maker measured, free-form, or null.
    #[schema(value_type = Option<Object>)]
    pub report: Option<Value>,
    /// Terms and origin of the weights, where its maker names them.
    #[schema(value_type = Option<Object>)]
    pub card: Option<Value>,
}

fn example_details() -> Value {
    json!({
        "set": "door",
        "version": 2,
        "digest": "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9",
        "labels": ["closed", "open"],
        "base": null,
        "temperature": 1.0,
        "knows_unknown": true,
        "view": { "crop": [0.0, 0.0, 1.0, 1.0], "fit": "crop" },
        "accuracy": { "count": 59, "of": 60, "share": 0.983, "low": 0.911, "high": 0.997 },
        "report": { "images": 60, "accuracy": { "count": 59, "of": 60, "share": 0.983, "low": 0.911, "high": 0.997 } },
        "card": null,
    })
}

/// What the file of one version of an expert set says of it.
///
/// `current` stands for the version that answers requests without one.
#[utoipa::path(
    get,
    path = "/sets/{name}/{version}",
    operation_id = "show_set_version",
    tag = "sets",
    responses((status = 200, description = "Done.", body = SetDetails, example = json!(example_details()))),
    extensions(
        ("x-errors" = json!(errors(&[NAMED]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/sets/cifar100/current"]))),
    ),
)]
async fn details(State(app): State<AppState>, path: ApiPath<(String, String)>) -> Result<Json<SetDetails>, ApiError> {
    let (name, version) = path.0;
    let set = find(&app, &name, &version)?;
    let details = app.bulk.run(move || read_details(&set)).await?;
    details.map(Json).map_err(|error| unreadable(&name, &error))
}

/// The file of one version of an expert set.
#[utoipa::path(
    get,
    path = "/sets/{name}/{version}/file",
    operation_id = "download_set_version",
    tag = "sets",
    responses((status = 200, description = "The file.", content(("application/octet-stream")))),
    extensions(
        ("x-errors" = json!(errors(&[&[ErrorCode::Unauthorized], NAMED]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/sets/cifar100/1/file | wc -c"]))),
    ),
)]
async fn file(State(app): State<AppState>, _: Viewer, path: ApiPath<(String, String)>) -> Result<Response, ApiError> {
    let (name, version) = path.0;
    send(&app, find(&app, &name, &version)?).await
}

/// The file of the version of an expert set that answers now.
#[utoipa::path(
    get,
    path = "/sets/{name}/file",
    operation_id = "download_set",
    tag = "sets",
    responses((status = 200, description = "The file.", content(("application/octet-stream")))),
    extensions(
        ("x-errors" = json!(errors(&[&[ErrorCode::Unauthorized], NAMED]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/sets/cifar100/file | wc -c"]))),
    ),
)]
async fn current_file(State(app): State<AppState>, _: Viewer, name: ApiPath<String>) -> Result<Response, ApiError> {
    send(&app, find(&app, &name.0, CURRENT)?).await
}

/// A version as it stands in a path.
pub fn checked_version(name: &str, version: &str) -> Result<u64, ApiError> {
    if !store_layout::is_valid_name(name) {
        return Err(ApiError::invalid(store_layout::NAME_RULE));
    }
    store_layout::parse_version(version)
        .ok_or_else(|| ApiError::invalid("a version is a whole number without leading zeros"))
}

fn find(app: &App, name: &str, version: &str) -> Result<Arc<SetDescriptor>, ApiError> {
    let version = if version == CURRENT { None } else { Some(checked_version(name, version)?) };
    Ok(app.classifier.registry.lookup(name, version)?.set)
}

/// What the file of the version says that answers now; nothing when it cannot be read.
pub async fn current_details(app: &App, name: &str) -> Option<SetDetails> {
    let set = find(app, name, CURRENT).ok()?;
    app.bulk.run(move || read_details(&set)).await.ok()?.ok()
}

fn read_details(set: &SetDescriptor) -> anyhow::Result<SetDetails> {
    let header = header(&set.location)?;
    let Contents::ExpertSet(own) = header.contents else { anyhow::bail!("it is no expert set any more") };
    Ok(SetDetails {
        set: set.name.clone(),
        version: set.version,
        digest: header.digest.to_string(),
        labels: own.labels,
        base: own.borrowed_experts.map(|digest| digest.to_string()),
        temperature: own.temperature,
        knows_unknown: own.familiarity.is_some(),
        view: own.view,
        accuracy: own.report.get("accuracy").filter(|accuracy| accuracy.is_object()).cloned(),
        report: Some(own.report).filter(Value::is_object),
        card: own.card.map(|card| json!(card)),
    })
}

/// The file went, or was replaced by something else, behind the server's back.
fn unreadable(name: &str, error: &anyhow::Error) -> ApiError {
    tracing::warn!(set.name = name, reason = sentence(error), "the file of an expert set cannot be read");
    ApiError::new(ErrorCode::Conflict, format!("the file of expert set `{name}` cannot be read; the log says why"))
}

async fn send(app: &App, set: Arc<SetDescriptor>) -> Result<Response, ApiError> {
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::ETAG, format!("\"{}\"", set.digest)),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{}-{}.safetensors\"", set.name, set.version)),
    ];
    let path: PathBuf = match &set.location {
        Location::Embedded(file) => return Ok((headers, Bytes::from_static(file.bytes())).into_response()),
        Location::File(path) => path.clone(),
    };
    let open = move || {
        let file = open_file(&path)?;
        let bytes = file.metadata()?.len();
        anyhow::Ok((file, bytes))
    };
    let (file, bytes) = app.bulk.run(open).await?.map_err(|error| unreadable(&set.name, &error))?;
    // An open file stays what it is when another one takes its place.
    let reader = tokio::fs::File::from_std(file).take(bytes);
    let pieces = stream::try_unfold(reader, async |mut reader| {
        let mut piece = Vec::with_capacity(PIECE);
        let read = (&mut reader).take(PIECE as u64).read_to_end(&mut piece).await?;
        std::io::Result::Ok((read > 0).then(|| (Bytes::from(piece), reader)))
    });
    let length = [(header::CONTENT_LENGTH, bytes.to_string())];
    Ok((headers, length, Body::from_stream(pieces)).into_response())
}
