//! The compute threads of a server: each runs batches of its own, and helps another with its batch while it has none.
//!
//! # Who waits for whom
//! A forward pass is some forty loops over tiles of rows or heads of images, with a little serial code between them. A
//! thread that runs one has *invited* the others, or not; another member without a batch may *help*. Members are known by
//! their numbers in the crew. Scratch belongs to numbers, so two threads never share any.
//!
//! - **A caller waits for no helper to come.** It makes a loop public ([`Loops::run`]), and takes the loop's items itself,
//!   one after the other, until none are left. With nobody there it does what it would do alone.
//! - **A caller waits for the helpers that are inside a loop when its items run out**, each of them busy with its last
//!   item: a tile of at most 64 rows, or one head of one image. It first closes the loop to newcomers. This is the only
//!   wait for a helper, and it is bounded by the work of one item.
//! - **A helper waits for nobody.** Between two loops it spins for some tens of microseconds and then yields. Between any
//!   two loops it asks `leave`, and goes when the answer is yes. It goes, too, when the invitation ends.
//! - **Whoever helps lends its number.** [`Member::help`] takes the member exclusively, as a forward pass does. So a number
//!   is in one loop at a time, on whichever backbone, and nobody waits in a circle: helping takes no lock of a model.
//! - **A panic in a helper is the caller's**: the loop ends, and [`Loops::run`] panics in the thread whose batch it is.
//!
//! Who has nothing to do is the server's business (its `compute/queue.rs`): an idle thread prefers images of its own.
//!
//! A caller without a crew ([`Member::with_helpers`]) has threads of its own, which sleep between its loops.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What the engine asks of threads.
///
/// # Safety
/// [`Loops::run`] calls its body once for every item. At any time a number is used by one call only, and by nobody else for
/// as long as `self` is borrowed; [`Loops::own`] is the caller's. Numbers lie below [`Loops::numbers`].
pub(super) unsafe trait Loops {
    /// The caller's own number.
    fn own(&self) -> usize;
    /// Every number lies below this.
    fn numbers(&self) -> usize;
    /// Threads that probably share the next loop, the caller's included: how finely to cut it.
    fn threads(&self) -> usize;
    /// Calls `body(number, item)` once for every item below `items`, in no particular order.
    fn run(&mut self, items: usize, body: &(dyn Fn(usize, usize) + Sync));
}

/// Threads that help each other; clones are the same crew.
#[derive(Clone)]
pub struct Crew(Arc<[Slot]>);

/// A thread's place in a crew. Dropping it ends its own helpers.
pub struct Member {
    crew: Crew,
    number: usize,
    /// Threads that do nothing but help this member.
    helpers: Vec<JoinHandle<()>>,
}

/// Others may help its member until it is dropped. Nobody waits for them.
pub struct Invitation {
    crew: Crew,
    number: usize,
}

/// A loop body, for as long as [`Loops::run`] keeps its helpers inside.
type Body = *const (dyn Fn(usize, usize) + Sync);

#[derive(Clone, Copy)]
struct Job {
    body: Body,
    items: usize,
}

// SAFETY: `body` points to a `Sync` closure, which `Loops::run` keeps alive until every helper is done with it.
unsafe impl Send for Job {}

/// Where the loops of one member are.
#[derive(Default)]
struct Slot {
    /// The loop that helpers may still join.
    job: Mutex<Option<Job>>,
    wake: Condvar,
    /// Counts loops; changes under the lock of `job`.
    epoch: AtomicUsize,
    /// The next item that nobody has taken.
    next: AtomicUsize,
    /// Helpers inside the current loop; grows under the lock of `job`.
    busy: AtomicUsize,
    /// How many invitations stand.
    open: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// How often a helper looks for a new loop before it sleeps or yields: some tens of microseconds, longer than most of the
/// serial code between the loops of a forward.
const SPINS: usize = 2_000;

impl Slot {
    fn job(&self) -> MutexGuard<'_, Option<Job>> {
        // The lock is never held across a loop body, so nothing can be half-written.
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes items until none are left.
    fn work(&self, job: Job, number: usize) {
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= job.items {
                return;
            }
            // SAFETY: `Loops::run` waits for every helper before the closure goes.
            unsafe { (*job.body)(number, item) };
        }
    }

