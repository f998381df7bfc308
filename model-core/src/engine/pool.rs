//! The threads of one session.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Threads that share the items of one loop at a time: the caller, and either helpers of its own, which spin for a
/// moment and then sleep between loops, or guests, threads that have nothing better to do (see [`Team::help`]).
/// Dropping it ends its own helpers.
pub struct Pool {
    shared: Arc<Shared>,
    seats: usize,
    helpers: Vec<JoinHandle<()>>,
}

/// A pool's seats for guests; clones are the same seats.
#[derive(Clone)]
pub struct Team(Arc<Shared>);

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
    /// Whether guests are welcome.
    open: AtomicBool,
    /// Numbers that guests may take.
    free_seats: Mutex<Vec<usize>>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// How often a helper looks for a new loop before it sleeps or yields: a few tens of microseconds, longer than the
/// serial code between the loops of a forward.
const SPINS: usize = 20_000;

impl Shared {
    fn job(&self) -> MutexGuard<'_, Option<Job>> {
        // The lock is never held across a loop body, so nothing can be half-written.
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free_seats(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free_seats.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let helpers = (1..threads).filter_map(|thread| {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("bvit-compute-{thread}"));
            // A thread that the system refuses is one helper less, not a failure.
            builder.spawn(move || shared.help_until_stopped(thread)).ok()
        });
        let helpers: Vec<_> = helpers.collect();
        // The first loop finds all of them, and what starting a thread allocates is behind it.
        while shared.busy.load(Ordering::Acquire) < helpers.len() {
            std::thread::yield_now();
        }
        shared.busy.store(0, Ordering::Relaxed);
        Self { shared, seats: helpers.len() + 1, helpers }
    }

    /// The caller, with seats for `guests`.
    pub fn with_seats_for(guests: usize) -> Self {
        let shared = Shared { free_seats: Mutex::new((1..=guests).collect()), ..Shared::default() };
        Self { shared: Arc::new(shared), seats: guests + 1, helpers: Vec::new() }
    }

    /// Its seats for guests.
    pub fn team(&self) -> Team {
        Team(Arc::clone(&self.shared))
    }

    /// Thread numbers that loops may see lie below this.
    pub fn seats(&self) -> usize {
        self.seats
    }

    /// Threads that probably share the next loop, the caller's included: how finely to cut it.
    pub fn threads(&self) -> usize {
        if self.helpers.is_empty() && !self.shared.open.load(Ordering::Relaxed) { 1 } else { self.seats }
    }

    /// Calls `body(thread, item)` once for every item below `items`, on all threads, in no particular order. At any
    /// time a thread number is used by one call only. Takes the pool exclusively, so that loops do not nest.
    pub(super) fn run<F: Fn(usize, usize) + Sync>(&mut self, items: usize, body: F) {
        if self.threads() < 2 || items < 2 {
            (0..items).for_each(|item| body(0, item));
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
        shared.work(job, 0);
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
        self.0.open.store(false, Ordering::Release);
    }
}

impl Team {
    /// Lets guests in, who are waited for in vain by nobody: a loop goes on without those that have not come.
    pub fn welcome(&self) -> Welcome {
        self.0.open.store(true, Ordering::Release);
        Welcome(Arc::clone(&self.0))
    }

    /// Shares the pool's loops on the calling thread for as long as guests are welcome, there is a seat, and `leave`,
    /// which is asked between loops, says no.
    pub fn help(&self, leave: impl Fn() -> bool) {
        let Some(seat) = self.0.free_seats().pop() else { return };
        let (mut seen, mut spins) = (0, 0);
        while self.0.open.load(Ordering::Acquire) && !leave() {
            let epoch = self.0.epoch.load(Ordering::Acquire);
            if epoch != seen {
                (seen, spins) = (epoch, 0);
                self.0.join(self.0.job(), seat);
            } else {
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
        self.0.free_seats().push(seat);
    }
}

impl fmt::Debug for Team {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Team").field("free_seats", &self.0.free_seats().len()).finish()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("seats", &self.seats).finish()
    }
}

/// A slice whose disjoint parts are written by several threads of one loop.
pub(super) struct Parts<'a, T> {
    data: *mut T,
    len: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts that the callers of `part` keep disjoint, so it is as good as `&mut [T]` split up.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

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

    #[test]
    fn guests_come_and_go_and_every_item_runs_once() {
        let mut pool = Pool::with_seats_for(2);
        let (team, done, by_guests) = (pool.team(), AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            // One more than there are seats; each leaves every now and then.
            for guest in 0..3 {
                let (team, done) = (&team, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        let asked = AtomicUsize::new(0);
                        team.help(|| asked.fetch_add(1, Ordering::Relaxed) > 100 * guest);
                        std::thread::yield_now();
                    }
                });
            }
            for round in 0..1_000_000 {
                if round >= 500 && by_guests.load(Ordering::Relaxed) > 100 {
                    break;
                }
                let welcome = (round % 5 > 0).then(|| team.welcome());
                assert_eq!(pool.threads(), if welcome.is_some() { 3 } else { 1 });
                for items in [1, 2, 50] {
                    let counts: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                    let seats: [AtomicBool; 3] = Default::default();
                    pool.run(items, |thread, item| {
                        assert!(!seats[thread].swap(true, Ordering::AcqRel), "two calls with one number");
                        counts[item].fetch_add(1, Ordering::Relaxed);
                        by_guests.fetch_add(usize::from(thread > 0), Ordering::Relaxed);
                        std::thread::yield_now();
                        seats[thread].store(false, Ordering::Release);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{items} items");
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(by_guests.load(Ordering::Relaxed) > 100, "nobody helped");
        assert_eq!(pool.shared.free_seats().len(), 2);
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
