//! What each path takes: its methods and its query parameters, as the API's document says. Anything else is refused by
//! name, so that no misspelt parameter passes without effect.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::Extension;
use axum::extract::{MatchedPath, Query, Request};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa::openapi::OpenApi;

use super::body;
use super::error::{ApiError, ErrorCode};
use crate::sentence::unknown_name;

/// By path, then by method: the names of query parameters.
#[derive(Debug)]
pub struct Known(HashMap<String, BTreeMap<String, Vec<String>>>);

impl Known {
    /// What a document describes.
    pub fn of(api: &OpenApi) -> Self {
        let described = json!(api);
        let paths = described["paths"].as_object().into_iter().flatten();
        let methods = |item: &Value| {
            let operations = item.as_object().into_iter().flatten();
            operations.map(|(method, operation)| (method.to_ascii_uppercase(), query_names(operation))).collect()
        };
        Self(paths.map(|(path, item)| (path.clone(), methods(item))).collect())
    }

    /// Why a request's query is refused.
    fn check(&self, path: &str, request: &Request) -> Result<(), ApiError> {
        let method = if request.method() == Method::HEAD { "GET" } else { request.method().as_str() };
        let Some(names) = self.0.get(path).and_then(|methods| methods.get(method)) else { return Ok(()) };
        let Query(given) = Query::<Vec<(String, String)>>::try_from_uri(request.uri())?;
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        let unknown = given.iter().map(|(name, _)| name.as_str()).find(|name| !known.contains(name));
        let refuse = |name| Err(ApiError::invalid(unknown_name("the query parameter", name, &known)));
        unknown.map_or(Ok(()), refuse)
    }
}

fn query_names(operation: &Value) -> Vec<String> {
    let parameters = operation["parameters"].as_array().into_iter().flatten();
    let of_query = parameters.filter(|parameter| parameter["in"] == "query");
    of_query.filter_map(|parameter| parameter["name"].as_str().map(str::to_owned)).collect()
}

/// Refuses query parameters that the path does not take.
pub async fn refuse_unknown(Extension(known): Extension<Arc<Known>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let checked = path.map_or(Ok(()), |path| known.check(path.as_str(), &request));
    match checked {
        Ok(()) => next.run(request).await,
        Err(error) => {
            body::linger(request.into_body()).await;
            error.into_response()
        }
    }
}

/// Answers a method that a path does not take.
pub async fn wrong_method(Extension(known): Extension<Arc<Known>>, request: Request) -> ApiError {
    let path = request.extensions().get::<MatchedPath>();
    let methods = path.and_then(|path| known.0.get(path.as_str()));
    let names: Vec<&str> = methods.into_iter().flat_map(BTreeMap::keys).map(String::as_str).collect();
    let names = match names.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, first)) => format!("{} and {last}", first.join(", ")),
        None => "nothing".to_owned(),
    };
    let message = format!("this path takes {names}, not {}", request.method());
    ApiError::new(ErrorCode::MethodNotAllowed, message)
}
