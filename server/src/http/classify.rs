//! `POST /classify`: an image in, labels out.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::auth::User;
use super::error::{ApiError, ErrorBody, ErrorCode};
use super::extract::{ApiPath, ApiQuery, RequestContext};
use super::openapi::{
    Api, BODY_ERRORS, LIFECYCLE_ERRORS, LOAD_ERRORS, Method, Operation, Shape, set_name_schema, version_schema,
};
use super::{body, input};
use crate::app::AppState;
use crate::classify::{self, Answers, Prediction, Request, predictions};
use crate::routing_map::RoutingMap;
use crate::sets::loaded::{Answer, SetLease};
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
    user: User,
) -> Result<Response, ApiError> {
    classify(app, context, None, query.0, user).await
}

async fn classify_named(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    query: ApiQuery<ClassifyQuery>,
    user: User,
) -> Result<Response, ApiError> {
    classify(app, context, Some(set.0), query.0, user).await
}

async fn classify(
    app: AppState,
    context: RequestContext,
    set: Option<String>,
    query: ClassifyQuery,
    user: User,
) -> Result<Response, ApiError> {
    let User { mut entry, headers, body } = user;
    let received = body::receive(&app, &headers, body, context.deadline).await?;
    let input = input::parse(&headers, received.bytes.clone(), app.limits.max_images).await?;
    let top_k = match query.top_k {
        Some(text) => Some(input::parse_top_k(&text)?),
        None => input.top_k,
    };
    let request = Request {
        set: app.set_name(set.or(query.set).or(input.set)),
        version: query.version,
        images: input.images,
        routing: query.routing,
        started: context.started,
        deadline: context.deadline,
    };
    let answers = app.classifier.answer(&mut entry, request).await?;
    // The encoded bytes are not needed any more, and the answer may be slow to leave.
    drop(received);
    respond(answers, top_k.unwrap_or(DEFAULT_TOP_K), input.is_batch)
}

fn respond(answers: Answers, top_k: usize, is_batch: bool) -> Result<Response, ApiError> {
    let Answers { lease, images } = answers;
    let timings = slowest(&images);
    let classification = |answer: Answer| Classification {
        set: lease.descriptor.name.clone(),
        version: lease.descriptor.version,
        generation: lease.descriptor.generation(),
        predictions: predictions(&answer.logits, lease.value.labels(), top_k),
        timings_ms: answer.timings,
        routing: answer.routing,
    };
    let mut results = images.into_iter().map(|image| image.map(classification).map_err(ApiError::from));
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
fn slowest(images: &[Result<Answer, classify::Error>]) -> Timings {
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
