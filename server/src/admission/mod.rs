//! What is let in: requests, images and body bytes, each bounded, each given back when its holder is done. Fullness is
//! a normal answer (429), decided before any work is spent.

mod images;

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{ApiError, ErrorCode};
pub use images::{ImageLimits, ImagePermit, Images, Refused};

/// Semaphores count this many bytes as one, so that large budgets fit their counters on 32-bit machines.
const GRAIN: usize = 1024;

/// The bounds; clones share them.
#[derive(Debug, Clone)]
pub struct Admission {
    requests: Arc<Semaphore>,
    body_bytes: Arc<Semaphore>,
    /// Images.
    pub images: Images,
}

/// Body bytes in memory.
#[derive(Debug)]
pub struct BodyPermit {
    source: Arc<Semaphore>,
    held: OwnedSemaphorePermit,
    bytes: usize,
}

impl Admission {
    /// Bounds on requests, on bytes of bodies and on images.
    pub fn new(requests: usize, body_bytes: usize, images: ImageLimits) -> Self {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        Self { requests: semaphore(requests), body_bytes: semaphore(body_bytes / GRAIN), images: Images::new(images) }
    }

    /// Lets one request in.
    ///
    /// # Errors
    /// 429 when as many as allowed are being worked on.
    pub fn request(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        take(&self.requests, 1, "too many requests are being worked on")
    }

    /// A permit for a body that grows as it arrives: bytes are counted when a client has sent them, so that announcing
    /// a large body holds nothing.
    ///
    /// # Errors
    /// Never in practice: zero bytes always fit.
    pub fn body(&self) -> Result<BodyPermit, ApiError> {
        let held = take(&self.body_bytes, 0, BODIES_FULL)?;
        Ok(BodyPermit { source: Arc::clone(&self.body_bytes), held, bytes: 0 })
    }
}

const BODIES_FULL: &str = "too many bytes of requests are being received";

impl BodyPermit {
    /// Counts `bytes` more.
    ///
    /// # Errors
    /// 429 when they do not fit.
    pub fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        self.bytes = self.bytes.saturating_add(bytes);
        let missing = self.bytes.div_ceil(GRAIN).saturating_sub(self.held.num_permits());
        if missing > 0 {
            self.held.merge(take(&self.source, missing, BODIES_FULL)?);
        }
        Ok(())
    }
}

fn take(semaphore: &Arc<Semaphore>, count: usize, full: &str) -> Result<OwnedSemaphorePermit, ApiError> {
    let permit = u32::try_from(count).ok().and_then(|count| Arc::clone(semaphore).try_acquire_many_owned(count).ok());
    permit.ok_or_else(|| ApiError::new(ErrorCode::QueueFull, format!("{full}; try again later")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_count_what_has_arrived() {
        let images = ImageLimits { images: 1, bytes: 1, images_per_set: 1, images_when_busy: 1 };
        let admission = Admission::new(1, 2 * GRAIN, images);
        let mut first = admission.body().unwrap();
        first.grow(1).unwrap();
        first.grow(GRAIN - 1).unwrap();
        let mut second = admission.body().unwrap();
        second.grow(GRAIN).unwrap();
        assert!(first.grow(1).is_err());
        drop(second);
        assert!(first.grow(1).is_ok());
    }
}
