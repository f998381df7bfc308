//! `POST /v1/vision/custom/{set}` and `/v1/vision/scene`: DeepStack's answers, for clients written for it: video recorders
//! such as Blue Iris, and home automation.

use axum::Json;
use axum::extract::State;
use bytes::Bytes;
use model_core::image::{Seen, upright_size};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::User;
use super::body::{Received, receive};
use super::classify::CLASSIFY;
use super::error::ApiError;
use super::extract::{ApiPath, RequestContext};
use super::input;
use super::openapi::{commands, errors};
use crate::app::AppState;
use crate::classify::{Image, Prediction, Request, predictions};

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(custom)).routes(routes!(scene))
}

/// A picture in a form, as DeepStack's clients send it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a form that axum reads")]
struct DeepStackForm {
    /// One picture as a file of a form.
    #[schema(value_type = String, format = Binary)]
    image: Bytes,
    /// The picture is unknown when the best label's softmax score is lower.
    #[schema(required = false, minimum = 0, maximum = 1)]
    min_confidence: f32,
}

/// What was found in a picture.
#[derive(Debug, Serialize, ToSchema)]
struct Detections {
    /// Always true; a request that fails has another status.
    success: bool,
    /// One, or none when the picture is unknown to the set.
    predictions: Vec<Detection>,
    /// Milliseconds from request to answer.
    duration: u64,
}

/// A label with the part of the picture that the model was shown, in pixels of the upright picture.
#[derive(Debug, Serialize, ToSchema)]
struct Detection {
    label: String,
    /// The label's softmax score.
    confidence: f32,
    x_min: u32,
    y_min: u32,
    x_max: u32,
    y_max: u32,
}

/// What a picture shows.
#[derive(Debug, Serialize, ToSchema)]
struct Scene {
    /// Always true; a request that fails has another status.
    success: bool,
    /// The best label, or `unknown`.
    label: String,
    /// The best label's softmax score; 0 for `unknown`.
    confidence: f32,
    /// Milliseconds from request to answer.
    duration: u64,
}

fn custom_example() -> Value {
    json!({
        "success": true,
        "predictions": [{ "label": "cat", "confidence": 0.91, "x_min": 80, "y_min": 0, "x_max": 560, "y_max": 480 }],
        "duration": 12,
    })
}

fn scene_example() -> Value {
    json!({ "success": true, "label": "cat", "confidence": 0.91, "duration": 12 })
}

/// Classify a picture, in DeepStack's schema for custom models.
///
/// The answer has one prediction, whose box is the part of the picture that the model was shown, or none when the picture is
/// unknown. Errors are those of every route: another status, and `error` with the reason.
#[utoipa::path(
    post,
    path = "/v1/vision/custom/{set}",
    operation_id = "deepstack_custom",
    tag = "classify",
    request_body(content(
        ("image/jpeg"),
        ("image/png"),
        ("application/octet-stream"),
        (DeepStackForm = "multipart/form-data"),
    )),
    responses((status = 200, description = "Done.", body = Detections, example = json!(custom_example()))),
    extensions(
        ("x-errors" = json!(errors(CLASSIFY))),
        ("x-codeSamples" = json!(commands(&["curl -F image=@cat.jpg http://127.0.0.1:8000/v1/vision/custom/cifar100"]))),
    ),
)]
async fn custom(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    user: User,
) -> Result<Json<Detections>, ApiError> {
    let Found { best, seen, size: (width, height), duration } = find(&app, &context, set.0, user).await?;
    let pixel = |share: f64, side: u32| (share * f64::from(side)).round().min(f64::from(side)) as u32;
    let detection = best.map(|Prediction { label, score, .. }| {
        let [x, y, w, h] = seen.map_or([0.0, 0.0, 1.0, 1.0], |seen| seen.crop);
        Detection {
            label,
            confidence: score,
            x_min: pixel(x, width),
            y_min: pixel(y, height),
            x_max: pixel(x + w, width),
            y_max: pixel(y + h, height),
        }
    });
    Ok(Json(Detections { success: true, predictions: detection.into_iter().collect(), duration }))
}

/// Classify a picture with the default set, in DeepStack's schema for scenes.
///
/// Errors are those of every route: another status, and `error` with the reason.
#[utoipa::path(
    post,
    path = "/v1/vision/scene",
    operation_id = "deepstack_scene",
    tag = "classify",
    request_body(content(
        ("image/jpeg"),
        ("image/png"),
        ("application/octet-stream"),
        (DeepStackForm = "multipart/form-data"),
    )),
    responses((status = 200, description = "Done.", body = Scene, example = json!(scene_example()))),
    extensions(
        ("x-errors" = json!(errors(CLASSIFY))),
        ("x-codeSamples" = json!(commands(&["curl -F image=@cat.jpg http://127.0.0.1:8000/v1/vision/scene"]))),
    ),
)]
async fn scene(State(app): State<AppState>, context: RequestContext, user: User) -> Result<Json<Scene>, ApiError> {
    let Found { best, duration, .. } = find(&app, &context, app.set_name(None), user).await?;
    let (label, confidence) = best.map_or(("unknown".to_owned(), 0.0), |best| (best.label, best.score));
    Ok(Json(Scene { success: true, label, confidence, duration }))
}

/// What there is to say about one picture.
struct Found {
    /// None when the picture is unknown.
    best: Option<Prediction>,
    seen: Option<Seen>,
    /// Pixels across and down.
    size: (u32, u32),
    duration: u64,
}

async fn find(app: &AppState, context: &RequestContext, set: String, user: User) -> Result<Found, ApiError> {
    let User { client, mut entry, headers, body } = user;
    let Received { bytes, deadline, permit } = receive(app, client, &headers, body).await?;
    let mut input = input::parse(app, &headers, bytes).await?;
    let Some(Ok(Image::Encoded(picture))) = input.images.first().filter(|_| input.images.len() == 1) else {
        return Err(ApiError::invalid(
            "DeepStack's schema answers for one picture; send one file in the field `image`",
        ));
    };
    // Without a header that can be read there is no answer either.
    let size = upright_size(picture).unwrap_or_default();
    let request = Request {
        set,
        version: None,
        images: std::mem::take(&mut input.images),
        routing: false,
        look: input.look,
        min_score: input.min_score,
        started: context.started,
        deadline,
    };
    let answers = app.classifier.answer(&mut entry, request).await?;
    drop(permit);
    let none = || ApiError::internal("a picture has no answer");
    let answer = answers.images.into_iter().next().ok_or_else(none)?.map_err(ApiError::from)?;
    let is_unknown = answer.verdict.unknown == Some(true);
    let best = predictions(&answer.logits, answers.lease.value.labels(), 1).pop().filter(|_| !is_unknown);
    let duration = u64::try_from(context.started.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(Found { best, seen: answer.seen, size, duration })
}
