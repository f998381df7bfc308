//! Probes and metrics. None of them loads a set or changes which set is evicted next.

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::error::ApiError;
use crate::state::AppState;

/// The routes of this resource.
pub fn router() -> Router<AppState> {
    Router::new()
        .route("/health", get(health))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/metrics", get(metrics))
}

async fn live() -> Json<serde_json::Value> {
    Json(json!({ "live": true }))
}

async fn ready(State(app): State<AppState>) -> Result<Json<serde_json::Value>, ApiError> {
    app.lifecycle.check()?;
    Ok(Json(json!({ "ready": true })))
}

/// For people: one look at what is running.
async fn health(State(app): State<AppState>) -> Result<Response, ApiError> {
    app.lifecycle.check()?;
    let (totals, budget, (images, bytes)) = (app.registry.totals(), app.registry.budget(), app.pipeline.depth());
    let body = json!({
        "status": app.lifecycle.as_str(),
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": app.started.elapsed().as_secs(),
        "default_set": app.default_set(),
        "sets": {
            "registered": totals.registered,
            "resident": totals.resident,
            "pinned": totals.pinned,
            "failed": totals.failed + app.catalog.broken_count(),
        },
        "memory": { "budget_bytes": budget.limit(), "accounted_bytes": budget.total() },
        "queue": { "images": images, "bytes": bytes },
    });
    Ok(Json(body).into_response())
}

async fn metrics(State(app): State<AppState>) -> Result<Response, ApiError> {
    app.refresh_metrics();
    let text = app.metrics.encode().map_err(ApiError::internal)?;
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}
