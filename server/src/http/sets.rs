//! `/sets`: which expert sets there are, what they are doing, and what an administrator may do with them.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Admin;
use super::body;
use super::error::{ApiError, ErrorCode};
use super::extract::{ApiPath, RequestContext};
use super::openapi::{ADMIN, LIFECYCLE, LOAD, commands, errors};
use super::set_file::{SetDetails, checked_version, current_details};
use crate::app::AppState;
use crate::keys::Caller;
use crate::sets::catalog::{self, CatalogError};
use crate::sets::registry::{Kind, SetState, SetStatus};
use crate::sets::upload::Upload;

/// Errors of an upload.
pub const UPLOAD: &[ErrorCode] = &[
    ErrorCode::InvalidRequest,
    ErrorCode::EmptyBody,
    ErrorCode::BodyTooLarge,
    ErrorCode::UnsupportedMediaType,
    ErrorCode::InvalidArtifact,
    ErrorCode::BackboneMismatch,
    ErrorCode::LenderMismatch,
    ErrorCode::Conflict,
    ErrorCode::QueueFull,
    ErrorCode::BodyTimeout,
    ErrorCode::SetTooLarge,
    ErrorCode::DiskFull,
];

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default()
        .routes(routes!(list))
        .routes(routes!(show, delete_set))
        .routes(routes!(upload, delete_version))
        .routes(routes!(load))
        .routes(routes!(unload))
        .routes(routes!(pin))
        .routes(routes!(unpin))
}

fn example_view() -> Value {
    json!({
        "name": "flowers",
        "version": 1,
        "state": "resident",
        "pinned": false,
        "current": true,
        "ready": true,
        "resident_bytes": 236544,
        "file_bytes": 181272,
        "num_classes": 17,
        "backbone": "default",
        "backbone_digest": "5be9c1d3a7f0426e8b1d5c9e7a3f0b2d4c6e8f0a1b3d5c7e9f1a2b4c6d8e0f13",
        "base": null,
        "generation": "flowers:1:0a1b2c3d4e5f",
        "hits": 12,
        "last_used": 1770000000.25,
        "reason": null,
    })
}

fn example_listing() -> Value {
    json!({
        "default": "cifar100",
        "sets": [example_view()],
        "broken": [{ "file": "expert-sets/roses/1.safetensors", "reason": "the file ends in mid-tensor" }],
        "memory": {
            "budget_bytes": 67108864,
            "accounted_bytes": 16777216,
            "kinds": { "backbone": 4194304, "loading": 0, "queue": 8388608, "scratch": 3957760, "sets": 236544 },
        },
    })
}

/// One version of an expert set.
#[derive(Debug, Serialize, ToSchema)]
pub struct SetView {
    name: String,
    version: u64,
    state: SetState,
    /// Whether it is never evicted.
    pinned: bool,
    /// Whether requests without a version get this one.
    current: bool,
    /// Whether a request would be answered now or after a load.
    ready: bool,
    /// Accounted bytes when resident, 0 otherwise.
    resident_bytes: usize,
    file_bytes: u64,
    num_classes: usize,
    backbone: String,
    backbone_digest: String,
    /// Generation of the set whose experts it borrows, or null.
    base: Option<String>,
    /// Name, version and content digest of what answers.
    generation: String,
    /// Requests it has answered from memory.
    hits: u64,
    /// Seconds since 1970, or null.
    last_used: Option<f64>,
    /// Why the last load failed, or why it is not ready.
    reason: Option<String>,
    /// What its file says, in the answer about one set, of the current version.
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<SetDetails>,
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
            base: status.base,
            generation: status.resident_generation.unwrap_or_else(|| descriptor.generation()),
            hits: status.hits,
            last_used: status.last_used.and_then(seconds),
            reason: status.reason,
            details: None,
        }
    }
}

/// A file of the store that could not be registered.
#[derive(Debug, Serialize, ToSchema)]
struct BrokenView {
    file: String,
    reason: String,
}

