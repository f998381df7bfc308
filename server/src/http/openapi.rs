//! The API described in OpenAPI 3.1. A route enters the router only through [`Api::on`], together with its
//! description, so that neither can be had without the other; schemas are derived from the types that are sent and
//! received, errors from the one status table.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use axum::handler::Handler;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{MethodFilter, on};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use model_core::artifact::store_layout;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa::openapi::{RefOr, Schema};

use super::error::{ApiError, ErrorBody, ErrorCode};
use crate::app::AppState;

/// Errors of a body that is read whole.
pub const BODY_ERRORS: [ErrorCode; 5] = [
    ErrorCode::InvalidRequest,
    ErrorCode::BodyTooLarge,
    ErrorCode::UnsupportedMediaType,
    ErrorCode::QueueFull,
    ErrorCode::BodyTimeout,
];
/// Errors of putting an expert set into memory.
pub const LOAD_ERRORS: [ErrorCode; 6] = [
    ErrorCode::SetNotFound,
    ErrorCode::InvalidArtifact,
    ErrorCode::BackboneMismatch,
    ErrorCode::SetLoading,
    ErrorCode::SetFailed,
    ErrorCode::SetTooLarge,
];
/// Errors of requests that are refused while the server starts or stops.
pub const LIFECYCLE_ERRORS: [ErrorCode; 2] = [ErrorCode::NotReady, ErrorCode::Draining];

/// The methods the API uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// GET, and with it HEAD.
    Get,
    /// POST.
    Post,
    /// PUT.
    Put,
    /// DELETE.
    Delete,
}

impl Method {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post => "post",
            Self::Put => "put",
            Self::Delete => "delete",
        }
    }

    const fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Post => MethodFilter::POST,
            Self::Put => MethodFilter::PUT,
            Self::Delete => MethodFilter::DELETE,
        }
    }
}

/// A router and its description, growing together.
#[derive(Default)]
pub struct Api {
    router: Router<AppState>,
    routes: Vec<&'static str>,
    paths: Map<String, Value>,
    schemas: BTreeMap<String, RefOr<Schema>>,
}

impl Api {
    /// Adds `method` on `path`.
    #[must_use]
    pub fn on<H, T>(mut self, method: Method, path: &'static str, handler: H, operation: Operation) -> Self
    where
        H: Handler<T, AppState>,
        T: 'static,
    {
        self.router = self.router.route(path, on(method.filter(), handler));
        if !self.routes.contains(&path) {
            self.routes.push(path);
        }
        self.schemas.extend(operation.schemas.iter().cloned());
        // OpenAPI has no sign for a parameter that spans segments.
        let documented = path.replace("{*", "{");
        let item = self.paths.entry(documented.as_str()).or_insert_with(|| json!({}));
        item[method.as_str()] = operation.into_json(&documented);
        self
    }

    /// The routes, with their document within reach of their handlers.
    pub fn into_router(self) -> Router<AppState> {
        let document = Document { json: self.document(), page: OnceLock::new() };
        self.router.layer(Extension(Arc::new(document)))
    }

    /// The paths as they appear in metrics.
    pub fn paths(&self) -> &[&'static str] {
        &self.routes
    }

    /// The document.
    pub fn document(&self) -> Value {
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
            "paths": self.paths,
            "components": {
                "schemas": self.schemas,
                "securitySchemes": {
                    "bearer": { "type": "http", "scheme": "bearer", "description": "A key of `--user-key-file` or `--admin-key-file`." },
                    "key": { "type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "The same key in a header of its own." },
                },
            },
        })
    }
}

/// The document's chapters.
const TAGS: [(&str, &str); 5] = [
    ("classify", "Images in, labels out."),
    ("sets", "Which expert sets there are, and what an administrator may do with them."),
    ("oip", "Open Inference Protocol v2, as KServe and Triton speak it; expert sets are its models."),
    ("health", "Probes and metrics. None of them loads an expert set or changes which is evicted next."),
    ("pages", "Pages for browsers, complete in themselves, and this document."),
];

/// What a parameter, a body or an answer looks like, with the named schemas it refers to.
#[derive(Clone)]
pub struct Shape {
    schema: Value,
    named: Vec<(String, RefOr<Schema>)>,
}

