//! From a file to a resident set: describe, find the backbone, reserve, read, commit. One task per load, however many
//! requests wait for it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use model_core::artifact::Digest;
use tokio::sync::watch;

use super::lru::{self, Usage};
use super::{
    BackboneUse, Failure, Inner, Key, Kind, Lease, LoadWatch, Loaded, Reservation, Resident, ResidentBackbone, Scratch,
    SetError, Slot, Source, State, sync, unknown,
};
use crate::sentence::sentence;
use crate::sets::descriptor::SetDescriptor;
use crate::threads::Panicked;

/// A load that waits for room looks again this often: protection from eviction ends with time, and that wakes no thread.
const ROOM_POLL: Duration = Duration::from_millis(20);

/// A version that nobody has yet: what answers meanwhile is not evicted for it.
fn next_version_of(name: &str) -> Key {
    Key { name: name.to_owned(), version: u64::MAX }
}

/// Bytes that a load needs.
struct Want<'a, S: Source> {
    kind: Kind,
    bytes: usize,
    /// Bytes that the same load holds already and keeps while it waits for these.
    held: usize,
    /// What is loaded, and the backbone it runs on.
    key: &'a Key,
    backbone: &'a Digest,
    /// The set whose experts it borrows.
    lender: Option<&'a Arc<Resident<S>>>,
    /// When to give up waiting.
    deadline: Instant,
}

/// What making room came to.
enum Room<S: Source> {
    /// These left the registry; dropping them frees enough, unless someone else takes it first.
    Evicted(Vec<Arc<Resident<S>>>, Vec<Arc<ResidentBackbone<S>>>),
    /// Too much is in use right now.
    Busy,
    /// It can never fit; this is the most there can be.
    Never(usize),
}

impl<S: Source> Inner<S> {
    /// A lease on a resident slot, counted as a use.
    pub(super) fn use_slot(&self, slot: &mut Slot<S>, tick: u64) -> Lease<S> {
        slot.usage.touch(tick);
        slot.hits += 1;
        slot.last_used = Some(SystemTime::now());
        self.metrics.hits.inc();
        let resident = slot.resident.as_ref().expect("callers checked that the slot is resident");
        self.lease(resident)
    }

    /// Joins the load of `key`, or starts it. Must run inside a tokio runtime.
    pub(super) fn start_load(self: &Arc<Self>, state: &mut State<S>, key: &Key) -> Result<LoadWatch<S>, SetError> {
        state.load_ids += 1;
        let load_id = state.load_ids;
        let slot = state.slot_mut(key).ok_or_else(|| unknown(&key.name, Some(key.version)))?;
        if let Some(watch) = &slot.loading {
            return Ok(watch.clone());
        }
        let (sender, receiver) = watch::channel(None);
        slot.loading = Some(receiver.clone());
        slot.load_id = load_id;
        let guard = LoadGuard { inner: Arc::clone(self), key: key.clone(), load_id };
        sync::spawn(async move {
            let started = Instant::now();
            let outcome = guard.inner.load_set(&guard.key, load_id).await;
            let metrics = &guard.inner.metrics;
            metrics.loads.with_label_values(&[if outcome.is_ok() { "ok" } else { "error" }]).inc();
            metrics.load_duration.observe(started.elapsed().as_secs_f64());
            let outcome = guard.inner.finish_load(&guard.key, load_id, outcome);
            // Without receivers everyone who waited has gone; the outcome is in the registry all the same.
            let _ = sender.send(Some(outcome));
        });
        Ok(receiver)
    }

