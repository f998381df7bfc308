//! The API described in OpenAPI 3.1. A handler enters the router together with its description; schemas are derived
//! from the types that are sent and received. [`describe`] adds what all operations share, errors from the one
//! status table among it.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bytes::Bytes;
use model_core::artifact::store_layout;
use serde_json::{Map, Value, json};
use utoipa::openapi::{ObjectBuilder, OpenApi, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};
use utoipa_axum::routes;

use super::error::{ApiError, ErrorBody, ErrorCode};
use crate::app::AppState;

/// Errors of a request that needs a user's key when there are user keys.
pub const USER: &[ErrorCode] = &[ErrorCode::Unauthorized, ErrorCode::RateLimited];
/// Errors of a request that needs an admin key.
pub const ADMIN: &[ErrorCode] = &[ErrorCode::Unauthorized, ErrorCode::Forbidden];
/// Errors of a body that is read whole.
pub const BODY: &[ErrorCode] = &[
    ErrorCode::InvalidRequest,
    ErrorCode::BodyTooLarge,
    ErrorCode::UnsupportedMediaType,
    ErrorCode::QueueFull,
    ErrorCode::BodyTimeout,
];
/// Errors of images, and of what is done with them.
pub const IMAGES: &[ErrorCode] = &[
    ErrorCode::EmptyBody,
    ErrorCode::BatchTooLarge,
    ErrorCode::ImageTooLarge,
    ErrorCode::UndecodableImage,
    ErrorCode::NotFinite,
    ErrorCode::DeadlineExceeded,
];
/// Errors of putting an expert set into memory.
pub const LOAD: &[ErrorCode] = &[
    ErrorCode::SetNotFound,
    ErrorCode::InvalidArtifact,
    ErrorCode::BackboneMismatch,
    ErrorCode::LenderMismatch,
    ErrorCode::SetLoading,
    ErrorCode::SetFailed,
    ErrorCode::SetTooLarge,
];
/// Errors of requests that are refused while the server starts or stops.
pub const LIFECYCLE: &[ErrorCode] = &[ErrorCode::NotReady, ErrorCode::Draining];
/// Errors of every request that is no GET.
const CHANGES: &[ErrorCode] = &[ErrorCode::CrossSite];
/// Errors of every request.
const ALWAYS: &[ErrorCode] = &[ErrorCode::Internal, ErrorCode::TooManyConnections];

/// An operation's extension that says how it may fail: [`errors`].
const ERRORS: &str = "x-errors";

/// The value of an operation's extension `x-errors`, which [`describe`] turns into responses.
pub fn errors(codes: &[&[ErrorCode]]) -> Value {
    codes.concat().into_iter().map(ErrorCode::as_str).collect()
}

/// The value of an operation's extension `x-codeSamples`: commands that can be pasted into a shell.
pub fn commands(commands: &[&str]) -> Value {
    commands.iter().map(|command| json!({ "lang": "Shell", "source": command })).collect()
}

/// The document's chapters.
const TAGS: [(&str, &str); 7] = [
    ("classify", "Images in, labels out."),
    ("sets", "Which expert sets there are, and what an administrator may do with them."),
    ("cameras", "What cameras show that the server asks for pictures."),
    ("teach", "Pictures with labels, to teach expert sets from."),
    ("oip", "Open Inference Protocol v2, as KServe and Triton speak it; expert sets are its models."),
    ("health", "Probes and metrics. None of them loads an expert set or changes which is evicted next."),
    ("pages", "Pages for browsers, complete in themselves, and this document."),
];

/// The name of an expert set, as a schema.
pub struct SetName;

impl PartialSchema for SetName {
    fn schema() -> RefOr<Schema> {
        let name = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[A-Za-z0-9_-][A-Za-z0-9_.-]*$"));
        name.max_length(Some(store_layout::MAX_NAME)).examples(["cifar100"]).into()
    }
}

impl ToSchema for SetName {}

/// The version of an expert set, as a schema.
pub struct Version;

impl PartialSchema for Version {
    fn schema() -> RefOr<Schema> {
        let version = ObjectBuilder::new().schema_type(Type::Integer);
        version.minimum(Some(0_usize)).maximum(Some(usize::MAX)).examples([1]).into()
    }
}

impl ToSchema for Version {}

/// The same operations at the path with a version: `/v2/models/{set}/ready`, for
/// instance, also at `/v2/models/{set}/versions/{version}/ready`.
pub fn with_version((schemas, paths, handlers): UtoipaMethodRouter<AppState>) -> UtoipaMethodRouter<AppState> {
    let mut versioned = utoipa::openapi::Paths::new();
    for (path, mut item) in paths.paths {
        for operation in [&mut item.get, &mut item.post].into_iter().flatten() {
            let id =
                operation.operation_id.take().map(|id| id.replace("model_", "").replacen("oip_", "oip_version_", 1));
            operation.operation_id = id;
        }
        versioned.paths.insert(path.replacen("{set}", "{set}/versions/{version}", 1), item);
    }
    (schemas, versioned, handlers)
}

