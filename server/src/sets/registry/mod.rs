//! Which expert sets there are, which are in memory, and who may stay.
//!
//! A set is *registered* (known, costing an index entry), *loading*, or *resident* (decoded in memory), and may be
//! *pinned* (resident and never evicted). Requests hold [`Lease`]s: reference-counted snapshots that stay valid
//! whatever happens to the registry meanwhile.
//!
//! The state sits behind one mutex that is never held across blocking work or an `await`. Bytes are reserved in the
//! [`Ledger`] before anything is loaded and come back when the last reference to the memory goes, so what is
//! accounted never falls below what is held.

mod budget;
mod lenders;
mod load;
mod lru;
#[cfg(test)]
mod schedules;
mod scratch;
mod source;
mod sync;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant, SystemTime};

use model_core::artifact::Digest;
use tokio::sync::watch;

pub use budget::{Budget, Kind, Ledger, Reservation};
pub use source::{Loaded, Source};

use crate::metrics::SetMetrics;
use crate::sets::descriptor::{BackboneDescriptor, Location, SetDescriptor, Stamp};
use crate::threads::BlockingPool;
use lenders::Lenders;
use lru::Usage;
use scratch::Scratch;

/// How the registry behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes for everything.
    pub budget_bytes: usize,
    /// Bytes of the budget set aside for queued images.
    pub queue_bytes: usize,
    /// How long a load may wait for others to leave memory.
    pub room_wait: Duration,
    /// How long a set that was loaded and not used yet is safe from eviction. Without it, two sets that do not fit
    /// together could evict each other for ever, each before its first answer.
    pub protect_unused: Duration,
    /// First delay after a failed load; doubles with each further failure.
    pub backoff: Duration,
    /// Longest delay after failed loads.
    pub max_backoff: Duration,
    /// Drop a backbone with its last resident set.
    pub drop_idle_backbones: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            budget_bytes: 64 << 20,
            queue_bytes: 0,
            room_wait: Duration::from_secs(5),
            protect_unused: Duration::from_secs(5),
            backoff: Duration::from_millis(500),
            max_backoff: Duration::from_secs(60),
            drop_idle_backbones: false,
        }
    }
}

/// Why an expert set is not to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetError {
    /// No set, or no version of it, has that name.
    #[error("{}", unknown_message(name, *version))]
    Unknown {
        /// What was asked for.
        name: String,
        /// Which version, when one was asked for.
        version: Option<u64>,
    },
    /// It cannot fit the budget however long one waits.
    #[error("expert set `{name}` needs {needed} bytes, but the memory budget can never give it more than {available}")]
    TooLarge {
        name: String,
        /// Bytes of the set, or of its backbone.
        needed: usize,
        /// The most there can be for it.
        available: usize,
    },
    /// Everything in memory is in use or pinned.
    #[error("there is no room for expert set `{name}`: everything in memory is in use")]
    NoRoom { name: String },
    /// It did not become resident in time.
    #[error("expert set `{name}` is still loading")]
    StillLoading { name: String },
    /// Its file is broken, or its load failed for another reason.
    #[error("expert set `{name}` cannot be loaded: {reason}")]
    Failed {
        name: String,
        reason: String,
        /// When it is tried again.
        retry_after: Duration,
    },
    /// No backbone with the digest it names is registered.
    #[error("expert set `{name}` is bound to backbone {backbone}, which is not here")]
    NoBackbone {
        name: String,
        /// The digest it names.
        backbone: Digest,
    },
    /// The set whose experts it borrows is not registered.
    #[error("expert set `{name}` borrows the experts of set {lender}, which is not here")]
    NoLender {
        name: String,
        /// The digest it names.
        lender: Digest,
    },
    /// It may not borrow from the set that it names.
    #[error("expert set `{name}` cannot borrow the experts of `{lender}`: {reason}")]
    BadLender { name: String, lender: String, reason: String },
    /// The request contradicts the set's state.
    #[error("{0}")]
    Conflict(String),
}

fn unknown_message(name: &str, version: Option<u64>) -> String {
    let shown: String = name.chars().take(64).collect();
    match version {
        Some(version) => format!("there is no version {version} of an expert set `{shown}`"),
        None => format!("there is no expert set `{shown}`"),
    }
}

