//! `/teach`: pictures with labels, to teach expert sets from.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use model_core::image::{Crop, DecodeLimits, probe};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Admin;
use super::body::{self, Received, receive};
use super::error::{ApiError, ErrorBody, ErrorCode};
use super::extract::{ApiPath, ApiQuery, RequestContext};
use super::input::{self, FitName, ImageForm};
use super::openapi::{ADMIN, BODY, LIFECYCLE, commands, errors};
use crate::app::AppState;
use crate::classify::{Error, Image};
use crate::compute::reduced::Reduction;
use crate::examples::{Example, ExampleError, Examples, Unsure, check_set};
use crate::fitting::{FitStatus, Fitting, Wish};
use crate::keys::Caller;

/// Errors of an example's picture, and of keeping it.
const KEEP: &[ErrorCode] = &[
    ErrorCode::EmptyBody,
    ErrorCode::BatchTooLarge,
    ErrorCode::ImageTooLarge,
    ErrorCode::UndecodableImage,
    ErrorCode::DeadlineExceeded,
    ErrorCode::Conflict,
    ErrorCode::DiskFull,
];
/// Errors of an example that is named.
const NAMED: &[ErrorCode] = &[ErrorCode::InvalidRequest, ErrorCode::ExampleNotFound, ErrorCode::Conflict];

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default()
        .routes(routes!(list))
        .routes(routes!(add))
        .routes(routes!(show, relabel, remove))
        .routes(routes!(fit, fit_status, cancel_fit))
}

/// How a set is fitted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct FitQuery {
    /// Name of the backbone; otherwise that of the set's current version, and of a new set the one for photographs.
    #[param(value_type = String, required = false, example = "photo")]
    backbone: Option<String>,
    /// Name of the set whose experts are borrowed, on a backbone with blocks; otherwise that of the set's current version, or the
    /// only one that can lend.
    #[param(value_type = String, required = false, example = "cifar100")]
    base: Option<String>,
    /// The part of a picture that matters, `x,y,w,h` in shares of the upright picture; otherwise that of the current version.
    #[param(value_type = String, required = false, example = "0.25,0,0.5,1")]
    crop: Option<String>,
    /// How that part becomes a square: `crop`, `pad` or `stretch`; otherwise as of the current version.
    #[param(inline, value_type = FitName, required = false)]
    fit: Option<String>,
}

/// What an example shows.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct LabelQuery {
    /// The label: 1 to 200 bytes without `/` and control characters that do not begin with a dot.
    #[param(
        min_length = 1,
        max_length = 200,
        pattern = r"^[^./\x00-\x1f\x7f-\x9f][^/\x00-\x1f\x7f-\x9f]*$",
        example = "open"
    )]
    label: String,
}

/// The examples of a set.
#[derive(Debug, Serialize, ToSchema)]
struct ExampleListing {
    set: String,
    /// Number of examples by label.
    labels: BTreeMap<String, usize>,
    /// Every example of the set, by id.
    examples: Vec<Example>,
    /// The last frames that the set could not name, the oldest first, which `PATCH` gives a label.
    unsure: Vec<Unsure>,
    /// Bytes that the examples of all sets take.
    used_bytes: u64,
    /// Bytes that they may take.
    budget_bytes: u64,
}

/// An example that is kept.
#[derive(Debug, Serialize, ToSchema)]
struct Kept {
    #[serde(flatten)]
    example: Example,
    /// Whether the set did not have it yet.
    new: bool,
}

/// An example or a frame that was deleted.
#[derive(Debug, Serialize, ToSchema)]
struct Gone {
    /// Its id.
    deleted: String,
}

/// What became of each picture, in the request's order.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum Outcome {
    Kept(Kept),
    Refused(ErrorBody),
}

fn example() -> Value {
    json!({ "id": "0a1b2c3d4e5f60718293a4b5", "label": "open", "bytes": 20480 })
}

fn unsure_example() -> Value {
    json!({ "id": "5f60718293a4b50a1b2c3d4e", "reason": "unsure", "bytes": 18211, "at": 1770000000.25 })
}

