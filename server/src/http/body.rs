//! Reading request bodies: bounded in size, in time and in bytes held by all requests together.

use std::io::Read;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::error::{ApiError, ErrorCode};
use crate::admission::BodyPermit;
use crate::app::AppState;

/// How long and how much of a refused body is read away before the answer. A client that is still sending when the
/// connection closes may never see the answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 20;

/// A request body with the bytes it holds accounted for.
#[derive(Debug)]
pub struct Received {
    pub bytes: Bytes,
    _permit: BodyPermit,
}

/// Reads a whole body, decompressing it when `Content-Encoding` says so.
///
/// # Errors
/// 413 over the limit, 429 when bodies take too much memory already, 408 when it comes too slowly, 415 for an unknown
/// encoding, 400 when it breaks off or does not decompress.
pub async fn receive(app: &AppState, headers: &HeaderMap, body: Body, deadline: Instant) -> Result<Received, ApiError> {
    let mut body = body;
    match receive_limited(app, headers, &mut body, deadline).await {
        Err(error) if [ErrorCode::BodyTooLarge, ErrorCode::QueueFull].contains(&error.code()) => {
            linger(body).await;
            Err(error)
        }
        result => result,
    }
}

/// Reads a refused body away, within reason.
pub async fn linger(mut body: Body) {
    let read_away = async {
        let mut left = LINGER_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { break };
            left = rest;
        }
    };
    let _ = tokio::time::timeout(LINGER, read_away).await;
}

async fn receive_limited(
    app: &AppState,
    headers: &HeaderMap,
    body: &mut Body,
    deadline: Instant,
) -> Result<Received, ApiError> {
    let limit = app.limits.max_body_bytes;
    let encoding = Encoding::of(headers)?;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|announced| announced > limit as u64) {
        return Err(too_large(limit));
    }
    let deadline = deadline.min(Instant::now() + app.limits.body_timeout);
    let mut permit = app.classifier.admission.body()?;
    let mut received = BytesMut::new();
    loop {
        let frame = tokio::time::timeout_at(deadline, body.frame())
            .await
            .map_err(|_| ApiError::new(ErrorCode::BodyTimeout, "the request's body did not arrive in time"))?;
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|error| ApiError::invalid(format!("the request's body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if received.len() + data.len() > limit {
            return Err(too_large(limit));
        }
        permit.grow(data.len())?;
        received.extend_from_slice(&data);
    }
    let bytes = received.freeze();
    if encoding == Encoding::Identity || bytes.is_empty() {
        return Ok(Received { bytes, _permit: permit });
    }
    app.decompression.run(move || decompress(encoding, &bytes, limit, permit)).await?
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(ErrorCode::BodyTooLarge, format!("the request's body is larger than {limit} bytes"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Identity,
    Gzip,
    Deflate,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let Some(value) = headers.get(header::CONTENT_ENCODING) else { return Ok(Self::Identity) };
        match value.to_str().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            "" | "identity" => Ok(Self::Identity),
            "gzip" | "x-gzip" => Ok(Self::Gzip),
            "deflate" => Ok(Self::Deflate),
            _ => Err(ApiError::new(
                ErrorCode::UnsupportedMediaType,
                "this content encoding is not accepted; use gzip, deflate or none",
            )),
        }
    }
}

/// Grows the permit as bytes come out, so that a small bomb stops at the limit, not at the end of memory.
fn decompress(encoding: Encoding, bytes: &[u8], limit: usize, mut permit: BodyPermit) -> Result<Received, ApiError> {
    let mut decoder: Box<dyn Read + '_> = match encoding {
        Encoding::Identity => Box::new(bytes),
        Encoding::Gzip => Box::new(flate2::read::MultiGzDecoder::new(bytes)),
        // "deflate" means the zlib format (RFC 9110, section 8.4.1.2).
        Encoding::Deflate => Box::new(flate2::read::ZlibDecoder::new(bytes)),
    };
    let mut out = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let count = decoder
            .read(&mut chunk)
            .map_err(|error| ApiError::invalid(format!("the request's body does not decompress: {error}")))?;
        if count == 0 {
            return Ok(Received { bytes: out.into(), _permit: permit });
        }
        if out.len() + count > limit {
            return Err(too_large(limit));
        }
        permit.grow(count)?;
        out.extend_from_slice(&chunk[..count]);
    }
}