/// A backbone in memory. Its bytes come back when the last set or lease lets go of it.
pub struct ResidentBackbone<S: Source> {
    pub value: Arc<S::Backbone>,
    // Fields drop in order: the reservations after the memory they stand for.
    memory: Reservation,
    scratch: Scratch,
}

impl<S: Source> ResidentBackbone<S> {
    /// What comes back when it goes.
    fn bytes(&self) -> usize {
        self.memory.bytes() + self.scratch.bytes()
    }
}

/// A set's hold on its backbone and on the scratch that it makes the backbone need.
pub struct BackboneUse<S: Source> {
    backbone: Arc<ResidentBackbone<S>>,
    /// Bytes of scratch beside what every set needs.
    growth: usize,
}

impl<S: Source> std::ops::Deref for BackboneUse<S> {
    type Target = Arc<ResidentBackbone<S>>;

    fn deref(&self) -> &Arc<ResidentBackbone<S>> {
        &self.backbone
    }
}

impl<S: Source> Drop for BackboneUse<S> {
    fn drop(&mut self) {
        if self.backbone.scratch.forget(self.growth) {
            S::shrink_scratch(&self.backbone.value);
            self.backbone.scratch.trim();
        }
    }
}

/// An expert set in memory.
pub struct Resident<S: Source> {
    pub value: S::Set,
    pub descriptor: Arc<SetDescriptor>,
    /// What it runs on.
    pub backbone: BackboneUse<S>,
    /// The set whose experts it borrows: they stay in memory as long as it does.
    lender: Option<Lease<S>>,
    served: AtomicBool,
    memory: Reservation,
}

/// A snapshot of a resident set: neither eviction nor replacement takes it away from its holder.
pub struct Lease<S: Source> {
    /// `None` only while being dropped.
    resident: Option<Arc<Resident<S>>>,
    ledger: Arc<Ledger>,
}

impl<S: Source> Lease<S> {
    /// Says that a batch ran on this set, which ends the protection of the newly loaded.
    pub fn mark_served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }
}

impl<S: Source> Clone for Lease<S> {
    fn clone(&self) -> Self {
        Self { resident: self.resident.clone(), ledger: Arc::clone(&self.ledger) }
    }
}

impl<S: Source> std::ops::Deref for Lease<S> {
    type Target = Resident<S>;

    fn deref(&self) -> &Self::Target {
        self.resident.as_deref().expect("taken only by drop")
    }
}

impl<S: Source> Drop for Lease<S> {
    fn drop(&mut self) {
        drop(self.resident.take());
        // The set may have become evictable.
        self.ledger.wake();
    }
}

type Outcome<S> = Result<Lease<S>, SetError>;
type LoadWatch<S> = watch::Receiver<Option<Outcome<S>>>;

/// The last load failed.
#[derive(Debug, Clone)]
struct Failure {
    reason: String,
    count: u32,
    retry_at: Instant,
    /// The file that failed; another one may be tried at once.
    stamp: Option<Stamp>,
}

/// One version of a set.
struct Slot<S: Source> {
    descriptor: Arc<SetDescriptor>,
    resident: Option<Arc<Resident<S>>>,
    /// What left the registry while leases or borrowers held it: as long as they do, it is not loaded a second time.
    alive: Weak<Resident<S>>,
    usage: Usage,
    protected_until: Instant,
    loading: Option<LoadWatch<S>>,
    /// Tells the load in progress whether its result is still wanted.
    load_id: u64,
    /// The file as the latest load found it; `None` when it could not even be looked at.
    tried: Option<Stamp>,
    failure: Option<Failure>,
    hits: u64,
    last_used: Option<SystemTime>,
}

impl<S: Source> Slot<S> {
    fn new(descriptor: Arc<SetDescriptor>) -> Self {
        Self {
            descriptor,
            resident: None,
            alive: Weak::new(),
            usage: Usage::first(0),
            protected_until: Instant::now(),
            loading: None,
            load_id: 0,
            tried: None,
            failure: None,
            hits: 0,
            last_used: None,
        }
    }

    /// Whether the registry and so many borrowers hold the only references, so that dropping those frees memory now.
    fn is_idle(&self, borrowers: usize, now: Instant) -> bool {
        self.loading.is_none()
            && self.resident.as_ref().is_some_and(|resident| {
                Arc::strong_count(resident) == 1 + borrowers
                    && (now >= self.protected_until || resident.served.load(Ordering::Relaxed))
            })
    }