fn fitting(app: &AppState) -> Result<&Fitting, ApiError> {
    Ok(app.fitting.as_ref().ok_or(ExampleError::Off)?)
}

fn fit_example() -> Value {
    json!({
        "set": "door", "state": "done", "progress": 1.0, "images": 60, "backbone": "photo", "base": null, "version": 1, "reason": null,
        "left_out": [], "report": { "images": 60, "folds": 5 },
    })
}

fn examples(app: &AppState) -> Result<&Examples, ApiError> {
    Ok(app.examples.as_ref().ok_or(ExampleError::Off)?)
}

/// The examples of a set.
///
/// A set that does not exist yet may have examples.
#[utoipa::path(
    get,
    path = "/teach/{set}",
    operation_id = "list_examples",
    tag = "teach",
    responses((status = 200, description = "Done.", body = ExampleListing, example = json!({
        "set": "door", "labels": { "open": 1 }, "examples": [example()], "unsure": [unsure_example()], "used_bytes": 20480, "budget_bytes": 268435456,
    }))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::InvalidRequest, ErrorCode::Conflict]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" http://127.0.0.1:8000/teach/door"]))),
    ),
)]
async fn list(State(app): State<AppState>, set: ApiPath<String>, _: Admin) -> Result<Json<ExampleListing>, ApiError> {
    let store = examples(&app)?;
    let (examples, unsure) = (store.list(&set.0)?, store.unsure(&set.0)?);
    let mut labels = BTreeMap::new();
    for example in &examples {
        *labels.entry(example.label.clone()).or_default() += 1;
    }
    let (used_bytes, budget_bytes) = store.bytes();
    Ok(Json(ExampleListing { set: set.0, labels, examples, unsure, used_bytes, budget_bytes }))
}

/// Keep pictures as examples of a label.
///
/// The body is read as `/classify` reads it: one image, or a form with several. The answer is a list in the request's
/// order, in which a picture that is not kept is an error in its place; of a single picture the error is the answer. A
/// picture that the set has under the same label already is kept once; under another label it is refused. A picture with
/// more than 1024 pixels along the longer side is kept as a JPEG of that size.
#[utoipa::path(
    post,
    path = "/teach/{set}/examples",
    operation_id = "add_examples",
    tag = "teach",
    params(LabelQuery),
    request_body(content(("image/jpeg"), ("image/png"), ("application/octet-stream"), (ImageForm = "multipart/form-data"))),
    responses((status = 201, description = "Done.", body = Vec<Outcome>, example = json!([
        { "id": "0a1b2c3d4e5f60718293a4b5", "label": "open", "bytes": 20480, "new": true },
    ]))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, BODY, LIFECYCLE, KEEP]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -F image=@cat.jpg 'http://127.0.0.1:8000/teach/door/examples?label=open'"]))),
    ),
)]
async fn add(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    query: Result<ApiQuery<LabelQuery>, ApiError>,
    admin: Result<Admin, ApiError>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let allowed = (|| {
        let Admin(by) = admin?;
        let label = query?.0.label;
        // Refused before a body is read that nobody keeps.
        let store = examples(&app)?;
        check_set(&set.0)?;
        let entry = app.classifier.admission.enter(&Caller::default(), context.client)?;
        Ok((by, label, store.clone(), entry))
    })();
    let (by, label, store, _entry) = match allowed {
        Ok(allowed) => allowed,
        Err(error) => {
            body::linger(body).await;
            return Err(error);
        }
    };
    let Received { bytes, permit, .. } = receive(&app, context.client, &headers, body).await?;
    let input = input::parse(&app, &headers, bytes).await?;
    let mut outcomes = Vec::with_capacity(input.images.len());
    // Of all pictures together.
    let deadline = Instant::now() + app.limits.request_timeout;
    for image in input.images {
        outcomes.push(keep(&app, &store, (&set.0, &label), image.map_err(ApiError::from), deadline).await);
    }
    drop(permit);
    if outcomes.len() == 1 && outcomes.iter().any(Result::is_err) {
        outcomes.pop().transpose()?;
    }
    let kept = outcomes.iter().flatten().filter(|kept| kept.new).count();
    tracing::info!(by = &*by, set.name = set.0, kept, "examples kept");
    let outcomes = outcomes.into_iter().map(|outcome| match outcome {
        Ok(kept) => Outcome::Kept(kept),
        Err(error) => Outcome::Refused(error.body()),
    });
    Ok((StatusCode::CREATED, Json(outcomes.collect::<Vec<_>>())).into_response())
}

