//! Floats that begin with a line of the cache.

use std::ops::{Deref, DerefMut};

/// A buffer whose first float begins a line, so that registers of whole rows are not read from two lines or written to
/// two. No more than that depends on it.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<f32>);

/// Bytes of a line.
const LINE: usize = 64;

/// Floats that are left over before and behind a buffer.
const SLACK: usize = LINE / size_of::<f32>() - 1;

impl Lines {
    /// A buffer of so many zeros.
    pub(super) fn new(len: usize) -> Self {
        let mut lines = Self::default();
        lines.grow(len);
        lines
    }

    /// Makes it at least so long; new ones are zeros, and old ones may have moved.
    pub(super) fn grow(&mut self, len: usize) {
        let needed = if len == 0 { 0 } else { len + SLACK };
        if self.0.len() < needed {
            self.0.reserve_exact(needed - self.0.len());
            self.0.resize(needed, 0.0);
        }
    }

    /// Makes it at most so long; the ones that stay may have moved.
    pub(super) fn shrink(&mut self, len: usize) {
        let needed = if len == 0 { 0 } else { len + SLACK };
        self.0.truncate(needed);
        self.0.shrink_to(needed);
    }

    /// Floats on the heap.
    pub(super) fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// Floats before the first one; the promise of a line is one of speed only.
    fn before(&self) -> usize {
        self.0.as_ptr().align_offset(LINE).min(SLACK)
    }
}

impl Deref for Lines {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let before = self.before();
        let all = &self.0;
        if all.is_empty() { &[] } else { &all[before..all.len() - (SLACK - before)] }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [f32] {
        let before = self.before();
        let all = &mut self.0;
        if all.is_empty() {
            return &mut [];
        }
        let end = all.len() - (SLACK - before);
        &mut all[before..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_with_a_line_and_has_its_length() {
        let mut lines = Lines::new(0);
        assert_eq!((lines.len(), lines.capacity()), (0, 0));
        for len in [1, 15, 16, 1000] {
            lines.grow(len);
            assert!(lines.len() == len && lines.as_ptr().addr().is_multiple_of(LINE), "{len}");
            lines.fill(1.0);
        }
        lines.shrink(17);
        assert_eq!((lines.len(), lines.capacity()), (17, 17 + SLACK));
        lines.shrink(0);
        assert_eq!((lines.len(), lines.capacity()), (0, 0));
    }
}
