//! Everything that a handler reaches.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::cameras::{Cameras, Condition};
use crate::classify::Classifier;
use crate::examples::Examples;
use crate::fitting::Fitting;
use crate::keys::Keys;
use crate::metrics::saturating;
use crate::sets::catalog::Catalog;
use crate::sets::registry::Kind;
use crate::threads::BlockingPool;

/// Limits that handlers look at.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest body after decompression.
    pub max_body_bytes: usize,
    /// Most images in one request.
    pub max_images: usize,
    /// From the last byte of a request to its answer.
    pub request_timeout: Duration,
    /// For any more of a body to arrive.
    pub body_timeout: Duration,
    /// Largest expert set that may be uploaded.
    pub max_upload_bytes: usize,
}

/// The application; clones share it.
#[derive(Clone)]
pub struct AppState(Arc<App>);

pub struct App {
    /// Limits that handlers look at.
    pub limits: Limits,
    /// Expert set of requests that name none; known once the server is ready.
    pub default_set: OnceLock<String>,
    pub classifier: Arc<Classifier>,
    pub cameras: Cameras,
    /// The thread that decompresses bodies, reads long JSON and builds long answers.
    pub bulk: BlockingPool,
    /// Bytes that long answers may take together.
    pub answers: Arc<Semaphore>,
    /// Keys that may classify.
    pub user_keys: Keys,
    /// Keys that may do everything.
    pub admin_keys: Keys,
    /// Other sites whose pages may send requests, as browsers write them.
    pub cors_origins: Vec<String>,
    /// Whether management without a key is open to this machine.
    pub trusts_loopback: bool,
    pub catalog: Catalog,
    /// Pictures to teach sets from, where a folder is configured for them.
    pub examples: Option<Examples>,
    /// Fits sets to them.
    pub fitting: Option<Fitting>,
    /// When the server started.
    pub started: Instant,
}

impl AppState {
    pub fn new(app: App) -> Self {
        Self(Arc::new(app))
    }
}

impl std::ops::Deref for AppState {
    type Target = App;

    fn deref(&self) -> &App {
        &self.0
    }
}

impl App {
    /// The default set's name; empty, which names no set, until the server is ready.
    pub fn default_set(&self) -> &str {
        self.default_set.get().map_or("", String::as_str)
    }

    /// The set a request gets that names `name`.
    pub fn set_name(&self, name: Option<String>) -> String {
        name.unwrap_or_else(|| self.default_set().to_owned())
    }

    /// Reads the gauges of what *is* from their owners.
    pub fn refresh_metrics(&self) {
        let Classifier { registry, admission, metrics, statistics, .. } = &*self.classifier;
        let (totals, budget, (images, bytes)) = (registry.totals(), registry.budget(), admission.images_held());
        metrics.queue_depth.set(saturating(images));
        metrics.sets_registered.set(saturating(totals.registered));
        metrics.sets_resident.set(saturating(totals.resident));
        metrics.sets_pinned.set(saturating(totals.pinned));
        metrics.sets_failed.set(saturating(totals.failed + self.catalog.broken_count()));
        metrics.memory_budget.set(saturating(budget.limit()));
        for kind in Kind::ALL {
            // The budget sets the whole queue aside; what it holds now is more telling.
            let held = if kind == Kind::Queue { bytes } else { budget.used(kind) };
            metrics.memory.with_label_values(&[kind.as_str()]).set(saturating(held));
        }
        let sets = registry.list();
        let versions = sets.iter().map(|status| (status.descriptor.name.as_str(), status.descriptor.version));
        statistics.forget_others(&versions.collect());
        metrics.forget_other_sets(&registry.names());
        metrics.set_resident.reset();
        if metrics.per_set() {
            for status in sets.iter().filter(|status| status.resident_bytes > 0) {
                let pinned = if status.pinned { "true" } else { "false" };
                metrics.set_resident.with_label_values(&[status.descriptor.name.as_str(), pinned]).set(1);
            }
        }
        self.refresh_cameras();
    }

    fn refresh_cameras(&self) {
        let metrics = &self.classifier.metrics;
        metrics.camera_state.reset();
        metrics.camera_frame_age.reset();
        for camera in self.cameras.all() {
            let (name, (age, condition)) = (camera.config.name.as_str(), camera.age());
            for each in Condition::ALL {
                let is_so = i64::from(each == condition);
                metrics.camera_state.with_label_values(&[name, each.as_str()]).set(is_so);
            }
            if let Some(age) = age {
                metrics.camera_frame_age.with_label_values(&[name]).set(age);
            }
        }
    }
}
