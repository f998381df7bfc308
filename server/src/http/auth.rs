//! Keys: who may classify, who may manage.

use std::path::Path;

use axum::http::{HeaderMap, header};
use sha2::{Digest as _, Sha256};

use super::extract::RequestContext;
use crate::error::{ApiError, ErrorCode};
use crate::state::AppState;

/// Named keys, kept as hashes: nothing that is logged or dumped by mistake contains one.
#[derive(Clone, Default)]
pub struct Keys(Vec<(String, [u8; 32])>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Keys {
    /// One key a line, `NAME:KEY` or `KEY`; empty lines and lines that start with `#` are skipped.
    ///
    /// # Errors
    /// A sentence that names the line, never the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let unnamed = format!("key-{number}");
            let (name, key) = line.split_once(':').unwrap_or((&unnamed, line));
            if key.len() < 8 {
                return Err(format!("line {number}: a key needs at least 8 characters"));
            }
            keys.push((name.to_owned(), hash(key)));
        }
        Ok(Self(keys))
    }

    /// Keys of a file and of an environment variable together.
    ///
    /// # Errors
    /// A sentence that names file or variable.
    pub fn load(file: Option<&Path>, variable: &str) -> Result<Self, String> {
        let mut keys = match std::env::var(variable) {
            // Commas for those who find line breaks in an environment awkward.
            Ok(text) => Self::parse(&text.replace(',', "\n")).map_err(|error| format!("{variable}: {error}"))?,
            Err(_) => Self::default(),
        };
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
            keys.0.extend(Self::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?.0);
        }
        Ok(keys)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The name of `key`. Every key is compared, and every byte of its hash, so that time tells nothing.
    fn name_of(&self, key: &str) -> Option<&str> {
        let hash = hash(key);
        let equal = |other: &[u8; 32]| std::iter::zip(&hash, other).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0;
        self.0.iter().fold(None, |found, (name, other)| if equal(other) { Some(name.as_str()) } else { found })
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

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
pub fn require_user(app: &AppState, headers: &HeaderMap) -> Result<(), ApiError> {
    if app.user_keys.is_empty() {
        return Ok(());
    }
    let known = presented(headers)
        .is_some_and(|key| app.user_keys.name_of(key).or_else(|| app.admin_keys.name_of(key)).is_some());
    if known { Ok(()) } else { Err(missing_or_wrong(headers)) }
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
    if let Some(name) = key.and_then(|key| app.admin_keys.name_of(key)) {
        return Ok(name);
    }
    match key {
        Some(key) if app.user_keys.name_of(key).is_some() => {
            Err(ApiError::new(ErrorCode::Forbidden, "this key may classify, not manage"))
        }
        _ => Err(missing_or_wrong(headers)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_names_and_are_never_shown() {
        let keys = Keys::parse("# comment\n\nalice:secret-one\nsecret-two\n").unwrap();
        assert_eq!(keys.name_of("secret-one"), Some("alice"));
        assert_eq!(keys.name_of("secret-two"), Some("key-4"));
        assert_eq!(keys.name_of("secret-three"), None);
        assert!(!format!("{keys:?}").contains("secret"));
        assert_eq!(Keys::parse("ok-ok-ok\nshort").unwrap_err(), "line 2: a key needs at least 8 characters");
    }
}
