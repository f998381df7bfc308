//! `POST /classify`: an image in, labels out.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::User;
use super::body::{Received, receive};
use super::error::{ApiError, ErrorBody, ErrorCode};
use super::extract::{ApiPath, ApiQuery, RequestContext};
use super::input::{FitName, ImageForm, JsonRequest};
use super::openapi::{BODY, IMAGES, LIFECYCLE, LOAD, SetName, USER, Version, commands, errors};
use super::{answer, input};
use crate::app::AppState;
use crate::classify::{self, Answers, Prediction, Request, ScoreFunction};
use crate::routing_map::RoutingMap;
use crate::sets::loaded::{Answer, SetLease};
use crate::statistics::Timings;
use crate::verdict::Verdict;

/// Labels answered when the request does not say how many.
pub(super) const DEFAULT_TOP_K: usize = 5;
/// Names the expert set that answered.
pub const EXPERT_SET: HeaderName = HeaderName::from_static("x-expert-set");
/// Names the generation that answered: name, version and content digest.
pub const EXPERT_SET_GENERATION: HeaderName = HeaderName::from_static("x-expert-set-generation");
/// Time of each stage, for browsers.
pub const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

const CURL_FILE: &str = "curl -F image=@cat.jpg 'http://127.0.0.1:8000/classify?top_k=3'";
const CURL_JSON: &str =
    "curl http://127.0.0.1:8000/classify --json \"{\\\"inputs\\\": \\\"$(base64 -w0 cat.jpg)\\\"}\"";
const CURL_UPLOAD: &str = "curl -T cat.jpg http://127.0.0.1:8000/classify";
const CURL_CROP: &str = "curl -T cat.jpg 'http://127.0.0.1:8000/classify?crop=0.25,0,0.5,1&fit=pad'";
const CURL_ROUTING: &str = "curl --data-binary @cat.jpg 'http://127.0.0.1:8000/classify/cifar100?routing=true'";
const CURL_UPLOAD_NAMED: &str = "curl -T cat.jpg http://127.0.0.1:8000/classify/cifar100";

pub(super) const CLASSIFY: &[&[ErrorCode]] = &[USER, BODY, LIFECYCLE, LOAD, IMAGES];

/// The routes of this resource. `PUT` is there for `curl -T image.jpg`.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(classify_default)).routes(routes!(classify_named))
}

fn example() -> Value {
    json!({
        "set": "cifar100",
        "version": 1,
        "generation": "cifar100:1:0a1b2c3d4e5f",
        "predictions": [{ "label": "hamster", "score": 0.91, "index": 36 }, { "label": "mouse", "score": 0.03, "index": 50 }],
        "unknown": null,
        "seen": { "crop": [0.125, 0.0, 0.75, 1.0], "fit": "crop" },
        "timings_ms": { "decode": 0.31, "queue": 0.02, "inference": 2.4, "total": 2.9 },
    })
}

/// The parameters of a request.
#[derive(Debug, Default, serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ClassifyQuery {
    /// Expert set to ask; the default set when left out.
    #[param(inline, value_type = SetName, required = false)]
    set: Option<String>,
    /// Version to ask; the current one when left out.
    #[param(inline, value_type = Version, required = false)]
    version: Option<u64>,
    /// How many labels to answer, best first; it goes before the body's `top_k`.
    #[param(value_type = usize, required = false, minimum = 1, default = json!(DEFAULT_TOP_K))]
    top_k: Option<String>,
    /// Whether to answer the routing map as well.
    #[serde(default)]
    #[param(required = false, default = false)]
    routing: bool,
    /// The part of each picture to look at: `x,y,w,h` of the upright picture, in shares when any of the four has a decimal
    /// point or all are at most 1, otherwise in pixels. `0,0,1,1` is the whole picture. The set decides when left out.
    #[param(value_type = String, required = false, example = "0.25,0,0.5,1")]
    crop: Option<String>,
    /// How that part becomes a square. The set decides when left out.
    #[param(inline, value_type = FitName, required = false)]
    fit: Option<String>,
    /// The picture is unknown when the best label's softmax score is lower; predictions stay.
    #[param(value_type = f32, required = false, minimum = 0, maximum = 1)]
    min_score: Option<String>,
}

/// The answer for one image.
#[derive(Debug, Serialize, ToSchema)]
pub struct Classification {
    /// The expert set that answered.
    pub set: String,
    /// Version of the expert set.
    pub version: u64,
    /// Its generation: name, version and content digest.
    pub generation: String,
    /// Labels, best first.
    pub predictions: Vec<Prediction>,
    #[serde(flatten)]
    pub verdict: Verdict,
    /// The part of the picture that the model was shown.
    #[schema(value_type = Seen)]
    pub seen: Option<model_core::image::Seen>,
    /// Where the time went.
    pub timings_ms: Timings,
    /// Which experts each patch went to, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingMap>,
}

/// The part of a picture that a model was shown.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a type of the model's")]
struct Seen {
    /// Left edge, top edge, width and height as shares of the upright picture; sent as `crop` it is seen again.
    crop: [f64; 4],
    /// How that part became a square.
    fit: FitName,
}

/// What a request gets.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Classified {
    /// The answer for one image.
    One(Box<Classification>),
    /// For several images, in the request's order.
    Several(Vec<BatchItem>),
}

/// An image's answer, or what was wrong with it.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum BatchItem {
    Ok(Box<Classification>),
    Err(ErrorBody),
}

