//! `POST /classify`: an image in, labels out.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::future::join_all;
use model_core::image::RgbImage;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::oneshot::error::RecvError;
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;

use super::auth;
use super::extract::{ApiPath, ApiQuery, RequestContext};
use super::openapi::{
    Api, BODY_ERRORS, LIFECYCLE_ERRORS, LOAD_ERRORS, Method, Operation, Shape, set_name_schema, version_schema,
};
use super::{body, input};
use crate::admission::{ImagePermit, Refused};
use crate::app::AppState;
use crate::compute::{Answer, ForwardFailed, Job};
use crate::error::{ApiError, ErrorBody, ErrorCode};
use crate::keys::Caller;
use crate::metrics::ImageResult;
use crate::routing_map::RoutingMap;
use crate::sets::loaded::SetLease;
use crate::statistics::Timings;

/// Labels answered when the request does not say how many.
pub(super) const DEFAULT_TOP_K: usize = 5;
/// Names the expert set that answered.
pub const EXPERT_SET: HeaderName = HeaderName::from_static("x-expert-set");
/// Names the generation that answered: name, version and content digest.
pub const EXPERT_SET_GENERATION: HeaderName = HeaderName::from_static("x-expert-set-generation");
/// Time of each stage, for browsers.
pub const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// The routes of this resource. `PUT` is there for `curl -T image.jpg`.
pub fn routes(api: Api) -> Api {
    let with_default = |id| {
        let name = "Expert set to ask; the default set when left out.";
        describe(id, "Classify images").query("set", name, set_name_schema())
    };
    let with_named = |id| describe(id, "Classify images with a named expert set");
    api.on(Method::Post, "/classify", classify_default, with_default("classify").command(CURL_FILE).command(CURL_JSON))
        .on(Method::Put, "/classify", classify_default, with_default("classify_put").command(CURL_UPLOAD))
        .on(Method::Post, "/classify/{set}", classify_named, with_named("classify_with").command(CURL_ROUTING))
        .on(Method::Put, "/classify/{set}", classify_named, with_named("classify_with_put").command(CURL_UPLOAD_NAMED))
}

const CURL_FILE: &str = "curl -F image=@cat.jpg 'http://127.0.0.1:8000/classify?top_k=3'";
const CURL_JSON: &str =
    "curl http://127.0.0.1:8000/classify --json \"{\\\"inputs\\\": \\\"$(base64 -w0 cat.jpg)\\\"}\"";
const CURL_UPLOAD: &str = "curl -T cat.jpg http://127.0.0.1:8000/classify";
const CURL_ROUTING: &str = "curl --data-binary @cat.jpg 'http://127.0.0.1:8000/classify/cifar100?routing=true'";
const CURL_UPLOAD_NAMED: &str = "curl -T cat.jpg http://127.0.0.1:8000/classify/cifar100";

fn describe(id: &'static str, summary: &'static str) -> Operation {
    let answer = Shape::any_of([Shape::of::<Classification>(), Shape::list_of::<BatchItem>()]);
    let top_k = json!({ "type": "integer", "minimum": 1, "default": DEFAULT_TOP_K });
    image_bodies(Operation::new("classify", id, summary))
        .description(
            "The body is read by its content type: `multipart/form-data` takes files under any name (and \
             a field `set` that names the expert set unless path or query do), \
             `application/json` takes base64, and everything else that may be an image (`image/*`, \
             `application/octet-stream` or no content type at all) is one image. JPEG, PNG, WebP, GIF (the first \
             frame) and BMP are read. One image answers an object; several files, or a list in JSON, answer a list in \
             request order, in which a bad image is an error in its place.",
        )
        .query("version", "Version to ask; the current one when left out.", version_schema())
        .query("top_k", "How many labels to answer, best first; it goes before the body's `top_k`.", top_k)
        .query("routing", "Whether to answer the routing map as well.", json!({ "type": "boolean", "default": false }))
        .json(answer, example())
        .answer_header(200, "x-expert-set", "The expert set that answered.", true)
        .answer_header(200, "x-expert-set-generation", "Its name, version and content digest.", true)
        .answer_header(200, "Server-Timing", "Milliseconds of each stage.", true)
}

