//! What goes through the queue.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::queue::{Entry, Queue};
use crate::admission::ImagePermit;
use crate::sets::loaded::{Answer, SetLease};

/// One image on its way through a compute thread.
pub struct Job {
    /// The expert set it runs on: a snapshot, whatever happens to the registry meanwhile.
    pub lease: SetLease,
    /// The model's input `[side, side, 3]`.
    pub pixels: Vec<f32>,
    /// Whether the routing map is wanted.
    pub routing: bool,
    /// When the answer is no longer wanted.
    pub deadline: Instant,
    /// Its place, held until it is answered or dropped.
    pub permit: ImagePermit,
}

/// The compute thread failed; its log has the cause.
#[derive(Debug, Clone, Copy)]
pub struct ForwardFailed;

pub(super) type Reply = oneshot::Sender<Result<Answer, ForwardFailed>>;

/// A job with the place its answer goes to.
pub(super) struct QueuedJob {
    pub(super) job: Job,
    pub(super) enqueued: Instant,
    pub(super) reply: Reply,
}

pub(super) type JobQueue = Queue<QueuedJob>;

impl Entry for QueuedJob {
    type Group = usize;

    fn group(&self) -> usize {
        // Same backbone in memory, same address; the lease keeps it from being reused.
        Arc::as_ptr(&self.job.lease.backbone) as usize
    }

    fn enqueued(&self) -> Instant {
        self.enqueued
    }

    fn is_dead(&self, now: Instant) -> bool {
        self.reply.is_closed() || self.job.deadline <= now
    }
}
