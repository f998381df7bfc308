//! What is let in: requests, images and body bytes, each bounded, each given back when its holder is done. Fullness is
//! a normal answer (429), decided before any work is spent.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{ApiError, ErrorCode};

/// Semaphores count this many bytes as one, so that large budgets fit their counters on 32-bit machines.
const GRAIN: usize = 1024;

/// The bounds; clones share them.
#[derive(Debug, Clone)]
pub struct Admission {
    requests: Arc<Semaphore>,
    images: Arc<Semaphore>,
    image_bytes: Arc<Semaphore>,
    body_bytes: Arc<Semaphore>,
}

/// Images on their way from admission to answer.
#[derive(Debug)]
pub struct ImagePermit {
    _images: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// Body bytes in memory.
#[derive(Debug)]
pub struct BodyPermit {
    source: Arc<Semaphore>,
    held: OwnedSemaphorePermit,
    bytes: usize,
}

impl Admission {
    /// Bounds on requests, on images with their preprocessed bytes, and on bytes of bodies.
    pub fn new(requests: usize, images: usize, image_bytes: usize, body_bytes: usize) -> Self {
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        Self {
            requests: semaphore(requests),
            images: semaphore(images),
            image_bytes: semaphore(image_bytes / GRAIN),
            body_bytes: semaphore(body_bytes / GRAIN),
        }
    }

    /// Lets one request in.
    ///
    /// # Errors
    /// 429 when as many as allowed are being worked on.
    pub fn request(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        take(&self.requests, 1, "too many requests are being worked on")
    }

    /// Lets `count` images of `bytes_each` preprocessed bytes in, all or none.
    ///
    /// # Errors
    /// 429 when they do not fit.
    pub fn images(&self, count: usize, bytes_each: usize) -> Result<ImagePermit, ApiError> {
        let full = "the queue is full";
        let _images = take(&self.images, count, full)?;
        let _bytes = take(&self.image_bytes, count.saturating_mul(bytes_each).div_ceil(GRAIN), full)?;
        Ok(ImagePermit { _images, _bytes })
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
    fn images_are_let_in_all_or_none_and_come_back() {
        let admission = Admission::new(1, 4, 8 * GRAIN, GRAIN);
        let three = admission.images(3, GRAIN).unwrap();
        assert_eq!(admission.images(2, 1).unwrap_err().code(), ErrorCode::QueueFull);
        let one = admission.images(1, 2 * GRAIN).unwrap();
        drop((three, one));
        assert!(admission.images(4, 3 * GRAIN).is_err(), "bytes count too");
        assert!(admission.images(4, 2 * GRAIN).is_ok());
        assert!(admission.images(usize::MAX, usize::MAX).is_err());
    }

    #[test]
    fn bodies_count_what_has_arrived() {
        let admission = Admission::new(1, 1, 1, 2 * GRAIN);
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