/// Examples of larger pictures are kept as JPEGs of this size: a fifth of the side still has the pixels that a model sees.
const KEPT: Reduction = Reduction { side: 1024, quality: 90 };

async fn keep(
    app: &AppState,
    store: &Examples,
    (set, label): (&str, &str),
    image: Result<Image, ApiError>,
    deadline: Instant,
) -> Result<Kept, ApiError> {
    let Image::Encoded(bytes) = image? else {
        return Err(ApiError::invalid("an example is an image file"));
    };
    if Instant::now() >= deadline {
        return Err(Error::Deadline.into());
    }
    let info = probe(&bytes, &DecodeLimits::default()).map_err(Error::from)?;
    let mut kept = bytes.clone();
    if info.width.max(info.height) > u32::from(KEPT.side) {
        // Before it is made smaller for nothing.
        if let Some((example, new)) = store.recognise(set, label, bytes.clone()).await? {
            return Ok(Kept { example, new });
        }
        let reduced = KEPT.apply(&app.classifier.decoder, bytes.clone());
        let reduced = timeout_at(deadline, reduced).await.map_err(|_| ApiError::from(Error::Deadline))?;
        let reduced = Bytes::from(reduced.map_err(Error::from)?);
        // A drawing may be smaller as it is.
        if reduced.len() < bytes.len() {
            kept = reduced;
        }
    }
    let (example, new) = store.add(set, label, bytes, kept).await?;
    Ok(Kept { example, new })
}

/// The picture of an example or of an unsure frame, as it is kept: with at most 1024 pixels along the longer side.
#[utoipa::path(
    get,
    path = "/teach/{set}/examples/{id}",
    operation_id = "show_example",
    tag = "teach",
    responses((status = 200, description = "The picture.", content(("image/jpeg"), ("image/png"), ("application/octet-stream")))),
    extensions(("x-errors" = json!(errors(&[ADMIN, NAMED])))),
)]
async fn show(State(app): State<AppState>, path: ApiPath<(String, String)>, _: Admin) -> Result<Response, ApiError> {
    let (set, id) = path.0;
    let store = examples(&app)?.clone();
    let bytes = app.bulk.run(move || store.picture(&set, &id)).await??;
    // A picture never changes: its id is the digest of what was sent.
    let headers = [
        (header::CONTENT_TYPE, input::picture_type(&bytes)),
        (header::CACHE_CONTROL, "private, max-age=86400, immutable"),
    ];
    Ok((headers, bytes).into_response())
}

/// Give an example another label, or an unsure frame its first one.
#[utoipa::path(
    patch,
    path = "/teach/{set}/examples/{id}",
    operation_id = "relabel_example",
    tag = "teach",
    params(LabelQuery),
    responses((status = 200, description = "Done.", body = Example, example = json!(example()))),
    extensions(("x-errors" = json!(errors(&[ADMIN, NAMED, &[ErrorCode::DiskFull]])))),
)]
async fn relabel(
    State(app): State<AppState>,
    path: ApiPath<(String, String)>,
    query: ApiQuery<LabelQuery>,
    Admin(by): Admin,
) -> Result<Json<Example>, ApiError> {
    let (set, id) = path.0;
    let example = examples(&app)?.relabel(&set, &id, &query.0.label).await?;
    tracing::info!(by = &*by, set.name = set, example = example.id, "example relabelled");
    Ok(Json(example))
}

