//! `/cameras` and `/events`: what cameras show that the server asks for pictures by itself.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Viewer;
use super::error::{ApiError, ErrorCode};
use super::extract::{ApiPath, ApiQuery};
use super::input::picture_type;
use super::openapi::{SetName, commands, errors};
use crate::app::{App, AppState};
use crate::cameras::{BrokerView, CameraView, Change, Reader};
use crate::classify::Error;
use crate::compute::reduced::Reduction;

/// What a camera's frame is shown as.
const THUMBNAIL: Reduction = Reduction { side: 320, quality: 75 };

/// Errors of whoever has no key where one is needed.
const VIEWER: &[ErrorCode] = &[ErrorCode::Unauthorized];
/// Errors of a frame.
const FRAME: &[ErrorCode] =
    &[ErrorCode::CameraNotFound, ErrorCode::InvalidRequest, ErrorCode::QueueFull, ErrorCode::DeadlineExceeded];
/// How often a stream without changes shows that it is alive.
const ALIVE_EVERY: Duration = Duration::from_secs(15);

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(list)).routes(routes!(show)).routes(routes!(frame)).routes(routes!(events))
}

/// All cameras of the file.
#[derive(Debug, Serialize, ToSchema)]
struct CameraListing {
    /// In the order of the file; none without `--cameras`.
    cameras: Vec<CameraView>,
    /// Why the file as it is now is not in force; the cameras are those of the file before.
    file_error: Option<String>,
    /// The MQTT broker that hears of them; null when the file names none.
    mqtt: Option<BrokerView>,
    /// Whether the server keeps examples (`--examples`), and so may be taught from frames.
    examples: bool,
}

/// Which picture of a camera.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct FrameQuery {
    /// Whether to answer the frame as the camera sent it.
    #[serde(default)]
    #[param(required = false, default = false)]
    whole: bool,
}

/// A camera and its last changes.
#[derive(Debug, Serialize, ToSchema)]
struct CameraDetail {
    #[serde(flatten)]
    camera: CameraView,
    /// The last 64 changes of condition or state, the newest first.
    changes: Vec<Change>,
}

fn example() -> Value {
    json!({
        "name": "garage",
        "set": "garage-door",
        "condition": "ok",
        "state": "closed",
        "since": 1770000000.25,
        "label": "closed",
        "score": 0.98,
        "unknown_reason": null,
        "generation": "garage-door:1:0a1b2c3d4e5f",
        "last_frame": 1770000420.5,
        "error": null,
        "frames": 420,
        "failures": 1,
        "every": 1.0,
    })
}

fn example_detail() -> Value {
    let mut detail = example();
    detail["changes"] = json!([{ "at": 1770000000.25, "condition": "ok", "state": "closed", "score": 0.97 }]);
    detail
}

/// Every camera, as it is now.
#[utoipa::path(
    get,
    path = "/cameras",
    operation_id = "list_cameras",
    tag = "cameras",
    responses((status = 200, description = "Done.", body = CameraListing, example = json!({ "cameras": [example()], "file_error": null, "mqtt": { "broker": "192.168.1.2:1883", "connected": true, "error": null }, "examples": true }))),
    extensions(
        ("x-errors" = json!(errors(&[VIEWER]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/cameras"]))),
    ),
)]
async fn list(State(app): State<AppState>, _: Viewer) -> Json<CameraListing> {
    let file_error = app.cameras.file_error();
    Json(CameraListing {
        cameras: app.cameras.all().iter().map(|camera| camera.view()).collect(),
        file_error,
        mqtt: app.cameras.broker(),
        examples: app.examples.is_some(),
    })
}

/// One camera and its last changes.
#[utoipa::path(
    get,
    path = "/cameras/{name}",
    operation_id = "show_camera",
    tag = "cameras",
    params(("name" = inline(SetName), Path, description = "The name of a camera.")),
    responses((status = 200, description = "Done.", body = CameraDetail, example = json!(example_detail()))),
    extensions(("x-errors" = json!(errors(&[VIEWER, &[ErrorCode::CameraNotFound]])))),
)]
async fn show(State(app): State<AppState>, _: Viewer, name: ApiPath<String>) -> Result<Json<CameraDetail>, ApiError> {
    let camera = app.cameras.find(&name.0).ok_or_else(|| unknown(&name.0))?;
    Ok(Json(CameraDetail { camera: camera.view(), changes: camera.changes() }))
}