    async fn load_set(self: &Arc<Self>, key: &Key, load_id: u64) -> Result<Resident<S>, SetError> {
        let descriptor = self.current_descriptor(key, load_id).await?;
        let deadline = Instant::now() + self.settings.room_wait;
        let backbone = self.acquire_backbone(key, &descriptor.backbone, deadline).await?;
        // Before bytes are reserved: a load that holds some never waits for another load.
        let lender = match &descriptor.lender {
            Some(digest) => Some(self.acquire_lender(key, digest).await?),
            None => None,
        };
        let lent = lender.as_ref().and_then(|lender| lender.resident.as_ref());
        // What stays and what the load takes beside that at once: two loads, each with one of the two, could wait for ever.
        let bytes = descriptor.resident_bytes.saturating_add(descriptor.loading_bytes);
        let want =
            Want { kind: Kind::Loading, bytes, held: 0, key, backbone: &descriptor.backbone, lender: lent, deadline };
        let mut memory = self.reserve(&want).await?;
        let (inner, source_descriptor, source_backbone, source_lender) =
            (Arc::clone(self), Arc::clone(&descriptor), Arc::clone(&backbone.value), lent.cloned());
        let load = move || {
            let lender = source_lender.as_deref().map(|lender| &lender.value);
            inner.source.load_set(&source_descriptor, &source_backbone, lender)
        };
        let loaded = sync::run_blocking(&self.loader, load).await;
        let Loaded { value, bytes } = flatten(loaded).map_err(|reason| self.failed(key, reason))?;
        self.settle(&mut memory, (Kind::Sets, bytes), key)?;
        let backbone = self.use_backbone(backbone, &descriptor, &Want { held: memory.bytes(), ..want }).await?;
        Ok(Resident { value, descriptor, backbone, lender, served: false.into(), memory })
    }

    /// The set whose experts are borrowed; the first load that needs it loads it.
    async fn acquire_lender(self: &Arc<Self>, key: &Key, digest: &Digest) -> Result<Lease<S>, SetError> {
        let missing = || SetError::NoLender { name: key.name.clone(), lender: *digest };
        let mut watch = {
            let mut state = self.lock();
            let lender = state.lender(digest).map(|(lender, _)| lender.clone()).ok_or_else(missing)?;
            let slot = state.slot_mut(&lender).ok_or_else(missing)?;
            slot.revive();
            // While a changed file loads, what is resident may still be the set of that digest.
            if let Some(resident) = slot.resident.as_ref().filter(|resident| resident.descriptor.digest == *digest) {
                return Ok(self.lease(resident));
            }
            self.start_load(&mut state, &lender)?
        };
        let outcome = watch.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        let lease = outcome.unwrap_or_else(|| Err(self.failed(key, "the load of its lender was abandoned".into())));
        match lease {
            Ok(lease) if lease.descriptor.digest == *digest => Ok(lease),
            Ok(_) => Err(missing()),
            Err(SetError::Failed { name, reason, retry_after }) => {
                let reason = format!("the experts that it borrows are those of `{name}`, which failed: {reason}");
                Err(SetError::Failed { name: key.name.clone(), reason, retry_after })
            }
            Err(error) => Err(error),
        }
    }

    /// A hold on `backbone` with the scratch that a set needs.
    async fn use_backbone(
        &self,
        backbone: Arc<ResidentBackbone<S>>,
        set: &SetDescriptor,
        want: &Want<'_, S>,
    ) -> Result<BackboneUse<S>, SetError> {
        let known = self.lock().backbones.get(&set.backbone).map(|slot| Arc::clone(&slot.descriptor));
        let known = known.ok_or_else(|| SetError::NoBackbone { name: set.name.clone(), backbone: set.backbone })?;
        let growth = self.source.scratch_growth(set, &known);
        let mut reserved = None;
        while let Err(bytes) = backbone.scratch.grow(growth, reserved.take()) {
            match self.reserve(&Want { kind: Kind::Scratch, bytes, ..*want }).await {
                Ok(reservation) => reserved = Some(reservation),
                Err(error) => {
                    backbone.scratch.trim();
                    return Err(error);
                }
            }
        }
        Ok(BackboneUse { backbone, growth })
    }

