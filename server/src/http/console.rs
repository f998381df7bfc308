//! `/`: the console page and its files, embedded in the binary and complete in themselves.

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::{ApiError, ErrorCode};
use super::extract::ApiPath;
use super::openapi::{commands, errors};
use crate::app::AppState;

/// What a page may do: run scripts, use styles, show images and talk, all with this server only. Nothing inline, so
/// that markup that slipped into a page would stay without effect; no way to make markup out of strings at all.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(index)).routes(routes!(file))
}

/// The console: classify, look at routing, manage expert sets.
#[utoipa::path(
    get,
    path = "/",
    operation_id = "console",
    tag = "pages",
    responses((status = 200, description = "A page.", content_type = "text/html", body = String)),
    extensions(("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/"])))),
)]
async fn index() -> Response {
    page(include_str!("../../console/index.html"))
}

/// The path of one of the console's files, as a schema.
struct FileName;

impl PartialSchema for FileName {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(Type::String).enum_values(Some(ASSETS.iter().map(|asset| asset.path))).into()
    }
}

impl ToSchema for FileName {}

/// An HTML page with the policy all pages share.
pub fn page(html: impl Into<axum::body::Body>) -> Response {
    let headers: [(HeaderName, &str); 3] = [
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
    ];
    (headers, [REVALIDATE], html.into()).into_response()
}

/// A page of one version must not meet the scripts of another after an update.
const REVALIDATE: (HeaderName, HeaderValue) = (header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));

/// The console's scripts, styles and pictures.
#[utoipa::path(
    get,
    path = "/console/{*file}",
    operation_id = "console_file",
    tag = "pages",
    params(("file" = inline(FileName), Path, description = "One of the files the console is made of.")),
    responses((
        status = 200,
        description = "A file.",
        content(("text/javascript"), ("text/css"), ("image/svg+xml"), ("image/png"), ("image/jpeg"), ("text/plain")),
    )),
    extensions(("x-errors" = json!(errors(&[&[ErrorCode::RouteNotFound]])))),
)]
async fn file(ApiPath(path): ApiPath<String>) -> Result<Response, ApiError> {
    let asset = ASSETS.iter().find(|asset| asset.path == path);
    let asset = asset.ok_or_else(|| ApiError::new(ErrorCode::RouteNotFound, "the console has no such file"))?;
    Ok(([(header::CONTENT_TYPE, asset.content_type())], [REVALIDATE], asset.bytes).into_response())
}

/// A file below `/console/`.
struct Asset {
    path: &'static str,
    bytes: &'static [u8],
}

impl Asset {
    fn media_type(&self) -> &'static str {
        match self.path.rsplit('.').next() {
            Some("js") => "text/javascript",
            Some("css") => "text/css",
            Some("svg") => "image/svg+xml",
            Some("png") => "image/png",
            Some("jpg") => "image/jpeg",
            _ => "text/plain",
        }
    }

    fn content_type(&self) -> String {
        let media_type = self.media_type();
        if media_type.starts_with("text/") { format!("{media_type}; charset=utf-8") } else { media_type.to_owned() }
    }
}

macro_rules! assets {
    ($($path:literal),* $(,)?) => {
        [$(Asset { path: $path, bytes: include_bytes!(concat!("../../console/", $path)) }),*]
    };
}

static ASSETS: [Asset; 23] = assets![
    "api.js",
    "cameras.js",
    "classify.js",
    "console.css",
    "docs.css",
    "dom.js",
    "format.js",
    "icon.svg",
    "live.js",
    "main.js",
    "metrics.js",
    "routing.js",
    "samples/photo-cat.jpg",
    "samples/photo-coffee.jpg",
    "samples/test-00.png",
    "samples/test-01.png",
    "samples/test-09.png",
    "samples/test-10.png",
    "sets.js",
    "teach.js",
    "uplot/LICENSE",
    "uplot/uPlot.iife.min.js",
    "uplot/uPlot.min.css",
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The page has to come through a slow link to a gateway.
    const MAX_PAGE_BYTES: usize = 200_000;

    #[test]
    fn the_whole_page_has_at_most_200_kilobytes() {
        let index = include_str!("../../console/index.html").len();
        let total = index + ASSETS.iter().map(|asset| asset.bytes.len()).sum::<usize>();
        assert!(total <= MAX_PAGE_BYTES, "{total} bytes");
    }
}
