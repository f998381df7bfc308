//! From pixels to logits: a queue, and compute threads that own the forward pass.
//!
//! Tokio's threads only move bytes; decoding has its own bounded threads ([`decode`]) and compute has these.

pub mod decode;
mod job;
pub mod queue;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::metrics::Metrics;
use crate::sets::loaded::Answer;
pub use job::{ForwardFailed, Job};
use job::{JobQueue, QueuedJob};
pub use queue::Closed;
use queue::{Queue, QueueSettings};

/// The queue and its compute threads.
pub struct Pipeline {
    queue: JobQueue,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Pipeline {
    /// Starts the compute threads.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(settings: QueueSettings, metrics: &Arc<Metrics>) -> std::io::Result<Self> {
        let queue = Queue::new(settings);
        let workers = (0..settings.threads)
            .map(|index| {
                let (queue, metrics) = (queue.clone(), Arc::clone(metrics));
                let thread = std::thread::Builder::new().name(format!("bvit-compute-{index}"));
                thread.spawn(move || worker::run(index, &queue, &metrics))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { queue, workers: Mutex::new(workers) })
    }

    /// Queues images of one request, all or none, and returns what will receive their answers.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<Vec<oneshot::Receiver<Result<Answer, ForwardFailed>>>, Closed> {
        let enqueued = Instant::now();
        let (entries, receivers): (Vec<_>, Vec<_>) = jobs
            .into_iter()
            .map(|job| {
                let (reply, receiver) = oneshot::channel();
                (QueuedJob { job, enqueued, reply }, receiver)
            })
            .unzip();
        self.queue.push_all(entries)?;
        Ok(receivers)
    }

    /// Drops images that nobody waits for.
    pub fn drop_dead(&self) {
        self.queue.drop_dead();
    }

    /// Refuses new images, finishes those that wait, and ends the compute threads. Blocking.
    pub fn drain(&self) {
        self.queue.close();
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in workers {
            // A panic outside the guarded forward pass was already logged by the panic hook.
            let _ = worker.join();
        }
    }
}