    /// Takes part in the current loop, if it is still open to newcomers.
    fn join(&self, slot: MutexGuard<'_, Option<Job>>, number: usize) {
        let Some(job) = *slot else { return };
        self.busy.fetch_add(1, Ordering::Relaxed);
        drop(slot);
        if catch_unwind(AssertUnwindSafe(|| self.work(job, number))).is_err() {
            self.panicked.store(true, Ordering::Release);
        }
        self.busy.fetch_sub(1, Ordering::Release);
    }

    /// The life of a helper that does nothing else.
    fn help_until_stopped(&self, number: usize) {
        // Counted by the member that starts it.
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
            self.join(job, number);
        }
    }
}

/// Closes a loop to newcomers and waits for the helpers inside, even when the caller's own share of it panics.
struct CloseLoop<'a>(&'a Slot);

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

impl Crew {
    fn of(count: usize) -> Self {
        Self((0..count).map(|_| Slot::default()).collect())
    }

    /// A crew of `count` threads; zero counts as one. Each of them is to own a member.
    pub fn new(count: usize) -> (Self, Vec<Member>) {
        let crew = Self::of(count.max(1));
        let members = (0..crew.size()).map(|number| Member { crew: crew.clone(), number, helpers: Vec::new() });
        (crew.clone(), members.collect())
    }

    /// How many members it has.
    pub fn size(&self) -> usize {
        self.0.len()
    }

    /// Whether `member` is one of this crew.
    pub fn has(&self, member: &Member) -> bool {
        Arc::ptr_eq(&self.0, &member.crew.0)
    }
}

impl Member {
    /// A caller and `threads - 1` threads that only help it; zero counts as one.
    pub(super) fn with_helpers(threads: usize) -> Self {
        let crew = Crew::of(threads.max(1));
        // Numbers must have no gaps, so the first thread that the system refuses is the last one asked for.
        let helpers = (1..threads).map_while(|number| {
            let crew = crew.clone();
            let builder = std::thread::Builder::new().name(format!("bvit-compute-{number}"));
            builder.spawn(move || crew.0[0].help_until_stopped(number)).ok()
        });
        let helpers: Vec<_> = helpers.collect();
        let slot = &crew.0[0];
        // The first loop finds all of them, and what starting a thread allocates is behind it.
        while slot.busy.load(Ordering::Acquire) < helpers.len() {
            std::thread::yield_now();
        }
        slot.busy.store(0, Ordering::Relaxed);
        Self { crew, number: 0, helpers }
    }

    /// Its number in the crew.
    pub fn number(&self) -> usize {
        self.number
    }

    fn slot(&self) -> &Slot {
        &self.crew.0[self.number]
    }

    /// Lets other members help with the forward passes of this one until the result is dropped.
    pub fn invite(&self) -> Invitation {
        self.slot().open.fetch_add(1, Ordering::Release);
        Invitation { crew: self.crew.clone(), number: self.number }
    }

