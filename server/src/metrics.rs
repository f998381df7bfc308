//! Every metric, declared once: a line of a table gives its field, its kind and its name, and is its help text.
//!
//! Metrics of what happens are counted where it happens. Metrics of what *is* (queue depth, resident bytes) are read
//! from their owners when scraped, so they cannot drift from the truth.

use std::collections::{HashMap, HashSet};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use model_core::kernels::Isa;
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::memory::ProcessMemory;
use crate::verdict::Reason;

/// Buckets in seconds for durations seen by clients: from fast hosts to the longest timeout.
const DURATION_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Buckets for batch sizes and the like.
const COUNT_BUCKETS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0];
/// Buckets for scores from 0 to 1.
const SCORE_BUCKETS: &[f64] = &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0];
/// Labels of one expert set that are counted by name.
const MOST_LABELS: usize = 32;
/// Labels of all expert sets together that are counted by name.
const MOST_ALL_LABELS: usize = 4096;
/// Stands for labels beyond these bounds.
const OTHER_LABEL: &str = "other";
/// The answer to pictures that the set does not know.
const UNKNOWN_LABEL: &str = "unknown";
/// Stands for names that are not registered: labels made by clients would grow memory without end.
const OTHER_SET: &str = "other";
/// Stands for every set when per-set series are switched off.
const ALL_SETS: &str = "all";

/// The process has one log, from before there are other metrics.
pub static LOG_LINES_LOST: LazyLock<IntCounter> = LazyLock::new(|| {
    IntCounter::new("bvit_log_lines_lost_total", "Log lines that found their reader too slow or their disk full.")
        .expect("a valid name")
});

/// How an image fared, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageResult {
    Ok,
    /// The image itself was at fault.
    BadImage,
    /// It was fine but not answered: deadline, overload, failure.
    Failed,
}

impl ImageResult {
    pub const ALL: [Self; 3] = [Self::Ok, Self::BadImage, Self::Failed];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::BadImage => "bad_image",
            Self::Failed => "failed",
        }
    }
}

/// A metric as its line in a table declares it.
struct Declaration {
    opts: Opts,
    labels: &'static [&'static str],
    buckets: &'static [f64],
}

impl Declaration {
    fn histogram(&self) -> HistogramOpts {
        HistogramOpts { common_opts: self.opts.clone(), buckets: self.buckets.to_vec() }
    }
}

/// A kind of metric.
trait Kind: Collector + Clone + Sized + 'static {
    fn declare(declaration: Declaration) -> prometheus::Result<Self>;
}

/// How each kind is made.
macro_rules! kinds {
    ($($kind:ident: |$declaration:ident| $make:expr;)+) => {
        $(impl Kind for $kind {
            fn declare($declaration: Declaration) -> prometheus::Result<Self> {
                $make
            }
        })+
    };
}

kinds! {
    IntCounter: |it| Self::with_opts(it.opts);
    IntGauge: |it| Self::with_opts(it.opts);
    Histogram: |it| Self::with_opts(it.histogram());
    IntCounterVec: |it| Self::new(it.opts, it.labels);
    IntGaugeVec: |it| Self::new(it.opts, it.labels);
    GaugeVec: |it| Self::new(it.opts, it.labels);
    HistogramVec: |it| Self::new(it.histogram(), it.labels);
}

