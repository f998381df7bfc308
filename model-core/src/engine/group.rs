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
//!   thread ever locks that: a thread locks its own session only, and takes the loop of another, never the session. So
//!   locks are taken in one order, and nobody waits in a circle.
//! - **A panic in a helper is the caller's**: the loop ends, and `Pool::run` panics in the thread whose batch it is.
//!
//! Who calls for help and who answers is the server's business (`compute/queue.rs`): a thread calls when it starts a batch
//! while others are idle, and an idle thread prefers images of its own to helping.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backbone::Backbone;
use super::expert_set::ExpertSet;
use super::pool::{Team, Welcome};
use super::session::{Row, Session};
use crate::error::ModelError;

/// A session for every compute thread, all on one backbone.
#[derive(Debug)]
pub struct SessionGroup {
    backbone: Arc<Backbone>,
    max_batch: usize,
    resident_bytes: usize,
    /// By the thread's number; each thread locks its own only.
    sessions: Box<[Mutex<Session>]>,
    teams: Box<[Team]>,
}

impl SessionGroup {
    /// Sessions for `threads` threads and batches of up to `max_batch` images. They start no threads of their own.
    pub fn new(backbone: &Arc<Backbone>, max_batch: usize, threads: usize) -> Self {
        let sessions = Session::group(backbone, max_batch, threads);
        let teams = sessions.iter().map(Session::team).collect();
        let resident_bytes = sessions.iter().map(Session::resident_bytes).sum();
        let sessions = sessions.into_iter().map(Mutex::new).collect();
        Self { backbone: Arc::clone(backbone), max_batch, resident_bytes, sessions, teams }
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
        self.session(thread).forward(rows)
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
    }

    /// Bytes of scratch of all threads, before any batch made it grow.
    pub fn resident_bytes(&self) -> usize {
        self.resident_bytes
    }

    /// Most bytes by which batches with sets like `set` make the scratch of all threads grow, once.
    pub fn growth(&self, set: &ExpertSet) -> usize {
        self.threads() * Session::growth(&self.backbone, self.max_batch, set.config())
    }
}
