//! The threads of one session.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// A team of threads that share the items of one loop at a time: the caller and `threads - 1` helpers, which spin for a
/// moment and then sleep between loops. Dropping it ends the helpers.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
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
    job: Mutex<Option<Job>>,
    wake: Condvar,
    /// Counts loops; changes under the lock of `job`.
    epoch: AtomicUsize,
    /// The next item that nobody has taken.
    next: AtomicUsize,
    /// Helpers still in the current loop.
    busy: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// How often a helper looks for a new loop before it sleeps: a few tens of microseconds, longer than the serial code
/// between the loops of a forward.
const SPINS: usize = 20_000;

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

    fn helper(&self, thread: usize) {
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
            let current = *job;
            drop(job);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                if let Some(job) = current {
                    self.work(job, thread);
                }
            }));
            if outcome.is_err() {
                self.panicked.store(true, Ordering::Release);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Waits for the helpers of a loop even when the caller's own share of it panics.
struct WaitForHelpers<'a>(&'a Shared);

impl Drop for WaitForHelpers<'_> {
    fn drop(&mut self) {
        let mut spins = 0;
        while self.0.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Pool {
    /// A team of `threads`; zero counts as one.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let helpers = (1..threads).filter_map(|thread| {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("bvit-compute-{thread}"));
            // A thread that the system refuses is one helper less, not a failure.
            builder.spawn(move || shared.helper(thread)).ok()
        });
        let helpers = helpers.collect();
        Self { shared, helpers }
    }

    /// Threads that share a loop, the caller's included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `body(thread, item)` once for every item below `items`, on all threads, in no particular order. At any
    /// time a thread number is used by one call only. Takes the pool exclusively, so that loops do not nest.
    pub(super) fn run<F: Fn(usize, usize) + Sync>(&mut self, items: usize, body: F) {
        if self.helpers.is_empty() || items < 2 {
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
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.helpers.len(), Ordering::Relaxed);
        {
            let mut slot = shared.job();
            *slot = Some(job);
            shared.epoch.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        let wait = WaitForHelpers(shared);
        shared.work(job, 0);
        drop(wait);
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

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
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
    fn a_panic_on_any_thread_reaches_the_caller() {
        let mut pool = Pool::new(3);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(100, |_, item| assert!(item != 50));
        }));
        assert!(outcome.is_err());
    }
}