    /// What is resident, out of the registry.
    fn take(&mut self) -> Option<Arc<Resident<S>>> {
        let resident = self.resident.take()?;
        self.alive = if Arc::strong_count(&resident) > 1 { Arc::downgrade(&resident) } else { Weak::new() };
        Some(resident)
    }

    /// Whether what the descriptor describes is in memory; what left the registry and is still held returns to it.
    fn revive(&mut self) -> bool {
        if self.resident.is_none() {
            self.resident = self.alive.upgrade().filter(|resident| resident.is_current(&self.descriptor));
        }
        self.resident.is_some()
    }
}

/// All versions under one name.
struct Name<S: Source> {
    versions: BTreeMap<u64, Slot<S>>,
    pinned: bool,
    /// Unloaded by hand: not ready until used or loaded again.
    unloaded: bool,
    /// The newest version that requests without a version were given: they are never given an older one again, since
    /// a client that saw a new model answer must not see the old one return.
    serving: Option<u64>,
}

impl<S: Source> Default for Name<S> {
    fn default() -> Self {
        Self { versions: BTreeMap::new(), pinned: false, unloaded: false, serving: None }
    }
}

struct BackboneSlot<S: Source> {
    descriptor: Arc<BackboneDescriptor>,
    /// Keeps it resident without any set; stays empty when idle backbones are dropped.
    keep: Option<Arc<ResidentBackbone<S>>>,
    resident: Weak<ResidentBackbone<S>>,
    /// Single flight for its loads.
    load: Arc<tokio::sync::Mutex<()>>,
}

struct State<S: Source> {
    names: BTreeMap<String, Name<S>>,
    backbones: HashMap<Digest, BackboneSlot<S>>,
    lenders: Lenders,
    tick: u64,
    load_ids: u64,
}

impl<S: Source> State<S> {
    fn slot_mut(&mut self, key: &Key) -> Option<&mut Slot<S>> {
        self.names.get_mut(&key.name)?.versions.get_mut(&key.version)
    }

    fn slots(&self) -> impl Iterator<Item = (&String, &Name<S>, &Slot<S>)> {
        self.names.iter().flat_map(|(key, name)| name.versions.values().map(move |slot| (key, name, slot)))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Key {
    name: String,
    version: u64,
}

impl Key {
    fn of(set: &SetDescriptor) -> Self {
        Self { name: set.name.clone(), version: set.version }
    }
}

struct Inner<S: Source> {
    source: S,
    settings: Settings,
    ledger: Arc<Ledger>,
    state: Mutex<State<S>>,
    loader: BlockingPool,
    metrics: SetMetrics,
    _queue: Reservation,
}

impl<S: Source> Inner<S> {
    fn lock(&self) -> MutexGuard<'_, State<S>> {
        sync::lock(&self.state)
    }

    fn lease(&self, resident: &Arc<Resident<S>>) -> Lease<S> {
        Lease { resident: Some(Arc::clone(resident)), ledger: Arc::clone(&self.ledger) }
    }
}

/// What a set is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SetState {
    /// Known, not in memory.
    Registered,
    /// On its way into memory.
    Loading,
    Resident,
}

/// One version of a set, for listings.
#[derive(Debug, Clone)]
pub struct SetStatus {
    pub descriptor: Arc<SetDescriptor>,
    /// Name of its backbone.
    pub backbone_name: String,
    /// Generation of the set whose experts it borrows.
    pub base: Option<String>,
    /// What it is doing.
    pub state: SetState,
    /// Never evicted.
    pub pinned: bool,
    /// Whether it is the version that answers requests without a version.
    pub current: bool,
    /// Whether a request would be answered: resident, or loadable as far as is known.
    pub ready: bool,
    /// Bytes it takes now; 0 unless resident.
    pub resident_bytes: usize,
    /// Generation in memory; differs from the descriptor's while a changed file is loading.
    pub resident_generation: Option<String>,
    pub hits: u64,
    /// When it last served one.
    pub last_used: Option<SystemTime>,
    /// Why its last load failed, or why it is not ready.
    pub reason: Option<String>,
}