/// All expert sets, and the memory they use.
#[derive(Debug, Serialize, ToSchema)]
struct Listing {
    /// The expert set of requests that name none.
    default: String,
    sets: Vec<SetView>,
    broken: Vec<BrokenView>,
    memory: MemoryView,
}

/// The memory budget and its use.
#[derive(Debug, Serialize, ToSchema)]
struct MemoryView {
    budget_bytes: usize,
    accounted_bytes: usize,
    /// The accounted bytes by kind; the queue's are set aside whether it is full or not.
    kinds: BTreeMap<&'static str, usize>,
}

/// Every version of every expert set, and the memory they take.
#[utoipa::path(
    get,
    path = "/sets",
    operation_id = "list_sets",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Listing, example = json!(example_listing()))),
    extensions(
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/sets"]))),
    ),
)]
async fn list(State(app): State<AppState>) -> Json<Listing> {
    let budget = app.classifier.registry.budget();
    let kinds = Kind::ALL.map(|kind| (kind.as_str(), budget.used(kind)));
    let broken = app.catalog.broken();
    let broken = broken.iter().map(|broken| {
        // Where the store is on the disk is none of the client's business.
        let path = format!("{}: ", broken.path.display());
        BrokenView { file: broken.file_name(), reason: broken.reason.replace(&path, "") }
    });
    Json(Listing {
        default: app.default_set().to_owned(),
        sets: app.classifier.registry.list().into_iter().map(SetView::from).collect(),
        broken: broken.collect(),
        memory: MemoryView { budget_bytes: budget.limit(), accounted_bytes: budget.total(), kinds: kinds.into() },
    })
}

/// Every version of one expert set.
#[utoipa::path(
    get,
    path = "/sets/{name}",
    operation_id = "show_set",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Vec<SetView>, example = json!([example_view()]))),
    extensions(
        ("x-errors" = json!(errors(&[&[ErrorCode::SetNotFound]]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/sets/cifar100"]))),
    ),
)]
async fn show(State(app): State<AppState>, name: ApiPath<String>) -> Result<Json<Vec<SetView>>, ApiError> {
    let Json(mut views) = views(&app, &name.0)?;
    let details = current_details(&app, &name.0).await;
    if let Some(current) = views.iter_mut().find(|view| details.as_ref().is_some_and(|of| of.version == view.version)) {
        current.details = details;
    }
    Ok(Json(views))
}

/// Every version of one set.
fn views(app: &AppState, name: &str) -> Result<Json<Vec<SetView>>, ApiError> {
    Ok(Json(app.classifier.registry.status(name)?.into_iter().map(SetView::from).collect()))
}

/// Upload a version of an expert set.
///
/// The file is checked from its first byte to its last before it takes its place. When it replaces what is in memory it is
/// loaded before the answer, so that every request after the answer gets the new one; should that fail, the answer's
/// `reason` says why and the old generation goes on answering.
#[utoipa::path(
    put,
    path = "/sets/{name}/{version}",
    operation_id = "upload_set",
    tag = "sets",
    request_body(content(("application/octet-stream"))),
    responses(
        (status = 200, description = "It replaced that version.", body = SetView, example = json!(example_view())),
        (status = 201, description = "The version is new.", body = SetView, example = json!(example_view())),
    ),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, LIFECYCLE, UPLOAD]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -T flowers.safetensors http://127.0.0.1:8000/sets/flowers/1"]))),
    ),
)]
async fn upload(
    State(app): State<AppState>,
    context: RequestContext,
    path: ApiPath<(String, String)>,
    admin: Result<Admin, ApiError>,
    headers: HeaderMap,
    mut body: Body,
) -> Result<Response, ApiError> {
    let (name, version) = path.0;
    let checked = async {
        let Admin(by) = admin?;
        let _entry = app.classifier.admission.enter(&Caller::default(), context.client)?;
        let version = checked_version(&name, &version)?;
        let upload = receive(&app, &headers, &mut body).await?;
        let is_new = app.catalog.publish(upload, &name, version).await?;
        tracing::info!(by = &*by, set.name = name, set.version = version, "expert set uploaded");
        Ok((version, is_new))
    };
    let (version, is_new) = match checked.await {
        Ok(published) => published,
        Err(error) => {
            body::linger(body).await;
            return Err(error);
        }
    };
    if catalog::replaces_resident(&app.classifier.registry, &name, version) {
        // The outcome is in the registry, and so in the answer.
        let _ = app.classifier.registry.load(&name, Some(version), app.classifier.load_wait).await;
    }
    let status = app.classifier.registry.status(&name)?.into_iter().find(|status| status.descriptor.version == version);
    let view = SetView::from(status.ok_or_else(|| set_vanished(&name))?);
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(view)).into_response())
}