impl Shape {
    /// A type's own.
    pub fn of<T: ToSchema>() -> Self {
        let mut named = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut named);
        Self { schema: json!({ "$ref": format!("#/components/schemas/{}", T::name()) }), named }
    }

    /// A list of a type's.
    pub fn list_of<T: ToSchema>() -> Self {
        Self::of::<T>().in_list()
    }

    /// A list of these.
    #[must_use]
    pub fn in_list(self) -> Self {
        Self { schema: json!({ "type": "array", "items": self.schema }), named: self.named }
    }

    /// One of several.
    pub fn any_of(shapes: impl IntoIterator<Item = Self>) -> Self {
        let (schemas, named): (Vec<Value>, Vec<_>) =
            shapes.into_iter().map(|shape| (shape.schema, shape.named)).unzip();
        Self { schema: json!({ "anyOf": schemas }), named: named.concat() }
    }

    /// Spelt out in JSON Schema.
    pub fn inline(schema: Value) -> Self {
        Self { schema, named: Vec::new() }
    }

    /// Bytes: OpenAPI 3.1 gives them no schema.
    pub fn bytes() -> Self {
        Self::inline(json!({}))
    }

    /// Text.
    pub fn text() -> Self {
        Self::inline(json!({ "type": "string" }))
    }
}

/// The description of one method on one path.
pub struct Operation {
    tag: &'static str,
    id: &'static str,
    summary: &'static str,
    description: &'static str,
    parameters: Vec<Value>,
    body: Option<Value>,
    answers: BTreeMap<u16, Value>,
    errors: Vec<ErrorCode>,
    needs_key: bool,
    commands: Vec<&'static str>,
    schemas: Vec<(String, RefOr<Schema>)>,
}

impl Operation {
    /// An operation in the chapter `tag`, with a name of its own and a line that says what it does.
    pub fn new(tag: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self {
            tag,
            id,
            summary,
            description: "",
            parameters: Vec::new(),
            body: None,
            answers: BTreeMap::new(),
            errors: vec![ErrorCode::Internal, ErrorCode::TooManyConnections],
            needs_key: false,
            commands: Vec::new(),
            schemas: Shape::of::<ErrorBody>().named,
        }
    }

    /// More than the summary says.
    #[must_use]
    pub fn description(mut self, description: &'static str) -> Self {
        self.description = description;
        self
    }

    /// A query parameter, always optional.
    #[must_use]
    pub fn query(self, name: &str, description: &str, schema: Value) -> Self {
        self.parameter("query", false, name, description, schema)
    }

    /// A request header, always optional.
    #[must_use]
    pub fn header(self, name: &str, description: &str, schema: Value) -> Self {
        self.parameter("header", false, name, description, schema)
    }

    /// A parameter in the path's braces.
    #[must_use]
    pub fn path(self, name: &str, description: &str, schema: Value) -> Self {
        self.parameter("path", true, name, description, schema)
    }

    fn parameter(mut self, place: &str, required: bool, name: &str, description: &str, schema: Value) -> Self {
        let parameter =
            json!({ "name": name, "in": place, "required": required, "description": description, "schema": schema });
        self.parameters.push(parameter);
        self
    }

    /// A form the request's body may have; `example` may be null.
    #[must_use]
    pub fn body(mut self, media_type: &str, shape: Shape, example: Value) -> Self {
        let body = self.body.get_or_insert_with(|| json!({ "required": true, "content": {} }));
        body["content"][media_type] = content(&shape, example);
        self.schemas.extend(shape.named);
        self
    }

    /// The body may be left out.
    #[must_use]
    pub fn optional_body(mut self, media_type: &str, shape: Shape, example: Value) -> Self {
        self = self.body(media_type, shape, example);
        if let Some(body) = &mut self.body {
            body["required"] = json!(false);
        }
        self
    }

    /// A success; `example` may be null.
    #[must_use]
    pub fn answer(mut self, status: u16, description: &str, media_type: &str, shape: Shape, example: Value) -> Self {
        let answer = self.answers.entry(status).or_insert_with(
            || json!({ "description": description, "headers": { "x-request-id": request_id_header() }, "content": {} }),
        );
        answer["content"][media_type] = content(&shape, example);
        self.schemas.extend(shape.named);
        self
    }

    /// A success in JSON.
    #[must_use]
    pub fn json(self, shape: Shape, example: Value) -> Self {
        self.answer(200, "Done.", "application/json", shape, example)
    }

    /// A header of the answer with this status.
    #[must_use]
    pub fn answer_header(mut self, status: u16, name: &str, description: &str, required: bool) -> Self {
        if let Some(answer) = self.answers.get_mut(&status) {
            answer["headers"][name] = header_of(description, required);
        }
        self
    }

