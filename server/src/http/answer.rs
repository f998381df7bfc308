//! Answers whose size a client can choose: bounded before they are built, and built off the async threads when large.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::error::{ApiError, ErrorCode};
use crate::app::AppState;
use crate::classify::Error;
use crate::sets::loaded::Answer;

/// Most bytes of one answer.
const MOST_BYTES: usize = 4 << 20;
/// Most bytes of all answers that are being built or have not left yet; those below `INLINE_BYTES` are not counted.
pub const ANSWER_MEMORY: usize = 8 << 20;
/// Answers up to this size are built where they are.
const INLINE_BYTES: usize = 64 << 10;

/// What each prediction takes beside its label, in JSON: names, punctuation, a score and an index.
const PREDICTION_BYTES: usize = 64;
/// What each image takes beside its predictions and routing map.
const IMAGE_BYTES: usize = 1024;

/// An answer's bytes with their place in [`ANSWER_MEMORY`], which they give back once they have left.
struct Held {
    bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Builds an answer that takes at most `bound` bytes, and whatever else `build` returns.
///
/// # Errors
/// 413 when the bound is too large; 504 when there is no place for it until `deadline`; those of `build`.
pub async fn build<T: Send + 'static>(
    app: &AppState,
    deadline: Instant,
    bound: usize,
    build: impl FnOnce() -> Result<(Vec<u8>, T), ApiError> + Send + 'static,
) -> Result<(Bytes, T), ApiError> {
    if bound > MOST_BYTES {
        let message = format!(
            "the answer could take {bound} bytes, {MOST_BYTES} are the most; ask for fewer labels or outputs, or send \
             fewer images at once"
        );
        return Err(ApiError::new(ErrorCode::BatchTooLarge, message));
    }
    if bound <= INLINE_BYTES {
        return build().map(|(bytes, more)| (bytes.into(), more));
    }
    // The bound is far below the 2^29 permits that a semaphore counts at least.
    let wanted = u32::try_from(bound).map_err(ApiError::internal)?;
    let place = timeout_at(deadline, Arc::clone(&app.answers).acquire_many_owned(wanted)).await;
    let place = place.map_err(|_| ApiError::from(Error::Deadline))?.map_err(ApiError::internal)?;
    let (bytes, more) = app.bulk.run(build).await??;
    Ok((Bytes::from_owner(Held { bytes, _place: place }), more))
}

/// Bytes that `top_k` predictions of each of these images take at most, with their routing maps.
pub fn bound(images: &[Result<Answer, Error>], labels: &[String], top_k: usize) -> usize {
    let maps = images.iter().flatten().filter_map(|answer| answer.routing.as_ref());
    let maps: usize = maps.map(|map| map.layers.iter().map(|layer| layer.json_bytes()).sum::<usize>()).sum();
    (predictions_bound(labels, top_k) + IMAGE_BYTES).saturating_mul(images.len()).saturating_add(maps)
}

/// Bytes that `top_k` predictions of one image take at most, in JSON or as lines of text.
pub fn predictions_bound(labels: &[String], top_k: usize) -> usize {
    let (mut all, mut longest) = (0, 0);
    for label in labels {
        let bytes = PREDICTION_BYTES + json_bytes(label);
        all += bytes;
        longest = longest.max(bytes);
    }
    longest.saturating_mul(top_k).min(all)
}

/// Bytes of a text in JSON at most: control characters take six, quotes and backslashes two.
fn json_bytes(text: &str) -> usize {
    text.bytes()
        .map(|byte| if byte < b' ' || byte == 0x7f { 6 } else { 1 + usize::from(b"\"\\".contains(&byte)) })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::predictions;

    #[test]
    fn no_answer_is_larger_than_its_bound() {
        let labels: Vec<String> =
            ["plain", "\u{1}\u{2}\"\\", "", "ein längerer Name", "猫"].map(str::to_owned).to_vec();
        let logits = [-1e-30, 2.0, -1.17e-38, 0.25, -3.4e38];
        for top_k in [1, 2, 5, 100, usize::MAX] {
            let json = serde_json::to_vec(&predictions(&logits, &labels, top_k)).unwrap();
            let bound = predictions_bound(&labels, top_k);
            assert!(json.len() <= bound + 2, "{top_k}: {} of {bound}", json.len());
        }
        assert_eq!(predictions_bound(&labels, usize::MAX), predictions_bound(&labels, 5));
    }
}
