//! Who may classify and who may manage.

use std::borrow::Cow;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};

use super::body;
use super::error::{ApiError, ErrorCode};
use super::extract::RequestContext;
use crate::admission::{Client, Entry};
use crate::app::{App, AppState};
use crate::keys::Caller;

/// `Authorization: Bearer KEY` or `X-Api-Key: KEY`.
fn presented(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    bearer.or_else(|| headers.get("x-api-key")?.to_str().ok())
}

fn missing_or_wrong(headers: &HeaderMap) -> ApiError {
    let message = if presented(headers).is_some() { "the key is not known" } else { "a key is needed" };
    ApiError::new(ErrorCode::Unauthorized, message)
}

/// Whether a request carries a key that is known here, a user's or an admin's.
pub fn is_known(app: &App, headers: &HeaderMap) -> bool {
    presented(headers).is_some_and(|key| app.user_keys.find(key).or_else(|| app.admin_keys.find(key)).is_some())
}

/// The request of someone who may classify: without user keys anyone, with them the holder of a user or admin key. The
/// request was let in; its body waits to be read.
#[derive(Debug)]
pub struct User {
    pub client: Client,
    pub entry: Entry,
    pub headers: HeaderMap,
    pub body: Body,
}

impl User {
    fn caller(app: &App, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if app.user_keys.is_empty() {
            return Ok(Caller::default());
        }
        let known = presented(headers).and_then(|key| app.user_keys.find(key).or_else(|| app.admin_keys.find(key)));
        known.map(|key| key.caller.clone()).ok_or_else(|| missing_or_wrong(headers))
    }
}

impl FromRequest<AppState> for User {
    type Rejection = ApiError;

    /// 401 without a known key; 429 and 503 when the request is not let in, after its body was read away.
    async fn from_request(request: Request, app: &AppState) -> Result<Self, ApiError> {
        let (mut parts, body) = request.into_parts();
        let RequestContext { client, .. } = RequestContext::from_request_parts(&mut parts, app).await?;
        let headers = parts.headers;
        match app.classifier.admission.enter(&Self::caller(app, &headers)?, client) {
            Ok(entry) => Ok(Self { client, entry, headers, body }),
            Err(refused) => {
                body::linger(body).await;
                Err(refused.into())
            }
        }
    }
}

/// Someone who may look at what cameras show: without user keys anyone, with them the holder of a user or admin key.
/// Looking counts as no image.
#[derive(Debug)]
pub struct Viewer;

impl FromRequestParts<AppState> for Viewer {
    type Rejection = ApiError;

    /// 401 without a known key.
    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, ApiError> {
        User::caller(app, &parts.headers).map(|_| Self)
    }
}

/// A caller who may manage: the holder of an admin key or, with `--trust-loopback`, a client on this machine.
#[derive(Debug)]
pub struct Admin(
    /// Who it is, for the log.
    pub Cow<'static, str>,
);

impl FromRequestParts<AppState> for Admin {
    type Rejection = ApiError;

    /// 401 without a known key; 403 for a user's key, and for everyone where there is no admin key and no trust.
    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, ApiError> {
        let context = RequestContext::from_request_parts(parts, app).await?;
        if app.admin_keys.is_empty() {
            let message = match app.trusts_loopback {
                true if context.from_loopback => return Ok(Self("loopback".into())),
                true => "no admin key is configured, so management is possible from this machine only",
                false => "no admin key is configured, and the server could not make one; its log says why",
            };
            return Err(ApiError::new(ErrorCode::Forbidden, message));
        }
        let key = presented(&parts.headers);
        if let Some(admin) = key.and_then(|key| app.admin_keys.find(key)) {
            return Ok(Self(admin.name.clone().into()));
        }
        match key {
            Some(key) if app.user_keys.find(key).is_some() => {
                Err(ApiError::new(ErrorCode::Forbidden, "this key may classify, not manage"))
            }
            _ => Err(missing_or_wrong(&parts.headers)),
        }
    }
}
