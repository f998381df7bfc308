//! One camera: a task of its own that fetches, asks the classifier and remembers, so that no camera waits for another.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::fetch::Fetcher;
use super::file::CameraConfig;
use super::state::{Condition, Progress, Sight};
use crate::admission::Client;
use crate::classify::{Classifier, Error, Image, Request, predictions};
use crate::keys::Caller;
use crate::sentence::sentence;
use crate::verdict::Reason;

/// Changes that are remembered.
const MOST_CHANGES: usize = 64;
/// Longest rest of a camera that fails, unless it is asked less often anyway.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// Longest time from a frame to its answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Labels that are remembered; those of a larger set are too many to be told beforehand.
const MOST_LABELS: usize = 64;
/// The label of frames that the expert set does not know.
const UNKNOWN: &str = "unknown";

/// A camera, shared between its task and whoever asks about it.
pub struct Camera {
    pub config: CameraConfig,
    /// Most bytes of a frame that is kept to be shown.
    keep: usize,
    known: Mutex<Known>,
}

struct Known {
    progress: Progress,
    last: Option<Last>,
    /// The labels of the set that answered last, unless they are many.
    labels: Option<Arc<[String]>>,
    frame: Option<Bytes>,
    error: Option<String>,
    frames: u64,
    failures: u64,
    since: f64,
    changes: VecDeque<Change>,
}

#[derive(Clone)]
struct Last {
    at: f64,
    when: Instant,
    set: String,
    generation: String,
    label: String,
    score: f32,
    reason: Option<Reason>,
}

/// A camera as it is now.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct CameraView {
    pub name: String,
    /// The expert set that looks at its frames; null before the first frame where the file names none.
    pub set: Option<String>,
    pub condition: Condition,
    /// The label that enough of the last answers agree on, or `unknown`; null while there is none, as for a camera that is
    /// silent or frozen.
    pub state: Option<String>,
    /// Seconds since 1970 when condition or state last changed.
    pub since: f64,
    /// The best label of the last frame.
    pub label: Option<String>,
    pub score: Option<f32>,
    /// Why the last frame is unknown, if it is.
    pub unknown_reason: Option<Reason>,
    /// Name, version and content digest of the expert set that answered last.
    pub generation: Option<String>,
    /// Seconds since 1970 when the last frame was answered.
    pub last_frame: Option<f64>,
    /// Why the last attempt brought no answer; null when it did.
    pub error: Option<String>,
    /// Frames answered since the start.
    pub frames: u64,
    /// Attempts without an answer since the start.
    pub failures: u64,
    /// Seconds from frame to frame.
    pub every: f64,
}

/// A change of condition or state.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Change {
    /// When it came, in seconds since 1970.
    pub at: f64,
    pub condition: Condition,
    pub state: Option<String>,
    /// Of the frame that brought the change.
    pub score: Option<f32>,
}

/// How an attempt ended, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameResult {
    Ok,
    /// No bytes of a picture came.
    Unreachable,
    /// What came is no picture.
    BadFrame,
    /// The picture was fine, the gateway had no answer.
    Unanswered,
}

impl FrameResult {
    pub const ALL: [Self; 4] = [Self::Ok, Self::Unreachable, Self::BadFrame, Self::Unanswered];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unreachable => "unreachable",
            Self::BadFrame => "bad_frame",
            Self::Unanswered => "unanswered",
        }
    }
}

/// What a frame came to.
struct Answered {
    last: Last,
    is_flat: bool,
    content: [u8; 32],
    bytes: Bytes,
}

