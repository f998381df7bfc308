//! The compute threads of a server on one backbone: each has a session, and a thread that has nothing to do helps another
//! with its forward pass.
//!
//! # Who waits for whom
//! A *caller* runs a forward pass: some forty loops over tiles of rows or heads of images, with a little serial code
//! between them. A *helper* is another thread of the group, without a pass of its own at the moment. Threads are known by
//! their numbers in the group; scratch belongs to numbers, so that two threads never share any.
//!
//! - **A caller waits for no helper to come.** It makes a loop public (`Pool::run`), and takes the loop's items itself, one
//!   after the other, until none are left. With nobody there it does what it would do alone.
//! - **A caller waits for the helpers that are inside a loop when its items run out**, each of them busy with its last item:
//!   a tile of at most 64 rows, or one head of one image. It first closes the loop to newcomers. This is the only wait for
//!   a helper, and it is bounded by the work of one item.
//! - **A helper waits for nobody.** Between two loops it spins for some tens of microseconds and then yields; between any two
//!   loops it asks `leave` and goes when the answer is yes. When the caller bids no guests welcome any more it goes, too.
//! - **Whoever helps lends its number.** [`SessionGroup::help`] locks the helper's own session for as long, and no other
//!   thread waits for that lock: a thread locks its own session only, and takes the loop of another, never the session. So
//!   locks are taken in one order, and nobody waits in a circle.
//! - **Whoever wants scratch back waits for nobody.** [`SessionGroup::shrink`] shrinks the sessions that are free; one that
//!   is in a pass, or helps, is shrunk by its own thread right after.
//! - **A panic in a helper is the caller's**: the loop ends, and `Pool::run` panics in the thread whose batch it is.
//!
//! Who calls for help and who answers is the server's business (`compute/queue.rs`): a thread calls when it starts a batch
//! while others are idle, and an idle thread prefers images of its own to helping.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::backbone::Backbone;
use super::pool::{Team, Welcome};
use super::session::{Row, Session};
use crate::error::ModelError;

/// A session for every compute thread, all on one backbone.
#[derive(Debug)]
pub struct SessionGroup {
    resident_bytes: usize,
    /// By the thread's number; each thread locks its own only.
    sessions: Box<[Mutex<Session>]>,
    /// Sessions that are to shrink as soon as their threads are done with them.
    to_shrink: Box<[AtomicBool]>,
    teams: Box<[Team]>,
}

impl SessionGroup {
    /// Sessions for `threads` threads and batches of up to `max_batch` images. They start no threads of their own.
    pub fn new(backbone: &Arc<Backbone>, max_batch: usize, threads: usize) -> Self {
        let sessions = Session::group(backbone, max_batch, threads);
        let teams = sessions.iter().map(Session::team).collect();
        let resident_bytes = sessions.iter().map(Session::resident_bytes).sum();
        let to_shrink = sessions.iter().map(|_| AtomicBool::new(false)).collect();
        let sessions = sessions.into_iter().map(Mutex::new).collect();
        Self { resident_bytes, sessions, to_shrink, teams }
    }

    /// Threads that the group is for.
    pub fn threads(&self) -> usize {
        self.sessions.len()
    }

    fn session(&self, thread: usize) -> MutexGuard<'_, Session> {
        // A pass that panicked leaves scratch that the next one overwrites.
        self.sessions[thread].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Session::forward`] on the session of `thread`.
    ///
    /// # Panics
    /// When `thread` is not below [`SessionGroup::threads`].
    pub fn forward(&self, thread: usize, rows: &mut [Row<'_>]) -> Result<(), ModelError> {
        let outcome = self.session(thread).forward(rows);
        self.shrink_if_wanted(thread);
        outcome
    }

    /// Bids the other threads welcome to help in the forward passes of `thread`, until the result is dropped.
    ///
    /// # Panics
    /// When `thread` is not below [`SessionGroup::threads`].
    pub fn welcome(&self, thread: usize) -> Welcome {
        self.teams[thread].welcome()
    }

    /// Shares the forward passes of thread `caller`, as `thread`, for as long as helpers are welcome there and `leave`,
    /// which is asked every few microseconds, says no.
    ///
    /// # Panics
    /// When a number is not below [`SessionGroup::threads`].
    pub fn help(&self, thread: usize, caller: usize, leave: impl Fn() -> bool) {
        self.session(thread).help(&self.teams[caller], leave);
        self.shrink_if_wanted(thread);
    }

    /// Gives back what batches made the scratch grow by: at once where a session is free, else when its thread is done.
    pub fn shrink(&self) {
        for (thread, wanted) in self.to_shrink.iter().enumerate() {
            wanted.store(true, Ordering::SeqCst);
            self.shrink_if_wanted(thread);
        }
    }

    /// Every thread asks after it let go of its session, so that a wish made meanwhile is not lost.
    fn shrink_if_wanted(&self, thread: usize) {
        while self.to_shrink[thread].load(Ordering::SeqCst) {
            let mut session = match self.sessions[thread].try_lock() {
                Ok(session) => session,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            if self.to_shrink[thread].swap(false, Ordering::SeqCst) {
                session.shrink();
            }
        }
    }

    /// Bytes of scratch of all threads, before any batch made it grow.
    pub fn resident_bytes(&self) -> usize {
        self.resident_bytes
    }
}