fn set_vanished(name: &str) -> ApiError {
    ApiError::new(ErrorCode::Conflict, format!("expert set `{name}` was deleted meanwhile"))
}

/// Streams a body to a temporary file of the store.
pub async fn receive(app: &AppState, headers: &HeaderMap, body: &mut Body) -> Result<Upload, ApiError> {
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        let message = "artifacts are uploaded as they are, without content encoding";
        return Err(ApiError::new(ErrorCode::UnsupportedMediaType, message));
    }
    let limit = app.limits.max_upload_bytes;
    let too_large = || {
        let message = format!("the file is larger than the {limit} bytes that may be uploaded");
        Err(ApiError::new(ErrorCode::BodyTooLarge, message))
    };
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|announced| announced > limit as u64) {
        return too_large();
    }
    let mut upload = app.catalog.begin_upload().await?;
    let mut pieces = body::Pieces::of(body, app.limits.body_timeout);
    let mut received = 0;
    while let Some(data) = pieces.next().await? {
        received += data.len();
        if received > limit {
            return too_large();
        }
        upload.write(&data).await.map_err(CatalogError::from)?;
    }
    if received == 0 {
        return Err(ApiError::new(ErrorCode::EmptyBody, "the request has no body; send an artifact"));
    }
    Ok(upload)
}

/// Names what a deletion removed.
#[derive(Debug, Serialize, ToSchema)]
struct Deleted {
    /// Generations: name, version and content digest.
    deleted: Vec<String>,
}

/// Forget an expert set and delete its files.
///
/// A pinned set stays, and so do the last version of the default set and a set whose experts others borrow.
#[utoipa::path(
    delete,
    path = "/sets/{name}",
    operation_id = "delete_set",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Deleted, example = json!({ "deleted": ["flowers:1:0a1b2c3d4e5f"] }))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::SetNotFound, ErrorCode::Conflict]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X DELETE http://127.0.0.1:8000/sets/flowers"]))),
    ),
)]
async fn delete_set(
    State(app): State<AppState>,
    name: ApiPath<String>,
    Admin(by): Admin,
) -> Result<Json<Deleted>, ApiError> {
    delete(&app, &by, &name.0, None).await
}

/// Forget one version of an expert set and delete its file.
///
/// A pinned set stays, and so do the last version of the default set and a set whose experts others borrow.
#[utoipa::path(
    delete,
    path = "/sets/{name}/{version}",
    operation_id = "delete_set_version",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Deleted, example = json!({ "deleted": ["flowers:1:0a1b2c3d4e5f"] }))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::SetNotFound, ErrorCode::Conflict, ErrorCode::InvalidRequest]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X DELETE http://127.0.0.1:8000/sets/flowers/1"]))),
    ),
)]
async fn delete_version(
    State(app): State<AppState>,
    path: ApiPath<(String, String)>,
    Admin(by): Admin,
) -> Result<Json<Deleted>, ApiError> {
    let (name, version) = path.0;
    let version = checked_version(&name, &version)?;
    delete(&app, &by, &name, Some(version)).await
}