/// Counts over all sets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub registered: usize,
    pub resident: usize,
    pub pinned: usize,
    /// Versions whose last load failed.
    pub failed: usize,
}

/// Facts about a set that its last use does not change.
#[derive(Debug, Clone)]
pub struct Target {
    /// The version a request would get.
    pub set: Arc<SetDescriptor>,
    pub backbone: Arc<BackboneDescriptor>,
}

/// The registry; clones share it.
pub struct Registry<S: Source> {
    inner: Arc<Inner<S>>,
}

impl<S: Source> Clone for Registry<S> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<S: Source> Registry<S> {
    /// An empty registry whose loads run on the threads of `loader`.
    ///
    /// # Errors
    /// [`SetError::TooLarge`] when the budget does not even hold the queue.
    pub fn new(source: S, settings: Settings, loader: BlockingPool, metrics: SetMetrics) -> Result<Self, SetError> {
        let ledger = Ledger::new(settings.budget_bytes);
        let queue = ledger.try_reserve(Kind::Queue, settings.queue_bytes).ok_or_else(|| SetError::TooLarge {
            name: "(queue)".into(),
            needed: settings.queue_bytes,
            available: settings.budget_bytes,
        })?;
        let state = State {
            names: BTreeMap::new(),
            backbones: HashMap::new(),
            lenders: Lenders::default(),
            tick: 0,
            load_ids: 0,
        };
        let inner = Inner { source, settings, ledger, state: Mutex::new(state), loader, metrics, _queue: queue };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub fn source(&self) -> &S {
        &self.inner.source
    }

    /// The budget as it stands.
    pub fn budget(&self) -> Budget {
        self.inner.ledger.snapshot()
    }

    /// Makes a backbone known; one already known by that digest stays.
    pub fn register_backbone(&self, descriptor: BackboneDescriptor) {
        let slot =
            BackboneSlot { descriptor: Arc::new(descriptor), keep: None, resident: Weak::new(), load: Arc::default() };
        self.inner.lock().backbones.entry(slot.descriptor.digest).or_insert(slot);
    }

    /// Makes a version of a set known. Another file under a known name and version replaces it: what is resident goes
    /// on serving until the new one is loaded.
    ///
    /// # Errors
    /// Those of [`Registry::check_place`].
    pub fn register(&self, descriptor: SetDescriptor) -> Result<(), SetError> {
        let mut state = self.inner.lock();
        state.check_place(&descriptor)?;
        let descriptor = Arc::new(descriptor);
        let key = Key::of(&descriptor);
        let old = state.slot_mut(&key).map(|slot| Arc::clone(&slot.descriptor));
        state.lenders.replace(old.as_deref(), &descriptor);
        let name = state.names.entry(descriptor.name.clone()).or_default();
        let slot = name.versions.entry(descriptor.version).or_insert_with(|| Slot::new(Arc::clone(&descriptor)));
        if slot.descriptor.digest != descriptor.digest || slot.descriptor.stamp != descriptor.stamp {
            slot.failure = None;
            // A load of the old file may be under way; its result is no longer the answer for new requests.
            slot.loading = None;
            slot.load_id = 0;
        }
        slot.descriptor = descriptor;
        Ok(())
    }

    /// Whether a set may take its place among the others.
    ///
    /// # Errors
    /// [`SetError::NoBackbone`] or [`SetError::NoLender`] when what it needs is not registered, [`SetError::BadLender`]
    /// when it may not borrow from the set that it names, and [`SetError::Conflict`] when it replaces a set whose experts
    /// others borrow.
    pub fn check_place(&self, descriptor: &SetDescriptor) -> Result<(), SetError> {
        self.inner.lock().check_place(descriptor)
    }

    /// The set of that digest, if it is registered and has experts of its own.
    pub fn lender(&self, digest: &Digest) -> Option<Arc<SetDescriptor>> {
        self.inner.lock().lender(digest).map(|(_, slot)| Arc::clone(&slot.descriptor))
    }

    /// Sets on a backbone that can lend their experts: of each name the newest version that has experts of its own.
    pub fn lending(&self, backbone: &Digest) -> Vec<Arc<SetDescriptor>> {
        let state = self.inner.lock();
        let newest = state.names.values().filter_map(|name| {
            let mut versions = name.versions.values().rev().map(|slot| &slot.descriptor);
            versions.find(|set| set.backbone == *backbone && set.lender.is_none())
        });
        newest.map(Arc::clone).collect()
    }

    /// Whether a set could ever be resident, with nothing beside it but its backbone, its lender and the queue.
    ///
    /// # Errors
    /// [`SetError::TooLarge`], or [`SetError::NoBackbone`] when its backbone is not registered.
    pub fn check_fits(&self, descriptor: &SetDescriptor) -> Result<(), SetError> {
        let name = || descriptor.name.clone();
        let state = self.inner.lock();
        let slot = state.backbones.get(&descriptor.backbone);
        let slot = slot.ok_or_else(|| SetError::NoBackbone { name: name(), backbone: descriptor.backbone })?;
        // The scratch that every set needs shows only once the backbone is resident.
        let resident = slot.resident.upgrade().map(|resident| resident.memory.bytes() + resident.scratch.base());
        let lender = descriptor.lender.and_then(|digest| state.lender(&digest));
        let borrowed = lender.map_or(0, |(_, lender)| lender.descriptor.resident_bytes);
        let budget = self.inner.ledger.snapshot();
        let fixed = budget.used(Kind::Queue) + resident.unwrap_or(slot.descriptor.resident_bytes) + borrowed;
        let available = budget.limit().saturating_sub(fixed);
        let growth = self.inner.source.scratch_growth(descriptor, &slot.descriptor);
        // The scratch grows when the load is over.
        let beside = descriptor.loading_bytes.max(growth);
        let needed = descriptor.resident_bytes.saturating_add(beside);
        if needed > available { Err(SetError::TooLarge { name: name(), needed, available }) } else { Ok(()) }
    }

    /// Bytes of the budget for reading a set's file as a whole; they come back when the result is dropped.
    pub async fn reserve_reading(&self, descriptor: &SetDescriptor) -> Result<Reservation, SetError> {
        self.inner.reserve_reading(descriptor).await
    }

    /// Bytes of the budget for work beside a backbone, on behalf of the set `name`, which need not be registered.
    pub async fn reserve_beside(&self, backbone: &Digest, name: &str, bytes: usize) -> Result<Reservation, SetError> {
        self.inner.reserve_beside(backbone, name, bytes).await
    }

    /// A backbone, loaded when it is not resident, on behalf of the set `name`, which need not be registered. It stays in
    /// memory as long as the result.
    pub async fn hold_backbone(&self, digest: &Digest, name: &str) -> Result<Arc<ResidentBackbone<S>>, SetError> {
        self.inner.hold_backbone(digest, name).await
    }

    /// Which set and version a request for `name` would get; touches neither memory nor order.
    ///
    /// # Errors
    /// [`SetError::Unknown`] when no such set is registered.
    pub fn lookup(&self, name: &str, version: Option<u64>) -> Result<Target, SetError> {
        let state = self.inner.lock();
        let slot = state
            .names
            .get(name)
            .and_then(|entry| match version {
                Some(version) => entry.versions.get(&version),
                None => entry.current().and_then(|current| entry.versions.get(&current)),
            })
            .ok_or_else(|| unknown(name, version))?;
        let set = Arc::clone(&slot.descriptor);
        let backbone = state.backbones.get(&set.backbone).map(|slot| Arc::clone(&slot.descriptor));
        let backbone =
            backbone.ok_or_else(|| SetError::NoBackbone { name: name.to_owned(), backbone: set.backbone })?;
        Ok(Target { set, backbone })
    }

    /// A lease on the set, loading it first when it is not resident; waits at most `wait`.
    ///
    /// While a newer version loads, an older resident one answers.
    pub async fn acquire(&self, name: &str, version: Option<u64>, wait: Duration) -> Result<Lease<S>, SetError> {
        self.clear_failure_of_changed_file(name, version).await;
        let watch = {
            let mut state = self.inner.lock();
            state.tick += 1;
            let tick = state.tick;
            let entry = state.names.get_mut(name).ok_or_else(|| unknown(name, version))?;
            entry.unloaded = false;
            let wanted = version.or_else(|| entry.newest_usable()).ok_or_else(|| unknown(name, version))?;
            let slot = entry.versions.get_mut(&wanted).ok_or_else(|| unknown(name, version))?;
            let key = Key { name: name.to_owned(), version: wanted };
            if slot.revive() {
                let lease = self.inner.use_slot(slot, tick);
                if version.is_none() {
                    entry.serving = entry.serving.max(Some(wanted));
                }
                return Ok(lease);
            }
            slot.check_backoff(name)?;
            let watch = self.inner.start_load(&mut state, &key)?;
            // No request waits for a replacement while the old version can answer.
            if let Some(old) = state.older_resident(&key).filter(|_| version.is_none()) {
                return Ok(self.inner.use_slot(old, tick));
            }
            self.inner.metrics.misses.inc();
            if let Some(slot) = state.slot_mut(&key) {
                slot.hits += 1;
                slot.last_used = Some(SystemTime::now());
            }
            watch
        };
        wait_for(watch, name, wait).await
    }

    /// Loads the newest version (or the given one), also when it is known to have failed, and waits for the outcome.
    /// A resident version whose file is unchanged stays as it is.
    pub async fn load(&self, name: &str, version: Option<u64>, wait: Duration) -> Result<Lease<S>, SetError> {
        let watch = {
            let mut state = self.inner.lock();
            let entry = state.names.get_mut(name).ok_or_else(|| unknown(name, version))?;
            entry.unloaded = false;
            let wanted = version.or_else(|| entry.versions.keys().next_back().copied());
            let wanted = wanted.ok_or_else(|| unknown(name, version))?;
            let slot = entry.versions.get_mut(&wanted).ok_or_else(|| unknown(name, version))?;
            slot.revive();
            if let Some(resident) = slot.resident.as_ref().filter(|resident| resident.is_current(&slot.descriptor)) {
                return Ok(self.inner.lease(resident));
            }
            self.inner.start_load(&mut state, &Key { name: name.to_owned(), version: wanted })?
        };
        wait_for(watch, name, wait).await
    }

    /// Drops a set from memory; it stays registered and loads again when used.
    ///
    /// # Errors
    /// [`SetError::Unknown`]; [`SetError::Conflict`] when it is pinned.
    pub fn unload(&self, name: &str) -> Result<(), SetError> {
        let mut state = self.inner.lock();
        let entry = state.names.get_mut(name).ok_or_else(|| unknown(name, None))?;
        if entry.pinned {
            return Err(SetError::Conflict(format!("expert set `{name}` is pinned; unpin it first")));
        }
        entry.unloaded = true;
        let dropped: Vec<_> = entry.versions.values_mut().filter_map(Slot::take).collect();
        drop(state);
        self.inner.count_evictions("unload", &dropped);
        Ok(())
    }

    /// Forgets a version, or all of them. Leases go on; bytes come back with the last.
    ///
    /// # Errors
    /// [`SetError::Unknown`]; [`SetError::Conflict`] when it is pinned, or other sets borrow its experts.
    pub fn remove(&self, name: &str, version: Option<u64>) -> Result<Vec<Arc<SetDescriptor>>, SetError> {
        let mut state = self.inner.lock();
        let versions = state.names.get(name).into_iter().flat_map(|entry| entry.versions.values());
        let leaving = versions.map(|slot| &*slot.descriptor).filter(|set| version.is_none_or(|v| v == set.version));
        state.lenders.check_leave(&leaving.collect::<Vec<_>>())?;
        let entry = state.names.get_mut(name).ok_or_else(|| unknown(name, version))?;
        let last = version.is_none_or(|version| entry.versions.keys().all(|&v| v == version));
        if entry.pinned && (last || version == entry.serving) {
            return Err(SetError::Conflict(format!("expert set `{name}` is pinned; unpin it first")));
        }
        let gone: Vec<Slot<S>> = match version {
            Some(version) => entry.versions.remove(&version).into_iter().collect(),
            None => std::mem::take(&mut entry.versions).into_values().collect(),
        };
        if gone.is_empty() {
            return Err(unknown(name, version));
        }
        if entry.versions.is_empty() {
            state.names.remove(name);
        } else if version == entry.serving {
            entry.serving = None;
        }
        gone.iter().for_each(|slot| state.lenders.forget(&slot.descriptor));
        drop(state);
        let dropped: Vec<_> = gone.iter().filter_map(|slot| slot.resident.clone()).collect();
        self.inner.count_evictions("delete", &dropped);
        Ok(gone.into_iter().map(|slot| slot.descriptor).collect())
    }

    /// Loads a set and never evicts it from then on.
    pub async fn pin(&self, name: &str, wait: Duration) -> Result<(), SetError> {
        // The lease keeps it from being evicted between its load and its pin.
        let _lease = self.load(name, None, wait).await?;
        self.inner.lock().names.get_mut(name).ok_or_else(|| unknown(name, None))?.pinned = true;
        Ok(())
    }

    /// Allows a set to be evicted again.
    ///
    /// # Errors
    /// [`SetError::Unknown`] when no such set is registered.
    pub fn unpin(&self, name: &str) -> Result<(), SetError> {
        self.inner.lock().names.get_mut(name).ok_or_else(|| unknown(name, None))?.pinned = false;
        self.inner.ledger.wake();
        Ok(())
    }

    /// Every version of every set, by name and version.
    pub fn list(&self) -> Vec<SetStatus> {
        let state = self.inner.lock();
        state.slots().map(|(_, name, slot)| state.status(name, slot)).collect()
    }

    /// Every version of one set.
    ///
    /// # Errors
    /// [`SetError::Unknown`] when no such set is registered.
    pub fn status(&self, name: &str) -> Result<Vec<SetStatus>, SetError> {
        let state = self.inner.lock();
        let entry = state.names.get(name).ok_or_else(|| unknown(name, None))?;
        Ok(entry.versions.values().map(|slot| state.status(entry, slot)).collect())
    }

    /// Counts for the metrics.
    pub fn totals(&self) -> Totals {
        let state = self.inner.lock();
        Totals {
            registered: state.names.len(),
            resident: state.slots().filter(|(_, _, slot)| slot.resident.is_some()).count(),
            pinned: state.names.values().filter(|name| name.pinned).count(),
            failed: state.slots().filter(|(_, _, slot)| slot.failure.is_some()).count(),
        }
    }

    /// The highest version of a set, if it is registered.
    pub fn highest_version(&self, name: &str) -> Option<u64> {
        self.inner.lock().names.get(name)?.versions.keys().next_back().copied()
    }

    pub fn names(&self) -> HashSet<String> {
        self.inner.lock().names.keys().cloned().collect()
    }

    /// The backbone of that digest, when known.
    pub fn backbone(&self, digest: &Digest) -> Option<Arc<BackboneDescriptor>> {
        self.inner.lock().backbones.get(digest).map(|slot| Arc::clone(&slot.descriptor))
    }

    /// All backbones that are known.
    pub fn backbones(&self) -> Vec<Arc<BackboneDescriptor>> {
        self.inner.lock().backbones.values().map(|slot| Arc::clone(&slot.descriptor)).collect()
    }

    /// A failed load is remembered for a while, but another file under the same name deserves another try at once.
    async fn clear_failure_of_changed_file(&self, name: &str, version: Option<u64>) {
        let failed: Vec<(Key, Location, Option<Stamp>)> = {
            let state = self.inner.lock();
            let Some(entry) = state.names.get(name) else { return };
            let failed = |slot: &Slot<S>| {
                let failure = slot.failure.as_ref().filter(|failure| failure.retry_at > Instant::now())?;
                let key = Key { name: name.to_owned(), version: slot.descriptor.version };
                Some((key, slot.descriptor.location.clone(), failure.stamp))
            };
            let wanted = entry.versions.iter().filter(|(v, _)| version.is_none_or(|version| version == **v));
            wanted.filter_map(|(_, slot)| failed(slot)).collect()
        };
        for (key, location, old) in failed {
            let now = sync::run_blocking(&self.inner.loader, move || location.stamp().ok()).await.unwrap_or(old);
            if now != old
                && let Some(slot) = self.inner.lock().slot_mut(&key)
            {
                slot.failure = None;
            }
        }
    }
}

impl<S: Source> Resident<S> {
    /// The set whose experts it borrows, if it does.
    fn lender(&self) -> Option<&Arc<Self>> {
        self.lender.as_ref()?.resident.as_ref()
    }

