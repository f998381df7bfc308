//! From pixels to logits: a queue, and compute threads that own the forward pass.
//!
//! Tokio's threads only move bytes; decoding has its own bounded threads ([`decode`]) and compute has these.

pub mod decode;
pub mod queue;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::admission::ImagePermit;
use crate::error::{ApiError, ErrorCode};
use crate::metrics::Metrics;
use crate::model::{self, ArtifactSource, RowOutput, SetLease};
use crate::registry::ResidentBackbone;
use queue::{Entry, Queue, QueueSettings, Work};

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

/// What a compute thread made of an image.
#[derive(Debug)]
pub struct Answer {
    /// Logits and, if wanted, routing.
    pub output: RowOutput,
    /// Time spent waiting for a compute thread.
    pub queued: Duration,
    /// Time of the forward pass it was part of.
    pub inference: Duration,
}

/// The compute thread failed; its log has the cause.
#[derive(Debug, Clone, Copy)]
pub struct ForwardFailed;

type Reply = oneshot::Sender<Result<Answer, ForwardFailed>>;

struct QueuedJob {
    job: Job,
    enqueued: Instant,
    reply: Reply,
}

/// Threads without a batch of their own share the forward passes of others.
type JobQueue = Queue<QueuedJob, HelpWanted>;

/// A compute thread that would like help with its batch.
#[derive(Clone)]
struct HelpWanted {
    thread: usize,
    /// With its place in the memory budget, whatever becomes of the caller's lease.
    backbone: Arc<ResidentBackbone<ArtifactSource>>,
}

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

/// The queue and its compute threads.
pub struct Pipeline {
    queue: JobQueue,
    workers: std::sync::Mutex<Vec<JoinHandle<()>>>,
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
                thread.spawn(move || run_worker(index, &queue, &metrics))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { queue, workers: std::sync::Mutex::new(workers) })
    }

    /// Queues images of one request, all or none, and returns what will receive their answers.
    ///
    /// # Errors
    /// 503 when the server is shutting down.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<Vec<oneshot::Receiver<Result<Answer, ForwardFailed>>>, ApiError> {
        let enqueued = Instant::now();
        let (entries, receivers): (Vec<_>, Vec<_>) = jobs
            .into_iter()
            .map(|job| {
                let (reply, receiver) = oneshot::channel();
                (QueuedJob { job, enqueued, reply }, receiver)
            })
            .unzip();
        let closed = |closed| ApiError::new(ErrorCode::Draining, format!("{closed}; try again later"));
        self.queue.push_all(entries).map_err(closed)?;
        Ok(receivers)
    }

    /// Drops images that nobody waits for.
    pub fn drop_dead(&self) {
        self.queue.drop_dead();
    }

    /// Refuses new images, finishes those that wait, and ends the compute threads. Blocking.
    pub fn drain(&self) {
        self.queue.close();
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for worker in workers {
            // A panic outside the guarded forward pass was already logged by the panic hook.
            let _ = worker.join();
        }
    }
}

fn run_worker(index: usize, queue: &JobQueue, metrics: &Metrics) {
    while let Some(work) = queue.next() {
        let (batch, others_free, _running) = match work {
            Work::Batch { entries, others_free, running } => (entries, others_free, running),
            Work::Help(wanted) => {
                wanted.backbone.value.help(index, wanted.thread, || queue.has_waiting());
                continue;
            }
        };
        // A panic in a forward pass fails its batch, not the thread.
        let batch_result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let backbone = batch.first().filter(|_| others_free).map(|entry| &entry.job.lease.backbone);
            let _welcome = backbone.and_then(|backbone| backbone.value.welcome(index));
            // Made last, so that it ends first: a thread that answers a call where it is not welcome would be back at once.
            let _call =
                backbone.map(|backbone| queue.call(HelpWanted { thread: index, backbone: Arc::clone(backbone) }));
            run_batch(index, &batch, metrics)
        }));
        let outputs = batch_result.unwrap_or_else(|_| Err("the forward pass panicked".to_owned()));
        match outputs {
            Ok((outputs, started, inference)) => {
                for (entry, output) in batch.into_iter().zip(outputs) {
                    let QueuedJob { job, enqueued, reply } = entry;
                    job.lease.mark_served();
                    // Its place is free before the client can know.
                    drop(job);
                    let queued = started.saturating_duration_since(enqueued);
                    metrics.queue_duration.observe(queued.as_secs_f64());
                    // A client that has gone meanwhile is no error.
                    let _ = reply.send(Ok(Answer { output, queued, inference }));
                }
            }
            Err(cause) => {
                tracing::error!(cause, batch_size = batch.len(), "a batch failed");
                for entry in batch {
                    let _ = entry.reply.send(Err(ForwardFailed));
                }
            }
        }
    }
}

type BatchOutputs = (Vec<RowOutput>, Instant, Duration);

fn run_batch(index: usize, batch: &[QueuedJob], metrics: &Metrics) -> Result<BatchOutputs, String> {
    let Some(first) = batch.first() else { return Err("an empty batch was closed".to_owned()) };
    let started = Instant::now();
    let rows: Vec<model::Row<'_>> = batch
        .iter()
        .map(|entry| model::Row { set: &entry.job.lease.value, pixels: &entry.job.pixels, routing: entry.job.routing })
        .collect();
    let outputs = first.job.lease.backbone.value.forward(index, &rows, Some(metrics))?;
    let inference = started.elapsed();
    let sets: std::collections::HashSet<&str> =
        batch.iter().map(|entry| entry.job.lease.descriptor.name.as_str()).collect();
    metrics.batches.inc();
    metrics.batch_size.observe(batch.len() as f64);
    metrics.batch_distinct_sets.observe(sets.len() as f64);
    metrics.inference_duration.observe(inference.as_secs_f64());
    Ok((outputs, started, inference))
}