/// Classify images.
///
/// The body is read by its content type: `multipart/form-data` takes files under any name (and a field `set` that names
/// the expert set unless path or query do), `application/json` takes base64, and everything else that may be an image
/// (`image/*`, `application/octet-stream` or no content type at all) is one image. JPEG, PNG, WebP, GIF (the first frame)
/// and BMP are read. One image answers an object; several files, or a list in JSON, answer a list in request order, in
/// which a bad image is an error in its place.
#[utoipa::path(
    method(post, put),
    path = "/classify",
    operation_id = "classify",
    tag = "classify",
    params(ClassifyQuery),
    request_body(content(
        ("image/jpeg"),
        ("image/png"),
        ("application/octet-stream"),
        (ImageForm = "multipart/form-data"),
        (JsonRequest = "application/json", example = json!(input::example())),
    )),
    responses((
        status = 200,
        description = "Done.",
        headers(
            ("x-expert-set" = String, description = "The expert set that answered."),
            ("x-expert-set-generation" = String, description = "Its name, version and content digest."),
            ("Server-Timing" = String, description = "Milliseconds of each stage."),
        ),
        body = Classified,
        example = json!(example())
    )),
    extensions(("x-errors" = json!(errors(CLASSIFY))), ("x-codeSamples" = json!(commands(&[CURL_FILE, CURL_JSON, CURL_UPLOAD, CURL_CROP])))),
)]
async fn classify_default(
    State(app): State<AppState>,
    context: RequestContext,
    query: ApiQuery<ClassifyQuery>,
    user: User,
) -> Result<Response, ApiError> {
    classify(app, context, None, query.0, user).await
}

/// Classify images with a named expert set.
///
/// The body is read by its content type: `multipart/form-data` takes files under any name (and a field `set` that names
/// the expert set unless path or query do), `application/json` takes base64, and everything else that may be an image
/// (`image/*`, `application/octet-stream` or no content type at all) is one image. JPEG, PNG, WebP, GIF (the first frame)
/// and BMP are read. One image answers an object; several files, or a list in JSON, answer a list in request order, in
/// which a bad image is an error in its place.
#[utoipa::path(
    method(post, put),
    path = "/classify/{set}",
    operation_id = "classify_with",
    tag = "classify",
    params(ClassifyQuery),
    request_body(content(
        ("image/jpeg"),
        ("image/png"),
        ("application/octet-stream"),
        (ImageForm = "multipart/form-data"),
        (JsonRequest = "application/json", example = json!(input::example())),
    )),
    responses((
        status = 200,
        description = "Done.",
        headers(
            ("x-expert-set" = String, description = "The expert set that answered."),
            ("x-expert-set-generation" = String, description = "Its name, version and content digest."),
            ("Server-Timing" = String, description = "Milliseconds of each stage."),
        ),
        body = Classified,
        example = json!(example())
    )),
    extensions(("x-errors" = json!(errors(CLASSIFY))), ("x-codeSamples" = json!(commands(&[CURL_ROUTING, CURL_UPLOAD_NAMED])))),
)]
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
    let User { client, mut entry, headers, body } = user;
    let Received { bytes, deadline, permit } = receive(&app, client, &headers, body).await?;
    let input = input::parse(&app, &headers, bytes).await?;
    let top_k = match query.top_k {
        Some(text) => Some(input::parse_top_k(&text)?),
        None => input.top_k,
    };
    let look = input::parse_look(query.crop.as_deref(), query.fit.as_deref())?.or(input.look);
    let request = Request {
        set: app.set_name(set.or(query.set).or(input.set)),
        version: query.version,
        images: input.images,
        routing: query.routing,
        look,
        min_score: input::parse_min_score(query.min_score.as_deref())?.or(input.min_score),
        started: context.started,
        deadline,
    };
    let answers = app.classifier.answer(&mut entry, request).await?;
    // The encoded bytes are not needed any more, and the answer may be slow to leave.
    drop(permit);
    respond(
        &app,
        deadline,
        answers,
        Wish { top_k: top_k.unwrap_or(DEFAULT_TOP_K), function: input.function, is_batch: input.is_batch },
    )
    .await
}

/// What the answer is to hold.
#[derive(Debug, Clone, Copy)]
struct Wish {
    top_k: usize,
    function: ScoreFunction,
    /// Whether it is a list.
    is_batch: bool,
}

async fn respond(app: &AppState, deadline: Instant, answers: Answers, wish: Wish) -> Result<Response, ApiError> {
    let Answers { lease, images } = answers;
    let timings = slowest(&images);
    let bound = answer::bound(&images, lease.value.labels(), wish.top_k);
    let encode = {
        let lease = lease.clone();
        move || {
            let classified = classified(images, &lease, wish)?;
            Ok((serde_json::to_vec(&classified).map_err(ApiError::internal)?, ()))
        }
    };
    let (json, ()) = answer::build(app, deadline, bound, encode).await?;
    let mut response = ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], json).into_response();
    answer_headers(response.headers_mut(), &lease, timings);
    Ok(response)
}

fn classified(
    images: Vec<Result<Answer, classify::Error>>,
    lease: &SetLease,
    wish: Wish,
) -> Result<Classified, ApiError> {
    let classification = |answer: Answer| Classification {
        set: lease.descriptor.name.clone(),
        version: lease.descriptor.version,
        generation: lease.descriptor.generation(),
        predictions: wish.function.predictions(&answer.logits, lease.value.labels(), wish.top_k),
        verdict: answer.verdict,
        seen: answer.seen,
        timings_ms: answer.timings,
        routing: answer.routing,
    };
    let mut results = images.into_iter().map(|image| image.map(classification).map_err(ApiError::from));
    Ok(match results.next() {
        Some(result) if !wish.is_batch => Classified::One(Box::new(result?)),
        first => {
            let item = |result: Result<Classification, ApiError>| match result {
                Ok(classification) => BatchItem::Ok(Box::new(classification)),
                Err(error) => BatchItem::Err(error.body()),
            };
            Classified::Several(first.into_iter().chain(results).map(item).collect())
        }
    })
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