    /// The descriptor, read again when the file changed since.
    async fn current_descriptor(self: &Arc<Self>, key: &Key, load_id: u64) -> Result<Arc<SetDescriptor>, SetError> {
        let known = {
            let mut state = self.lock();
            let slot = state.slot_mut(key).ok_or_else(|| unknown(&key.name, Some(key.version)))?;
            Arc::clone(&slot.descriptor)
        };
        let location = known.location.clone();
        let stamp = move || location.stamp().with_context(|| location.to_string());
        let stamp = sync::run_blocking(&self.loader, stamp).await;
        let stamp = flatten(stamp);
        if let Some(slot) = self.lock().slot_mut(key).filter(|slot| slot.load_id == load_id) {
            slot.tried = stamp.as_ref().ok().copied();
        }
        if stamp.map_err(|reason| self.failed(key, reason))? == known.stamp {
            return Ok(known);
        }
        let inner = Arc::clone(self);
        let describe = move || inner.source.describe_set(&known.name, known.version, &known.location);
        let fresh =
            flatten(sync::run_blocking(&self.loader, describe).await).map_err(|reason| self.failed(key, reason))?;
        let fresh = Arc::new(fresh);
        let mut state = self.lock();
        state.check_place(&fresh)?;
        if let Some(slot) = state.slot_mut(key).filter(|slot| slot.load_id == load_id) {
            let old = std::mem::replace(&mut slot.descriptor, Arc::clone(&fresh));
            state.lenders.replace(Some(&old), &fresh);
        }
        Ok(fresh)
    }

    /// The backbone; the first load that needs it reads it.
    async fn acquire_backbone(
        self: &Arc<Self>,
        key: &Key,
        digest: &Digest,
        deadline: Instant,
    ) -> Result<Arc<ResidentBackbone<S>>, SetError> {
        let missing = || SetError::NoBackbone { name: key.name.clone(), backbone: *digest };
        let single_flight = {
            let state = self.lock();
            let slot = state.backbones.get(digest).ok_or_else(missing)?;
            if let Some(resident) = slot.resident.upgrade() {
                return Ok(resident);
            }
            Arc::clone(&slot.load)
        };
        let _turn = single_flight.lock().await;
        let descriptor = {
            let state = self.lock();
            let slot = state.backbones.get(digest).ok_or_else(missing)?;
            if let Some(resident) = slot.resident.upgrade() {
                return Ok(resident);
            }
            Arc::clone(&slot.descriptor)
        };
        let bytes = descriptor.resident_bytes.saturating_add(descriptor.loading_bytes);
        let want = Want { kind: Kind::Loading, bytes, held: 0, key, backbone: digest, lender: None, deadline };
        let mut memory = self.reserve(&want).await?;
        let (inner, source_descriptor) = (Arc::clone(self), Arc::clone(&descriptor));
        let load = move || inner.source.load_backbone(&source_descriptor);
        let loaded = sync::run_blocking(&self.loader, load).await;
        let Loaded { value, bytes } = flatten(loaded).map_err(|reason| self.failed(key, reason))?;
        self.settle(&mut memory, (Kind::Backbone, bytes), key)?;
        let scratch = self.source.scratch(&value);
        let want = Want { kind: Kind::Scratch, bytes: scratch, held: memory.bytes(), ..want };
        let scratch = Scratch::new(self.reserve(&want).await?);
        let resident = Arc::new(ResidentBackbone { value: Arc::new(value), memory, scratch });
        if let Some(slot) = self.lock().backbones.get_mut(digest) {
            slot.resident = Arc::downgrade(&resident);
            slot.keep = (!self.settings.drop_idle_backbones).then(|| Arc::clone(&resident));
        }
        Ok(resident)
    }

    /// Turns what a load reserved into what stays, of the size that the memory turned out to have.
    fn settle(&self, reservation: &mut Reservation, (kind, bytes): (Kind, usize), key: &Key) -> Result<(), SetError> {
        if reservation.turn_into(kind, bytes) { Ok(()) } else { Err(SetError::NoRoom { name: key.name.clone() }) }
    }

