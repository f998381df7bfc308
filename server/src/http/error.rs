//! The one error type of the API, the one table from error codes to HTTP statuses, and what every error of
//! the rooms below becomes.
//!
//! Every answer that is not a success goes through [`ApiError`], framework rejections and unknown routes
//! included, as `{"error": "<sentence>", "error_type": "<code>"}`. `error` stays a flat string: Open Inference
//! Protocol clients expect one.

use std::borrow::Cow;
use std::time::Duration;

use crate::repeats::REPEATS;
use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use model_core::image::ImageError;
use serde::Serialize;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};

use crate::admission::{NoPlace, Refused};
use crate::classify;
use crate::examples::ExampleError;
use crate::fitting::FitError;
use crate::keys::OverRate;
use crate::lifecycle::NotServing;
use crate::sets::catalog::CatalogError;
use crate::sets::registry::SetError;
use crate::threads::Panicked;

/// Declares [`ErrorCode`] from the table below, each row's doc comment being also its explanation
/// in the API's documentation.
macro_rules! error_codes {
    ($(#[doc = $meaning:literal] $code:ident $text:literal $status:ident;)+) => {
        /// What went wrong, as clients can match on it. The codes are part of the API.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ErrorCode {
            $(#[doc = $meaning] $code,)+
        }

        impl ErrorCode {
            /// Every code, for documentation, metrics and tests.
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$code),+];

            /// The status of the answer.
            pub const fn status(self) -> StatusCode {
                match self { $(Self::$code => StatusCode::$status,)+ }
            }

            /// The code as it stands in `error_type` and in metric labels.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$code => $text,)+ }
            }

            /// When it is answered, as a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$code => $meaning.trim_start(),)+ }
            }
        }
    };
}

// The status table: the only place where a code becomes a status.
error_codes! {
    /// A parameter, header, shape or the JSON is malformed.
    InvalidRequest "invalid_request" BAD_REQUEST;
    /// A body was needed and none came.
    EmptyBody "empty_body" BAD_REQUEST;
    /// No key came, or not one that is known.
    Unauthorized "unauthorized" UNAUTHORIZED;
    /// The key lacks the right, or there is no admin key that could give it.
    Forbidden "forbidden" FORBIDDEN;
    /// A page of another site sent the request, without a key.
    CrossSite "cross_site" FORBIDDEN;
    /// There is no such path.
    RouteNotFound "route_not_found" NOT_FOUND;
    /// There is no such expert set or version.
    SetNotFound "set_not_found" NOT_FOUND;
    /// There is no such camera, or nothing to show of it yet.
    CameraNotFound "camera_not_found" NOT_FOUND;
    /// The set has no such example.
    ExampleNotFound "example_not_found" NOT_FOUND;
    /// The path exists, the method does not.
    MethodNotAllowed "method_not_allowed" METHOD_NOT_ALLOWED;
    /// The request contradicts the present state.
    Conflict "conflict" CONFLICT;
    /// The body is over the limit.
    BodyTooLarge "body_too_large" PAYLOAD_TOO_LARGE;
    /// The image has more pixels than allowed.
    ImageTooLarge "image_too_large" PAYLOAD_TOO_LARGE;
    /// There are more images than allowed in one request, or their answer would be too large.
    BatchTooLarge "batch_too_large" PAYLOAD_TOO_LARGE;
    /// This is not an image, or its content type or encoding is not read.
    UnsupportedMediaType "unsupported_media_type" UNSUPPORTED_MEDIA_TYPE;
    /// The image has a known format, but is broken.
    UndecodableImage "undecodable_image" UNPROCESSABLE_ENTITY;
    /// The uploaded or stored artifact is broken.
    InvalidArtifact "invalid_artifact" UNPROCESSABLE_ENTITY;
    /// The expert set was made for a backbone that is not here.
    BackboneMismatch "backbone_mismatch" UNPROCESSABLE_ENTITY;
    /// The expert set borrows the experts of a set that is not here, or that cannot lend them.
    LenderMismatch "lender_mismatch" UNPROCESSABLE_ENTITY;
    /// The body came too slowly.
    BodyTimeout "body_timeout" REQUEST_TIMEOUT;
    /// The queue, or another bounded resource, is full.
    QueueFull "queue_full" TOO_MANY_REQUESTS;
    /// The key has sent more images than it may.
    RateLimited "rate_limited" TOO_MANY_REQUESTS;
    /// The expert set gives numbers that are not finite.
    NotFinite "not_finite" INTERNAL_SERVER_ERROR;
    /// This is a bug of the server.
    Internal "internal" INTERNAL_SERVER_ERROR;
    /// The server is shutting down.
    Draining "draining" SERVICE_UNAVAILABLE;
    /// The server has not finished starting.
    NotReady "not_ready" SERVICE_UNAVAILABLE;
    /// The expert set did not become resident in time.
    SetLoading "set_loading" SERVICE_UNAVAILABLE;
    /// The expert set failed to load; it is tried again later.
    SetFailed "set_failed" SERVICE_UNAVAILABLE;
    /// Too many connections are open.
    TooManyConnections "too_many_connections" SERVICE_UNAVAILABLE;
    /// The deadline passed before the answer was there.
    DeadlineExceeded "deadline_exceeded" GATEWAY_TIMEOUT;
    /// The expert set can never fit the memory budget.
    SetTooLarge "set_too_large" INSUFFICIENT_STORAGE;
    /// The disk of the model store, or the room for examples, is full.
    DiskFull "disk_full" INSUFFICIENT_STORAGE;
}

