//! Loops shared by threads. Who waits for whom is told in [`group`](super::group).

use std::cell::UnsafeCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Threads that share the items of one loop at a time: the caller, and either helpers of its own, which spin for a
/// moment and then sleep between loops, or the callers of other pools of its group that have nothing better to do.
/// Dropping it ends its own helpers.
pub(super) struct Pool {
    shared: Arc<Shared>,
    own: usize,
    /// Numbers lie below this.
    seats: usize,
    /// Pools with the same one share a set of numbers, each its caller's.
    group: Arc<()>,
    helpers: Vec<JoinHandle<()>>,
}

/// Where the callers of other pools of a group may help; clones are the same place.
#[derive(Clone)]
pub(super) struct Team {
    shared: Arc<Shared>,
    group: Arc<()>,
}

/// A loop body with its type erased.
#[derive(Clone, Copy)]
struct Job {
    body: *const (),
    /// Calls `body` for one (thread, item).
    call: unsafe fn(*const (), usize, usize),
    items: usize,
}

// SAFETY: `body` points to a `Sync` closure, which `Pool::run` keeps alive until every helper is done with it.
unsafe impl Send for Job {}

#[derive(Default)]
struct Shared {
    /// The loop that helpers may still join.
    job: Mutex<Option<Job>>,
    wake: Condvar,
    /// Counts loops; changes under the lock of `job`.
    epoch: AtomicUsize,
    /// The next item that nobody has taken.
    next: AtomicUsize,
    /// Helpers inside the current loop; grows under the lock of `job`.
    busy: AtomicUsize,
    /// How many have bidden guests welcome.
    open: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// How often a helper looks for a new loop before it sleeps or yields: some tens of microseconds, longer than most of the
/// serial code between the loops of a forward.
const SPINS: usize = 2_000;

impl Shared {
    fn job(&self) -> MutexGuard<'_, Option<Job>> {
        // The lock is never held across a loop body, so nothing can be half-written.
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes items until none are left.
    fn work(&self, job: Job, thread: usize) {
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= job.items {
                return;
            }
            // SAFETY: `Pool::run` waits for every helper before the closure goes.
            unsafe { (job.call)(job.body, thread, item) };
        }
    }

    /// Takes part in the current loop, if it is still open to newcomers.
    fn join(&self, slot: MutexGuard<'_, Option<Job>>, thread: usize) {
        let Some(job) = *slot else { return };
        self.busy.fetch_add(1, Ordering::Relaxed);
        drop(slot);
        if catch_unwind(AssertUnwindSafe(|| self.work(job, thread))).is_err() {
            self.panicked.store(true, Ordering::Release);
        }
        self.busy.fetch_sub(1, Ordering::Release);
    }

    /// The life of a pool's own helper.
    fn help_until_stopped(&self, thread: usize) {
        // Counted by the pool that starts it.
        self.busy.fetch_add(1, Ordering::Release);
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
                std::hint::spin_loop();
                spins += 1;
            }
            let mut job = self.job();
            while self.epoch.load(Ordering::Acquire) == seen {
                job = self.wake.wait(job).unwrap_or_else(PoisonError::into_inner);
            }
            seen = self.epoch.load(Ordering::Acquire);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            self.join(job, thread);
        }
    }
}

/// Closes a loop to newcomers and waits for the helpers inside, even when the caller's own share of it panics.
struct CloseLoop<'a>(&'a Shared);

