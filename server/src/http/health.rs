//! Probes and metrics. None of them loads a set or changes which set is evicted next.

use axum::Json;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::body;
use super::error::{ApiError, ErrorCode, Failure};
use super::openapi::{LIFECYCLE, commands, errors};
use crate::app::AppState;
use crate::classify::Classifier;

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default()
        .routes(routes!(health))
        .routes(routes!(live))
        .routes(routes!(ready))
        .routes(routes!(metrics))
}

/// Marks a request that came beyond the limit of connections.
#[derive(Debug, Clone, Copy)]
pub struct ProbesOnly;

/// What is answered on any connection: who has to know how the server is should not have to wait for a place.
const PROBES: [&str; 4] = ["/health", "/v2/health/live", "/v2/health/ready", "/metrics"];

/// Refuses what came beyond the limit of connections and is no probe.
pub async fn refuse_surplus(request: Request, next: Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>();
    let is_probe = matched.is_some_and(|path| PROBES.contains(&path.as_str()));
    if is_probe || request.extensions().get::<ProbesOnly>().is_none() {
        return next.run(request).await;
    }
    body::linger(request.into_body()).await;
    let message = "too many connections are open, of all clients or from this address; try again later";
    let mut response = ApiError::new(ErrorCode::TooManyConnections, message).into_response();
    // The connection was counted as refused when it came.
    response.extensions_mut().remove::<Failure>();
    response
}

/// The process is alive: it answers.
#[derive(Serialize, ToSchema)]
struct Live {
    live: bool,
}

/// Whether the process answers at all.
#[utoipa::path(
    get,
    path = "/v2/health/live",
    tag = "health",
    responses((status = 200, description = "Done.", body = Live, example = json!({ "live": true }))),
    extensions(("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2/health/live"])))),
)]
async fn live() -> Json<Live> {
    Json(Live { live: true })
}

/// The server is ready for requests.
#[derive(Serialize, ToSchema)]
pub(super) struct Ready {
    ready: bool,
}

impl Ready {
    pub(super) const YES: Self = Self { ready: true };
}

/// Whether requests are welcome.
#[utoipa::path(
    get,
    path = "/v2/health/ready",
    tag = "health",
    responses((status = 200, description = "Done.", body = Ready, example = json!({ "ready": true }))),
    extensions(
        ("x-errors" = json!(errors(&[LIFECYCLE]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/v2/health/ready"]))),
    ),
)]
async fn ready(State(app): State<AppState>) -> Result<Json<Ready>, ApiError> {
    app.classifier.admission.lifecycle.check()?;
    Ok(Json(Ready::YES))
}

/// The state of the server.
#[derive(Serialize, ToSchema)]
struct Health {
    /// `ready`; otherwise the request is answered 503.
    status: &'static str,
    /// Version of the server.
    version: &'static str,
    uptime_seconds: u64,
    /// The expert set of requests that name none.
    default_set: String,
    sets: SetCounts,
    memory: MemoryUse,
    queue: QueueUse,
}

/// Expert sets, counted by version.
#[derive(Serialize, ToSchema)]
struct SetCounts {
    registered: usize,
    resident: usize,
    pinned: usize,
    /// Those whose last load failed, and files that could not be registered.
    failed: usize,
}

/// The memory budget and its use.
#[derive(Serialize, ToSchema)]
struct MemoryUse {
    budget_bytes: usize,
    accounted_bytes: usize,
}

/// What waits for a compute thread.
#[derive(Serialize, ToSchema)]
struct QueueUse {
    images: usize,
    bytes: usize,
}

fn example() -> Value {
    json!({
        "status": "ready",
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": 86400,
        "default_set": "cifar100",
        "sets": { "registered": 300, "resident": 41, "pinned": 1, "failed": 0 },
        "memory": { "budget_bytes": 67108864, "accounted_bytes": 58720256 },
        "queue": { "images": 0, "bytes": 0 },
    })
}

/// One look at what is running.
#[utoipa::path(
    get,
    path = "/health",
    tag = "health",
    responses((status = 200, description = "Done.", body = Health, example = json!(example()))),
    extensions(
        ("x-errors" = json!(errors(&[LIFECYCLE]))),
        ("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/health"]))),
    ),
)]
async fn health(State(app): State<AppState>) -> Result<Json<Health>, ApiError> {
    let Classifier { registry, admission, .. } = &*app.classifier;
    admission.lifecycle.check()?;
    let (totals, budget, (images, bytes)) = (registry.totals(), registry.budget(), admission.images_held());
    Ok(Json(Health {
        status: admission.lifecycle.as_str(),
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: app.started.elapsed().as_secs(),
        default_set: app.default_set().to_owned(),
        sets: SetCounts {
            registered: totals.registered,
            resident: totals.resident,
            pinned: totals.pinned,
            failed: totals.failed + app.catalog.broken_count(),
        },
        memory: MemoryUse { budget_bytes: budget.limit(), accounted_bytes: budget.total() },
        queue: QueueUse { images, bytes },
    }))
}

/// Metrics in the text format of Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "health",
    responses((
        status = 200,
        description = "Prometheus' text format; every name starts with `bvit_` or `process_`.",
        content_type = "text/plain",
        body = String,
    )),
    extensions(("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/metrics"])))),
)]
async fn metrics(State(app): State<AppState>) -> Result<Response, ApiError> {
    app.refresh_metrics();
    let text = app.classifier.metrics.encode().map_err(ApiError::internal)?;
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}