impl ErrorCode {
    /// Seconds after which trying again may help, for the statuses that promise a `Retry-After`.
    const fn default_retry_after(self) -> Option<Duration> {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some(Duration::from_secs(1)),
            _ => None,
        }
    }
}

/// Most characters of a sentence that may contain what a client wrote.
const MOST_CHARACTERS: usize = 300;

/// `text` as it may stand in an answer or in a line of the log: its middle left out when it is long. What clients write
/// comes in here, wherever it stands in a sentence.
pub fn cut(text: &str) -> Cow<'_, str> {
    // Two thirds from the beginning, which says what is wrong; the end says what to do about it.
    const END: usize = MOST_CHARACTERS / 3;
    const BEGINNING: usize = MOST_CHARACTERS - END - ELLIPSIS.len();
    const ELLIPSIS: &str = " ... ";
    if text.chars().nth(MOST_CHARACTERS).is_none() {
        return Cow::Borrowed(text);
    }
    let beginning = text.char_indices().nth(BEGINNING).map_or(text.len(), |(at, _)| at);
    let end = text.char_indices().rev().nth(END - 1).map_or(0, |(at, _)| at);
    Cow::Owned([&text[..beginning], ELLIPSIS, &text[end..]].concat())
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
    /// An error with a sentence that the client may see, which is [`cut`].
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = message.into();
        let message = match cut(&message) {
            Cow::Borrowed(_) => message,
            Cow::Owned(cut) => cut,
        };
        Self { code, message, retry_after: code.default_retry_after() }
    }

    /// A bug: `cause` goes to the log, the client sees a generic sentence.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        if let Some(repeated) = REPEATS.admit("internal error") {
            tracing::error!(cause = cut(&cause.to_string()).as_ref(), repeated, "internal error");
        }
        Self::new(ErrorCode::Internal, "an internal error occurred; the server's log has the cause")
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message)
    }

    /// The same error, suggesting another time to wait.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The body of the answer.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.message.clone(), error_type: self.code.as_str() }
    }
}

/// In documentation a code is one of those strings.
impl utoipa::PartialSchema for ErrorCode {
    fn schema() -> RefOr<Schema> {
        let codes = Self::ALL.map(Self::as_str);
        ObjectBuilder::new().schema_type(Type::String).enum_values(Some(codes)).into()
    }
}

impl utoipa::ToSchema for ErrorCode {}

/// The body of every failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ErrorBody {
    /// A sentence for people.
    pub error: String,
    /// A code for programs.
    #[schema(value_type = ErrorCode)]
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
    pub code: ErrorCode,
    /// The sentence the client got.
    pub message: String,
}