    /// Bytes for reading a set's file as a whole, given back when the result is dropped.
    pub(super) async fn reserve_reading(&self, set: &SetDescriptor) -> Result<Reservation, SetError> {
        let (key, deadline) = (Key::of(set), Instant::now() + self.settings.room_wait);
        let (bytes, backbone) = (set.loading_bytes, &set.backbone);
        self.reserve(&Want { kind: Kind::Loading, bytes, held: 0, key: &key, backbone, lender: None, deadline }).await
    }

    /// Bytes for work beside a backbone that stays, on behalf of a set that need not be registered.
    pub(super) async fn reserve_beside(
        &self,
        backbone: &Digest,
        name: &str,
        bytes: usize,
    ) -> Result<Reservation, SetError> {
        let (key, deadline) = (next_version_of(name), Instant::now() + self.settings.room_wait);
        self.reserve(&Want { kind: Kind::Loading, bytes, held: 0, key: &key, backbone, lender: None, deadline }).await
    }

    /// A backbone in memory, on behalf of a set that need not be registered.
    pub(super) async fn hold_backbone(
        self: &Arc<Self>,
        digest: &Digest,
        name: &str,
    ) -> Result<Arc<ResidentBackbone<S>>, SetError> {
        let deadline = Instant::now() + self.settings.room_wait;
        self.acquire_backbone(&next_version_of(name), digest, deadline).await
    }

    /// Takes bytes, evicting what may be evicted, waiting while too much is in use.
    async fn reserve(&self, want: &Want<'_, S>) -> Result<Reservation, SetError> {
        let name = || want.key.name.clone();
        loop {
            // Registered before looking, so that bytes released in between are not missed.
            let mut released = std::pin::pin!(self.ledger.released());
            released.as_mut().enable();
            if let Some(reservation) = self.ledger.try_reserve(want.kind, want.bytes) {
                return Ok(reservation);
            }
            match self.make_room(want) {
                Room::Evicted(sets, backbones) => {
                    self.count_evictions("budget", &sets);
                    // Sets before the backbones they refer to.
                    drop((sets, backbones));
                    continue;
                }
                Room::Never(available) => {
                    return Err(SetError::TooLarge { name: name(), needed: want.bytes, available });
                }
                Room::Busy => {}
            }
            if Instant::now() >= want.deadline {
                return Err(SetError::NoRoom { name: name() });
            }
            let _ = sync::wait_at_most(ROOM_POLL, released).await;
        }
    }

