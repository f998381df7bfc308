//! `POST /hf/{set}`: the answer of Hugging Face's image-classification task, a bare list, for clients written for it.

use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::User;
use super::body::{Received, receive};
use super::classify::{CLASSIFY, DEFAULT_TOP_K};
use super::error::ApiError;
use super::extract::{ApiPath, ApiQuery, RequestContext};
use super::input::{FitName, ImageForm, JsonRequest};
use super::openapi::{commands, errors};
use super::{answer, input};
use crate::app::AppState;
use crate::classify::{Answers, Prediction, Request};
use crate::sets::loaded::Answer;

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(classify))
}

/// The parameters of a request; they go before those of the body.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct HfQuery {
    /// The part of each picture to look at, as `/classify` takes it.
    #[param(value_type = String, required = false, example = "0.25,0,0.5,1")]
    crop: Option<String>,
    /// How that part becomes a square.
    #[param(inline, value_type = FitName, required = false)]
    fit: Option<String>,
    /// The picture is unknown when the best label's softmax score is lower.
    #[param(value_type = f32, required = false, minimum = 0, maximum = 1)]
    min_score: Option<String>,
    /// Whether the label `unknown` comes before all others, with score 1, for a picture that is.
    #[param(required = false)]
    unknown: Option<bool>,
}

/// Labels with scores, the best first.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Labels {
    /// The labels of one image.
    One(Vec<Prediction>),
    /// Of each of several images.
    Several(Vec<Vec<Prediction>>),
}

fn example() -> Value {
    json!([{ "label": "hamster", "score": 0.91, "index": 36 }, { "label": "mouse", "score": 0.03, "index": 50 }])
}

/// Classify images, in Hugging Face's schema.
///
/// What `InferenceClient.image_classification` of `huggingface_hub` sends and expects: labels as a bare list. Several
/// images answer a list of lists; one bad image refuses the whole request, because the schema has no place for its error.
#[utoipa::path(
    post,
    path = "/hf/{set}",
    operation_id = "hugging_face",
    tag = "classify",
    params(HfQuery),
    request_body(content(
        ("image/jpeg"),
        ("image/png"),
        ("application/octet-stream"),
        (ImageForm = "multipart/form-data"),
        (JsonRequest = "application/json", example = json!(input::example())),
    )),
    responses((status = 200, description = "Done.", body = Labels, example = json!(example()))),
    extensions(
        ("x-errors" = json!(errors(CLASSIFY))),
        ("x-codeSamples" = json!(commands(&["curl --data-binary @cat.jpg http://127.0.0.1:8000/hf/cifar100"]))),
    ),
)]
async fn classify(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    query: ApiQuery<HfQuery>,
    user: User,
) -> Result<Response, ApiError> {
    let User { client, mut entry, headers, body } = user;
    let Received { bytes, deadline, permit } = receive(&app, client, &headers, body).await?;
    let input = input::parse(&app, &headers, bytes).await?;
    let request = Request {
        set: set.0,
        version: None,
        images: input.images,
        routing: false,
        look: input::parse_look(query.0.crop.as_deref(), query.0.fit.as_deref())?.or(input.look),
        min_score: input::parse_min_score(query.0.min_score.as_deref())?.or(input.min_score),
        started: context.started,
        deadline,
    };
    let answers = app.classifier.answer(&mut entry, request).await?;
    let top_k = input.top_k.unwrap_or(DEFAULT_TOP_K);
    // The encoded bytes are not needed any more, and the answer may be slow to leave.
    drop(permit);
    let Answers { lease, images } = answers;
    let bound = answer::bound(&images, lease.value.labels(), top_k);
    let says_unknown = query.0.unknown.unwrap_or(input.unknown_label);
    let encode = move || {
        let labels = lease.value.labels();
        let list = |answer: Answer| {
            let is_unknown = says_unknown && answer.verdict.unknown == Some(true);
            let unknown = is_unknown.then(|| Prediction { label: "unknown".into(), score: 1.0, index: labels.len() });
            let known = input.function.predictions(&answer.logits, labels, top_k);
            unknown.into_iter().chain(known).collect()
        };
        // The schema has no place for one image's error among other images' answers.
        let mut lists: Vec<Vec<Prediction>> =
            images.into_iter().map(|image| image.map(list)).collect::<Result<_, _>>()?;
        let one = if input.is_batch { None } else { lists.pop() };
        let labels = one.map_or_else(|| Labels::Several(lists), Labels::One);
        Ok((serde_json::to_vec(&labels).map_err(ApiError::internal)?, ()))
    };
    let (json, ()) = answer::build(&app, deadline, bound, encode).await?;
    Ok(([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], json).into_response())
}