    /// Shares the loops of the next member that has invited others, for as long as the invitation stands and `leave`, which
    /// is asked between loops, says no. Returns at once when there is none.
    pub fn help(&mut self, leave: impl Fn() -> bool) {
        let (slots, number) = (&self.crew.0, self.number);
        let mut others = (1..slots.len()).map(|step| &slots[(number + step) % slots.len()]);
        let Some(slot) = others.find(|slot| slot.open.load(Ordering::Acquire) > 0) else { return };
        let (mut seen, mut spins) = (0, 0);
        while slot.open.load(Ordering::Acquire) > 0 && !leave() {
            let epoch = slot.epoch.load(Ordering::Acquire);
            if epoch != seen {
                (seen, spins) = (epoch, 0);
                slot.join(slot.job(), number);
            } else {
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
    }
}

// SAFETY: a member has its number alone, because members cannot be copied. `run` and `help` take it exclusively, so the
// number is in one loop at a time. Helpers of its own have the other numbers of a crew without other members.
unsafe impl Loops for Member {
    fn own(&self) -> usize {
        self.number
    }

    fn numbers(&self) -> usize {
        self.crew.size()
    }

    fn threads(&self) -> usize {
        match self.helpers.len() {
            0 if self.slot().open.load(Ordering::Relaxed) == 0 => 1,
            0 => self.crew.size(),
            helpers => helpers + 1,
        }
    }

    fn run(&mut self, items: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        if self.threads() < 2 || items < 2 {
            (0..items).for_each(|item| body(self.number, item));
            return;
        }
        // SAFETY: only the lifetime changes, and `close` waits until nobody uses the body any more.
        let body = unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), Body>(body) };
        let job = Job { body, items };
        let slot = self.slot();
        {
            let mut current = slot.job();
            slot.next.store(0, Ordering::Relaxed);
            slot.panicked.store(false, Ordering::Relaxed);
            *current = Some(job);
            slot.epoch.fetch_add(1, Ordering::Release);
        }
        slot.wake.notify_all();
        let close = CloseLoop(slot);
        slot.work(job, self.number);
        drop(close);
        assert!(!slot.panicked.load(Ordering::Acquire), "a compute thread panicked");
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if self.helpers.is_empty() {
            return;
        }
        let slot = self.slot();
        {
            let _job = slot.job();
            slot.stop.store(true, Ordering::Release);
            slot.epoch.fetch_add(1, Ordering::Release);
        }
        slot.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches its panics, so joining cannot fail in a way that is not known already.
            let _ = helper.join();
        }
    }
}

impl Drop for Invitation {
    fn drop(&mut self) {
        self.crew.0[self.number].open.fetch_sub(1, Ordering::Release);
    }
}

impl fmt::Debug for Crew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew").field("size", &self.size()).finish()
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("number", &self.number).field("crew", &self.crew).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once_whatever_the_number_of_threads() {
        for threads in 1..5 {
            let mut caller = Member::with_helpers(threads);
            for items in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                caller.run(items, &|number, item| {
                    assert!(number < threads);
                    counts[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {items} items"
                );
            }
        }
    }

    /// Ends the helpers of a test even when an assertion fails.
    struct Done<'a>(&'a AtomicBool);

    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn helpers_come_and_go_and_every_item_runs_once() {
        let (_, mut members) = Crew::new(3);
        let (_, mut strangers) = Crew::new(1);
        let mut caller = members.remove(1);
        let (done, by_helpers) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let _done = Done(&done);
            for (i, member) in members.iter_mut().chain(&mut strangers).enumerate() {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        let asked = AtomicUsize::new(0);
                        member.help(|| asked.fetch_add(1, Ordering::Relaxed) > 100 * (i + 1));
                        std::thread::yield_now();
                    }
                });
            }
            for round in 0..1_000_000 {
                if round >= 500 && by_helpers.load(Ordering::Relaxed) > 100 {
                    break;
                }
                let invitation = (round % 5 > 0).then(|| caller.invite());
                assert_eq!(caller.threads(), if invitation.is_some() { 3 } else { 1 });
                for items in [1, 2, 50] {
                    let counts: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                    let numbers: [AtomicBool; 3] = Default::default();
                    caller.run(items, &|thread, item| {
                        assert!(!numbers[thread].swap(true, Ordering::AcqRel), "two calls with one number");
                        counts[item].fetch_add(1, Ordering::Relaxed);
                        by_helpers.fetch_add(usize::from(thread != 1), Ordering::Relaxed);
                        std::thread::yield_now();
                        numbers[thread].store(false, Ordering::Release);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{items} items");
                }
            }
        });
        assert!(by_helpers.load(Ordering::Relaxed) > 100, "nobody helped");
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller() {
        let mut caller = Member::with_helpers(3);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            caller.run(100, &|_, item| assert!(item != 50));
        }));
        assert!(outcome.is_err());
        // The next loop is whole again.
        caller.run(100, &|_, _| ());
    }
}
