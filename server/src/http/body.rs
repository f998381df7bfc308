//! Reading request bodies: bounded in size, in time and in bytes held by all requests together.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::error::{ApiError, ErrorCode};
use crate::admission::{BodyPermit, Client};
use crate::app::AppState;

/// How long and how much of a refused body is read away before the answer. A client that is still sending when the
/// connection closes may never see the answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 20;

/// Bytes a second that a body needs on average, once `--body-timeout` has passed: one that trickles must end, too.
pub const LEAST_RATE: usize = 4 << 10;

/// A request body with the bytes it holds accounted for.
#[derive(Debug)]
pub struct Received {
    /// Given away to whoever reads them, so that they are gone when what was made of them is there.
    pub bytes: Bytes,
    /// When the answer must be there. A client's time to send its body is its own.
    pub deadline: Instant,
    /// To be kept as long as the bytes, or what was made of them.
    pub permit: BodyPermit,
}

/// Reads a whole body, decompressing it when `Content-Encoding` says so.
///
/// # Errors
/// 413 over the limit, 429 when bodies take too much memory already, 408 when it comes too slowly, 415 for an unknown
/// encoding, 400 when it breaks off or does not decompress.
pub async fn receive(
    app: &AppState,
    client: Client,
    headers: &HeaderMap,
    mut body: Body,
) -> Result<Received, ApiError> {
    match receive_limited(app, client, headers, &mut body).await {
        Err(error) if [ErrorCode::BodyTooLarge, ErrorCode::QueueFull].contains(&error.code()) => {
            linger(body).await;
            Err(error)
        }
        result => result,
    }
}

/// The pieces of a body, as long as they keep coming.
pub struct Pieces<'a> {
    body: &'a mut Body,
    patience: Duration,
    started: Instant,
    received: usize,
}

impl<'a> Pieces<'a> {
    /// None has come yet. A client may take `patience` for each piece, and is then to keep up [`LEAST_RATE`].
    pub fn of(body: &'a mut Body, patience: Duration) -> Self {
        Self { body, patience, started: Instant::now(), received: 0 }
    }

    /// The next piece, or `None` at the end.
    ///
    /// # Errors
    /// 408 when it comes too slowly, 400 when the body breaks off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let earned = Duration::from_secs_f64(self.received as f64 / LEAST_RATE as f64);
            let deadline = (Instant::now() + self.patience).min(self.started + self.patience + earned);
            let frame = tokio::time::timeout_at(deadline, self.body.frame())
                .await
                .map_err(|_| ApiError::new(ErrorCode::BodyTimeout, "the request's body came too slowly"))?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| ApiError::invalid(format!("the request's body broke off: {error}")))?;
            if let Ok(data) = frame.into_data() {
                self.received += data.len();
                return Ok(Some(data));
            }
        }
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
    client: Client,
    headers: &HeaderMap,
    body: &mut Body,
) -> Result<Received, ApiError> {
    let limit = app.limits.max_body_bytes;
    let encoding = Encoding::of(headers)?;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|announced| announced > limit as u64) {
        return Err(too_large(limit));
    }
    let mut permit = app.classifier.admission.body(client)?;
    let mut pieces = Pieces::of(body, app.limits.body_timeout);
    let mut received = BytesMut::new();
    let mut compressed = VecDeque::new();
    while let Some(piece) = pieces.next().await? {
        if pieces.received > limit {
            return Err(too_large(limit));
        }
        permit.hold(pieces.received)?;
        if encoding == Encoding::Identity {
            received.extend_from_slice(&piece);
        } else {
            // Apart, so that each piece's memory is given back when it has been decompressed.
            compressed.push_back(piece);
        }
    }
    let deadline = Instant::now() + app.limits.request_timeout;
    if compressed.is_empty() {
        return Ok(Received { bytes: received.freeze(), deadline, permit });
    }
    let decompressed = app.bulk.run(move || decompress(encoding, compressed, limit, permit));
    let (bytes, permit) = decompressed.await??;
    Ok(Received { bytes, deadline, permit })
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

/// Counts bytes as they come out and no more as they go in, so that a small bomb
/// stops at the limit, not at the end of memory.
fn decompress(
    encoding: Encoding,
    pieces: VecDeque<Bytes>,
    limit: usize,
    mut permit: BodyPermit,
) -> Result<(Bytes, BodyPermit), ApiError> {
    let left = Cell::new(pieces.iter().map(Bytes::len).sum());
    let source = Compressed { pieces, left: &left };
    let mut decoder: Box<dyn Read + '_> = match encoding {
        Encoding::Identity => Box::new(source),
        Encoding::Gzip => Box::new(flate2::read::MultiGzDecoder::new(source)),
        // "deflate" means the zlib format (RFC 9110, section 8.4.1.2).
        Encoding::Deflate => Box::new(flate2::read::ZlibDecoder::new(source)),
    };
    let mut out = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let count = decoder
            .read(&mut chunk)
            .map_err(|error| ApiError::invalid(format!("the request's body does not decompress: {error}")))?;
        if count == 0 {
            permit.hold(out.len())?;
            return Ok((out.into(), permit));
        }
        if out.len() + count > limit {
            return Err(too_large(limit));
        }
        permit.hold(left.get() + out.len() + count)?;
        out.extend_from_slice(&chunk[..count]);
    }
}

/// Pieces of a compressed body, each dropped when it has been read.
struct Compressed<'a> {
    pieces: VecDeque<Bytes>,
    left: &'a Cell<usize>,
}

impl Read for Compressed<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(piece) = self.pieces.front_mut() else { return Ok(0) };
        let count = piece.len().min(out.len());
        out[..count].copy_from_slice(&piece.split_to(count));
        self.left.set(self.left.get() - count);
        if piece.is_empty() {
            self.pieces.pop_front();
        }
        Ok(count)
    }
}