/// Errors of images, and of what is done with them.
pub(super) const IMAGE_ERRORS: [ErrorCode; 5] = [
    ErrorCode::EmptyBody,
    ErrorCode::BatchTooLarge,
    ErrorCode::ImageTooLarge,
    ErrorCode::UndecodableImage,
    ErrorCode::DeadlineExceeded,
];

/// The bodies in which images are taken, and what is said of those that are not.
pub(super) fn image_bodies(operation: Operation) -> Operation {
    let form = json!({
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": { "type": "string", "format": "binary", "description": "A file; further files, and this one, may have any name." },
            "top_k": { "type": "integer", "minimum": 1 },
        },
    });
    ["image/jpeg", "image/png", "application/octet-stream"]
        .into_iter()
        .fold(operation, |operation, media_type| operation.body(media_type, Shape::bytes(), Value::Null))
        .body("multipart/form-data", Shape::inline(form), Value::Null)
        .body("application/json", Shape::of::<input::JsonRequest>(), input::example())
        .user()
        .errors(BODY_ERRORS)
        .errors(LIFECYCLE_ERRORS)
        .errors(LOAD_ERRORS)
        .errors(IMAGE_ERRORS)
}

fn example() -> Value {
    json!({
        "set": "cifar100",
        "version": 1,
        "generation": "cifar100:1:0a1b2c3d4e5f",
        "predictions": [{ "label": "hamster", "score": 0.91, "index": 36 }, { "label": "mouse", "score": 0.03, "index": 50 }],
        "timings_ms": { "decode": 0.31, "queue": 0.02, "inference": 2.4, "total": 2.9 },
    })
}

/// Query parameters of `/classify`.
#[derive(Debug, Default, serde::Deserialize)]
pub struct ClassifyQuery {
    set: Option<String>,
    version: Option<u64>,
    top_k: Option<String>,
    #[serde(default)]
    routing: bool,
}

/// One image's answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Classification {
    /// The expert set that answered.
    pub set: String,
    /// Its version.
    pub version: u64,
    /// Its generation: name, version and content digest.
    pub generation: String,
    /// Labels, best first.
    pub predictions: Vec<Prediction>,
    /// Where the time went.
    pub timings_ms: Timings,
    /// Which experts each patch went to, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingMap>,
}

/// One label with its score.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Prediction {
    /// The label.
    pub label: String,
    /// Softmax over all labels of the set.
    pub score: f32,
    /// The label's place in the set.
    pub index: usize,
}

/// An image's answer, or what was wrong with it.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum BatchItem {
    Ok(Box<Classification>),
    Err(ErrorBody),
}

async fn classify_default(
    State(app): State<AppState>,
    context: RequestContext,
    query: ApiQuery<ClassifyQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    classify(app, context, None, query.0, headers, body).await
}

async fn classify_named(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    query: ApiQuery<ClassifyQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    classify(app, context, Some(set.0), query.0, headers, body).await
}

async fn classify(
    app: AppState,
    context: RequestContext,
    set: Option<String>,
    query: ClassifyQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (admitted, body) = admit(&app, &headers, body).await?;
    let received = body::receive(&app, &headers, body, context.deadline).await?;
    let input = input::parse(&headers, received.bytes.clone(), app.limits.max_images).await?;
    let top_k = match query.top_k {
        Some(text) => Some(input::parse_top_k(&text)?),
        None => input.top_k,
    };
    let request = ImageRequest {
        set: set.or(query.set).or(input.set),
        version: query.version,
        images: input.images.into_iter().map(|image| image.map(Image::Encoded)).collect(),
        routing: query.routing,
        started: context.started,
        deadline: context.deadline,
        caller: admitted.caller.clone(),
    };
    let answers = answer_images(&app, request).await?;
    // The encoded bytes are not needed any more, and the answer may be slow to leave.
    drop(received);
    respond(answers, top_k.unwrap_or(DEFAULT_TOP_K), input.is_batch)
}

