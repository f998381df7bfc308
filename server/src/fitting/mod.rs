//! Fits expert sets to the examples that were sent for them, while the server answers.
//!
//! One fit runs at a time, on one thread that gives way to those that answer. Its features come from the backbone that serves,
//! its memory out of the budget that sets are loaded in, and what it made takes its place as an upload does: in full, or not
//! at all. A fit that is cancelled, fails or dies with the server changes nothing.

pub mod features;
mod kept;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model_core::artifact::{Contents, Digest, read_backbone};
use model_core::config::ExpertConfig;
use model_core::engine::Session;
use model_core::image::{Crop, Fit, View};
use model_core::weights::{Background, Covariance};
use serde::Serialize;
use serde_json::{Value, json};
use teaching::{Base, Options, Report, Taught, TeachError, teach};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use crate::compute::decode::{Decoder, Input};
use crate::examples::{Example, ExampleError, Examples, check_set};
use crate::sentence::sentence;
use crate::sets::catalog::{Catalog, CatalogError};
use crate::sets::descriptor::{self, BackboneDescriptor, SetDescriptor};
use crate::sets::loaded::SetRegistry;
use crate::sets::registry::{Reservation, SetError};
use crate::threads::{BlockingPool, Panicked, Priority};
use features::{Extractor, views_of};
use kept::{Kept, Key};

/// Fits that are remembered, one a set.
const REMEMBERED: usize = 64;
/// Of the progress, the part that reading the examples is.
const READING: f64 = 0.7;
/// The backbone to fit to where a set has none yet and the store has several.
const FOR_PHOTOGRAPHS: &str = "photo";
/// Sentences about examples that are left out.
const MOST_LEFT_OUT: usize = 100;

/// Why nothing is fitted.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    #[error(transparent)]
    Example(#[from] ExampleError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Set(#[from] SetError),
    #[error(transparent)]
    Teach(#[from] TeachError),
    #[error("a fit of expert set `{set}` is under way ({percent}% done); wait for its end, or cancel it")]
    UnderWay { set: String, percent: u32 },
    /// There is nothing to cancel.
    #[error("no fit of expert set `{0}` is under way")]
    NotUnderWay(String),
    /// It cannot be cancelled any more.
    #[error("the new version of expert set `{0}` is being put into its place; delete that version to undo the fit")]
    TooLate(String),
    /// No backbone to fit to.
    #[error("{0}")]
    Backbone(String),
    /// The examples do not fit into the memory budget.
    #[error(
        "to fit {images} examples takes {needed} bytes, and the memory budget can never give more than {available} to that; \
         raise --memory-budget, or delete examples"
    )]
    TooLarge { images: usize, needed: usize, available: usize },
    #[error("{0}")]
    Internal(String),
}

impl From<Panicked> for FitError {
    fn from(panicked: Panicked) -> Self {
        Self::Internal(panicked.to_string())
    }
}

/// What a fit is doing, or has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FitState {
    /// The set was not fitted since the server started.
    None,
    Running,
    /// The new version is in its place.
    Done,
    Failed,
    Cancelled,
}

/// A set's last fit.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct FitStatus {
    pub set: String,
    /// What it is doing, or has come to.
    pub state: FitState,
    /// Share of the work that is done.
    pub progress: f64,
    /// Examples that it was begun with.
    pub images: usize,
    /// Name of the backbone that it is fitted to, or null.
    pub backbone: Option<String>,
    /// The set whose experts it borrows, on a backbone with blocks: its name and version, or null.
    pub base: Option<FitBase>,
    /// Version of the set that came of it, or null.
    pub version: Option<u64>,
    /// Why there is none, or null.
    pub reason: Option<String>,
    /// Sentences about the first hundred examples that were left out.
    pub left_out: Vec<String>,
    /// What the set is worth by images that were held out, or null until it is done.
    #[schema(value_type = Option<Object>)]
    pub report: Option<Value>,
}

