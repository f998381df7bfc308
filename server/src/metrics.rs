//! Every metric, declared once; the second argument of each constructor call is its help text.
//!
//! Metrics of what happens are counted where it happens. Metrics of what *is* (queue depth, resident bytes) are read
//! from their owners when scraped, so they cannot drift from the truth.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use model_core::kernels::Isa;
use prometheus::core::Collector;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::memory::ProcessMemory;

/// Buckets in seconds for durations seen by clients: from fast hosts to the longest timeout.
const DURATION_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Buckets for batch sizes and the like.
const COUNT_BUCKETS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0];
/// Stands for names that are not registered: labels made by clients would grow memory without end.
const OTHER_SET: &str = "other";
/// Stands for every set when per-set series are switched off.
const ALL_SETS: &str = "all";

/// How an image fared, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageResult {
    /// Classified.
    Ok,
    /// The image itself was at fault.
    BadImage,
    /// It was fine but not answered: deadline, overload, failure.
    Failed,
}

impl ImageResult {
    /// Every result.
    pub const ALL: [Self; 3] = [Self::Ok, Self::BadImage, Self::Failed];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::BadImage => "bad_image",
            Self::Failed => "failed",
        }
    }
}

/// The process's metrics.
pub struct Metrics {
    registry: Registry,
    per_set: bool,
    /// Names that are `set` labels of `images`.
    labelled_sets: Mutex<HashSet<String>>,
    /// Requests answered, by matched route and status.
    pub http_requests: IntCounterVec,
    /// Time from a request's headers to its response.
    pub request_duration: HistogramVec,
    /// Time to decode and preprocess one image, waiting for a decode thread included.
    pub decode_duration: Histogram,
    /// Time an image waited for a compute thread.
    pub queue_duration: Histogram,
    /// Time of one forward pass over a batch.
    pub inference_duration: Histogram,
    /// Images by expert set and result.
    images: IntCounterVec,
    /// Forward passes.
    pub batches: IntCounter,
    /// Images per forward pass.
    pub batch_size: Histogram,
    /// Different expert sets per forward pass.
    pub batch_distinct_sets: Histogram,
    /// Images waiting.
    pub queue_depth: IntGauge,
    /// Images that may wait.
    pub queue_capacity: IntGauge,
    /// Requests being worked on.
    pub requests_in_flight: IntGauge,
    /// Open connections.
    pub connections_open: IntGauge,
    /// Failed requests, failed images of a batch and refused connections, by error code.
    pub request_failures: IntCounterVec,
    /// 1 for each resident set.
    pub set_resident: IntGaugeVec,
    /// Known expert sets.
    pub sets_registered: IntGauge,
    /// Expert sets in memory.
    pub sets_resident: IntGauge,
    /// Expert sets never evicted.
    pub sets_pinned: IntGauge,
    /// Expert sets whose last load failed, and files of the store that are broken.
    pub sets_failed: IntGauge,
    /// What the registry of expert sets counts.
    pub sets: SetMetrics,
    /// The memory budget.
    pub memory_budget: IntGauge,
    /// Accounted bytes by kind.
    pub memory: IntGaugeVec,
    process_memory_peak: IntGauge,
    cgroup_memory: IntGauge,
    cgroup_memory_limit: IntGauge,
    /// Patch tokens routed, by transformer block.
    pub expert_tokens: IntCounterVec,
    /// Busiest expert's share of a block's tokens over the mean share; 1 is perfect balance.
    pub expert_load_imbalance: GaugeVec,
    /// Always 1; the labels say what is running.
    pub build_info: GaugeVec,
}

/// What the registry of expert sets counts; cheap to clone.
#[derive(Debug, Clone)]
pub struct SetMetrics {
    /// Loads by result.
    pub loads: IntCounterVec,
    /// Time of one load, from file to resident.
    pub load_duration: Histogram,
    /// Sets that left memory, by reason.
    pub evictions: IntCounterVec,
    /// Requests whose expert set was resident.
    pub hits: IntCounter,
    /// Requests whose expert set had to be loaded first.
    pub misses: IntCounter,
}