/// A request that may cost real work, until dropped.
pub struct Admitted {
    /// Whose images they are; the first is counted already.
    pub caller: Caller,
    _permit: OwnedSemaphorePermit,
}

/// Lets a request in and hands its body back; a refused one's is read away first.
///
/// # Errors
/// 401, 429 and 503, before any work is spent.
pub async fn admit(app: &AppState, headers: &HeaderMap, body: Body) -> Result<(Admitted, Body), ApiError> {
    let caller = auth::require_user(app, headers)?;
    match caller.charge(1).and_then(|()| app.admit()) {
        Ok(_permit) => Ok((Admitted { caller, _permit }, body)),
        Err(error) => {
            body::linger(body).await;
            Err(error)
        }
    }
}

/// An image to classify.
#[derive(Debug)]
pub enum Image {
    /// A file: JPEG, PNG and so on.
    Encoded(Bytes),
    /// Decoded, of any size.
    Rgb(RgbImage),
    /// The model's input `[side, side, 3]`, ready made.
    Prepared(Vec<f32>),
}

/// Images to classify with one expert set.
#[derive(Debug)]
pub struct ImageRequest {
    /// Which set; the default one when absent.
    pub set: Option<String>,
    /// Which version; the current one when absent.
    pub version: Option<u64>,
    /// The images; what is wrong with one stands in its place.
    pub images: Vec<Result<Image, ApiError>>,
    /// Whether the routing maps are wanted.
    pub routing: bool,
    /// When the request's headers were there.
    pub started: Instant,
    /// When the answer must be there.
    pub deadline: Instant,
    /// Whose images they are; the first is counted already.
    pub caller: Caller,
}

/// One image's logits.
#[derive(Debug)]
pub struct ImageAnswer {
    /// One per label.
    pub logits: Vec<f32>,
    /// The routing map, when wanted.
    pub routing: Option<RoutingMap>,
    /// Where the time went.
    pub timings: Timings,
}

/// The answers to an [`ImageRequest`], in its order.
pub struct ImageAnswers {
    /// What answered.
    pub lease: SetLease,
    /// Each image's logits or what was wrong with it.
    pub images: Vec<Result<ImageAnswer, ApiError>>,
}

/// The journey of images: acquire the set, admit, decode, queue, forward.
///
/// # Errors
/// What stops the request as a whole; what is wrong with one image stands in its place.
pub async fn answer_images(app: &AppState, request: ImageRequest) -> Result<ImageAnswers, ApiError> {
    let (count, deadline, set) = (request.images.len(), request.deadline, request.set.clone());
    let (version, started) = (request.version, request.started);
    let name = app.set_name(set.as_deref());
    let result = timeout_at(deadline, answer_in_time(app, name, request)).await;
    let result = result.unwrap_or_else(|_| Err(deadline_exceeded()));
    match &result {
        Ok(answers) => {
            count_images(app, name, &answers.images);
            let version = answers.lease.descriptor.version;
            let timings = answers.images.iter().map(|image| image.as_ref().ok().map(|answer| answer.timings));
            app.statistics.record(name, version, timings, milliseconds(started.elapsed()));
        }
        Err(_) => {
            // Labels made by clients would grow memory without end.
            let registered = app.registry.lookup(name, None).is_ok().then_some(name);
            app.metrics.count_images(registered, ImageResult::Failed, count);
            if let Ok(target) = app.registry.lookup(name, version) {
                app.statistics.record_failure(name, target.set.version, milliseconds(started.elapsed()));
            }
        }
    }
    result
}