/// The set that lends its experts to one that is fitted.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct FitBase {
    pub set: String,
    pub version: u64,
}

impl FitStatus {
    fn none(set: &str) -> Self {
        Self {
            set: set.to_owned(),
            state: FitState::None,
            progress: 0.0,
            images: 0,
            backbone: None,
            base: None,
            version: None,
            reason: None,
            left_out: Vec::new(),
            report: None,
        }
    }
}

/// What a request for a fit wants.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Name of a backbone; otherwise that of the set's current version.
    pub backbone: Option<String>,
    /// Name of the set whose experts are borrowed, on a backbone with blocks; otherwise the lender of the set's current version,
    /// or the only set on that backbone that can lend.
    pub base: Option<String>,
    /// Which part of a picture matters; otherwise that of the set's current version.
    pub crop: Option<[f64; 4]>,
    pub fit: Option<Fit>,
}

/// Fits sets; clones share it.
#[derive(Clone)]
pub struct Fitting(Arc<Shared>);

struct Shared {
    examples: Examples,
    registry: SetRegistry,
    catalog: Catalog,
    decoder: Decoder,
    /// How long the new version may take to load.
    load_wait: Duration,
    thread: BlockingPool,
    /// The last one first.
    fits: Mutex<VecDeque<Run>>,
    ids: AtomicU64,
}

struct Run {
    /// Tells it from an earlier one of the same set that was cancelled and has not noticed yet.
    id: u64,
    status: FitStatus,
    cancel: CancellationToken,
    /// Whether it has begun to change the store.
    is_installing: bool,
}

/// All that a fit is begun with.
struct Task {
    set: String,
    examples: Vec<Example>,
    classes: Vec<String>,
    backbone: Arc<BackboneDescriptor>,
    /// The set whose experts are borrowed, on a backbone with blocks.
    base: Option<Arc<SetDescriptor>>,
    /// The set's version when the fit began.
    current: Option<Arc<SetDescriptor>>,
    crop: Option<[f64; 4]>,
    fit: Option<Fit>,
    cancel: CancellationToken,
    id: u64,
}

/// Examples as the backbone sees them.
struct Seen {
    features: Vec<f32>,
    views: usize,
    labels: Vec<usize>,
    /// Those whose features these are.
    ids: Vec<String>,
}

impl Fitting {
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(
        examples: Examples,
        registry: SetRegistry,
        catalog: Catalog,
        decoder: Decoder,
        load_wait: Duration,
    ) -> std::io::Result<Self> {
        let (thread, fits) = (BlockingPool::start("fit", 1, Priority::Background)?, Mutex::default());
        Ok(Self(Arc::new(Shared {
            examples,
            registry,
            catalog,
            decoder,
            load_wait,
            thread,
            fits,
            ids: AtomicU64::new(0),
        })))
    }

    /// The last fit of a set.
    ///
    /// # Errors
    /// [`ExampleError::Set`] when that is no name.
    pub fn status(&self, set: &str) -> Result<FitStatus, FitError> {
        check_set(set)?;
        let fits = self.0.fits();
        Ok(fits.iter().find(|run| run.status.set == set).map_or_else(|| FitStatus::none(set), |run| run.status.clone()))
    }

