//! Ending a command before it is done: because somebody asked it to, or because its time is over.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Why a run returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The recipe is done.
    Finished,
    OutOfTime,
    Interrupted,
}

/// Whether to end early. What takes long asks many times a second.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    asked: Option<Arc<AtomicBool>>,
    deadline: Option<Instant>,
    /// Nothing but the loop ends for want of time: a limit of 0 is one step.
    one_step: bool,
}

impl Stop {
    /// Ends when `asked` becomes true, or `limit` from now.
    pub fn new(asked: Arc<AtomicBool>, limit: Option<Duration>) -> Self {
        Self { asked: Some(asked), ..Self::after(limit) }
    }

    /// Ends when that much time has gone by.
    pub fn after(limit: Option<Duration>) -> Self {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { asked: None, deadline, one_step: limit.is_some_and(|limit| limit.is_zero()) }
    }

    /// Whether somebody asked it to end.
    pub fn is_asked(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.load(Ordering::Relaxed))
    }

    /// Whether its time is over, if that has an end.
    pub fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// For what comes before the first step.
    ///
    /// # Errors
    /// [`Stopped`] when it is to end.
    pub fn check(&self) -> Result<(), Stopped> {
        match () {
            () if self.is_asked() => Err(Stopped(Ended::Interrupted)),
            () if self.is_late() && !self.one_step => Err(Stopped(Ended::OutOfTime)),
            () => Ok(()),
        }
    }
}

/// The command ended before its first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped(pub Ended);

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Ended::OutOfTime => "out of time before the first step",
            _ => "interrupted before the first step",
        })
    }
}

impl std::error::Error for Stopped {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_when_asked_or_late_and_a_limit_of_nothing_is_one_step() {
        assert_eq!(Stop::default().check(), Ok(()));
        let asked = Arc::new(AtomicBool::new(false));
        let stop = Stop::new(asked.clone(), None);
        assert_eq!(stop.check(), Ok(()));
        asked.store(true, Ordering::Relaxed);
        assert_eq!(stop.check(), Err(Stopped(Ended::Interrupted)));
        assert_eq!(Stop::after(Some(Duration::from_nanos(1))).check(), Err(Stopped(Ended::OutOfTime)));
        let one_step = Stop::after(Some(Duration::ZERO));
        assert_eq!((one_step.check(), one_step.is_late()), (Ok(()), true));
        assert!(!Stop::after(Some(Duration::MAX)).is_late());
    }
}
