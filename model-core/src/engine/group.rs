//! The scratch of every compute thread of a server on one backbone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use super::backbone::Backbone;
use super::crew::{Crew, Member};
use super::session::{Pass, Row};
use crate::error::ModelError;

/// Scratch for the forward passes of every member of a crew, all on one backbone.
#[derive(Debug)]
pub struct SessionGroup {
    crew: Crew,
    resident_bytes: usize,
    /// By the member's number; only who shrinks them asks for those of others, and waits for none.
    passes: Box<[Mutex<Pass>]>,
    /// Those that are to shrink as soon as their threads are done with them.
    to_shrink: Box<[AtomicBool]>,
}

impl SessionGroup {
    /// Scratch for batches of up to `max_batch` images.
    pub fn new(backbone: &Arc<Backbone>, max_batch: usize, crew: &Crew) -> Self {
        let passes = Pass::group(backbone, max_batch, crew);
        let resident_bytes = passes.iter().map(Pass::resident_bytes).sum();
        let to_shrink = passes.iter().map(|_| AtomicBool::new(false)).collect();
        Self { crew: crew.clone(), resident_bytes, passes: passes.into_iter().map(Mutex::new).collect(), to_shrink }
    }

    /// [`Session::forward`](super::Session::forward) in the thread of `member`.
    ///
    /// # Panics
    /// When `member` is of another crew.
    pub fn forward(&self, member: &mut Member, rows: &mut [Row<'_>]) -> Result<(), ModelError> {
        // Numbers are one member's within its crew, so the scratch that goes by them is, too.
        assert!(self.crew.has(member), "a member of another crew");
        let number = member.number();
        // A pass that panicked leaves scratch that the next one overwrites.
        let outcome = self.passes[number].lock().unwrap_or_else(PoisonError::into_inner).forward(member, rows);
        self.shrink_if_wanted(number);
        outcome
    }

    /// Gives back what batches made the scratch grow by: at once where no pass runs, else right after the pass.
    pub fn shrink(&self) {
        for (number, wanted) in self.to_shrink.iter().enumerate() {
            wanted.store(true, Ordering::SeqCst);
            self.shrink_if_wanted(number);
        }
    }

    /// Every thread asks after its pass, so that a wish made meanwhile is not lost.
    fn shrink_if_wanted(&self, number: usize) {
        while self.to_shrink[number].load(Ordering::SeqCst) {
            let mut pass = match self.passes[number].try_lock() {
                Ok(pass) => pass,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            if self.to_shrink[number].swap(false, Ordering::SeqCst) {
                pass.shrink();
            }
        }
    }

    /// Bytes of scratch of all threads, before any batch made it grow.
    pub fn resident_bytes(&self) -> usize {
        self.resident_bytes
    }
}
