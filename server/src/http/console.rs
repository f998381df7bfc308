//! `/`: the console page and its files, embedded in the binary and complete in themselves.

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::error::{ApiError, ErrorCode};
use crate::state::AppState;

/// What a page may do: run scripts, use styles, show images and talk, all with this server only. Nothing inline, so
/// that markup that slipped into a page would stay without effect; no way to make markup out of strings at all.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

/// The routes of this resource.
pub fn router() -> Router<AppState> {
    let index = get(async || page(include_str!("../../console/index.html")));
    Router::new().route("/", index).route("/console/{*file}", get(file))
}

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

async fn file(Path(path): Path<String>) -> Result<Response, ApiError> {
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
    fn content_type(&self) -> &'static str {
        match self.path.rsplit('.').next() {
            Some("js") => "text/javascript; charset=utf-8",
            Some("css") => "text/css; charset=utf-8",
            Some("svg") => "image/svg+xml",
            Some("png") => "image/png",
            _ => "text/plain; charset=utf-8",
        }
    }
}

macro_rules! assets {
    ($($path:literal),* $(,)?) => {
        [$(Asset { path: $path, bytes: include_bytes!(concat!("../../console/", $path)) }),*]
    };
}

static ASSETS: [Asset; 20] = assets![
    "api.js",
    "classify.js",
    "console.css",
    "dom.js",
    "format.js",
    "icon.svg",
    "live.js",
    "main.js",
    "metrics.js",
    "routing.js",
    "samples/test-00.png",
    "samples/test-01.png",
    "samples/test-06.png",
    "samples/test-07.png",
    "samples/test-09.png",
    "samples/test-10.png",
    "sets.js",
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