impl SetMetrics {
    /// Metrics that belong to no registry yet.
    ///
    /// # Errors
    /// Never for these constant names.
    pub fn new() -> prometheus::Result<Self> {
        let metrics = Self {
            loads: counter_vec("bvit_set_loads_total", "Loads of expert sets by result.", &["result"])?,
            load_duration: histogram(
                "bvit_set_load_duration_seconds",
                "Time of one load of an expert set, from file to resident.",
                DURATION_BUCKETS,
            )?,
            evictions: counter_vec(
                "bvit_set_evictions_total",
                "Expert sets that left memory, by reason.",
                &["reason"],
            )?,
            hits: IntCounter::new("bvit_set_hits_total", "Requests whose expert set was resident.")?,
            misses: IntCounter::new("bvit_set_misses_total", "Requests whose expert set had to be loaded first.")?,
        };
        for result in ["ok", "error"] {
            metrics.loads.with_label_values(&[result]);
        }
        for reason in ["budget", "replaced", "unload", "delete"] {
            metrics.evictions.with_label_values(&[reason]);
        }
        Ok(metrics)
    }
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
    Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))
}

fn counter_vec(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

fn gauge_vec(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    IntGaugeVec::new(Opts::new(name, help), labels)
}

impl Metrics {
    /// Declares and registers everything, at zero.
    ///
    /// # Errors
    /// Never for these constant names, but the library's constructors can fail.
    pub fn new(per_set: bool) -> prometheus::Result<Self> {
        let metrics = Self {
            registry: Registry::new(),
            per_set,
            labelled_sets: Mutex::default(),
            http_requests: counter_vec(
                "bvit_http_requests_total",
                "Requests answered, by matched route and status.",
                &["route", "status"],
            )?,
            request_duration: HistogramVec::new(
                HistogramOpts::new("bvit_request_duration_seconds", "Time from a request's headers to its response.")
                    .buckets(DURATION_BUCKETS.to_vec()),
                &["route"],
            )?,
            decode_duration: histogram(
                "bvit_decode_duration_seconds",
                "Time to decode and preprocess one image, waiting for a decode thread included.",
                DURATION_BUCKETS,
            )?,
            queue_duration: histogram(
                "bvit_queue_duration_seconds",
                "Time an image waited for a compute thread.",
                DURATION_BUCKETS,
            )?,
            inference_duration: histogram(
                "bvit_inference_duration_seconds",
                "Time of one forward pass over a batch.",
                DURATION_BUCKETS,
            )?,
            images: counter_vec("bvit_images_total", "Images by expert set and result.", &["set", "result"])?,
            batches: IntCounter::new("bvit_batches_total", "Forward passes.")?,
            batch_size: histogram("bvit_batch_size", "Images per forward pass.", COUNT_BUCKETS)?,
            batch_distinct_sets: histogram(
                "bvit_batch_distinct_sets",
                "Different expert sets per forward pass.",
                COUNT_BUCKETS,
            )?,
            queue_depth: IntGauge::new("bvit_queue_depth", "Images from admission to answer.")?,
            queue_capacity: IntGauge::new("bvit_queue_capacity", "Most images from admission to answer.")?,
            requests_in_flight: IntGauge::new("bvit_requests_in_flight", "Requests being worked on.")?,
            connections_open: IntGauge::new("bvit_connections_open", "Open connections.")?,
            request_failures: counter_vec(
                "bvit_request_failures_total",
                "Failed requests, failed images of a batch and refused connections, by error code.",
                &["reason"],
            )?,
            set_resident: gauge_vec("bvit_set_resident", "1 for each expert set in memory.", &["set", "pinned"])?,
            sets_registered: IntGauge::new("bvit_sets_registered", "Known expert sets.")?,
            sets_resident: IntGauge::new("bvit_sets_resident", "Expert sets in memory.")?,
            sets_pinned: IntGauge::new("bvit_sets_pinned", "Expert sets that are never evicted.")?,
            sets_failed: IntGauge::new(
                "bvit_sets_failed",
                "Expert sets whose last load failed, and broken files in the model store.",
            )?,
            sets: SetMetrics::new()?,
            memory_budget: IntGauge::new(
                "bvit_memory_budget_bytes",
                "Bytes that backbones, resident sets, scratch and queue may take together.",
            )?,
            memory: gauge_vec("bvit_memory_bytes", "Accounted bytes by kind.", &["kind"])?,
            process_memory_peak: IntGauge::new(
                "bvit_process_memory_peak_bytes",
                "Largest resident memory of the process so far.",
            )?,
            cgroup_memory: IntGauge::new("bvit_cgroup_memory_bytes", "Memory of the process's cgroup; 0 if unknown.")?,
            cgroup_memory_limit: IntGauge::new(
                "bvit_cgroup_memory_limit_bytes",
                "Memory limit of the process's cgroup; 0 when none is in force.",
            )?,
            expert_tokens: counter_vec(
                "bvit_expert_tokens_total",
                "Patch tokens routed to experts, by transformer block.",
                &["layer"],
            )?,
            expert_load_imbalance: GaugeVec::new(
                Opts::new(
                    "bvit_expert_load_imbalance",
                    "Busiest expert's share of a block's tokens over the mean share, in the last batch; 1 is balance.",
                ),
                &["layer"],
            )?,
            build_info: GaugeVec::new(
                Opts::new("bvit_build_info", "Always 1; the labels say what is running."),
                &["version", "revision", "target", "isa"],
            )?,
        };
        metrics.register()?;
        metrics.start_at_zero();
        Ok(metrics)
    }

    fn register(&self) -> prometheus::Result<()> {
        let collectors: [Box<dyn Collector>; 33] = [
            Box::new(self.http_requests.clone()),
            Box::new(self.request_duration.clone()),
            Box::new(self.decode_duration.clone()),
            Box::new(self.queue_duration.clone()),
            Box::new(self.inference_duration.clone()),
            Box::new(self.images.clone()),
            Box::new(self.batches.clone()),
            Box::new(self.batch_size.clone()),
            Box::new(self.batch_distinct_sets.clone()),
            Box::new(self.queue_depth.clone()),
            Box::new(self.queue_capacity.clone()),
            Box::new(self.requests_in_flight.clone()),
            Box::new(self.connections_open.clone()),
            Box::new(self.request_failures.clone()),
            Box::new(self.set_resident.clone()),
            Box::new(self.sets_registered.clone()),
            Box::new(self.sets_resident.clone()),
            Box::new(self.sets_pinned.clone()),
            Box::new(self.sets_failed.clone()),
            Box::new(self.sets.loads.clone()),
            Box::new(self.sets.load_duration.clone()),
            Box::new(self.sets.evictions.clone()),
            Box::new(self.sets.hits.clone()),
            Box::new(self.sets.misses.clone()),
            Box::new(self.memory_budget.clone()),
            Box::new(self.memory.clone()),
            Box::new(self.process_memory_peak.clone()),
            Box::new(self.cgroup_memory.clone()),
            Box::new(self.cgroup_memory_limit.clone()),
            Box::new(self.expert_tokens.clone()),
            Box::new(self.expert_load_imbalance.clone()),
            Box::new(self.build_info.clone()),
            Box::new(prometheus::process_collector::ProcessCollector::for_self()),
        ];
        collectors.into_iter().try_for_each(|collector| self.registry.register(collector))
    }

    /// Labelled metrics exist only once a label is used; a dashboard should not have to wait for the first request.
    fn start_at_zero(&self) {
        let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
        let revision = option_env!("BVIT_REVISION").unwrap_or("unknown");
        let isa = Isa::from_env().unwrap_or_else(|_| Isa::best()).name();
        self.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), revision, target.as_str(), isa]).set(1.0);
        for result in ImageResult::ALL {
            self.count_images(None, result, 0);
        }
    }

    /// Makes the series of a route exist before its first request.
    pub fn declare_route(&self, route: &str) {
        self.http_requests.with_label_values(&[route, "200"]);
        self.request_duration.with_label_values(&[route]);
    }

    /// Makes the series of an error code exist before the first failure.
    pub fn declare_failure(&self, code: &str) {
        self.request_failures.with_label_values(&[code]);
    }

    /// Makes the series of a model's blocks exist before its first batch.
    pub fn declare_layers(&self, num_layers: usize) {
        for layer in 0..num_layers {
            let label = layer.to_string();
            self.expert_tokens.with_label_values(&[label.as_str()]);
            self.expert_load_imbalance.with_label_values(&[label.as_str()]);
        }
    }

    /// Forgets the series of sets that are not registered any more.
    pub fn forget_other_sets(&self, registered: &HashSet<String>) {
        self.labelled_sets().retain(|set| {
            let stays = registered.contains(set);
            for result in ImageResult::ALL.iter().filter(|_| !stays) {
                // Fails only when the series does not exist, which is what is wanted.
                let _ = self.images.remove_label_values(&[set, result.as_str()]);
            }
            stays
        });
    }

    /// Counts images of a registered set; `None` stands for names that clients made up.
    pub fn count_images(&self, set: Option<&str>, result: ImageResult, count: usize) {
        let label = match set {
            _ if !self.per_set => ALL_SETS,
            None => OTHER_SET,
            Some(set) => {
                let mut labelled = self.labelled_sets();
                if !labelled.contains(set) {
                    labelled.insert(set.to_owned());
                }
                set
            }
        };
        self.images.with_label_values(&[label, result.as_str()]).inc_by(count as u64);
    }

    fn labelled_sets(&self) -> MutexGuard<'_, HashSet<String>> {
        self.labelled_sets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether resident sets are listed one by one.
    pub fn per_set(&self) -> bool {
        self.per_set
    }

    /// Everything in the text format, after reading what the operating system knows.
    ///
    /// # Errors
    /// When a metric cannot be encoded.
    pub fn encode(&self) -> prometheus::Result<Vec<u8>> {
        let memory = ProcessMemory::read();
        self.process_memory_peak.set(saturating(memory.peak));
        self.cgroup_memory.set(saturating(memory.cgroup.unwrap_or(0)));
        self.cgroup_memory_limit.set(saturating(memory.cgroup_limit.unwrap_or(0)));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Prometheus gauges are signed.
pub fn saturating(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_there_before_the_first_request() {
        let metrics = Metrics::new(true).unwrap();
        metrics.declare_route("/classify");
        metrics.declare_failure("queue_full");
        let text = String::from_utf8(metrics.encode().unwrap()).unwrap();
        for name in [
            "bvit_http_requests_total{route=\"/classify\",status=\"200\"} 0",
            "bvit_request_duration_seconds_count{route=\"/classify\"} 0",
            "bvit_images_total",
            "bvit_batches_total 0",
            "bvit_request_failures_total{reason=\"queue_full\"} 0",
            "bvit_set_loads_total{result=\"ok\"} 0",
            "bvit_process_memory_peak_bytes",
            "process_resident_memory_bytes",
        ] {
            assert!(text.contains(name), "{name} is missing from\n{text}");
        }
    }

    #[test]
    fn series_of_sets_that_are_gone_go_too() {
        let metrics = Metrics::new(true).unwrap();
        metrics.count_images(Some("known"), ImageResult::Ok, 2);
        metrics.count_images(None, ImageResult::Failed, 1000);
        let text = String::from_utf8(metrics.encode().unwrap()).unwrap();
        assert!(text.contains("bvit_images_total{result=\"ok\",set=\"known\"} 2"));
        assert!(text.contains("bvit_images_total{result=\"failed\",set=\"other\"} 1000"));
        metrics.forget_other_sets(&HashSet::new());
        assert!(!String::from_utf8(metrics.encode().unwrap()).unwrap().contains("set=\"known\""));
    }
}
