//! Starting, ready, draining: what probes and handlers ask.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{ApiError, ErrorCode};

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;

/// Where the server is in its life. It only moves forward.
#[derive(Debug, Default)]
pub struct Lifecycle(AtomicU8);

impl Lifecycle {
    /// The model is warm and requests are welcome.
    pub fn set_ready(&self) {
        self.0.fetch_max(READY, Ordering::Relaxed);
    }

    /// No new work.
    pub fn set_draining(&self) {
        self.0.fetch_max(DRAINING, Ordering::Relaxed);
    }

    /// As a word for people.
    pub fn as_str(&self) -> &'static str {
        match self.0.load(Ordering::Relaxed) {
            STARTING => "starting",
            READY => "ready",
            _ => "draining",
        }
    }

    /// Refuses work unless ready.
    ///
    /// # Errors
    /// 503, saying whether it is too early or too late.
    pub fn check(&self) -> Result<(), ApiError> {
        match self.0.load(Ordering::Relaxed) {
            STARTING => Err(ApiError::new(ErrorCode::NotReady, "the server is starting")),
            READY => Ok(()),
            _ => Err(ApiError::new(ErrorCode::Draining, "the server is shutting down")),
        }
    }
}