    /// Begins to fit a set to its examples. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// What can be known before a picture is looked at: too few examples, no backbone, a store that cannot be written, and
    /// [`FitError::UnderWay`] when one runs already.
    pub async fn begin(&self, set: &str, wish: Wish) -> Result<FitStatus, FitError> {
        let examples = self.0.examples.list(set)?;
        check_free(&self.0.fits())?;
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        examples.iter().for_each(|example| *counts.entry(&example.label).or_default() += 1);
        teaching::check_counts(counts.iter().map(|(label, count)| (*label, *count)))?;
        let classes: Vec<String> = counts.into_keys().map(str::to_owned).collect();
        // Refused before minutes of work whose outcome has no place.
        drop(self.0.catalog.begin_upload().await?);
        let current = self.0.registry.lookup(set, None).ok().map(|target| target.set);
        let backbone = self.0.backbone(wish.backbone.as_deref(), current.as_deref())?;
        let base = self.0.base(wish.base.as_deref(), current.as_deref(), &backbone)?;
        let cancel = CancellationToken::new();
        let task = Task {
            set: set.to_owned(),
            examples,
            classes,
            backbone,
            base,
            current,
            crop: wish.crop,
            fit: wish.fit,
            cancel: cancel.clone(),
            id: self.0.ids.fetch_add(1, Ordering::Relaxed),
        };
        let status = FitStatus {
            state: FitState::Running,
            images: task.examples.len(),
            backbone: Some(task.backbone.name.clone()),
            base: task.base.as_ref().map(|base| FitBase { set: base.name.clone(), version: base.version }),
            ..FitStatus::none(set)
        };
        {
            let mut fits = self.0.fits();
            check_free(&fits)?;
            fits.retain(|run| run.status.set != set);
            fits.truncate(REMEMBERED - 1);
            fits.push_front(Run { id: task.id, status: status.clone(), cancel, is_installing: false });
        }
        let shared = Arc::clone(&self.0);
        tokio::spawn(async move {
            let task = Arc::new(task);
            let (inner, inner_task) = (Arc::clone(&shared), Arc::clone(&task));
            // A task of its own: should it panic, the fit has failed, and does not run for ever.
            let outcome = tokio::spawn(async move { inner.run(&inner_task).await }).await;
            shared.finish(&task, outcome.unwrap_or_else(|error| Err(FitError::Internal(error.to_string()))));
        });
        Ok(status)
    }

    /// Ends the fit of a set; what it has done so far is lost.
    ///
    /// # Errors
    /// [`FitError::NotUnderWay`], and [`FitError::TooLate`] when its version is on its way.
    pub fn cancel(&self, set: &str) -> Result<FitStatus, FitError> {
        check_set(set)?;
        let mut fits = self.0.fits();
        let running = fits.iter_mut().find(|run| run.status.set == set && run.status.state == FitState::Running);
        let running = running.ok_or_else(|| FitError::NotUnderWay(set.to_owned()))?;
        if running.is_installing {
            return Err(FitError::TooLate(set.to_owned()));
        }
        running.cancel.cancel();
        running.status.state = FitState::Cancelled;
        Ok(running.status.clone())
    }
}

impl Shared {
    fn fits(&self) -> MutexGuard<'_, VecDeque<Run>> {
        self.fits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the status of a fit that still runs.
    fn update(&self, task: &Task, change: impl FnOnce(&mut Run)) {
        let mut fits = self.fits();
        if let Some(run) = fits.iter_mut().find(|run| run.id == task.id && run.status.state == FitState::Running) {
            change(run);
        }
    }

    fn progress(&self, task: &Task, share: f64) {
        self.update(task, |run| run.status.progress = share);
    }

    /// The backbone to fit to: the wanted one, that of the current version, the only one without blocks, or `photo`.
    fn backbone(
        &self,
        wanted: Option<&str>,
        current: Option<&SetDescriptor>,
    ) -> Result<Arc<BackboneDescriptor>, FitError> {
        let mut known = self.registry.backbones();
        known.sort_by(|a, b| a.name.cmp(&b.name));
        let without_blocks: Vec<_> = known.iter().filter(|backbone| !backbone.config.has_blocks()).collect();
        let found = match (wanted, current, &without_blocks[..]) {
            (Some(wanted), ..) => known.iter().find(|backbone| backbone.name == wanted),
            (None, Some(current), _) => known.iter().find(|backbone| backbone.digest == current.backbone),
            (None, None, [only]) => Some(*only),
            (None, None, several) => several.iter().copied().find(|backbone| backbone.name == FOR_PHOTOGRAPHS),
        };
        found.map(Arc::clone).ok_or_else(|| {
            let names = known.iter().map(|backbone| &*backbone.name).collect::<Vec<_>>().join(", ");
            FitError::Backbone(match wanted {
                Some(_) => format!("there is no such backbone; sets can be fitted to: {names}"),
                None => format!("say which backbone the set is to be fitted to: {names}"),
            })
        })
    }