/// Delete an example or an unsure frame, and its file.
#[utoipa::path(
    delete,
    path = "/teach/{set}/examples/{id}",
    operation_id = "delete_example",
    tag = "teach",
    responses((status = 200, description = "It is gone.", body = Gone, example = json!({ "deleted": "0a1b2c3d4e5f60718293a4b5" }))),
    extensions(("x-errors" = json!(errors(&[ADMIN, NAMED])))),
)]
async fn remove(
    State(app): State<AppState>,
    path: ApiPath<(String, String)>,
    Admin(by): Admin,
) -> Result<Json<Gone>, ApiError> {
    let (set, id) = path.0;
    examples(&app)?.remove(&set, &id).await?;
    tracing::info!(by = &*by, set.name = set, example = id, "example deleted");
    Ok(Json(Gone { deleted: id }))
}

/// Fit the set to its examples.
///
/// It begins, and the answer does not wait for its end: `GET` says how far it is. The new version takes its place when it is
/// done and answers from then on; the old one stays, and is current again when the new one is deleted. One fit runs at a
/// time, on a thread that gives way to those that answer.
#[utoipa::path(
    post,
    path = "/teach/{set}/fit",
    operation_id = "fit_set",
    tag = "teach",
    params(FitQuery),
    responses((status = 202, description = "It has begun.", body = FitStatus, example = json!(fit_example()))),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::InvalidRequest, ErrorCode::SetNotFound, ErrorCode::Conflict, ErrorCode::DiskFull]]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -X POST http://127.0.0.1:8000/teach/door/fit"]))),
    ),
)]
async fn fit(
    State(app): State<AppState>,
    set: ApiPath<String>,
    query: ApiQuery<FitQuery>,
    Admin(by): Admin,
) -> Result<Response, ApiError> {
    let FitQuery { backbone, base, crop, fit } = query.0;
    let look = input::parse_look(crop.as_deref(), fit.as_deref())?;
    let crop = match look.crop {
        Some(Crop::Pixels(_)) => {
            return Err(ApiError::invalid("the crop of a set is in shares of the picture, from 0 to 1, not in pixels"));
        }
        Some(Crop::Shares(shares)) => Some(shares),
        None => None,
    };
    let wish = Wish { backbone, base, crop, fit: look.fit };
    let status = fitting(&app)?.begin(&set.0, wish).await?;
    tracing::info!(by = &*by, set.name = set.0, images = status.images, "fit begun");
    Ok((StatusCode::ACCEPTED, Json(status)).into_response())
}

/// How far the set's last fit is, and what came of it.
///
/// Fits are remembered until the server ends; what they made is in the store.
#[utoipa::path(
    get,
    path = "/teach/{set}/fit",
    operation_id = "show_fit",
    tag = "teach",
    responses((status = 200, description = "Done.", body = FitStatus, example = json!(fit_example()))),
    extensions(("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::InvalidRequest, ErrorCode::Conflict]])))),
)]
async fn fit_status(State(app): State<AppState>, set: ApiPath<String>, _: Admin) -> Result<Json<FitStatus>, ApiError> {
    Ok(Json(fitting(&app)?.status(&set.0)?))
}

/// Cancel the set's fit; nothing changes then.
#[utoipa::path(
    delete,
    path = "/teach/{set}/fit",
    operation_id = "cancel_fit",
    tag = "teach",
    responses((status = 200, description = "It is cancelled.", body = FitStatus, example = json!(fit_example()))),
    extensions(("x-errors" = json!(errors(&[ADMIN, &[ErrorCode::InvalidRequest, ErrorCode::Conflict]])))),
)]
async fn cancel_fit(
    State(app): State<AppState>,
    set: ApiPath<String>,
    Admin(by): Admin,
) -> Result<Json<FitStatus>, ApiError> {
    let status = fitting(&app)?.cancel(&set.0)?;
    tracing::info!(by = &*by, set.name = set.0, "fit cancelled by request");
    Ok(Json(status))
}