    /// Whether this is what the descriptor describes.
    fn is_current(&self, descriptor: &SetDescriptor) -> bool {
        self.descriptor.digest == descriptor.digest && self.descriptor.stamp == descriptor.stamp
    }
}

impl<S: Source> Slot<S> {
    fn check_backoff(&self, name: &str) -> Result<(), SetError> {
        match &self.failure {
            Some(failure) if failure.retry_at > Instant::now() => Err(SetError::Failed {
                name: name.to_owned(),
                reason: failure.reason.clone(),
                retry_after: failure.retry_at.saturating_duration_since(Instant::now()),
            }),
            _ => Ok(()),
        }
    }
}

impl<S: Source> Name<S> {
    /// The versions that may answer a request without a version.
    fn candidates(&self) -> impl DoubleEndedIterator<Item = (&u64, &Slot<S>)> {
        self.versions.range(self.serving.unwrap_or(0)..)
    }

    /// The newest version that has not failed lately, or the newest of all.
    fn newest_usable(&self) -> Option<u64> {
        let now = Instant::now();
        let backing_off = |slot: &Slot<S>| {
            slot.resident.is_none() && slot.failure.as_ref().is_some_and(|failure| failure.retry_at > now)
        };
        let usable = self.candidates().rev().find(|(_, slot)| !backing_off(slot));
        usable.or_else(|| self.versions.iter().next_back()).map(|(&version, _)| version)
    }