/// The document of an API whose operations are described: with chapters, path parameters, keys and errors.
pub fn describe(api: &OpenApi) -> Value {
    let described = json!(api);
    let mut paths = Map::new();
    for (path, item) in described["paths"].as_object().into_iter().flatten() {
        // OpenAPI has no sign for a parameter that spans segments.
        let path = path.replace("{*", "{");
        let mut item = item.clone();
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            if method == "put" && operation["operationId"] == described["paths"][&path]["post"]["operationId"] {
                // One handler takes both methods, but an id names one operation.
                operation["operationId"] =
                    json!(format!("{}_put", operation["operationId"].as_str().unwrap_or_default()));
            }
            describe_operation(&path, method, operation);
        }
        paths.insert(path, item);
    }
    let mut schemas = described["components"]["schemas"].clone();
    schemas[&*ErrorBody::name()] = json!(ErrorBody::schema());
    schemas[&*ErrorCode::name()] = json!(ErrorCode::schema());
    let tags = TAGS.map(|(name, description)| json!({ "name": name, "description": description }));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "ButterflyViT Gateway",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "An image-classification server for edge gateways: POST an image, get labels back.",
            "license": { "name": env!("CARGO_PKG_LICENSE"), "identifier": env!("CARGO_PKG_LICENSE") },
        },
        "servers": [{ "url": "/", "description": "The server this document comes from." }],
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer", "description": "A key of `--user-key-file` or `--admin-key-file`." },
                "key": { "type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "The same key in a header of its own." },
            },
        },
    })
}

fn describe_operation(path: &str, method: &str, operation: &mut Value) {
    let names: Vec<&str> = path.split(['{', '}']).skip(1).step_by(2).collect();
    let mut described = operation["parameters"].as_array().cloned().unwrap_or_default();
    // What the path names, the query need not.
    described.retain(|parameter| parameter["in"] == "path" || names.iter().all(|name| parameter["name"] != *name));
    let parameters: Vec<Value> = path_parameters(&names, &described).into_iter().chain(described).collect();
    if !parameters.is_empty() {
        operation["parameters"] = json!(parameters);
    }
    for (_, answer) in operation["responses"].as_object_mut().into_iter().flatten() {
        for (_, header) in answer["headers"].as_object_mut().into_iter().flatten() {
            header["required"] = json!(true);
        }
        answer["headers"]["x-request-id"] = request_id_header();
        describe_bytes(answer);
    }
    if let Some(body) = operation.get_mut("requestBody") {
        describe_body(body);
        describe_bytes(body);
    }
    let errors = operation.as_object_mut().and_then(|operation| operation.remove(ERRORS)).unwrap_or_default();
    let is_listed = |code: &ErrorCode| {
        ALWAYS.contains(code)
            || (method != "get" && CHANGES.contains(code))
            || errors.as_array().is_some_and(|errors| errors.contains(&json!(code.as_str())))
    };
    let codes: Vec<ErrorCode> = ErrorCode::ALL.into_iter().filter(is_listed).collect();
    let keys = [json!({ "bearer": [] }), json!({ "key": [] })];
    // Users need keys only where there are some.
    let no_key = (!codes.contains(&ErrorCode::Forbidden)).then(|| json!({}));
    let needs_key = codes.contains(&ErrorCode::Unauthorized);
    operation["security"] = if needs_key { no_key.into_iter().chain(keys).collect() } else { json!([]) };
    for (status, response) in error_responses(codes) {
        operation["responses"][status] = response;
    }
}

/// A body is needed unless its type is an `Option`, whose absence is no body, not the word `null`.
fn describe_body(body: &mut Value) {
    let mut is_required = true;
    for (_, form) in body["content"].as_object_mut().into_iter().flatten() {
        let alternatives = form["schema"]["oneOf"].as_array().cloned().unwrap_or_default();
        if let [null, schema] = alternatives.as_slice()
            && null["type"] == "null"
        {
            form["schema"] = schema.clone();
            is_required = false;
        }
    }
    body["required"] = json!(is_required);
}

/// The parameters of a path that are not `described`; their names mean the same everywhere.
/// Content without a schema is bytes as they are. Generators of clients leave out content of which nothing is said.
fn describe_bytes(body: &mut Value) {
    for (_, form) in body["content"].as_object_mut().into_iter().flatten() {
        if form["schema"].is_null() {
            form["schema"] = json!({ "type": "string", "format": "binary" });
        }
    }
}

fn path_parameters(names: &[&str], described: &[Value]) -> Vec<Value> {
    let parameter = |name: &&str| {
        let (description, schema) = match *name {
            "version" => ("The version of the expert set.", json!(Version::schema())),
            "id" => ("The id of an example.", json!({ "type": "string", "maxLength": 64, "pattern": "^[0-9a-f]+$" })),
            _ => ("The name of an expert set.", json!(SetName::schema())),
        };
        json!({ "name": name, "in": "path", "required": true, "description": description, "schema": schema })
    };
    let is_new = |name: &&&str| described.iter().all(|described| described["name"] != **name);
    names.iter().filter(is_new).map(parameter).collect()
}