impl Drop for CloseLoop<'_> {
    fn drop(&mut self) {
        *self.0.job() = None;
        let mut spins = 0;
        while self.0.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Pool {
    /// A team of `threads`, all but the caller its own; zero counts as one.
    pub(super) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        // Numbers must have no gaps, so the first thread that the system refuses is the last one asked for.
        let helpers = (1..threads).map_while(|thread| {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("bvit-compute-{thread}"));
            builder.spawn(move || shared.help_until_stopped(thread)).ok()
        });
        let helpers: Vec<_> = helpers.collect();
        // The first loop finds all of them, and what starting a thread allocates is behind it.
        while shared.busy.load(Ordering::Acquire) < helpers.len() {
            std::thread::yield_now();
        }
        shared.busy.store(0, Ordering::Relaxed);
        Self { shared, own: 0, seats: helpers.len() + 1, group: Arc::new(()), helpers }
    }

    /// `count` pools without helpers of their own whose callers may help each other.
    pub(super) fn group(count: usize) -> Vec<Self> {
        let group = Arc::new(());
        let pool =
            |own| Self { shared: Arc::default(), own, seats: count, group: Arc::clone(&group), helpers: Vec::new() };
        (0..count).map(pool).collect()
    }

    /// Where others may help its caller.
    pub(super) fn team(&self) -> Team {
        Team { shared: Arc::clone(&self.shared), group: Arc::clone(&self.group) }
    }

    /// Shares another pool's loops for as long as guests are welcome there and `leave`, which is asked between loops, says
    /// no. Nothing for a pool of another group. Takes this pool exclusively, because its caller's number goes along.
    pub(super) fn help(&mut self, team: &Team, leave: impl Fn() -> bool) {
        let other = &team.shared;
        if !Arc::ptr_eq(&self.group, &team.group) || Arc::ptr_eq(&self.shared, other) {
            return;
        }
        let (mut seen, mut spins) = (0, 0);
        while other.open.load(Ordering::Acquire) > 0 && !leave() {
            let epoch = other.epoch.load(Ordering::Acquire);
            if epoch != seen {
                (seen, spins) = (epoch, 0);
                other.join(other.job(), self.own);
            } else {
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
    }

    pub(super) fn own(&self) -> usize {
        self.own
    }

    /// Thread numbers that loops may see lie below this.
    pub(super) fn seats(&self) -> usize {
        self.seats
    }

    /// Threads that probably share the next loop, the caller's included: how finely to cut it.
    pub(super) fn threads(&self) -> usize {
        if self.helpers.is_empty() && self.shared.open.load(Ordering::Relaxed) == 0 { 1 } else { self.seats }
    }

    /// Calls `body(thread, item)` once for every item below `items`, on all threads, in no particular order. At any
    /// time a thread number is used by one call only. Takes the pool exclusively, so that loops do not nest.
    pub(super) fn run<F: Fn(usize, usize) + Sync>(&mut self, items: usize, body: F) {
        if self.threads() < 2 || items < 2 {
            (0..items).for_each(|item| body(self.own, item));
            return;
        }
        /// # Safety
        /// `body` points to a live `F`.
        unsafe fn call<F: Fn(usize, usize)>(body: *const (), thread: usize, item: usize) {
            // SAFETY: the caller vouches for it.
            unsafe { (*body.cast::<F>())(thread, item) }
        }
        let job = Job { body: (&raw const body).cast(), call: call::<F>, items };
        let shared = &*self.shared;
        {
            let mut slot = shared.job();
            shared.next.store(0, Ordering::Relaxed);
            shared.panicked.store(false, Ordering::Relaxed);
            *slot = Some(job);
            shared.epoch.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        let close = CloseLoop(shared);
        shared.work(job, self.own);
        drop(close);
        assert!(!shared.panicked.load(Ordering::Acquire), "a compute thread panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let _job = self.shared.job();
            self.shared.stop.store(true, Ordering::Release);
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches its panics, so joining cannot fail in a way that is not known already.
            let _ = helper.join();
        }
    }
}

/// Guests are welcome until it is dropped.
pub struct Welcome(Arc<Shared>);

impl Drop for Welcome {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Release);
    }
}

impl Team {
    /// Bids guests welcome. Nobody waits for them: a loop goes on without those that have not come.
    pub(super) fn welcome(&self) -> Welcome {
        self.shared.open.fetch_add(1, Ordering::Release);
        Welcome(Arc::clone(&self.shared))
    }
}

/// Something for every thread number of a pool, or of a group of pools, that whoever has the number may use.
pub(super) struct PerThread<T>(Box<[UnsafeCell<T>]>);

// SAFETY: an item is only used by the thread that has its number, as the callers of `of` vouch.
unsafe impl<T: Send> Sync for PerThread<T> {}

impl<T> PerThread<T> {
    pub(super) fn new(count: usize, mut make: impl FnMut() -> T) -> Self {
        Self((0..count).map(|_| UnsafeCell::new(make())).collect())
    }

