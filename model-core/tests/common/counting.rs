//! An allocator that counts, for test binaries that check how much memory something takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Counts the bytes that are allocated, and their peak; all threads together, so tests that measure run one at a time.
pub(crate) struct Counting;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to `System` unchanged; the counters do not touch the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(CURRENT.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are those `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        CURRENT.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// What a run took.
#[allow(dead_code, reason = "every test binary uses a part of it")]
pub(crate) struct Taken<T> {
    pub(crate) result: T,
    /// Most bytes it held at once.
    pub(crate) peak: usize,
    /// Bytes still held when it returned: those of the result.
    pub(crate) kept: usize,
}

/// Runs `run` and counts.
pub(crate) fn measure<T>(run: impl FnOnce() -> T) -> Taken<T> {
    let before = CURRENT.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = run();
    let (peak, after) = (PEAK.load(Relaxed), CURRENT.load(Relaxed));
    Taken { result, peak: peak.saturating_sub(before), kept: after.saturating_sub(before) }
}