fn registered<K: Kind>(registry: &Registry, declaration: Declaration) -> prometheus::Result<K> {
    let metric = K::declare(declaration)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// A table of metrics, one a line: field, kind, name, then labels and buckets where the kind has them. The doc comment is
/// also the metric's help text. A field under `beside` is no metric.
macro_rules! metrics {
    (
        $(#[$meta:meta])*
        pub struct $table:ident beside { $($own:ident: $type:ty),* }
        $(#[doc = $help:literal] $vis:vis $field:ident: $kind:ident = $name:literal $([$($label:literal),+])? $($buckets:ident)?;)+
    ) => {
        $(#[$meta])*
        pub struct $table {
            $($own: $type,)*
            $(#[doc = $help] $vis $field: $kind,)+
        }

        impl $table {
            fn declare(into: &Registry, $($own: $type),*) -> prometheus::Result<Self> {
                Ok(Self {
                    $($own,)*
                    $($field: registered(into, Declaration {
                        opts: Opts::new($name, $help.trim_start()),
                        labels: &[$($($label),+)?],
                        buckets: [$($buckets,)? &[]][0],
                    })?,)+
                })
            }
        }
    };
}

metrics! {
    /// What the registry of expert sets counts; cheap to clone.
    #[derive(Debug, Clone)]
    pub struct SetMetrics beside {}

    /// Loads of expert sets by result.
    pub loads: IntCounterVec = "bvit_set_loads_total" ["result"];
    /// Time of one load of an expert set, from file to resident.
    pub load_duration: Histogram = "bvit_set_load_duration_seconds" DURATION_BUCKETS;
    /// Expert sets that left memory, by reason.
    pub evictions: IntCounterVec = "bvit_set_evictions_total" ["reason"];
    /// Requests whose expert set was resident.
    pub hits: IntCounter = "bvit_set_hits_total";
    /// Requests whose expert set had to be loaded first.
    pub misses: IntCounter = "bvit_set_misses_total";
}

metrics! {
    pub struct Metrics beside {
        registry: Registry,
        per_set: bool,
        labelled_sets: Mutex<HashSet<String>>,
        labelled_answers: Mutex<HashMap<String, HashSet<String>>>,
        labelled_cameras: Mutex<Vec<String>>,
        sets: SetMetrics
    }

    /// Requests answered, by matched route and status.
    pub http_requests: IntCounterVec = "bvit_http_requests_total" ["route", "status"];
    /// Time from a request's headers to its response.
    pub request_duration: HistogramVec = "bvit_request_duration_seconds" ["route"] DURATION_BUCKETS;
    /// Time to decode and preprocess one image, waiting for a decode thread included.
    pub decode_duration: Histogram = "bvit_decode_duration_seconds" DURATION_BUCKETS;
    /// Time an image waited for a compute thread.
    pub queue_duration: Histogram = "bvit_queue_duration_seconds" DURATION_BUCKETS;
    /// Time of one forward pass over a batch.
    pub inference_duration: Histogram = "bvit_inference_duration_seconds" DURATION_BUCKETS;
    /// Images by expert set and result.
    images: IntCounterVec = "bvit_images_total" ["set", "result"];
    /// Pictures that are unknown to the expert set asked, by reason.
    unknown: IntCounterVec = "bvit_unknown_total" ["set", "reason"];
    /// Answers by expert set and best label, unknown for pictures that are; other for labels beyond the bound.
    answers: IntCounterVec = "bvit_answers_total" ["set", "label"];
    /// Softmax scores of best labels.
    top_score: HistogramVec = "bvit_top_score" ["set"] SCORE_BUCKETS;
    /// Forward passes.
    pub batches: IntCounter = "bvit_batches_total";
    /// Images per forward pass.
    pub batch_size: Histogram = "bvit_batch_size" COUNT_BUCKETS;
    /// Different expert sets per forward pass.
    pub batch_distinct_sets: Histogram = "bvit_batch_distinct_sets" COUNT_BUCKETS;
    /// Images from admission to answer.
    pub queue_depth: IntGauge = "bvit_queue_depth";
    /// Most images from admission to answer.
    pub queue_capacity: IntGauge = "bvit_queue_capacity";
    /// Requests being worked on.
    pub requests_in_flight: IntGauge = "bvit_requests_in_flight";
    /// Open connections.
    pub connections_open: IntGauge = "bvit_connections_open";
    /// Failed requests, failed images of a batch and refused connections, by error code.
    pub request_failures: IntCounterVec = "bvit_request_failures_total" ["reason"];
    /// What was refused because one address had its share of a limit, by limit.
    pub share_refusals: IntCounterVec = "bvit_share_refusals_total" ["limit"];
    /// 1 for each expert set in memory.
    pub set_resident: IntGaugeVec = "bvit_set_resident" ["set", "pinned"];
    /// Known expert sets.
    pub sets_registered: IntGauge = "bvit_sets_registered";
    /// Expert sets in memory.
    pub sets_resident: IntGauge = "bvit_sets_resident";
    /// Expert sets that are never evicted.
    pub sets_pinned: IntGauge = "bvit_sets_pinned";
    /// Expert sets whose last load failed, and broken files in the model store.
    pub sets_failed: IntGauge = "bvit_sets_failed";
    /// Bytes that backbones, resident sets, scratch and queue may take together.
    pub memory_budget: IntGauge = "bvit_memory_budget_bytes";
    /// Accounted bytes by kind.
    pub memory: IntGaugeVec = "bvit_memory_bytes" ["kind"];
    /// Largest resident memory of the process so far.
    process_memory_peak: IntGauge = "bvit_process_memory_peak_bytes";
    /// Memory of the process's cgroup; 0 if unknown.
    cgroup_memory: IntGauge = "bvit_cgroup_memory_bytes";
    /// Memory limit of the process's cgroup; 0 when none is in force.
    cgroup_memory_limit: IntGauge = "bvit_cgroup_memory_limit_bytes";
    /// Patch tokens routed to experts, by transformer block.
    pub expert_tokens: IntCounterVec = "bvit_expert_tokens_total" ["layer"];
    /// Busiest expert's share of a block's tokens over the mean share, in the last batch; 1 is balance.
    pub expert_load_imbalance: GaugeVec = "bvit_expert_load_imbalance" ["layer"];
    /// Seconds since a camera's last frame was answered.
    pub camera_frame_age: GaugeVec = "bvit_camera_frame_age_seconds" ["camera"];
    /// 1 for the condition that a camera is in, 0 for the others.
    pub camera_state: IntGaugeVec = "bvit_camera_state" ["camera", "state"];
    /// Attempts to get a frame and its answer, by result.
    pub camera_frames: IntCounterVec = "bvit_camera_frames_total" ["camera", "result"];
    /// 1 while the MQTT broker that the file of cameras names is connected.
    pub mqtt_connected: IntGaugeVec = "bvit_mqtt_connected" ["broker"];
    /// Always 1; the labels say what is running.
    build_info: GaugeVec = "bvit_build_info" ["version", "revision", "target", "isa"];
}

impl Metrics {
    /// Declares and registers everything, at zero.
    ///
    /// # Errors
    /// Never for these constant names, but the library's constructors can fail.
    pub fn new(per_set: bool) -> prometheus::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        registry.register(Box::new(LOG_LINES_LOST.clone()))?;
        let sets = SetMetrics::declare(&registry)?;
        let metrics = Self::declare(
            &registry.clone(),
            registry,
            per_set,
            Mutex::default(),
            Mutex::default(),
            Mutex::default(),
            sets,
        )?;
        metrics.start_at_zero();
        Ok(metrics)
    }

    /// What the registry of expert sets counts.
    pub fn sets(&self) -> &SetMetrics {
        &self.sets
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
        if !self.per_set {
            self.declare_unknown(ALL_SETS);
            self.declare_answers(ALL_SETS, &[]);
        }
        for result in ["ok", "error"] {
            self.sets.loads.with_label_values(&[result]);
        }
        for reason in ["budget", "replaced", "unload", "delete"] {
            self.sets.evictions.with_label_values(&[reason]);
        }
    }

    /// Makes the series of a limit exist before the first refusal.
    pub fn declare_share(&self, limit: &str) {
        self.share_refusals.with_label_values(&[limit]);
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

    /// The series of cameras are those of these cameras, from before their first frames on.
    pub fn declare_cameras(&self, cameras: &[String], results: &[&str]) {
        let mut labelled = self.labelled_cameras.lock().unwrap_or_else(PoisonError::into_inner);
        for gone in labelled.iter().filter(|name| !cameras.contains(name)) {
            for result in results {
                let _ = self.camera_frames.remove_label_values(&[gone.as_str(), result]);
            }
        }
        for name in cameras {
            results.iter().for_each(|result| drop(self.camera_frames.with_label_values(&[name.as_str(), result])));
        }
        *labelled = cameras.to_vec();
    }

    /// Makes the series of a set's answers exist before the first: one for each label, as long as there are few.
    pub fn declare_answers(&self, set: &str, labels: &[String]) {
        let set = if self.per_set { set } else { ALL_SETS };
        if self.labelled_answers().contains_key(set) {
            return;
        }
        self.labelled_answers().insert(set.to_owned(), HashSet::new());
        self.top_score.with_label_values(&[set]);
        for label in [UNKNOWN_LABEL, OTHER_LABEL] {
            self.answers.with_label_values(&[set, label]);
        }
        if self.per_set && labels.len() <= MOST_LABELS {
            for label in labels {
                self.answers.with_label_values(&[set, self.answer_label(set, label)]);
            }
        }
    }

    /// Counts an answer of a registered set; no label stands for unknown.
    pub fn count_answer(&self, set: &str, label: Option<&str>, score: f32) {
        let set = if self.per_set { set } else { ALL_SETS };
        let label = label.map_or(UNKNOWN_LABEL, |label| self.answer_label(set, label));
        self.answers.with_label_values(&[set, label]).inc();
        self.top_score.with_label_values(&[set]).observe(f64::from(score));
    }

    /// The label as it is counted: itself while there is room for a series.
    fn answer_label<'a>(&self, set: &str, label: &'a str) -> &'a str {
        if !self.per_set {
            return OTHER_LABEL;
        }
        let mut labelled = self.labelled_answers();
        if labelled.get(set).is_some_and(|labels| labels.contains(label)) {
            return label;
        }
        let all: usize = labelled.values().map(HashSet::len).sum();
        let labels = labelled.entry(set.to_owned()).or_default();
        if labels.len() >= MOST_LABELS || all >= MOST_ALL_LABELS {
            return OTHER_LABEL;
        }
        labels.insert(label.to_owned());
        label
    }

    fn labelled_answers(&self) -> MutexGuard<'_, HashMap<String, HashSet<String>>> {
        self.labelled_answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the series of sets that are not registered any more.
    pub fn forget_other_sets(&self, registered: &HashSet<String>) {
        self.labelled_answers().retain(|set, labels| {
            let stays = registered.contains(set) || set == ALL_SETS;
            if !stays {
                let _ = self.top_score.remove_label_values(&[set]);
                for label in labels.iter().map(String::as_str).chain([UNKNOWN_LABEL, OTHER_LABEL]) {
                    let _ = self.answers.remove_label_values(&[set, label]);
                }
            }
            stays
        });
        self.labelled_sets().retain(|set| {
            let stays = registered.contains(set);
            for result in ImageResult::ALL.iter().filter(|_| !stays) {
                // Fails only when the series does not exist, which is what is wanted.
                let _ = self.images.remove_label_values(&[set, result.as_str()]);
            }
            for reason in Reason::ALL.iter().filter(|_| !stays) {
                let _ = self.unknown.remove_label_values(&[set, reason.as_str()]);
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
                    self.declare_unknown(set);
                }
                set
            }
        };
        self.images.with_label_values(&[label, result.as_str()]).inc_by(count as u64);
    }

    /// Makes the series of unknown pictures exist before the first.
    fn declare_unknown(&self, set: &str) {
        for reason in Reason::ALL {
            self.unknown.with_label_values(&[set, reason.as_str()]);
        }
    }

    /// Counts a picture that is unknown to a registered set.
    pub fn count_unknown(&self, set: &str, reason: Reason) {
        let label = if self.per_set { set } else { ALL_SETS };
        self.unknown.with_label_values(&[label, reason.as_str()]).inc();
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
        metrics.count_unknown("known", Reason::Flat);
        metrics.declare_answers("known", &["open".to_owned()]);
        metrics.count_answer("known", None, 0.5);
        let text = String::from_utf8(metrics.encode().unwrap()).unwrap();
        assert!(text.contains("bvit_images_total{result=\"ok\",set=\"known\"} 2"));
        assert!(text.contains("bvit_unknown_total{reason=\"flat\",set=\"known\"} 1"));
        assert!(text.contains("bvit_images_total{result=\"failed\",set=\"other\"} 1000"));
        metrics.forget_other_sets(&HashSet::new());
        assert!(!String::from_utf8(metrics.encode().unwrap()).unwrap().contains("set=\"known\""));
    }

    #[test]
    fn labels_of_answers_are_bounded() {
        let metrics = Metrics::new(true).unwrap();
        let labels: Vec<String> = (0..MOST_LABELS).map(|label| format!("label {label}")).collect();
        metrics.declare_answers("few", &labels);
        let text = || String::from_utf8(metrics.encode().unwrap()).unwrap();
        assert!(text().contains("bvit_answers_total{label=\"label 31\",set=\"few\"} 0"));
        metrics.declare_answers("many", &vec![String::new(); MOST_LABELS + 1]);
        for label in 0..1000 {
            metrics.count_answer("many", Some(&format!("label {label}")), 0.99);
        }
        assert_eq!(text().matches("set=\"many\"} 1\n").count(), MOST_LABELS);
        assert!(text().contains("bvit_answers_total{label=\"other\",set=\"many\"} 968"));
        assert!(text().contains("bvit_top_score_bucket{set=\"many\",le=\"0.95\"} 0"));
        for set in 0..1000 {
            metrics.count_answer(&format!("set {set}"), Some("a"), 0.5);
            metrics.count_answer(&format!("set {set}"), Some("b"), 0.5);
            metrics.count_answer(&format!("set {set}"), Some("c"), 0.5);
            metrics.count_answer(&format!("set {set}"), Some("d"), 0.5);
            metrics.count_answer(&format!("set {set}"), Some("e"), 0.5);
        }
        let counted = metrics.labelled_answers().values().map(HashSet::len).sum::<usize>();
        assert_eq!(counted, MOST_ALL_LABELS);
    }

    #[test]
    fn without_series_by_set_labels_are_not_told_apart() {
        let metrics = Metrics::new(false).unwrap();
        metrics.count_answer("door", Some("open"), 0.5);
        let text = String::from_utf8(metrics.encode().unwrap()).unwrap();
        assert!(text.contains("bvit_answers_total{label=\"other\",set=\"all\"} 1") && !text.contains("label=\"open\""));
        assert!(text.contains("bvit_answers_total{label=\"unknown\",set=\"all\"} 0"));
    }
}