    /// The version that answers a request without a version now.
    fn current(&self) -> Option<u64> {
        let resident = self.candidates().rev().find(|(_, slot)| slot.resident.is_some());
        resident.map(|(&version, _)| version).or_else(|| self.newest_usable())
    }
}

impl<S: Source> State<S> {
    /// The newest resident version below `key`'s that may still answer: what `key` replaces.
    fn older_resident(&mut self, key: &Key) -> Option<&mut Slot<S>> {
        let name = self.names.get_mut(&key.name)?;
        let oldest = name.serving.unwrap_or(0).min(key.version);
        name.versions.range_mut(oldest..key.version).rev().map(|(_, slot)| slot).find(|slot| slot.resident.is_some())
    }

    fn status(&self, name: &Name<S>, slot: &Slot<S>) -> SetStatus {
        let state = match (&slot.resident, &slot.loading) {
            (Some(_), _) => SetState::Resident,
            (None, Some(_)) => SetState::Loading,
            (None, None) => SetState::Registered,
        };
        let backbone = self.backbones.get(&slot.descriptor.backbone);
        let failure = slot.failure.as_ref().map(|failure| failure.reason.clone());
        let resident = slot.resident.as_ref();
        SetStatus {
            backbone_name: backbone.map(|slot| slot.descriptor.name.clone()).unwrap_or_default(),
            base: slot.descriptor.lender.map(|lender| match self.lender(&lender) {
                Some((_, lender)) => lender.descriptor.generation(),
                None => lender.to_string(),
            }),
            state,
            pinned: name.pinned,
            current: name.current() == Some(slot.descriptor.version),
            ready: resident.is_some() || (failure.is_none() && !name.unloaded && slot.loading.is_none()),
            resident_bytes: resident.map_or(0, |resident| resident.memory.bytes()),
            resident_generation: resident.map(|resident| resident.descriptor.generation()),
            hits: slot.hits,
            last_used: slot.last_used,
            reason: failure.or_else(|| name.unloaded.then(|| "unloaded".to_owned())),
            descriptor: Arc::clone(&slot.descriptor),
        }
    }
}

fn unknown(name: &str, version: Option<u64>) -> SetError {
    SetError::Unknown { name: name.to_owned(), version }
}

/// The outcome of a load, for every request that waits for it.
async fn wait_for<S: Source>(mut watch: LoadWatch<S>, name: &str, wait: Duration) -> Outcome<S> {
    let done = sync::wait_at_most(wait, watch.wait_for(Option::is_some)).await;
    let name = || name.to_owned();
    match done {
        Some(Ok(outcome)) => match &*outcome {
            Some(outcome) => outcome.clone(),
            None => Err(SetError::StillLoading { name: name() }),
        },
        // The loading task ended without an outcome: it panicked.
        Some(Err(_)) => Err(SetError::Failed {
            name: name(),
            reason: "its load was abandoned".into(),
            retry_after: Duration::from_secs(1),
        }),
        None => Err(SetError::StillLoading { name: name() }),
    }
}