    /// The set that lends its experts to one on `backbone`; none where that has no blocks.
    fn base(
        &self,
        wanted: Option<&str>,
        current: Option<&SetDescriptor>,
        backbone: &BackboneDescriptor,
    ) -> Result<Option<Arc<SetDescriptor>>, FitError> {
        let name = &backbone.name;
        let refused = |reason: String| Err(FitError::Backbone(reason));
        if !backbone.config.has_blocks() {
            return match wanted {
                Some(_) => {
                    refused(format!("the backbone `{name}` has no blocks, so its sets have no experts to borrow"))
                }
                None => Ok(None),
            };
        }
        let mut lending = self.registry.lending(&backbone.digest);
        if let Some(wanted) = wanted {
            if let Some(base) = lending.into_iter().find(|set| set.name == wanted) {
                return Ok(Some(base));
            }
            let newest = self.registry.lookup(wanted, None)?.set;
            return refused(if newest.backbone == backbone.digest {
                format!("the set `{wanted}` borrows its experts itself, and lends none")
            } else {
                format!("the set `{wanted}` is on another backbone than `{name}`")
            });
        }
        let before = current.filter(|current| current.backbone == backbone.digest).and_then(|current| current.lender);
        if let Some(lender) = before.and_then(|digest| self.registry.lender(&digest)) {
            return Ok(Some(lender));
        }
        // The same experts under two names are one choice.
        let mut seen = HashSet::new();
        lending.retain(|set| seen.insert(set.digest));
        match &lending[..] {
            [only] => Ok(Some(Arc::clone(only))),
            [] => refused(format!(
                "the backbone `{name}` has blocks, and no set on it has experts that could be borrowed"
            )),
            several => {
                let names: Vec<_> = several.iter().map(|set| &*set.name).collect();
                refused(format!("say which set on the backbone `{name}` lends its experts: {}", names.join(", ")))
            }
        }
    }

    /// The part of a picture that a set looks at.
    async fn view_of(&self, set: Option<Arc<SetDescriptor>>) -> Result<View, FitError> {
        let Some(set) = set else { return Ok(View::default()) };
        let view = move || match descriptor::header(&set.location).map(|header| header.contents) {
            Ok(Contents::ExpertSet(set)) => set.view,
            // Replaced by hand a moment ago.
            _ => View::default(),
        };
        Ok(self.thread.run(view).await?)
    }

