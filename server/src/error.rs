//! The one error type of the API and the one table from error codes to HTTP statuses.
//!
//! Every answer that is not a success goes through [`ApiError`], framework rejections and unknown routes included, as
//! `{"error": "<sentence>", "error_type": "<code>"}`. `error` stays a flat string: Open Inference Protocol clients
//! expect one.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// What went wrong, as clients can match on it. The codes are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ErrorCode {
    /// Malformed JSON, parameter, header or shape.
    InvalidRequest,
    /// A body was needed and none came.
    EmptyBody,
    /// No key, or not one we know.
    Unauthorized,
    /// A valid key without the right, or management from afar without any admin key configured.
    Forbidden,
    /// No such path.
    RouteNotFound,
    /// No such expert set or version.
    SetNotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The request contradicts the present state.
    Conflict,
    /// The body is over the limit.
    BodyTooLarge,
    /// The image has more pixels than allowed.
    ImageTooLarge,
    /// More images than allowed in one request.
    BatchTooLarge,
    /// Not an image, or a content type or encoding we do not read.
    UnsupportedMediaType,
    /// An image format we know, but broken.
    UndecodableImage,
    /// The uploaded or stored artifact is broken.
    InvalidArtifact,
    /// The expert set was made for a backbone that is not here.
    BackboneMismatch,
    /// The body came too slowly.
    BodyTimeout,
    /// The queue, or another bounded resource, is full.
    QueueFull,
    /// The key has sent more images than it may.
    RateLimited,
    /// A bug here.
    Internal,
    /// The server is shutting down.
    Draining,
    /// The server has not finished starting.
    NotReady,
    /// The expert set did not become resident in time.
    SetLoading,
    /// The expert set failed to load; it is tried again later.
    SetFailed,
    /// Too many connections are open.
    TooManyConnections,
    /// The deadline passed before the answer was there.
    DeadlineExceeded,
    /// The expert set can never fit the memory budget.
    SetTooLarge,
    /// The disk of the model store is full.
    DiskFull,
}

impl ErrorCode {
    /// Every code, for documentation, metrics and tests.
    pub const ALL: [Self; 27] = [
        Self::InvalidRequest,
        Self::EmptyBody,
        Self::Unauthorized,
        Self::Forbidden,
        Self::RouteNotFound,
        Self::SetNotFound,
        Self::MethodNotAllowed,
        Self::Conflict,
        Self::BodyTooLarge,
        Self::ImageTooLarge,
        Self::BatchTooLarge,
        Self::UnsupportedMediaType,
        Self::UndecodableImage,
        Self::InvalidArtifact,
        Self::BackboneMismatch,
        Self::BodyTimeout,
        Self::QueueFull,
        Self::RateLimited,
        Self::Internal,
        Self::Draining,
        Self::NotReady,
        Self::SetLoading,
        Self::SetFailed,
        Self::TooManyConnections,
        Self::DeadlineExceeded,
        Self::SetTooLarge,
        Self::DiskFull,
    ];

    /// The status table: the only place where a code becomes a status.
    pub const fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest | Self::EmptyBody => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::RouteNotFound | Self::SetNotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict => StatusCode::CONFLICT,
            Self::BodyTooLarge | Self::ImageTooLarge | Self::BatchTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::UndecodableImage | Self::InvalidArtifact | Self::BackboneMismatch => StatusCode::UNPROCESSABLE_ENTITY,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::QueueFull | Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Draining | Self::NotReady | Self::SetLoading | Self::SetFailed | Self::TooManyConnections => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::SetTooLarge | Self::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
        }
    }

    /// The code as it stands in `error_type` and in metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::EmptyBody => "empty_body",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::RouteNotFound => "route_not_found",
            Self::SetNotFound => "set_not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::Conflict => "conflict",
            Self::BodyTooLarge => "body_too_large",
            Self::ImageTooLarge => "image_too_large",
            Self::BatchTooLarge => "batch_too_large",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::UndecodableImage => "undecodable_image",
            Self::InvalidArtifact => "invalid_artifact",
            Self::BackboneMismatch => "backbone_mismatch",
            Self::BodyTimeout => "body_timeout",
            Self::QueueFull => "queue_full",
            Self::RateLimited => "rate_limited",
            Self::Internal => "internal",
            Self::Draining => "draining",
            Self::NotReady => "not_ready",
            Self::SetLoading => "set_loading",
            Self::SetFailed => "set_failed",
            Self::TooManyConnections => "too_many_connections",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::SetTooLarge => "set_too_large",
            Self::DiskFull => "disk_full",
        }
    }

    /// Seconds after which trying again may help, for the statuses that promise a `Retry-After`.
    const fn default_retry_after(self) -> Option<Duration> {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some(Duration::from_secs(1)),
            _ => None,
        }
    }
}

/// A request's failure: a code for programs, a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    code: ErrorCode,
    message: String,
    retry_after: Option<Duration>,
}

impl ApiError {
    /// An error with a sentence that the client may see.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: code.default_retry_after() }
    }

    /// A bug: `cause` goes to the log, the client sees a generic sentence.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(cause = %cause, "internal error");
        Self::new(ErrorCode::Internal, "an internal error occurred; the server's log has the cause")
    }

    /// Shorthand for [`ErrorCode::InvalidRequest`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message)
    }

    /// The same error, suggesting another time to wait.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The code.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The body of the answer.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.message.clone(), error_type: self.code.as_str() }
    }
}

/// The JSON body of every failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorBody {
    /// A sentence for people.
    pub error: String,
    /// An [`ErrorCode`] for programs.
    pub error_type: &'static str,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.code.status(), Json(self.body())).into_response();
        if let Some(wait) = self.retry_after {
            // Whole seconds, never zero: "0" would invite an immediate retry.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.code == ErrorCode::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // Lets the outermost middleware count and log the failure without reading the body back.
        response.extensions_mut().insert(Failure { code: self.code, message: self.message });
        response
    }
}

/// Attached to the response of a failed request for metrics and logs.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What went wrong.
    pub code: ErrorCode,
    /// The sentence the client got.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_map_to_errors() {
        let names: std::collections::HashSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(names.len(), ErrorCode::ALL.len());
        for code in ErrorCode::ALL {
            assert!(code.status().is_client_error() || code.status().is_server_error(), "{code:?}");
        }
    }

    #[test]
    fn try_again_later_says_when() {
        for code in ErrorCode::ALL {
            let retry = ApiError::new(code, "x").into_response().headers().contains_key(header::RETRY_AFTER);
            assert_eq!(retry, matches!(code.status().as_u16(), 429 | 503), "{code:?}");
        }
        let wait = ApiError::new(ErrorCode::SetFailed, "x").retry_after(Duration::from_millis(2500));
        assert_eq!(wait.into_response().headers()[header::RETRY_AFTER], "3");
    }
}