    /// Chooses and removes victims. Never: pinned, in use, loading, protected, what `key` is about to replace, and the
    /// lenders of all these.
    fn make_room(&self, want: &Want<'_, S>) -> Room<S> {
        let bytes = want.bytes;
        let now = Instant::now();
        let mut state = self.lock();
        let budget = self.ledger.snapshot();
        let mut fixed = budget.used(Kind::Queue) + want.held;
        let mut fixed_backbones = HashSet::from([*want.backbone]);
        let mut backbone_users: HashMap<Digest, usize> = HashMap::new();
        let mut candidates = Vec::new();
        revive_lenders(&mut state);
        let Lent { fixed: fixed_sets, users: borrowers } = Lent::of(&state, want, now);
        fixed += fixed_sets.values().sum::<usize>();
        for (name_key, _, slot) in state.slots() {
            let Some(resident) = &slot.resident else { continue };
            if fixed_sets.contains_key(&Arc::as_ptr(resident)) {
                fixed_backbones.insert(resident.descriptor.backbone);
                continue;
            }
            let borrowers = borrowers.get(&Arc::as_ptr(resident)).copied().unwrap_or(0);
            if slot.is_idle(borrowers, now) {
                *backbone_users.entry(resident.descriptor.backbone).or_default() += 1;
                let victim = Victim::Set(Key { name: name_key.clone(), version: slot.descriptor.version });
                // Those that borrow from it go first.
                let rank = u8::from(borrowers > 0);
                candidates.push((victim, (rank, slot.usage.order()), resident.memory.bytes()));
            }
        }
        for (digest, slot) in &state.backbones {
            let Some(resident) = slot.resident.upgrade() else { continue };
            let size = resident.bytes();
            if fixed_backbones.contains(digest) {
                fixed += size;
                continue;
            }
            // One reference is the registry's, one is `resident` above, the rest are sets that would go first.
            let users = backbone_users.get(digest).copied().unwrap_or(0);
            if slot.keep.is_some() && Arc::strong_count(&resident) == 2 + users {
                candidates.push((Victim::Backbone(*digest), (2, (false, 0)), size));
            }
        }
        let available = budget.limit().saturating_sub(fixed);
        if bytes > available {
            return Room::Never(available);
        }
        let needed = bytes.saturating_sub(budget.free());
        let Some(victims) = lru::plan_eviction(needed, candidates) else { return Room::Busy };
        let (mut sets, mut backbones) = (Vec::new(), Vec::new());
        for victim in victims {
            match victim {
                Victim::Set(key) => sets.extend(state.slot_mut(&key).and_then(Slot::take)),
                Victim::Backbone(digest) => {
                    backbones.extend(state.backbones.get_mut(&digest).and_then(|slot| slot.keep.take()));
                }
            }
        }
        Room::Evicted(sets, backbones)
    }

    /// Puts the outcome into the registry and turns it into what those who wait get.
    fn finish_load(
        &self,
        key: &Key,
        load_id: u64,
        outcome: Result<Resident<S>, SetError>,
    ) -> Result<Lease<S>, SetError> {
        let outcome = outcome.map(Arc::new);
        let mut replaced = Vec::new();
        {
            let mut state = self.lock();
            state.tick += 1;
            let tick = state.tick;
            let Some(name) = state.names.get_mut(&key.name) else {
                return outcome.and(Err(unknown(&key.name, Some(key.version))));
            };
            let Some(slot) = name.versions.get_mut(&key.version) else {
                return outcome.and(Err(unknown(&key.name, Some(key.version))));
            };
            if slot.load_id != load_id {
                // Registered anew meanwhile: those who waited asked before that, and get what they asked for.
                return outcome.map(|resident| self.lease(&resident));
            }
            slot.loading = None;
            match &outcome {
                Ok(resident) => {
                    slot.failure = None;
                    slot.usage = Usage::first(tick);
                    slot.protected_until = Instant::now() + self.settings.protect_unused;
                    replaced.extend(slot.resident.replace(Arc::clone(resident)));
                    let old = name.serving.filter(|&old| old < key.version);
                    replaced.extend(old.and_then(|old| name.versions.get_mut(&old)?.take()));
                    if name.serving.is_none_or(|old| old < key.version) {
                        name.serving = Some(key.version);
                    }
                    let slots = state.names.values_mut().flat_map(|name| name.versions.values_mut());
                    let budget = self.ledger.snapshot();
                    let capacity = budget.used(Kind::Sets) + budget.free();
                    let members = slots.filter_map(|slot| {
                        let bytes = slot.resident.as_ref()?.memory.bytes();
                        Some((&mut slot.usage, bytes))
                    });
                    lru::demote_excess(members, capacity);
                }
                Err(error) => slot.failure = self.remember(slot, error),
            }
        }
        self.count_evictions("replaced", &replaced);
        match outcome {
            Ok(resident) => {
                tracing::debug!(set.generation = resident.descriptor.generation(), "expert set resident");
                Ok(self.lease(&resident))
            }
            Err(error) => {
                tracing::warn!(set.name = key.name, set.version = key.version, reason = %error, "load failed");
                Err(error)
            }
        }
    }