    async fn run(&self, task: &Task) -> Result<(u64, Report, Vec<String>), FitError> {
        let Task { set, examples, backbone, .. } = task;
        let resident = self.registry.hold_backbone(&backbone.digest, set).await;
        let resident = resident.map_err(|error| without_room(task, error))?;
        let (background, _background_memory) = self.background(task).await?;
        let engine = resident.value.engine();
        let kept = self.view_of(task.current.clone()).await?;
        let view = View { crop: task.crop.unwrap_or(kept.crop), fit: task.fit.unwrap_or(kept.fit) };
        // Held until the new version is there, which borrows from it.
        let base = match &task.base {
            Some(base) => Some(self.registry.acquire(&base.name, Some(base.version), self.load_wait).await?),
            None => None,
        };
        if let Some((lease, base)) =
            base.as_ref().zip(task.base.as_ref()).filter(|(lease, base)| lease.descriptor.digest != base.digest)
        {
            let (now, then) = (lease.descriptor.digest.short(), base.digest.short());
            return Err(FitError::Backbone(format!(
                "the set `{}` changed meanwhile: its experts were {then} and are {now}",
                base.name
            )));
        }
        let lender = base.as_ref().map(|lease| Arc::clone(lease.value.engine()));
        let extractor = Extractor::new(Arc::clone(engine), lender, view);
        let extractor = Arc::new(extractor.map_err(|error| FitError::Internal(sentence(&error)))?);
        let (session, _memory) = self.session(task, &extractor).await?;
        let seen = self.see(task, view, &extractor, session).await?;
        tracing::debug!(set.name = set, images = seen.labels.len(), of = examples.len(), "examples seen");
        let (taught, ids) = self.fit(task, seen, background).await?;
        let report = taught.report.clone();
        let base = Base {
            backbone: engine.config().shape(),
            backbone_digest: backbone.digest,
            experts: task.base.as_ref().map_or(ExpertConfig::NONE, |base| base.experts.clone()),
            borrowed_experts: task.base.as_ref().map(|base| base.digest),
            view,
        };
        let bytes =
            taught.into_artifact(set, base).to_bytes().map_err(|error| FitError::Internal(error.to_string()))?;
        // From here on it is too late to cancel.
        self.update(task, |run| run.is_installing = true);
        if task.cancel.is_cancelled() {
            return Err(TeachError::Cancelled.into());
        }
        let mut upload = self.catalog.begin_upload().await?;
        upload.write(&bytes).await.map_err(CatalogError::from)?;
        let version = self.catalog.publish_next(upload, set, task.current.is_some()).await?;
        // What was learned is served when the fit is done; the old version answers until then.
        self.registry.load(set, Some(version), self.load_wait).await?;
        Ok((version, report, ids))
    }

    /// The backbone's background as its file has it, with the memory that it takes.
    async fn background(&self, task: &Task) -> Result<(Option<Background>, Reservation), FitError> {
        let (digest, location) = (task.backbone.digest, task.backbone.location.clone());
        // As if a second one were loaded.
        let whole = task.backbone.resident_bytes.saturating_add(task.backbone.loading_bytes);
        let memory = self.registry.reserve_beside(&digest, &task.set, whole).await;
        let mut memory = memory.map_err(|error| without_room(task, error))?;
        let read = move || -> anyhow::Result<(Digest, Option<Background>)> {
            let artifact = read_backbone(&location.read()?)?;
            Ok((artifact.digest, artifact.weights.background))
        };
        let name = &task.backbone.name;
        let gone =
            |reason: String| FitError::Backbone(format!("the file of the backbone `{name}` cannot be read: {reason}"));
        let (now, background) = self.thread.run(read).await?.map_err(|error| gone(without_places(&error)))?;
        if now != digest {
            return Err(gone("it was replaced by another one".to_owned()));
        }
        let kept = background.as_ref().map_or(0, bytes_of);
        let fits = memory.resize(kept.min(whole));
        debug_assert!(fits, "it shrinks");
        Ok((background, memory))
    }

    /// Scratch to look at every example in as many ways as the memory budget allows, and that memory.
    async fn session(&self, task: &Task, extractor: &Arc<Extractor>) -> Result<(Session, Reservation), FitError> {
        let (images, classes) = (task.examples.len(), task.classes.len());
        let d_model = extractor.backbone().config().d_model;
        let mut views = views_of(images);
        loop {
            let maker = Arc::clone(extractor);
            let session = self.thread.run(move || maker.session(views)).await?;
            // The first batch makes the scratch grow to what the base's experts need.
            let experts = task.base.as_ref().map_or(&ExpertConfig::NONE, |base| &base.experts);
            let scratch = session.resident_bytes() + Session::growth(&task.backbone.config, views, experts);
            let bytes = scratch.saturating_add(teaching::memory(images, views, d_model, classes));
            match self.registry.reserve_beside(&task.backbone.digest, &task.set, bytes).await {
                Ok(memory) => return Ok((session, memory)),
                Err(SetError::TooLarge { .. }) if views > 1 => views /= 2,
                Err(error) => return Err(without_room(task, error)),
            }
        }
    }

