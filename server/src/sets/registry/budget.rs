//! The memory budget: pure arithmetic in [`Budget`], shared reservations around it in [`Ledger`].
//!
//! Bytes are reserved before they are allocated and given back when the owner of the memory is dropped, so what is
//! accounted is never less than what is held.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

use super::sync;

/// What accounted bytes are used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Backbone,
    Sets,
    /// Working memory of the compute threads.
    Scratch,
    /// Preprocessed images that may wait for a compute thread.
    Queue,
    /// What reading a model takes until the model is in its place.
    Loading,
}

impl Kind {
    /// Every kind, in the order of [`Budget`]'s columns.
    pub const ALL: [Self; 5] = [Self::Backbone, Self::Sets, Self::Scratch, Self::Queue, Self::Loading];

    /// As a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Backbone => "backbone",
            Self::Sets => "sets",
            Self::Scratch => "scratch",
            Self::Queue => "queue",
            Self::Loading => "loading",
        }
    }
}

/// Bytes used out of a limit. Invariant: the sum over kinds never exceeds the limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    limit: usize,
    used: [usize; Kind::ALL.len()],
}

impl Budget {
    pub const fn new(limit: usize) -> Self {
        Self { limit, used: [0; Kind::ALL.len()] }
    }

    pub const fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes used for one kind.
    pub const fn used(&self, kind: Kind) -> usize {
        self.used[kind as usize]
    }

    /// Bytes used for everything.
    pub fn total(&self) -> usize {
        // Cannot overflow: the invariant keeps the sum at or below `limit`.
        self.used.iter().sum()
    }

    /// Bytes that nothing has reserved.
    pub fn free(&self) -> usize {
        self.limit - self.total()
    }

    /// Takes `bytes` if they fit.
    #[must_use]
    pub fn try_reserve(&mut self, kind: Kind, bytes: usize) -> bool {
        let fits = bytes <= self.free();
        if fits {
            self.used[kind as usize] += bytes;
        }
        fits
    }

    /// Gives `bytes` back.
    ///
    /// # Panics
    /// When more is given back than was taken: an accounting bug.
    pub fn release(&mut self, kind: Kind, bytes: usize) {
        let used = &mut self.used[kind as usize];
        *used = used.checked_sub(bytes).expect("only reserved bytes are released");
    }
}

/// A [`Budget`] that many threads reserve from.
#[derive(Debug)]
pub struct Ledger {
    budget: Mutex<Budget>,
    /// Told whenever bytes come back.
    released: Notify,
}

impl Ledger {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { budget: Mutex::new(Budget::new(limit)), released: Notify::new() })
    }

    /// Takes `bytes` if they fit; dropping the reservation gives them back.
    pub fn try_reserve(self: &Arc<Self>, kind: Kind, bytes: usize) -> Option<Reservation> {
        let fits = self.lock().try_reserve(kind, bytes);
        fits.then(|| Reservation { ledger: Arc::clone(self), kind, bytes })
    }

    /// The budget as it stands.
    pub fn snapshot(&self) -> Budget {
        self.lock().clone()
    }

    /// Completes when bytes may have come back since it was created.
    pub fn released(&self) -> tokio::sync::futures::Notified<'_> {
        self.released.notified()
    }

    /// Wakes those who wait for room; for events other than released bytes that make room obtainable.
    pub fn wake(&self) {
        self.released.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Budget> {
        sync::lock(&self.budget)
    }
}

/// Bytes taken from a [`Ledger`]; dropping it gives them back.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    kind: Kind,
    bytes: usize,
}

impl Reservation {
    /// How many bytes of the budget are reserved.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes the bytes of another reservation of the same kind part of this one.
    pub fn absorb(&mut self, mut other: Self) {
        debug_assert_eq!(self.kind, other.kind);
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Turns it into bytes of another kind, of the size that the memory turned out to be; `false`, and no change, when a
    /// growth does not fit.
    #[must_use]
    pub fn turn_into(&mut self, kind: Kind, bytes: usize) -> bool {
        let mut budget = self.ledger.lock();
        budget.release(self.kind, self.bytes);
        let fits = budget.try_reserve(kind, bytes);
        if fits {
            (self.kind, self.bytes) = (kind, bytes);
        } else {
            // What was just released fits again.
            let _ = budget.try_reserve(self.kind, self.bytes);
        }
        drop(budget);
        self.ledger.wake();
        fits
    }

    /// Changes the size to what the memory turned out to be; `false`, and no change, when the growth does not fit.
    #[must_use]
    pub fn resize(&mut self, bytes: usize) -> bool {
        let fits = match bytes.checked_sub(self.bytes) {
            Some(more) => self.ledger.lock().try_reserve(self.kind, more),
            None => {
                self.ledger.lock().release(self.kind, self.bytes - bytes);
                self.ledger.wake();
                true
            }
        };
        if fits {
            self.bytes = bytes;
        }
        fits
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.ledger.lock().release(self.kind, self.bytes);
        self.ledger.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Guarantee 1: no sequence of reservations, resizes and drops exceeds the limit or loses a byte.
        #[test]
        fn reservations_never_exceed_the_limit(
            limit in 0usize..1000,
            steps in prop::collection::vec((0u8..5, 0usize..5, 0usize..600, any::<prop::sample::Index>()), 0..200),
        ) {
            let ledger = Ledger::new(limit);
            let mut held: Vec<Reservation> = Vec::new();
            for (action, kind, bytes, which) in steps {
                match action {
                    0 => held.extend(ledger.try_reserve(Kind::ALL[kind], bytes)),
                    1 if !held.is_empty() => { let i = which.index(held.len()); let _ = held[i].resize(bytes); }
                    2 if !held.is_empty() => {
                        let i = which.index(held.len());
                        let _ = held[i].turn_into(Kind::ALL[kind], bytes);
                    }
                    3 if !held.is_empty() => {
                        let other = held.swap_remove(which.index(held.len()));
                        match held.iter_mut().find(|reservation| reservation.kind == other.kind) {
                            Some(reservation) => reservation.absorb(other),
                            None => held.push(other),
                        }
                    }
                    _ if !held.is_empty() => { held.swap_remove(which.index(held.len())); }
                    _ => {}
                }
                let budget = ledger.snapshot();
                prop_assert!(budget.total() <= limit);
                prop_assert_eq!(budget.total(), held.iter().map(Reservation::bytes).sum::<usize>());
            }
            held.clear();
            prop_assert_eq!(ledger.snapshot(), Budget::new(limit));
        }
    }

    #[test]
    fn a_refused_reservation_takes_nothing() {
        let ledger = Ledger::new(10);
        let first = ledger.try_reserve(Kind::Sets, 7);
        assert!(ledger.try_reserve(Kind::Backbone, 4).is_none());
        assert!(ledger.try_reserve(Kind::Backbone, usize::MAX).is_none());
        assert_eq!(ledger.snapshot().total(), 7);
        drop(first);
        assert!(ledger.try_reserve(Kind::Backbone, 10).is_some());
    }
}