async fn delete(app: &AppState, by: &str, name: &str, version: Option<u64>) -> Result<Json<Deleted>, ApiError> {
    let known = app.classifier.registry.status(name)?;
    let is_last = known.iter().all(|status| version.is_none_or(|version| status.descriptor.version == version));
    if is_last && name == app.default_set() {
        let message = format!("expert set `{name}` answers requests that name none, so its last version stays");
        return Err(ApiError::new(ErrorCode::Conflict, message));
    }
    let gone = app.catalog.delete(name, version).await?;
    tracing::info!(by, set.name = name, versions = gone.len(), "expert set deleted");
    Ok(Json(Deleted { deleted: gone.iter().map(|descriptor| descriptor.generation()).collect() }))
}

/// Load the newest version there is on the disk.
#[utoipa::path(
    post,
    path = "/sets/{name}/load",
    operation_id = "load_set",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Vec<SetView>, example = json!([example_view()]))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, LOAD]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X POST http://127.0.0.1:8000/sets/flowers/load"]))),
    ),
)]
async fn load(
    State(app): State<AppState>,
    name: ApiPath<String>,
    Admin(by): Admin,
) -> Result<Json<Vec<SetView>>, ApiError> {
    load_set(&app, &by, &name.0).await?;
    views(&app, &name.0)
}

/// Drop an expert set from memory.
///
/// A pinned set stays.
#[utoipa::path(
    post,
    path = "/sets/{name}/unload",
    operation_id = "unload_set",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Vec<SetView>, example = json!([example_view()]))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::SetNotFound, ErrorCode::Conflict]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X POST http://127.0.0.1:8000/sets/flowers/unload"]))),
    ),
)]
async fn unload(
    State(app): State<AppState>,
    name: ApiPath<String>,
    Admin(by): Admin,
) -> Result<Json<Vec<SetView>>, ApiError> {
    unload_set(&app, &by, &name.0)?;
    views(&app, &name.0)
}

/// Load an expert set and never evict it.
#[utoipa::path(
    post,
    path = "/sets/{name}/pin",
    operation_id = "pin_set",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Vec<SetView>, example = json!([example_view()]))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, LOAD, &[ErrorCode::Conflict]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X POST http://127.0.0.1:8000/sets/flowers/pin"]))),
    ),
)]
async fn pin(
    State(app): State<AppState>,
    name: ApiPath<String>,
    Admin(by): Admin,
) -> Result<Json<Vec<SetView>>, ApiError> {
    app.classifier.registry.pin(&name.0, app.classifier.load_wait).await?;
    tracing::info!(by = &*by, set.name = name.0, "expert set pinned");
    views(&app, &name.0)
}

/// Let an expert set be evicted again.
#[utoipa::path(
    post,
    path = "/sets/{name}/unpin",
    operation_id = "unpin_set",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Vec<SetView>, example = json!([example_view()]))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::SetNotFound]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X POST http://127.0.0.1:8000/sets/flowers/unpin"]))),
    ),
)]
async fn unpin(
    State(app): State<AppState>,
    name: ApiPath<String>,
    Admin(by): Admin,
) -> Result<Json<Vec<SetView>>, ApiError> {
    app.classifier.registry.unpin(&name.0)?;
    tracing::info!(by = &*by, set.name = name.0, "expert set unpinned");
    views(&app, &name.0)
}

/// Loads the newest version there is on the disk.
///
/// # Errors
/// Those of the registry; what was resident stays.
pub async fn load_set(app: &AppState, by: &str, name: &str) -> Result<(), ApiError> {
    app.catalog.refresh(name).await?;
    let lease = app.classifier.registry.load(name, None, app.classifier.load_wait).await?;
    tracing::info!(by, set.generation = lease.descriptor.generation(), "expert set loaded");
    Ok(())
}

/// Drops every version of a set from memory.
///
/// # Errors
/// 404; 409 when it is pinned.
pub fn unload_set(app: &AppState, by: &str, name: &str) -> Result<(), ApiError> {
    app.classifier.registry.unload(name)?;
    tracing::info!(by, set.name = name, "expert set unloaded");
    Ok(())
}