    /// Runs the examples through the backbone, one by one.
    async fn see(
        &self,
        task: &Task,
        view: View,
        extractor: &Arc<Extractor>,
        mut session: Session,
    ) -> Result<Seen, FitError> {
        let (config, preprocess) = (extractor.backbone().config(), extractor.backbone().preprocess().clone());
        let input = Input { preprocess, side: config.image_size, view: (Crop::Shares(view.crop), view.fit) };
        let views = session.max_batch();
        let features = Vec::with_capacity(task.examples.len() * views * config.d_model);
        let mut seen = Seen { features, views, labels: Vec::new(), ids: Vec::new() };
        for (at, example) in task.examples.iter().enumerate() {
            let (outcome, returned) = self.see_one(task, example, (&input, extractor, view), session).await?;
            session = returned;
            match outcome {
                Ok(features) => {
                    seen.features.extend(features);
                    let class = task.classes.binary_search(&example.label);
                    seen.labels.push(class.map_err(|_| FitError::Internal("a label without a class".to_owned()))?);
                    seen.ids.push(example.id.clone());
                }
                Err(reason) => self.update(task, |run| {
                    if run.status.left_out.len() < MOST_LEFT_OUT {
                        run.status.left_out.push(format!("example {} (`{}`): {reason}", example.id, example.label));
                    }
                }),
            }
            self.progress(task, READING * (at + 1) as f64 / task.examples.len() as f64);
        }
        Ok(seen)
    }

    /// The features of an example, or why it is left out; gives the session back.
    async fn see_one(
        &self,
        task: &Task,
        example: &Example,
        (input, extractor, view): (&Input, &Arc<Extractor>, View),
        mut session: Session,
    ) -> Result<(Result<Vec<f32>, String>, Session), FitError> {
        if task.cancel.is_cancelled() {
            return Err(TeachError::Cancelled.into());
        }
        let (examples, set, wanted) = (self.examples.clone(), task.set.clone(), example.clone());
        let (reader, views) = (Arc::clone(extractor), session.max_batch());
        let read = move || {
            let bytes = examples.read(&set, &wanted)?;
            let key = Key::of(&bytes, &reader, view, views);
            let count = views * reader.backbone().config().d_model;
            let kept = examples.features(&set, &wanted.id).map(|kept| kept::decode(&kept, &key, count));
            if let Some(Kept::Damaged) = kept {
                tracing::warn!(
                    set.name = set,
                    example = wanted.id,
                    "the kept features of an example are damaged; they are computed anew"
                );
            }
            Ok((bytes, key, kept))
        };
        let (bytes, key) = match self.thread.run(read).await? {
            Ok((_, _, Some(Kept::Features(features)))) => return Ok((Ok(features), session)),
            Ok((bytes, key, _)) => (bytes, key),
            Err(ExampleError::Unknown(_)) => {
                return Ok((Err("it was deleted or relabelled meanwhile".to_owned()), session));
            }
            Err(error) => return Err(error.into()),
        };
        let (limits, permit) = match self.decoder.lend_memory(&bytes, input).await {
            Ok(lent) => lent,
            Err(error) => return Ok((Err(error.to_string()), session)),
        };
        let (extractor, cancel) = (Arc::clone(extractor), task.cancel.clone());
        let work = move || {
            let _permit = permit;
            let features = extractor.features(&bytes, &limits, &mut session, &|| cancel.is_cancelled());
            (features.map_err(|error| sentence(&error)), session)
        };
        let (features, session) = self.thread.run(work).await?;
        if let Ok(features) = &features {
            self.examples.keep_features(&task.set, &example.id, kept::encode(&key, features)).await;
        }
        Ok((features, session))
    }