impl Camera {
    /// A camera that has shown nothing yet and keeps frames of up to `keep` bytes.
    pub fn new(config: CameraConfig, keep: usize) -> Self {
        let known = Known {
            progress: Progress::new(config.agree, config.frozen, config.enabled),
            last: None,
            labels: None,
            frame: None,
            error: None,
            frames: 0,
            failures: 0,
            since: now(),
            changes: VecDeque::new(),
        };
        Self { config, keep, known: Mutex::new(known) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn view(&self) -> CameraView {
        let known = self.known();
        let last = known.last.as_ref();
        CameraView {
            name: self.config.name.clone(),
            set: self.config.set.clone().or(last.map(|last| last.set.clone())),
            condition: known.progress.condition,
            state: known.progress.state.clone(),
            since: known.since,
            label: last.map(|last| last.label.clone()),
            score: last.map(|last| last.score),
            unknown_reason: last.and_then(|last| last.reason),
            generation: last.map(|last| last.generation.clone()),
            last_frame: last.map(|last| last.at),
            error: known.error.clone(),
            frames: known.frames,
            failures: known.failures,
            every: self.config.every.as_secs_f64(),
        }
    }

    /// The last changes, the newest first.
    pub fn changes(&self) -> Vec<Change> {
        self.known().changes.iter().rev().cloned().collect()
    }

    /// The last frame as the camera sent it; none before the first one, and when it is too large to be kept.
    pub fn frame(&self) -> Option<Bytes> {
        self.known().frame.clone()
    }

    /// The labels that its state may have, once a set with few of them has answered.
    pub fn labels(&self) -> Option<Arc<[String]>> {
        self.known().labels.clone()
    }

    /// Seconds since the last frame, and the condition.
    pub fn age(&self) -> (Option<f64>, Condition) {
        let known = self.known();
        (known.last.as_ref().map(|last| last.when.elapsed().as_secs_f64()), known.progress.condition)
    }

    /// Fetches and asks until `stop`. `changed` hears of every change. The first frame comes after `delay`.
    pub async fn run(
        &self,
        classifier: &Classifier,
        default_set: &str,
        delay: Duration,
        stop: CancellationToken,
        changed: impl Fn(&Self),
    ) {
        if !self.config.enabled {
            return stop.cancelled().await;
        }
        let mut fetcher = match Fetcher::new(&self.config) {
            Ok(fetcher) => fetcher,
            Err(error) => {
                // Certificates do not come by themselves; the file has to change.
                while !self.note(Err((FrameResult::Unreachable, sentence(&error)))) {}
                changed(self);
                return stop.cancelled().await;
            }
        };
        let mut ticks = interval_at(Instant::now() + delay, self.config.every);
        // A frame that took long is no reason for two in a hurry.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut rest_until = Instant::now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled() => return,
            }
            if Instant::now() < rest_until {
                continue;
            }
            let looked = tokio::select! {
                looked = self.look(&mut fetcher, classifier, default_set) => looked,
                () = stop.cancelled() => return,
            };
            let result = looked.as_ref().map_or_else(|(result, _)| *result, |_| FrameResult::Ok);
            classifier.metrics.camera_frames.with_label_values(&[self.config.name.as_str(), result.as_str()]).inc();
            if self.note(looked) {
                changed(self);
            }
            let failures = self.known().progress.failures();
            if failures > 0 {
                let rest = self.config.every.saturating_mul(1 << failures.min(16));
                rest_until = Instant::now() + rest.min(LONGEST_REST.max(self.config.every));
            }
        }
    }

    /// Remembers what an attempt came to. Returns whether condition or state have changed.
    fn note(&self, looked: Result<Answered, (FrameResult, String)>) -> bool {
        let mut known = self.known();
        let before = (known.progress.condition, known.progress.state.clone());
        let (is_changed, score) = match looked {
            Ok(Answered { last, is_flat, content, bytes }) => {
                let sight = Sight { label: &last.label, is_flat, bytes: Sha256::digest(&bytes).into(), content };
                let is_changed = known.progress.seen(sight);
                let score = last.score;
                known.frames += 1;
                known.error = None;
                known.frame = (bytes.len() <= self.keep).then_some(bytes);
                known.last = Some(last);
                (is_changed, Some(score))
            }
            Err((result, reason)) => {
                known.failures += 1;
                known.error = Some(reason);
                // That the gateway has too much to do says nothing about the camera.
                (result != FrameResult::Unanswered && known.progress.failed(), None)
            }
        };
        if is_changed {
            let at = now();
            known.since = at;
            let (condition, state) = (known.progress.condition, known.progress.state.clone());
            self.log(before, (condition, state.as_deref()), known.error.as_deref());
            known.changes.push_back(Change { at, condition, state, score });
            while known.changes.len() > MOST_CHANGES {
                known.changes.pop_front();
            }
        }
        is_changed
    }

