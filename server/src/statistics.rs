//! What each expert set has answered since the server started, counted as Triton's statistics extension counts.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use utoipa::ToSchema;

/// Milliseconds, rounded to the microsecond.
pub fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Milliseconds by stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
pub struct Timings {
    /// Decoding and preprocessing, waiting for a decode thread included.
    pub decode: f64,
    /// Waiting for a compute thread.
    pub queue: f64,
    pub inference: f64,
    /// From the request's headers to here.
    pub total: f64,
}

/// Statistics by name and version of the expert set.
#[derive(Debug, Default)]
pub struct Statistics(Mutex<HashMap<(String, u64), SetStatistics>>);

/// One version's statistics, in Triton's terms.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct SetStatistics {
    /// Milliseconds since 1970 when an image was last answered; 0 before the first.
    last_inference: u64,
    inference_count: u64,
    /// Requests with at least one image answered. Triton counts forward passes here, but ours carry
    /// images of many sets.
    execution_count: u64,
    inference_stats: Durations,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
struct Durations {
    success: CountAndTime,
    fail: CountAndTime,
    queue: CountAndTime,
    compute_input: CountAndTime,
    compute_infer: CountAndTime,
    compute_output: CountAndTime,
}

/// How often something happened, and how long it took in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
pub struct CountAndTime {
    count: u64,
    /// Nanoseconds, all together.
    ns: u64,
}

impl CountAndTime {
    fn add(&mut self, milliseconds: f64) {
        self.count += 1;
        self.ns += (milliseconds.max(0.0) * 1e6) as u64;
    }
}

impl SetStatistics {
    fn add(&mut self, timings: Timings) {
        let durations = &mut self.inference_stats;
        durations.success.add(timings.total);
        durations.queue.add(timings.queue);
        durations.compute_input.add(timings.decode);
        durations.compute_infer.add(timings.inference);
        durations.compute_output.add(timings.total - timings.decode - timings.queue - timings.inference);
        self.inference_count += 1;
    }
}

impl Statistics {
    /// Counts the images of one request to a registered version: the timings of each that was answered, `None` for each
    /// that failed. A failed one is counted with `elapsed_ms`.
    pub fn record(&self, name: &str, version: u64, images: impl IntoIterator<Item = Option<Timings>>, elapsed_ms: f64) {
        let mut all = self.lock();
        let statistics = all.entry((name.to_owned(), version)).or_default();
        let answered_before = statistics.inference_count;
        for image in images {
            match image {
                Some(timings) => statistics.add(timings),
                None => statistics.inference_stats.fail.add(elapsed_ms),
            }
        }
        if statistics.inference_count > answered_before {
            statistics.execution_count += 1;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            statistics.last_inference = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        }
    }

    /// Counts a request to a registered version that failed as a whole.
    pub fn record_failure(&self, name: &str, version: u64, elapsed_ms: f64) {
        self.lock().entry((name.to_owned(), version)).or_default().inference_stats.fail.add(elapsed_ms);
    }

    /// Forgets every version that is not in `registered`.
    pub fn forget_others(&self, registered: &HashSet<(&str, u64)>) {
        self.lock().retain(|(name, version), _| registered.contains(&(name.as_str(), *version)));
    }

    /// What one version has answered.
    pub fn of(&self, name: &str, version: u64) -> SetStatistics {
        self.lock().get(&(name.to_owned(), version)).cloned().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, u64), SetStatistics>> {
        // Counts are whole after every statement, so a panic elsewhere leaves nothing half-done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_and_requests_are_counted_apart_from_failures() {
        let timings = Timings { decode: 1.0, queue: 2.0, inference: 3.0, total: 7.0 };
        let statistics = Statistics::default();
        statistics.record("flowers", 1, [Some(timings), None, Some(timings)], 9.0);
        statistics.record_failure("flowers", 1, 0.5);
        let counted = statistics.of("flowers", 1);
        assert_eq!((counted.inference_count, counted.execution_count), (2, 1));
        assert!(counted.last_inference > 0);
        let Durations { success, fail, queue, compute_input, compute_infer, compute_output } = counted.inference_stats;
        let pair = |sum: CountAndTime| (sum.count, sum.ns);
        assert_eq!(pair(success), (2, 14_000_000));
        assert_eq!(pair(fail), (2, 9_500_000));
        assert_eq!([queue, compute_input, compute_infer].map(pair), [(2, 4_000_000), (2, 2_000_000), (2, 6_000_000)]);
        assert_eq!(pair(compute_output), (2, 2_000_000));
        assert_eq!(statistics.of("flowers", 2), SetStatistics::default());
        statistics.forget_others(&HashSet::new());
        assert_eq!(statistics.of("flowers", 1), SetStatistics::default());
    }
}
