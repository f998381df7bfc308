//! The HTTP surface: one file per resource, each with its own `routes()`, and what all of them share.

pub mod answer;
pub mod auth;
pub mod backbones;
pub mod body;
pub mod cameras;
pub mod classify;
pub mod console;
pub mod deepstack;
pub mod docs;
pub mod error;
pub mod extract;
pub mod health;
pub mod hf;
pub mod input;
pub mod json;
pub mod known;
pub mod observe;
pub mod oip;
pub mod openapi;
pub mod origin;
pub mod set_file;
pub mod sets;
pub mod teach;

use std::sync::Arc;

use axum::http::{HeaderName, HeaderValue, Uri, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use tower::util::option_layer;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::normalize_path::NormalizePath;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::set_header::SetResponseHeaderLayer;

use error::{ApiError, ErrorCode};
pub use extract::RequestContext;
pub use health::ProbesOnly;
pub use observe::PeerAddress;
use utoipa_axum::router::OpenApiRouter;

use crate::app::AppState;
use crate::metrics::Metrics;

/// Every route with its description.
fn api() -> OpenApiRouter<AppState> {
    let resources = [
        classify::router,
        hf::router,
        deepstack::router,
        sets::router,
        backbones::router,
        set_file::router,
        cameras::router,
        teach::router,
        oip::router,
        health::router,
        console::router,
        docs::router,
        openapi::router,
    ];
    resources.into_iter().fold(OpenApiRouter::default(), |api, router| api.merge(router()))
}

/// Makes the series of every route and every error code exist.
pub fn declare(metrics: &Metrics) {
    api().get_openapi().paths.paths.keys().for_each(|path| metrics.declare_route(path));
    ErrorCode::ALL.iter().for_each(|code| metrics.declare_failure(code.as_str()));
}

/// Every route with what surrounds it.
///
/// # Errors
/// Names an origin that no browser sends.
pub fn build_router(app: AppState) -> anyhow::Result<Router> {
    let (router, described) = api().split_for_parts();
    let document = openapi::Document::new(openapi::describe(&described));
    let router = router
        .layer(Extension(Arc::new(document)))
        .fallback(unknown_route)
        .method_not_allowed_fallback(known::wrong_method)
        .layer(middleware::from_fn(known::refuse_unknown))
        .layer(Extension(Arc::new(known::Known::of(&described))))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(origin::refuse_other_sites(&app.cors_origins)?)
        .layer(middleware::map_request_with_state(app.clone(), origin::forget_origin))
        .layer(option_layer((!app.cors_origins.is_empty()).then(|| origin::allow_sites(&app.cors_origins))))
        .layer(middleware::from_fn(health::refuse_surplus));
    let secure =
        |router: Router<AppState>, (name, value)| router.layer(SetResponseHeaderLayer::if_not_present(name, value));
    let router = SECURITY_HEADERS
        .into_iter()
        .fold(router, secure)
        .layer(middleware::from_fn_with_state(app.clone(), observe::observe))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(middleware::map_request(observe::forget_unusable_id))
        .with_state(app);
    // Around the router, because a path is matched before what a router wraps sees it.
    Ok(Router::new().fallback_service(NormalizePath::trim_trailing_slash(router)))
}

/// For answers that say nothing else: no browser is to guess a type, show them inside another site's page, run anything
/// in them, or tell others where it has been.
const SECURITY_HEADERS: [(HeaderName, HeaderValue); 4] = [
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
];

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::new(ErrorCode::RouteNotFound, format!("there is nothing at {}", uri.path()))
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    ApiError::internal(text.unwrap_or_else(|| "a handler panicked".to_owned())).into_response()
}