async fn answer_in_time(app: &AppState, name: &str, request: ImageRequest) -> Result<ImageAnswers, ApiError> {
    let ImageRequest { version, images, routing, started, deadline, caller, .. } = request;
    caller.charge(images.len().saturating_sub(1))?;
    let wait = app.limits.load_wait.min(deadline.saturating_duration_since(Instant::now()));
    let lease = app.registry.acquire(name, version, wait).await?;
    let permits = admit_images(app, name, images.len(), lease.backbone.value.input_bytes())?;

    let prepared = join_all(images.into_iter().map(|image| prepare(app, &lease, image))).await;

    let mut jobs = Vec::new();
    let mut slots = Vec::with_capacity(prepared.len());
    for (image, permit) in prepared.into_iter().zip(permits) {
        slots.push(image.map(|(pixels, decode)| {
            jobs.push(Job { lease: lease.clone(), pixels, routing, deadline: deadline.into_std(), permit });
            decode
        }));
    }
    let mut receivers = app.pipeline.submit(jobs)?.into_iter();

    let mut answers = Vec::with_capacity(slots.len());
    for slot in slots {
        answers.push(match slot {
            Ok(decode) => {
                let receiver = receivers.next().ok_or_else(|| ApiError::internal("an image has no receiver"))?;
                finish(receiver.await, decode, started)
            }
            Err(error) => Err(error),
        });
    }
    Ok(ImageAnswers { lease, images: answers })
}

/// Places for images of one set. Those that are still taken for clients who have gone are given up first.
fn admit_images(app: &AppState, set: &str, count: usize, bytes_each: usize) -> Result<Vec<ImagePermit>, ApiError> {
    let admitted = app.admission.images.admit(set, count, bytes_each, || app.pipeline.drop_dead());
    admitted.map_err(|refused| {
        let code = match refused {
            Refused::Full | Refused::SetFull => ErrorCode::QueueFull,
            Refused::TooMany { .. } => ErrorCode::BatchTooLarge,
        };
        ApiError::new(code, refused.to_string())
    })
}

/// The model's input, with the time it took.
async fn prepare(
    app: &AppState,
    lease: &SetLease,
    image: Result<Image, ApiError>,
) -> Result<(Vec<f32>, Duration), ApiError> {
    let started = Instant::now();
    let model = &lease.backbone.value;
    let side = model.config().image_size;
    let pixels = match image? {
        Image::Encoded(bytes) => app.decoder.pixels(bytes, model.preprocess().clone(), side).await?,
        Image::Rgb(image) => app.decoder.fit(image, model.preprocess().clone(), side).await?,
        Image::Prepared(pixels) if pixels.len() == side * side * 3 => pixels,
        Image::Prepared(_) => {
            return Err(ApiError::invalid(format!(
                "expert set `{}` takes {side}x{side} pixels",
                lease.descriptor.name
            )));
        }
    };
    Ok((pixels, started.elapsed()))
}