impl From<NotServing> for ApiError {
    fn from(error: NotServing) -> Self {
        let code = match error {
            NotServing::Starting => ErrorCode::NotReady,
            NotServing::Draining => ErrorCode::Draining,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Refused> for ApiError {
    fn from(error: Refused) -> Self {
        match error {
            Refused::NotServing(error) => error.into(),
            Refused::OverRate(OverRate::Now { retry_after }) => {
                Self::new(ErrorCode::RateLimited, error.to_string()).retry_after(retry_after)
            }
            Refused::OverRate(OverRate::Always) => Self::new(ErrorCode::RateLimited, error.to_string()),
            Refused::Images(NoPlace::TooMany { .. }) => Self::new(ErrorCode::BatchTooLarge, error.to_string()),
            Refused::LargeBody(_) => Self::new(ErrorCode::BodyTooLarge, error.to_string()),
            Refused::Requests
            | Refused::Bodies
            | Refused::Share(_)
            | Refused::Images(NoPlace::Full | NoPlace::SetFull) => Self::new(ErrorCode::QueueFull, error.to_string()),
        }
    }
}

impl From<SetError> for ApiError {
    fn from(error: SetError) -> Self {
        let code = match &error {
            SetError::Unknown { .. } => ErrorCode::SetNotFound,
            SetError::TooLarge { .. } => ErrorCode::SetTooLarge,
            SetError::NoRoom { .. } | SetError::StillLoading { .. } => ErrorCode::SetLoading,
            SetError::Failed { retry_after, .. } => {
                return Self::new(ErrorCode::SetFailed, error.to_string()).retry_after(*retry_after);
            }
            SetError::NoBackbone { .. } => ErrorCode::BackboneMismatch,
            SetError::NoLender { .. } | SetError::BadLender { .. } => ErrorCode::LenderMismatch,
            SetError::Conflict(_) => ErrorCode::Conflict,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ExampleError> for ApiError {
    fn from(error: ExampleError) -> Self {
        let code = match error {
            ExampleError::Off | ExampleError::OtherLabel { .. } | ExampleError::ReadOnly => ErrorCode::Conflict,
            ExampleError::Set(_) | ExampleError::Label => ErrorCode::InvalidRequest,
            ExampleError::Unknown(_) => ErrorCode::ExampleNotFound,
            ExampleError::Full { .. } | ExampleError::TooMany | ExampleError::DiskFull => ErrorCode::DiskFull,
            ExampleError::Internal(_) => return Self::internal(error),
        };
        Self::new(code, error.to_string())
    }
}

impl From<FitError> for ApiError {
    fn from(error: FitError) -> Self {
        let code = match error {
            FitError::Example(error) => return error.into(),
            FitError::Catalog(error) => return error.into(),
            FitError::Set(error) => return error.into(),
            FitError::Internal(cause) => return Self::internal(cause),
            FitError::Backbone(_) => ErrorCode::InvalidRequest,
            FitError::TooLarge { .. } => ErrorCode::SetTooLarge,
            FitError::Teach(_) | FitError::UnderWay { .. } | FitError::NotUnderWay(_) | FitError::TooLate(_) => {
                ErrorCode::Conflict
            }
        };
        Self::new(code, error.to_string())
    }
}

impl From<CatalogError> for ApiError {
    fn from(error: CatalogError) -> Self {
        let code = match error {
            CatalogError::Embedded | CatalogError::ReadOnly => ErrorCode::Conflict,
            CatalogError::DiskFull => ErrorCode::DiskFull,
            CatalogError::Invalid(_) => ErrorCode::InvalidArtifact,
            CatalogError::Set(error) => return error.into(),
            CatalogError::Internal(cause) => return Self::internal(cause),
        };
        Self::new(code, error.to_string())
    }
}

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        let code = match error {
            ImageError::Empty => ErrorCode::EmptyBody,
            ImageError::NotAnImage | ImageError::UnsupportedFormat { .. } => ErrorCode::UnsupportedMediaType,
            ImageError::TooManyPixels { .. } | ImageError::TooMuchMemory { .. } => ErrorCode::ImageTooLarge,
            ImageError::Crop { .. } | ImageError::TooLong { .. } => ErrorCode::InvalidRequest,
            // Nobody reads the answer.
            ImageError::Stopped => ErrorCode::DeadlineExceeded,
            _ => ErrorCode::UndecodableImage,
        };
        Self::new(code, error.to_string())
    }
}

impl From<classify::Error> for ApiError {
    fn from(error: classify::Error) -> Self {
        let code = match error {
            classify::Error::Refused(error) => return error.into(),
            classify::Error::Set(error) => return error.into(),
            classify::Error::Image(error) => return error.into(),
            classify::Error::Internal(cause) => return Self::internal(cause),
            classify::Error::Form(_) | classify::Error::Side { .. } => ErrorCode::InvalidRequest,
            classify::Error::NotFinite { .. } => ErrorCode::NotFinite,
            classify::Error::Deadline => ErrorCode::DeadlineExceeded,
            classify::Error::Closed(_) => ErrorCode::Draining,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Panicked> for ApiError {
    fn from(error: Panicked) -> Self {
        Self::internal(error)
    }
}

impl From<PathRejection> for ApiError {
    /// A path that does not parse names nothing that exists.
    fn from(error: PathRejection) -> Self {
        Self::new(ErrorCode::RouteNotFound, error.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(error: QueryRejection) -> Self {
        Self::invalid(format!("query parameters: {}", error.body_text()))
    }
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
    fn long_text_loses_its_middle() {
        let longest = "ä".repeat(MOST_CHARACTERS);
        assert!(matches!(cut(&longest), Cow::Borrowed(text) if text == longest));
        for letter in ["x", "ä", "🦋"] {
            let long = format!("field `{}` is unknown", letter.repeat(100_000));
            let short = cut(&long);
            assert_eq!(short.chars().count(), MOST_CHARACTERS, "{letter}");
            assert!(
                short.starts_with("field `") && short.ends_with("` is unknown") && short.contains(" ... "),
                "{short}"
            );
            assert_eq!(ApiError::invalid(long.clone()).body().error, short);
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