    /// Codes it may fail with.
    #[must_use]
    pub fn errors(mut self, codes: impl IntoIterator<Item = ErrorCode>) -> Self {
        self.errors.extend(codes);
        self
    }

    /// Needs a key when user keys are configured.
    #[must_use]
    pub fn user(mut self) -> Self {
        self.needs_key = true;
        self.errors([ErrorCode::Unauthorized, ErrorCode::RateLimited])
    }

    /// Needs an admin key, or none from this machine when no admin key is configured.
    #[must_use]
    pub fn admin(mut self) -> Self {
        self.needs_key = true;
        self.errors([ErrorCode::Unauthorized, ErrorCode::Forbidden])
    }

    /// A command that can be pasted into a shell.
    #[must_use]
    pub fn command(mut self, command: &'static str) -> Self {
        self.commands.push(command);
        self
    }

    fn into_json(self, path: &str) -> Value {
        let mut operation = json!({ "operationId": self.id, "tags": [self.tag], "summary": self.summary });
        if !self.description.is_empty() {
            operation["description"] = json!(self.description);
        }
        let mut parameters = path_parameters(path, &self.parameters);
        parameters.extend(self.parameters);
        if !parameters.is_empty() {
            operation["parameters"] = json!(parameters);
        }
        if let Some(body) = self.body {
            operation["requestBody"] = body;
        }
        let mut responses: Map<String, Value> =
            self.answers.into_iter().map(|(status, answer)| (status.to_string(), answer)).collect();
        responses.extend(error_responses(self.errors));
        operation["responses"] = Value::Object(responses);
        operation["security"] = if self.needs_key { json!([{ "bearer": [] }, { "key": [] }]) } else { json!([]) };
        if !self.commands.is_empty() {
            let sample = |command: &&str| json!({ "lang": "Shell", "source": command });
            operation["x-codeSamples"] = self.commands.iter().map(sample).collect();
        }
        operation
    }
}

/// The parameters in a path's braces that are not `described`; their names mean the same everywhere.
fn path_parameters(path: &str, described: &[Value]) -> Vec<Value> {
    let parameter = |name: &str| {
        let (description, schema) = match name {
            "version" => ("The version of the expert set.", version_schema()),
            _ => ("The name of an expert set.", set_name_schema()),
        };
        json!({ "name": name, "in": "path", "required": true, "description": description, "schema": schema })
    };
    let names = path.split(['{', '}']).skip(1).step_by(2);
    names.filter(|name| described.iter().all(|described| described["name"] != *name)).map(parameter).collect()
}

/// The schema of an expert set's name.
pub fn set_name_schema() -> Value {
    json!({
        "type": "string",
        "pattern": "^[A-Za-z0-9_-][A-Za-z0-9_.-]*$",
        "maxLength": store_layout::MAX_NAME,
        "examples": ["cifar100"],
    })
}

/// The schema of an expert set's version.
pub fn version_schema() -> Value {
    json!({ "type": "integer", "minimum": 0, "maximum": u64::MAX, "examples": [1] })
}

/// What an answer's or a request's body holds.
fn content(shape: &Shape, example: Value) -> Value {
    let mut content = json!({ "schema": shape.schema });
    if !example.is_null() {
        content["example"] = example;
    }
    content
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
    /// For programs.
    pub json: Value,
    page: OnceLock<Bytes>,
}

impl Document {
    /// The page that `render` makes of it, made once.
    pub fn page(&self, render: impl FnOnce(&Value) -> String) -> Bytes {
        self.page.get_or_init(|| render(&self.json).into()).clone()
    }
}

/// The route of this resource.
pub fn routes(api: Api) -> Api {
    let operation = Operation::new("pages", "openapi", "This document")
        .json(Shape::inline(json!({ "type": "object", "required": ["openapi", "info", "paths"] })), Value::Null)
        .command("curl http://127.0.0.1:8000/openapi.json");
    let document = async |Extension(document): Extension<Arc<Document>>| Json(&document.json).into_response();
    api.on(Method::Get, "/openapi.json", document, operation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::LazyLock;

    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| crate::http::api().document());

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
    fn every_code_is_documented_somewhere_except_those_no_route_answers() {
        let text = DOCUMENT["paths"].to_string();
        for code in ErrorCode::ALL {
            let of_no_route = code == ErrorCode::MethodNotAllowed;
            assert_eq!(text.contains(&format!("`{}`: ", code.as_str())), !of_no_route, "{code:?}");
        }
    }
}
