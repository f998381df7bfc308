//! Pages of other sites. A browser sends what any page tells it to, from inside the network that it is in. What a page of
//! another site may make it send is decided by `Sec-Fetch-Site` and `Origin`, which pages cannot forge.

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowOrigin, CorsLayer};
use tower_http::csrf::{CsrfLayer, ProtectionError};

use super::auth;
use super::classify::{EXPERT_SET, EXPERT_SET_GENERATION, SERVER_TIMING};
use super::error::{ApiError, ErrorCode};
use super::observe::REQUEST_ID;
use super::oip::HEADER_LENGTH;
use crate::app::AppState;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// Our console sends it. A page of another site cannot without asking first, which only `--cors-origin` lets it.
const X_REQUESTED_WITH: HeaderName = HeaderName::from_static("x-requested-with");
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// An origin as browsers write it.
///
/// # Errors
/// A sentence that says how one is written.
pub fn parse_origin(text: &str) -> Result<String, String> {
    let how = || format!("`{text}` is no origin; write https://HOST or https://HOST:PORT, as browsers do");
    let uri: Uri = text.trim().to_ascii_lowercase().parse().map_err(|_| how())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(how()) };
    if uri.path().len() > 1 || uri.query().is_some() || authority.as_str().contains(['@', '*']) {
        return Err(how());
    }
    let default_port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return Err(how()),
    };
    let host = authority.as_str().strip_suffix(default_port).unwrap_or(authority.as_str());
    Ok(format!("{scheme}://{host}"))
}

/// Refuses requests that a page of another site sends, unless the site is one of `allowed`.
///
/// # Errors
/// Names an origin that no browser sends.
pub fn refuse_other_sites(
    allowed: &[String],
) -> anyhow::Result<CsrfLayer<impl Fn(ProtectionError) -> Response + Clone + use<>>> {
    let layer = allowed.iter().try_fold(CsrfLayer::new(), CsrfLayer::add_trusted_origin)?;
    Ok(layer.with_rejection_response(|_| {
        let message = "a page of another site sent this request, and without a key that is known here; --cors-origin \
                       allows a site";
        ApiError::new(ErrorCode::CrossSite, message).into_response()
    }))
}

/// Answers what browsers ask before a page of another site may send a request or read an answer.
pub fn allow_sites(allowed: &[String]) -> CorsLayer {
    let origins = allowed.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
    CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE])
        .allow_headers([
            header::CONTENT_TYPE,
            header::CONTENT_ENCODING,
            header::AUTHORIZATION,
            X_API_KEY,
            REQUEST_ID,
            HEADER_LENGTH,
        ])
        .expose_headers([
            header::RETRY_AFTER,
            EXPERT_SET,
            EXPERT_SET_GENERATION,
            SERVER_TIMING,
            REQUEST_ID,
            HEADER_LENGTH,
        ])
        // Browsers ask this of a public site's page that talks to a private address.
        .allow_private_network(true)
        .max_age(std::time::Duration::from_secs(600))
}

/// Forgets which page sent a request where that does not matter: its sender holds a key,
/// or is our console behind a proxy that changes `Host`.
pub async fn forget_origin(State(app): State<AppState>, mut request: Request) -> Request {
    let headers = request.headers_mut();
    if auth::is_known(&app, headers) {
        headers.remove(header::ORIGIN);
        headers.remove(&SEC_FETCH_SITE);
    } else if headers.contains_key(&X_REQUESTED_WITH) && !headers.contains_key(&SEC_FETCH_SITE) {
        headers.remove(header::ORIGIN);
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_written_as_browsers_do() {
        for (text, expected) in [
            ("https://app.example", "https://app.example"),
            (" HTTPS://App.Example:443/ ", "https://app.example"),
            ("http://app.example:80", "http://app.example"),
            ("http://app.example:443", "http://app.example:443"),
            ("http://[::1]:3000", "http://[::1]:3000"),
        ] {
            assert_eq!(parse_origin(text).as_deref(), Ok(expected), "{text}");
            assert!(refuse_other_sites(&[expected.to_owned()]).is_ok(), "{text}");
        }
        for text in
            ["", "*", "null", "app.example", "https://", "https://*.example", "https://a.example/path", "file:///a"]
        {
            let error = parse_origin(text).unwrap_err();
            assert!(error.contains("https://HOST"), "{text}: {error}");
        }
    }
}