    fn log(
        &self,
        before: (Condition, Option<String>),
        (condition, state): (Condition, Option<&str>),
        error: Option<&str>,
    ) {
        let (camera, condition_is_new) = (self.config.name.as_str(), before.0 != condition);
        let (was, condition) = (before.0.as_str(), condition.as_str());
        match error {
            Some(error) => tracing::warn!(camera, condition, was, error, "a camera sends no pictures"),
            None if condition_is_new && was != "starting" => {
                tracing::info!(camera, condition, was, "a camera's condition")
            }
            None => tracing::debug!(camera, condition, state, "a camera's state"),
        }
    }

    async fn look(
        &self,
        fetcher: &mut Fetcher,
        classifier: &Classifier,
        default_set: &str,
    ) -> Result<Answered, (FrameResult, String)> {
        let unanswered = |reason: String| (FrameResult::Unanswered, reason);
        // All cameras together are one client of the gateway, beside those of the network.
        let mut permit =
            classifier.admission.body(Client::UNKNOWN).map_err(|refused| unanswered(refused.to_string()))?;
        let most = self.config.timeout;
        let fetched = timeout(most, fetcher.fetch(&mut permit)).await;
        let fetched =
            fetched.unwrap_or_else(|_| Err(anyhow::anyhow!("no picture came within {} s", most.as_secs_f64())));
        let bytes = fetched.map_err(|error| match error.downcast_ref::<crate::admission::Refused>() {
            Some(refused) => unanswered(refused.to_string()),
            None => (FrameResult::Unreachable, sentence(&error)),
        })?;
        let entered = classifier.admission.enter(&Caller::default(), Client::UNKNOWN);
        let mut entry = entered.map_err(|refused| unanswered(refused.to_string()))?;
        let (set, started) = (self.config.set.as_deref().unwrap_or(default_set), Instant::now());
        let request = Request {
            set: set.to_owned(),
            version: None,
            images: vec![Ok(Image::Encoded(bytes.clone()))],
            routing: false,
            look: self.config.look,
            min_score: self.config.min_score,
            started,
            deadline: started + ANSWER_TIME,
        };
        let answers = classifier.answer(&mut entry, request).await.map_err(|error| unanswered(error.to_string()))?;
        let answer = answers.images.into_iter().next().unwrap_or_else(|| Err(Error::Internal("no answer".into())));
        let answer = answer.map_err(|error| match error {
            Error::Image(_) | Error::Form(_) => (FrameResult::BadFrame, error.to_string()),
            error => unanswered(error.to_string()),
        })?;
        let best = predictions(&answer.logits, answers.lease.value.labels(), 1).pop();
        let best = best.ok_or_else(|| unanswered("the expert set has no labels".into()))?;
        let (generation, labels) = (answers.lease.descriptor.generation(), answers.lease.value.labels());
        {
            let mut known = self.known();
            if known.last.as_ref().is_none_or(|last| last.generation != generation) {
                known.labels = (labels.len() <= MOST_LABELS).then(|| labels.into());
            }
        }
        let is_unknown = answer.verdict.unknown == Some(true);
        let mut content = Sha256::new();
        answer.logits.iter().for_each(|logit| content.update(logit.to_le_bytes()));
        Ok(Answered {
            last: Last {
                at: now(),
                when: Instant::now(),
                set: set.to_owned(),
                generation,
                label: if is_unknown { UNKNOWN.to_owned() } else { best.label },
                score: best.score,
                reason: answer.verdict.reason,
            },
            is_flat: answer.verdict.reason == Some(Reason::Flat),
            content: content.finalize().into(),
            bytes,
        })
    }
}

/// Seconds since 1970, in milliseconds.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs_f64() * 1e3).round() / 1e3
}
