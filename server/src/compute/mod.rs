//! From pixels to logits: a queue, and compute threads that own the forward pass.
//!
//! Tokio's threads only move bytes; decoding has its own bounded threads ([`decode`]) and compute has these.

pub mod decode;
mod job;
pub mod queue;
pub mod reduced;
mod worker;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;
use model_core::engine::Member;
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
    /// Those whose threads are not started yet.
    members: Mutex<Vec<Member>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Pipeline {
    /// A pipeline whose compute threads are still to be started.
    pub fn new(settings: QueueSettings, members: Vec<Member>) -> Self {
        Self { queue: Queue::new(settings), members: Mutex::new(members), workers: Mutex::default() }
    }

    /// Starts the compute threads, each after `first` with the member that the thread will have. What is queued waits.
    ///
    /// # Errors
    /// Those of `first`, or when the operating system gives no thread.
    pub fn start(
        &self,
        metrics: &Arc<Metrics>,
        mut first: impl FnMut(&mut Member) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut members = std::mem::take(&mut *lock(&self.members));
        members.iter_mut().try_for_each(&mut first)?;
        for member in members {
            let (queue, metrics) = (self.queue.clone(), Arc::clone(metrics));
            let thread = std::thread::Builder::new().name(format!("bvit-compute-{}", member.number()));
            let worker = thread.spawn(move || worker::run(member, &queue, &metrics)).context("threads")?;
            lock(&self.workers).push(worker);
        }
        Ok(())
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
        let workers = std::mem::take(&mut *lock(&self.workers));
        for worker in workers {
            // A panic outside the guarded forward pass was already logged by the panic hook.
            let _ = worker.join();
        }
    }
}

/// What is behind the lock, even when a thread panicked with it: the lists are whole at any time.
fn lock<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}
