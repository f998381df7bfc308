//! Who may classify and who may manage.

use axum::http::{HeaderMap, header};

use super::extract::RequestContext;
use crate::app::AppState;
use crate::error::{ApiError, ErrorCode};
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

/// Lets classification through: without user keys anyone, with them a user or admin key.
///
/// # Errors
/// 401.
pub fn require_user(app: &AppState, headers: &HeaderMap) -> Result<Caller, ApiError> {
    if app.user_keys.is_empty() {
        return Ok(Caller::default());
    }
    let known = presented(headers).and_then(|key| app.user_keys.find(key).or_else(|| app.admin_keys.find(key)));
    known.map(|key| key.caller.clone()).ok_or_else(|| missing_or_wrong(headers))
}

/// Lets management through: with admin keys one of them, without any only the loopback. Returns who it is, for the
/// log.
///
/// # Errors
/// 401 without a known key, 403 for a user's key, or from afar when no admin key is configured.
pub fn require_admin<'a>(
    app: &'a AppState,
    context: &RequestContext,
    headers: &HeaderMap,
) -> Result<&'a str, ApiError> {
    if app.admin_keys.is_empty() {
        return if context.from_loopback {
            Ok("loopback")
        } else {
            let message = "no admin key is configured, so management is possible from this machine only";
            Err(ApiError::new(ErrorCode::Forbidden, message))
        };
    }
    let key = presented(headers);
    if let Some(admin) = key.and_then(|key| app.admin_keys.find(key)) {
        return Ok(&admin.name);
    }
    match key {
        Some(key) if app.user_keys.find(key).is_some() => {
            Err(ApiError::new(ErrorCode::Forbidden, "this key may classify, not manage"))
        }
        _ => Err(missing_or_wrong(headers)),
    }
}