    /// The failure to remember, with its growing delay. A full memory is nobody's fault and is tried again at once.
    fn remember(&self, slot: &Slot<S>, error: &SetError) -> Option<Failure> {
        let reason = match error {
            SetError::Failed { reason, .. } => reason.clone(),
            SetError::TooLarge { .. }
            | SetError::NoBackbone { .. }
            | SetError::NoLender { .. }
            | SetError::BadLender { .. } => error.to_string(),
            _ => return slot.failure.clone(),
        };
        let count = slot.failure.as_ref().map_or(1, |failure| failure.count.saturating_add(1));
        let delay = self.settings.backoff.saturating_mul(1 << (count - 1).min(16)).min(self.settings.max_backoff);
        Some(Failure { reason, count, retry_at: Instant::now() + delay, stamp: slot.tried })
    }

    pub(super) fn failed(&self, key: &Key, reason: String) -> SetError {
        SetError::Failed { name: key.name.clone(), reason, retry_after: self.settings.backoff }
    }

    pub(super) fn count_evictions(&self, reason: &str, dropped: &[Arc<Resident<S>>]) {
        if !dropped.is_empty() {
            self.metrics.evictions.with_label_values(&[reason]).inc_by(dropped.len() as u64);
        }
    }
}

/// Lenders that left the registry while sets borrow from them return to it: they are to be evicted after those.
fn revive_lenders<S: Source>(state: &mut State<S>) {
    let residents = state.slots().filter_map(|(_, _, slot)| slot.resident.as_ref());
    let lent: HashSet<_> = residents.filter_map(|resident| resident.lender().map(Arc::as_ptr)).collect();
    let slots = state.names.values_mut().flat_map(|name| name.versions.values_mut());
    slots.filter(|slot| slot.resident.is_none() && lent.contains(&slot.alive.as_ptr())).for_each(|slot| {
        slot.revive();
    });
}

/// What resident sets mean for the lenders of their experts.
struct Lent<S: Source> {
    /// Bytes of each set that must stay, lenders of sets that must stay among them.
    fixed: HashMap<*const Resident<S>, usize>,
    /// How many sets that may be evicted borrow from each.
    users: HashMap<*const Resident<S>, usize>,
}

impl<S: Source> Lent<S> {
    fn of(state: &State<S>, want: &Want<'_, S>, now: Instant) -> Self {
        let (mut fixed, mut users) = (HashMap::new(), HashMap::new());
        let mut fix = |resident: &Arc<Resident<S>>| {
            for resident in [Some(resident), resident.lender()].into_iter().flatten() {
                fixed.insert(Arc::as_ptr(resident), resident.memory.bytes());
            }
        };
        want.lender.into_iter().for_each(&mut fix);
        for (name_key, name, slot) in state.slots() {
            let Some(resident) = &slot.resident else { continue };
            if name.pinned || (*name_key == want.key.name && slot.descriptor.version <= want.key.version) {
                fix(resident);
            } else if let Some(lender) = resident.lender().filter(|_| slot.is_idle(0, now)) {
                *users.entry(Arc::as_ptr(lender)).or_default() += 1;
            }
        }
        Self { fixed, users }
    }
}

enum Victim {
    Set(Key),
    Backbone(Digest),
}

/// Ends a load in the registry's eyes also when its task panics, so that the next request starts another.
struct LoadGuard<S: Source> {
    inner: Arc<Inner<S>>,
    key: Key,
    load_id: u64,
}

impl<S: Source> Drop for LoadGuard<S> {
    fn drop(&mut self) {
        if let Some(slot) = self.inner.lock().slot_mut(&self.key).filter(|slot| slot.load_id == self.load_id) {
            slot.loading = None;
        }
    }
}

/// The outcome of blocking work, or the reason why there is none.
fn flatten<T>(result: Result<anyhow::Result<T>, Panicked>) -> Result<T, String> {
    result.map_err(anyhow::Error::from).flatten().map_err(|error| sentence(&error))
}