    /// Head, temperature and statistics, and the examples that they come from.
    async fn fit(
        &self,
        task: &Task,
        seen: Seen,
        background: Option<Background>,
    ) -> Result<(Taught, Vec<String>), FitError> {
        let (classes, cancel) = (task.classes.clone(), task.cancel.clone());
        let d_model = task.backbone.config.d_model;
        let (tell, mut told) = tokio::sync::watch::channel(0.0);
        let work = move || {
            let examples = teaching::Examples {
                features: &seen.features,
                views: seen.views,
                d_model,
                labels: &seen.labels,
                classes: &classes,
            };
            let options = Options { threads: 1, ..Options::default() };
            let mut progress = |share: f64| {
                let _ = tell.send(share);
            };
            let taught = teach(&examples, background.as_ref(), &options, &mut progress, &|| cancel.is_cancelled());
            Ok((taught?, seen.ids))
        };
        let follow = async {
            while told.changed().await.is_ok() {
                let share = *told.borrow();
                self.progress(task, READING + (1.0 - READING) * share);
            }
        };
        let (taught, ()) = tokio::join!(self.thread.run(work), follow);
        taught?
    }

    /// Writes down what came of a fit.
    fn finish(&self, task: &Task, outcome: Result<(u64, Report, Vec<String>), FitError>) {
        let set = &task.set;
        if task.cancel.is_cancelled() {
            tracing::info!(set.name = set, "fit cancelled");
            return;
        }
        match &outcome {
            Ok((version, report, _)) => {
                tracing::info!(set.name = set, set.version = version, accuracy = report.accuracy.share, "set fitted");
            }
            Err(error) => tracing::warn!(set.name = set, %error, "fit failed"),
        }
        self.update(task, |run| match outcome {
            Ok((version, report, ids)) => {
                run.status.state = FitState::Done;
                run.status.progress = 1.0;
                run.status.version = Some(version);
                run.status.report = Some(with_ids(&report, &ids));
            }
            Err(error) => {
                run.status.state = FitState::Failed;
                run.status.reason = Some(match error {
                    FitError::Internal(_) => "the server failed; its log says why".to_owned(),
                    error => error.to_string(),
                });
            }
        });
    }
}

/// Why there are no bytes for a fit, in its own words.
fn without_room(task: &Task, error: SetError) -> FitError {
    match error {
        SetError::TooLarge { needed, available, .. } => {
            FitError::TooLarge { images: task.examples.len(), needed, available }
        }
        error => error.into(),
    }
}

/// # Errors
/// [`FitError::UnderWay`] when one runs already.
fn check_free(fits: &VecDeque<Run>) -> Result<(), FitError> {
    match fits.iter().find(|run| run.status.state == FitState::Running) {
        None => Ok(()),
        Some(Run { status, .. }) => {
            Err(FitError::UnderWay { set: status.set.clone(), percent: (status.progress * 100.0) as u32 })
        }
    }
}

/// The report, in which suspects are named by their examples.
fn with_ids(report: &Report, ids: &[String]) -> Value {
    let mut value = json!(report);
    let suspects = report.suspects.iter().map(|suspect| {
        json!({
            "example": ids.get(suspect.image),
            "label": suspect.label,
            "taken_for": suspect.taken_for,
            "score": suspect.score,
        })
    });
    value["suspects"] = suspects.collect();
    value
}

/// Bytes of a background as a file has it.
fn bytes_of(background: &Background) -> usize {
    let covariance = match &background.covariance {
        Covariance::Packed(values) => values.len(),
        Covariance::Diagonal { diagonal, factor } => diagonal.len() + factor.len(),
        Covariance::Background { factor, .. } => factor.len(),
        // No background has it.
        Covariance::Even { .. } => 0,
    };
    (background.mean.len() + covariance) * size_of::<f32>()
}

/// An error without the files that it names, which are none of the client's business.
fn without_places(error: &anyhow::Error) -> String {
    error.root_cause().to_string()
}
