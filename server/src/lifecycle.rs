//! Starting, ready, draining: what probes and handlers ask.

use std::sync::atomic::{AtomicU8, Ordering};

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;

/// The server takes no requests, because it is too early or too late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotServing {
    /// It has not finished starting.
    #[error("the server is starting")]
    Starting,
    /// It finishes what it has accepted.
    #[error("the server is shutting down")]
    Draining,
}

/// Where the server is in its life. It only moves forward.
#[derive(Debug, Default)]
pub struct Lifecycle(AtomicU8);

impl Lifecycle {
    /// The model is warm and requests are welcome.
    pub fn set_ready(&self) {
        self.0.fetch_max(READY, Ordering::Relaxed);
    }

    /// Ends readiness; the server takes no new work.
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
    pub fn check(&self) -> Result<(), NotServing> {
        match self.0.load(Ordering::Relaxed) {
            STARTING => Err(NotServing::Starting),
            READY => Ok(()),
            _ => Err(NotServing::Draining),
        }
    }
}