fn header_of(description: &str, required: bool) -> Value {
    json!({ "description": description, "required": required, "schema": { "type": "string" } })
}

fn request_id_header() -> Value {
    header_of("The request's own `x-request-id` when it came with one, or a new one.", true)
}

/// The answers of failures, by status.
fn error_responses(codes: Vec<ErrorCode>) -> BTreeMap<String, Value> {
    let mut by_status: BTreeMap<StatusCode, Vec<ErrorCode>> = BTreeMap::new();
    for code in codes {
        let known = by_status.entry(code.status()).or_default();
        if !known.contains(&code) {
            known.push(code);
        }
    }
    let response = |(status, codes): (StatusCode, Vec<ErrorCode>)| {
        let lines: Vec<String> = codes.iter().map(|code| format!("`{}`: {}", code.as_str(), code.meaning())).collect();
        let examples: Map<String, Value> = codes
            .iter()
            .map(|&code| (code.as_str().to_owned(), json!({ "value": ApiError::new(code, code.meaning()).body() })))
            .collect();
        let mut headers = json!({ "x-request-id": request_id_header() });
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers["Retry-After"] = header_of("Seconds after which trying again may help.", true);
        }
        if status == StatusCode::UNAUTHORIZED {
            headers["WWW-Authenticate"] = header_of("`Bearer`.", true);
        }
        let schema = json!({ "$ref": format!("#/components/schemas/{}", ErrorBody::name()) });
        let body = json!({ "application/json": { "schema": schema, "examples": examples } });
        (status.as_str().to_owned(), json!({ "description": lines.join("\n"), "headers": headers, "content": body }))
    };
    by_status.into_iter().map(response).collect()
}

/// The document of the routes beside it.
pub struct Document {
    pub json: Value,
    page: OnceLock<Bytes>,
}

impl Document {
    /// Without a page yet.
    pub fn new(json: Value) -> Self {
        Self { json, page: OnceLock::new() }
    }

    /// The page that `render` makes of it, made once.
    pub fn page(&self, render: impl FnOnce(&Value) -> String) -> Bytes {
        self.page.get_or_init(|| render(&self.json).into()).clone()
    }
}

/// The route of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(openapi))
}

/// This document, for programs.
#[utoipa::path(
    get,
    path = "/openapi.json",
    tag = "pages",
    responses((status = 200, description = "Done.", content_type = "application/json", body = Object)),
    extensions(("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/openapi.json"])))),
)]
async fn openapi(Extension(document): Extension<Arc<Document>>) -> Response {
    Json(&document.json).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::LazyLock;

    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| describe(crate::http::api().get_openapi()));

    fn operations() -> impl Iterator<Item = (String, &'static Value)> {
        let paths = DOCUMENT["paths"].as_object().unwrap();
        paths.iter().flat_map(|(path, item)| {
            item.as_object().unwrap().iter().map(move |(method, operation)| (format!("{method} {path}"), operation))
        })
    }

    #[test]
    fn the_document_refers_to_nothing_that_is_missing() {
        let text = DOCUMENT.to_string();
        for reference in text.split("#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(DOCUMENT["components"]["schemas"][name].is_object(), "{name}");
        }
    }

    #[test]
    fn every_operation_has_an_id_of_its_own_a_success_and_statuses_of_the_table() {
        let mut ids = std::collections::HashSet::new();
        for (operation, description) in operations() {
            assert!(ids.insert(&description["operationId"]), "{operation}");
            let statuses: Vec<u16> =
                description["responses"].as_object().unwrap().keys().map(|status| status.parse().unwrap()).collect();
            assert!(statuses.iter().any(|status| (200..300).contains(status)), "{operation}");
            for status in statuses.into_iter().filter(|&status| status >= 300) {
                assert!(ErrorCode::ALL.iter().any(|code| code.status().as_u16() == status), "{operation}: {status}");
            }
        }
    }

    #[test]
    fn every_parameter_of_a_path_is_described_once_and_is_no_parameter_of_the_query() {
        for (operation, description) in operations() {
            let parameters = description["parameters"].as_array().cloned().unwrap_or_default();
            for name in operation.split(['{', '}']).skip(1).step_by(2) {
                let places: Vec<_> = parameters.iter().filter(|p| p["name"] == name).map(|p| &p["in"]).collect();
                assert_eq!(places, ["path"], "{operation}: {name}");
            }
        }
    }

    #[test]
    fn every_code_is_documented_somewhere_except_those_no_route_answers() {
        let text = DOCUMENT["paths"].to_string();
        for code in ErrorCode::ALL {
            let of_no_route = code == ErrorCode::MethodNotAllowed;
            assert_eq!(text.contains(&format!("`{}`: ", code.as_str())), !of_no_route, "{code:?}");
        }
    }
}