    /// The item of `thread`.
    ///
    /// # Safety
    /// The calling thread has that number in the pools that this is for, and uses no other reference to the item.
    ///
    /// # Panics
    /// When the number is too large.
    #[expect(clippy::mut_from_ref, reason = "numbers are exclusive, as the caller vouches")]
    pub(super) unsafe fn of(&self, thread: usize) -> &mut T {
        // SAFETY: the caller's promise makes the reference the only one.
        unsafe { &mut *self.0[thread].get() }
    }
}

impl<T> fmt::Debug for PerThread<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerThread").field("threads", &self.0.len()).finish()
    }
}

impl fmt::Debug for Team {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Team").finish_non_exhaustive()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("seats", &self.seats).finish()
    }
}

/// A slice whose disjoint parts are written and read by several threads of one loop.
pub(super) struct Parts<'a, T> {
    data: *mut T,
    len: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts that the callers of `part` and `shared` keep disjoint from those that are written, so it
// is as good as `&mut [T]` split up.
unsafe impl<T: Send + Sync> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), slice: std::marker::PhantomData }
    }

    /// `len` values from `start`.
    ///
    /// # Safety
    /// While the part is in use, no other part that overlaps it is.
    ///
    /// # Panics
    /// When the range exceeds the slice.
    #[expect(clippy::mut_from_ref, reason = "parts are disjoint, as the caller vouches")]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part exceeds its slice");
        // SAFETY: the range lies in the slice, which is borrowed mutably for 'a; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }

    /// `len` values from `start`, to read.
    ///
    /// # Safety
    /// While the part is in use, none of [`Parts::part`] that overlaps it is.
    ///
    /// # Panics
    /// When the range exceeds the slice.
    pub(super) unsafe fn shared(&self, start: usize, len: usize) -> &[T] {
        assert!(start <= self.len && len <= self.len - start, "part exceeds its slice");
        // SAFETY: the range lies in the slice, which is borrowed mutably for 'a; nobody writes it, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.data.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once_whatever_the_number_of_threads() {
        for threads in 1..5 {
            let mut pool = Pool::new(threads);
            for items in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, |thread, item| {
                    assert!(thread < threads);
                    counts[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {items} items"
                );
            }
        }
    }

    /// Ends the guests of a test even when an assertion fails.
    struct Done<'a>(&'a AtomicBool);

    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn guests_come_and_go_and_every_item_runs_once() {
        let mut pools = Pool::group(3);
        let (mut caller, mut stranger) = (pools.remove(1), Pool::new(1));
        let (team, done, by_guests) = (caller.team(), AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let _done = Done(&done);
            for (guest, pool) in pools.iter_mut().chain([&mut stranger]).enumerate() {
                let (team, done) = (&team, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        let asked = AtomicUsize::new(0);
                        pool.help(team, || asked.fetch_add(1, Ordering::Relaxed) > 100 * (guest + 1));
                        std::thread::yield_now();
                    }
                });
            }
            for round in 0..1_000_000 {
                if round >= 500 && by_guests.load(Ordering::Relaxed) > 100 {
                    break;
                }
                let welcome = (round % 5 > 0).then(|| team.welcome());
                assert_eq!(caller.threads(), if welcome.is_some() { 3 } else { 1 });
                for items in [1, 2, 50] {
                    let counts: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                    let numbers: [AtomicBool; 3] = Default::default();
                    caller.run(items, |thread, item| {
                        assert!(!numbers[thread].swap(true, Ordering::AcqRel), "two calls with one number");
                        counts[item].fetch_add(1, Ordering::Relaxed);
                        by_guests.fetch_add(usize::from(thread != 1), Ordering::Relaxed);
                        std::thread::yield_now();
                        numbers[thread].store(false, Ordering::Release);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{items} items");
                }
            }
        });
        assert!(by_guests.load(Ordering::Relaxed) > 100, "nobody helped");
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller() {
        let mut pool = Pool::new(3);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(100, |_, item| assert!(item != 50));
        }));
        assert!(outcome.is_err());
        // The next loop is whole again.
        pool.run(100, |_, _| ());
    }
}
