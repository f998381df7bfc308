//! A compute thread: batches from the queue through the forward pass, and help for other threads in between.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use model_core::engine::Member;

use super::job::{ForwardFailed, JobQueue, QueuedJob};
use super::queue::Work;
use crate::metrics::Metrics;
use crate::repeats::REPEATS;
use crate::sentence::sentence;
use crate::sets::loaded::{Answer, Row};
use crate::statistics::milliseconds;

/// Runs batches, or helps with those of other members, until the queue is closed and empty.
pub(super) fn run(mut member: Member, queue: &JobQueue, metrics: &Metrics) {
    while let Some(work) = queue.next() {
        let (batch, running) = match work {
            Work::Batch { entries, running } => (entries, running),
            Work::Help => {
                member.help(|| queue.has_waiting());
                continue;
            }
        };
        // A panic in a forward pass fails its batch, not the thread.
        let batch_result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let _invitation = running.wants_help().then(|| member.invite());
            run_batch(&mut member, &batch, metrics)
        }));
        // Before the answers go out: whoever was told to help and is not invited would be back at once.
        drop(running);
        let outputs = batch_result.unwrap_or_else(|_| Err(anyhow!("the forward pass panicked")));
        match outputs {
            Ok((answers, started, inference)) => {
                for (entry, mut answer) in batch.into_iter().zip(answers) {
                    let QueuedJob { job, enqueued, reply } = entry;
                    job.lease.mark_served();
                    // Its place is free before the client can know.
                    drop(job);
                    let queued = started.saturating_duration_since(enqueued);
                    metrics.queue_duration.observe(queued.as_secs_f64());
                    answer.timings.queue = milliseconds(queued);
                    answer.timings.inference = milliseconds(inference);
                    // A client that has gone meanwhile is no error.
                    let _ = reply.send(Ok(answer));
                }
            }
            Err(cause) => {
                if let Some(repeated) = REPEATS.admit("a batch failed") {
                    tracing::error!(cause = sentence(&cause), batch_size = batch.len(), repeated, "a batch failed");
                }
                for entry in batch {
                    let _ = entry.reply.send(Err(ForwardFailed));
                }
            }
        }
    }
}

type BatchOutputs = (Vec<Answer>, Instant, Duration);

fn run_batch(member: &mut Member, batch: &[QueuedJob], metrics: &Metrics) -> anyhow::Result<BatchOutputs> {
    let Some(first) = batch.first() else { bail!("an empty batch was closed") };
    let started = Instant::now();
    let rows: Vec<Row<'_>> = batch
        .iter()
        .map(|entry| Row { set: &entry.job.lease.value, pixels: &entry.job.pixels, routing: entry.job.routing })
        .collect();
    let outputs = first.job.lease.backbone.value.forward(member, &rows, Some(metrics))?;
    let inference = started.elapsed();
    let sets: HashSet<&str> = batch.iter().map(|entry| entry.job.lease.descriptor.name.as_str()).collect();
    metrics.batches.inc();
    metrics.batch_size.observe(batch.len() as f64);
    metrics.batch_distinct_sets.observe(sets.len() as f64);
    metrics.inference_duration.observe(inference.as_secs_f64());
    Ok((outputs, started, inference))
}