fn finish(
    reply: Result<Result<Answer, ForwardFailed>, RecvError>,
    decode: Duration,
    started: Instant,
) -> Result<ImageAnswer, ApiError> {
    let answer = match reply {
        Ok(Ok(answer)) => answer,
        Ok(Err(ForwardFailed)) => return Err(ApiError::internal("the forward pass failed")),
        // The queue lets go only of what is past its deadline.
        Err(_) => return Err(deadline_exceeded()),
    };
    let timings = Timings {
        decode: milliseconds(decode),
        queue: milliseconds(answer.queued),
        inference: milliseconds(answer.inference),
        total: milliseconds(started.elapsed()),
    };
    Ok(ImageAnswer { logits: answer.output.logits, routing: answer.output.routing, timings })
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn deadline_exceeded() -> ApiError {
    ApiError::new(ErrorCode::DeadlineExceeded, "the request could not be answered in time")
}

fn count_images(app: &AppState, set: &str, images: &[Result<ImageAnswer, ApiError>]) {
    let count = |wanted: ImageResult| {
        let count = images.iter().filter(|image| image_result(image) == wanted).count();
        app.metrics.count_images(Some(set), wanted, count);
    };
    [ImageResult::Ok, ImageResult::BadImage, ImageResult::Failed].into_iter().for_each(count);
}

fn image_result(image: &Result<ImageAnswer, ApiError>) -> ImageResult {
    match image {
        Ok(_) => ImageResult::Ok,
        Err(error) if error.code().status().is_client_error() => ImageResult::BadImage,
        Err(_) => ImageResult::Failed,
    }
}

/// The `top_k` best labels with their softmax scores, best first; ties in label order.
pub fn predictions(logits: &[f32], labels: &[String], top_k: usize) -> Vec<Prediction> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    let mut order: Vec<usize> = (0..logits.len().min(labels.len())).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(top_k);
    let prediction =
        |index: usize| Prediction { label: labels[index].clone(), score: exponentials[index] / sum, index };
    order.into_iter().map(prediction).collect()
}

fn respond(answers: ImageAnswers, top_k: usize, is_batch: bool) -> Result<Response, ApiError> {
    let ImageAnswers { lease, images } = answers;
    let timings = slowest(&images);
    let classification = |answer: ImageAnswer| Classification {
        set: lease.descriptor.name.clone(),
        version: lease.descriptor.version,
        generation: lease.descriptor.generation(),
        predictions: predictions(&answer.logits, lease.value.labels(), top_k),
        timings_ms: answer.timings,
        routing: answer.routing,
    };
    let mut results = images.into_iter().map(|image| image.map(classification));
    let mut response = match (is_batch, results.next()) {
        (false, Some(result)) => Json(result?).into_response(),
        (_, first) => {
            let item = |result: Result<Classification, ApiError>| match result {
                Ok(classification) => BatchItem::Ok(Box::new(classification)),
                Err(error) => BatchItem::Err(error.body()),
            };
            Json(first.into_iter().chain(results).map(item).collect::<Vec<_>>()).into_response()
        }
    };
    answer_headers(response.headers_mut(), &lease, timings);
    Ok(response)
}

/// The times of the image that took longest: what a batch's client waited for.
fn slowest(images: &[Result<ImageAnswer, ApiError>]) -> Timings {
    let timings = images.iter().flatten().map(|answer| answer.timings);
    timings
        .max_by(|a, b| (a.decode + a.queue + a.inference).total_cmp(&(b.decode + b.queue + b.inference)))
        .unwrap_or_default()
}

/// Says which generation answered, and where the time went.
pub fn answer_headers(headers: &mut HeaderMap, lease: &SetLease, timings: Timings) {
    let Timings { decode, queue, inference, total } = timings;
    let timing = format!("decode;dur={decode}, queue;dur={queue}, inference;dur={inference}, total;dur={total}");
    let descriptor = &lease.descriptor;
    let values = [
        (EXPERT_SET, descriptor.name.clone()),
        (EXPERT_SET_GENERATION, descriptor.generation()),
        (SERVER_TIMING, timing),
    ];
    // Set names are plain ASCII (`store_layout::is_valid_name`), so no value is refused.
    headers.extend(values.into_iter().filter_map(|(name, value)| Some((name, HeaderValue::try_from(value).ok()?))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_are_softmax_descending_and_cut() {
        let labels: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
        let all = predictions(&[1.0, 3.0, 2.0], &labels, 9);
        assert_eq!(all.iter().map(|p| p.index).collect::<Vec<_>>(), [1, 2, 0]);
        assert!((all.iter().map(|p| p.score).sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(predictions(&[1.0, 3.0, 2.0], &labels, 1), all[..1]);
        assert_eq!(predictions(&[500.0, 500.0, -500.0], &labels, 1)[0].index, 0, "ties in label order, no overflow");
    }
}
