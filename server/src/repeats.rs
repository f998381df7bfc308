//! What clients can make happen as often as they like is logged once a second and kind, with a count.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a kind stays silent after a line.
const SILENCE: Duration = Duration::from_secs(1);

/// The windows of this process.
pub static REPEATS: Repeats = Repeats(Mutex::new(BTreeMap::new()));

/// When each kind was last logged, and how often it has happened since. Kinds are constants of the program, so that
/// clients cannot make more.
#[derive(Debug)]
pub struct Repeats(Mutex<BTreeMap<&'static str, Window>>);

#[derive(Debug)]
struct Window {
    logged: Instant,
    more: u64,
}

impl Repeats {
    /// Whether what has just happened is to be logged: then how often it happened without a line since the last one.
    pub fn admit(&self, kind: &'static str) -> Option<u64> {
        self.admit_at(Instant::now(), kind)
    }

    fn admit_at(&self, now: Instant, kind: &'static str) -> Option<u64> {
        let mut windows = self.windows();
        let Some(window) = windows.get_mut(kind) else {
            windows.insert(kind, Window { logged: now, more: 0 });
            return Some(0);
        };
        if now.saturating_duration_since(window.logged) < SILENCE {
            window.more += 1;
            return None;
        }
        window.logged = now;
        Some(std::mem::take(&mut window.more))
    }

    /// Kind and count of what happened without a line, where the last line is a `SILENCE` ago. Counts start anew.
    pub fn overdue(&self, now: Instant) -> Vec<(&'static str, u64)> {
        let mut counts = Vec::new();
        for (&kind, window) in self.windows().iter_mut() {
            if window.more > 0 && now.saturating_duration_since(window.logged) >= SILENCE {
                window.logged = now;
                counts.push((kind, std::mem::take(&mut window.more)));
            }
        }
        counts
    }

    /// As [`Repeats::overdue`], at the end, when nothing is waited for.
    pub fn rest(&self) -> Vec<(&'static str, u64)> {
        self.overdue(Instant::now() + SILENCE)
    }

    fn windows(&self) -> MutexGuard<'_, BTreeMap<&'static str, Window>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_occurrence_is_logged_or_counted_once() {
        let repeats = Repeats(Mutex::default());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(repeats.admit_at(at(0), "a"), Some(0));
        assert_eq!(repeats.admit_at(at(1), "b"), Some(0), "kinds are silent one by one");
        assert_eq!(repeats.admit_at(at(500), "a"), None);
        assert_eq!(repeats.admit_at(at(999), "a"), None);
        assert_eq!(repeats.overdue(at(999)), []);
        assert_eq!(repeats.admit_at(at(1000), "a"), Some(2));
        assert_eq!(repeats.admit_at(at(1500), "a"), None);
        assert_eq!(repeats.overdue(at(2000)), [("a", 1)]);
        assert_eq!(repeats.overdue(at(9000)), []);
        assert_eq!(repeats.admit_at(at(2500), "a"), None, "the count was a line too");
        assert_eq!(repeats.admit_at(at(9000), "a"), Some(1));
    }
}
