//! `POST /hf/{set}`: the answer of Hugging Face's image-classification task, a bare list, for clients written for it.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::auth::User;
use super::classify::{DEFAULT_TOP_K, image_bodies};
use super::error::ApiError;
use super::extract::{ApiPath, RequestContext};
use super::openapi::{Api, Method, Operation, Shape};
use super::{body, input};
use crate::app::AppState;
use crate::classify::{Prediction, Request, predictions};
use crate::sets::loaded::Answer;

/// The routes of this resource.
pub fn routes(api: Api) -> Api {
    let one = Shape::list_of::<Prediction>();
    let operation = Operation::new("classify", "hugging_face", "Classify images, in Hugging Face's schema");
    let operation = image_bodies(operation)
        .description(
            "What `InferenceClient.image_classification` of `huggingface_hub` sends and expects: labels as a bare \
             list. Several images answer a list of lists; one bad image refuses the whole request, because the schema \
             has no place for its error.",
        )
        .json(
            Shape::any_of([one.clone(), one.in_list()]),
            json!([{ "label": "hamster", "score": 0.91, "index": 36 }, { "label": "mouse", "score": 0.03, "index": 50 }]),
        )
        .command("curl --data-binary @cat.jpg http://127.0.0.1:8000/hf/cifar100");
    api.on(Method::Post, "/hf/{set}", classify, operation)
}

async fn classify(
    State(app): State<AppState>,
    context: RequestContext,
    set: ApiPath<String>,
    user: User,
) -> Result<Response, ApiError> {
    let User { mut entry, headers, body } = user;
    let received = body::receive(&app, &headers, body, context.deadline).await?;
    let input = input::parse(&headers, received.bytes.clone(), app.limits.max_images).await?;
    let request = Request {
        set: set.0,
        version: None,
        images: input.images,
        routing: false,
        started: context.started,
        deadline: context.deadline,
    };
    let answers = app.classifier.answer(&mut entry, request).await?;
    let top_k = input.top_k.unwrap_or(DEFAULT_TOP_K);
    let labels = answers.lease.value.labels();
    let list = |answer: Answer| predictions(&answer.logits, labels, top_k);
    // The schema has no place for one image's error among other images' answers.
    let lists: Vec<Vec<Prediction>> =
        answers.images.into_iter().map(|image| image.map(list)).collect::<Result<_, _>>()?;
    Ok(match lists.first().filter(|_| !input.is_batch) {
        Some(list) => Json(list).into_response(),
        None => Json(lists).into_response(),
    })
}
