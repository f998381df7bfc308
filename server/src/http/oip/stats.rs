//! Triton's statistics extension: what each expert set has answered since the server started.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::super::classify::{ImageAnswer, Timings};
use super::super::extract::ApiPath;
use super::super::openapi::{Operation, Shape};
use super::ModelPath;
use crate::error::ApiError;
use crate::registry::SetStatus;
use crate::state::AppState;

/// Statistics by name and version of the expert set.
#[derive(Debug, Default)]
pub struct Statistics(Mutex<HashMap<(String, u64), SetStatistics>>);

/// One version's statistics, in Triton's terms.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
struct SetStatistics {
    /// Milliseconds since 1970 when an image was last answered; 0 before the first.
    last_inference: u64,
    /// Images answered.
    inference_count: u64,
    /// Requests with at least one image answered. Triton counts forward passes here, but ours carry images of many
    /// sets.
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

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
struct CountAndTime {
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
    /// Counts the images of one request to a registered version; `elapsed_ms` is what the failed ones took.
    pub fn record(&self, name: &str, version: u64, images: &[Result<ImageAnswer, ApiError>], elapsed_ms: f64) {
        let mut all = self.lock();
        let statistics = all.entry((name.to_owned(), version)).or_default();
        for image in images {
            match image {
                Ok(answer) => statistics.add(answer.timings),
                Err(_) => statistics.inference_stats.fail.add(elapsed_ms),
            }
        }
        if images.iter().any(Result::is_ok) {
            statistics.execution_count += 1;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            statistics.last_inference = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        }
    }

    /// Counts a request to a registered version that failed as a whole.
    pub fn record_failure(&self, name: &str, version: u64, elapsed_ms: f64) {
        self.lock().entry((name.to_owned(), version)).or_default().inference_stats.fail.add(elapsed_ms);
    }

    /// Forgets versions that are not registered any more.
    pub fn forget_others(&self, registered: &[SetStatus]) {
        let registered: std::collections::HashSet<(&str, u64)> =
            registered.iter().map(|status| (status.descriptor.name.as_str(), status.descriptor.version)).collect();
        self.lock().retain(|(name, version), _| registered.contains(&(name.as_str(), *version)));
    }

    fn of(&self, name: &str, version: u64) -> SetStatistics {
        self.lock().get(&(name.to_owned(), version)).cloned().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, u64), SetStatistics>> {
        // Counts are whole after every statement, so a panic elsewhere leaves nothing half-done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What each version of an expert set has answered.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelStatistics {
    model_stats: Vec<NamedStatistics>,
}

#[derive(Serialize, ToSchema)]
struct NamedStatistics {
    name: String,
    version: String,
    #[serde(flatten)]
    statistics: SetStatistics,
    /// Always empty: forward passes carry images of many sets.
    #[schema(max_items = 0)]
    batch_stats: [CountAndTime; 0],
}

pub(super) fn describe(id: &'static str, summary: &'static str) -> Operation {
    let batch_stats = [];
    let entry =
        NamedStatistics { name: "cifar100".into(), version: "1".into(), statistics: Default::default(), batch_stats };
    Operation::new("oip", id, summary)
        .description("`inference_count` counts images and `execution_count` requests, since the server started.")
        .json(Shape::of::<ModelStatistics>(), json!(ModelStatistics { model_stats: vec![entry] }))
}

/// All versions of all sets.
pub(super) async fn all(State(app): State<AppState>) -> Json<ModelStatistics> {
    document(&app, &app.registry.list())
}

/// One version, or all versions of a set.
pub(super) async fn model(
    State(app): State<AppState>,
    path: ApiPath<ModelPath>,
) -> Result<Json<ModelStatistics>, ApiError> {
    path.0.lookup(&app)?;
    let mut statuses = app.registry.status(&path.0.set)?;
    if let Some(version) = path.0.version()? {
        statuses.retain(|status| status.descriptor.version == version);
    }
    Ok(document(&app, &statuses))
}

fn document(app: &AppState, statuses: &[SetStatus]) -> Json<ModelStatistics> {
    let entry = |status: &SetStatus| {
        let (name, version) = (&status.descriptor.name, status.descriptor.version);
        let statistics = app.statistics.of(name, version);
        NamedStatistics { name: name.clone(), version: version.to_string(), statistics, batch_stats: [] }
    };
    Json(ModelStatistics { model_stats: statuses.iter().map(entry).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;

    #[test]
    fn images_and_requests_are_counted_apart_from_failures() {
        let timings = Timings { decode: 1.0, queue: 2.0, inference: 3.0, total: 7.0 };
        let good = || Ok(ImageAnswer { logits: Vec::new(), routing: None, timings });
        let bad = || Err(ApiError::new(ErrorCode::UndecodableImage, "torn"));
        let statistics = Statistics::default();
        statistics.record("flowers", 1, &[good(), bad(), good()], 9.0);
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
        statistics.forget_others(&[]);
        assert_eq!(statistics.of("flowers", 1), SetStatistics::default());
    }
}
