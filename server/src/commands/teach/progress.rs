//! How far it has come.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Width of the bar.
const BAR: usize = 30;
/// Time between two pictures of the bar.
const REDRAW: Duration = Duration::from_millis(50);

/// A bar on standard error, when that is a terminal.
pub(super) struct Progress {
    drawn: Option<Mutex<Option<Instant>>>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { drawn: io::stderr().is_terminal().then(Mutex::default) }
    }

    /// Draws the bar; a terminal that has gone is no failure.
    pub(super) fn show(&self, what: &str, share: f64) {
        let Some(drawn) = &self.drawn else { return };
        let Ok(mut drawn) = drawn.try_lock() else { return };
        if share < 1.0 && drawn.is_some_and(|at| at.elapsed() < REDRAW) {
            return;
        }
        *drawn = Some(Instant::now());
        let full = (share.clamp(0.0, 1.0) * BAR as f64) as usize;
        let (full, empty) = ("#".repeat(full), ".".repeat(BAR - full));
        let _ = write!(io::stderr(), "\r{what:<8} [{full}{empty}] {:3.0}%", share * 100.0);
    }

    /// Takes the bar away.
    pub(super) fn done(&self) {
        if self.drawn.is_some() {
            let _ = write!(io::stderr(), "\r{:60}\r", "");
        }
    }
}