fn unknown(name: &str) -> ApiError {
    ApiError::new(ErrorCode::CameraNotFound, format!("there is no camera `{name}`"))
}

/// The last frame of a camera, as a small JPEG or as it came.
#[utoipa::path(
    get,
    path = "/cameras/{name}/frame",
    operation_id = "camera_frame",
    tag = "cameras",
    params(("name" = inline(SetName), Path, description = "The name of a camera."), FrameQuery),
    responses((
        status = 200,
        description = "A JPEG of at most 320 pixels along its longer side, or the whole frame.",
        content(("image/jpeg"), ("image/png"), ("application/octet-stream")),
    )),
    extensions(("x-errors" = json!(errors(&[VIEWER, FRAME])))),
)]
async fn frame(
    State(app): State<AppState>,
    _: Viewer,
    name: ApiPath<String>,
    query: ApiQuery<FrameQuery>,
) -> Result<Response, ApiError> {
    let camera = app.cameras.find(&name.0).ok_or_else(|| unknown(&name.0))?;
    let none = || ApiError::new(ErrorCode::CameraNotFound, format!("there is no frame of the camera `{}`", name.0));
    let frame = camera.frame().ok_or_else(none)?;
    let picture = if query.0.whole {
        let full = || ApiError::new(ErrorCode::QueueFull, "other whole frames are on their way; try again later");
        app.cameras.leaving(frame).ok_or_else(full)?
    } else {
        let made = timeout(app.limits.request_timeout, THUMBNAIL.apply(&app.classifier.decoder, frame)).await;
        made.map_err(|_| ApiError::from(Error::Deadline))?.map_err(ApiError::internal)?.into()
    };
    let headers = [(header::CONTENT_TYPE, picture_type(&picture)), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, picture).into_response())
}

/// Changes of cameras, as server-sent events.
///
/// Each event is called `camera`, and its data is the camera as `/cameras` lists it. The stream begins with one event for
/// each camera; it ends when the server stops, and at once when the server has no file of cameras.
#[utoipa::path(
    get,
    path = "/events",
    tag = "cameras",
    responses((status = 200, description = "A stream that does not end by itself.", content_type = "text/event-stream", body = String)),
    extensions(("x-errors" = json!(errors(&[VIEWER, &[ErrorCode::QueueFull]])))),
)]
async fn events(State(app): State<AppState>, _: Viewer) -> Result<Response, ApiError> {
    let full = || ApiError::new(ErrorCode::QueueFull, "as many streams of events are open as may be; try again later");
    let reader = app.cameras.reader().ok_or_else(full)?;
    Ok(Sse::new(stream_of(&app, reader)).keep_alive(KeepAlive::new().interval(ALIVE_EVERY)).into_response())
}

fn stream_of(app: &App, reader: Reader) -> impl Stream<Item = Result<Event, Infallible>> + use<> {
    let now: Vec<CameraView> = app.cameras.all().iter().map(|camera| camera.view()).collect();
    let changes = stream::unfold(reader, |mut reader| async move {
        loop {
            let Reader { changes, end, .. } = &mut reader;
            let change = tokio::select! {
                change = changes.recv() => change,
                () = end.cancelled() => return None,
            };
            match change {
                Ok(view) => return Some((view, reader)),
                // A slow reader misses changes, not the last ones.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    });
    let event = |view: CameraView| Event::default().event("camera").json_data(&view).unwrap_or_default();
    stream::iter(now).chain(changes).map(move |view| Ok(event(view)))
}
