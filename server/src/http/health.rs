//! Probes and metrics. None of them loads a set or changes which set is evicted next.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::error::ApiError;
use super::openapi::{Api, LIFECYCLE_ERRORS, Method, Operation, Shape};
use crate::app::AppState;
use crate::classify::Classifier;

/// The routes of this resource.
pub fn routes(api: Api) -> Api {
    let health_operation = Operation::new("health", "health", "One look at what is running")
        .json(Shape::of::<Health>(), example())
        .errors(LIFECYCLE_ERRORS)
        .command("curl http://127.0.0.1:8000/health");
    let live_operation = Operation::new("health", "live", "Whether the process answers at all")
        .json(Shape::of::<Live>(), json!({ "live": true }))
        .command("curl http://127.0.0.1:8000/v2/health/live");
    let ready_operation = Operation::new("health", "ready", "Whether requests are welcome")
        .json(Shape::of::<Ready>(), json!({ "ready": true }))
        .errors(LIFECYCLE_ERRORS)
        .command("curl http://127.0.0.1:8000/v2/health/ready");
    let metrics_operation = Operation::new("health", "metrics", "Metrics for Prometheus")
        .answer(
            200,
            "Prometheus' text format; every name starts with `bvit_` or `process_`.",
            "text/plain",
            Shape::text(),
            Value::Null,
        )
        .command("curl http://127.0.0.1:8000/metrics");
    api.on(Method::Get, "/health", health, health_operation)
        .on(Method::Get, "/v2/health/live", live, live_operation)
        .on(Method::Get, "/v2/health/ready", ready, ready_operation)
        .on(Method::Get, "/metrics", metrics, metrics_operation)
}

/// The process answers.
#[derive(Serialize, ToSchema)]
struct Live {
    live: bool,
}

async fn live() -> Json<Live> {
    Json(Live { live: true })
}

/// Requests are welcome.
#[derive(Serialize, ToSchema)]
pub(super) struct Ready {
    ready: bool,
}

impl Ready {
    pub(super) const YES: Self = Self { ready: true };
}

async fn ready(State(app): State<AppState>) -> Result<Json<Ready>, ApiError> {
    app.classifier.admission.lifecycle.check()?;
    Ok(Json(Ready::YES))
}

/// What is running.
#[derive(Serialize, ToSchema)]
struct Health {
    /// `ready`; otherwise the request is answered 503.
    status: &'static str,
    /// The server's version.
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

/// The memory budget.
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

/// For people: one look at what is running.
async fn health(State(app): State<AppState>) -> Result<Json<Health>, ApiError> {
    let Classifier { registry, admission, .. } = &app.classifier;
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

async fn metrics(State(app): State<AppState>) -> Result<Response, ApiError> {
    app.refresh_metrics();
    let text = app.classifier.metrics.encode().map_err(ApiError::internal)?;
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}
