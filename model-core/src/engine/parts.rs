//! What the threads of one loop share: places of their own, and disjoint parts of one slice.

use std::cell::UnsafeCell;
use std::fmt;

/// Something for every thread number of a crew, to be used by whoever has the number.
pub(super) struct PerThread<T>(Box<[UnsafeCell<T>]>);

// SAFETY: an item is only used by the thread that has its number, as the callers of `of` vouch.
unsafe impl<T: Send> Sync for PerThread<T> {}

impl<T> PerThread<T> {
    pub(super) fn new(count: usize, mut make: impl FnMut() -> T) -> Self {
        Self((0..count).map(|_| UnsafeCell::new(make())).collect())
    }

    /// The item of `thread`.
    ///
    /// # Safety
    /// The calling thread has that number in the crew that this is for, and uses no other reference to the item.
    ///
    /// # Panics
    /// When the number is too large.
    #[expect(clippy::mut_from_ref, reason = "numbers are exclusive, as the caller vouches")]
    pub(super) unsafe fn of(&self, thread: usize) -> &mut T {
        // SAFETY: the caller's promise makes the reference the only one.
        unsafe { &mut *self.0[thread].get() }
    }
}

impl<T> fmt::Debug for PerThread<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerThread").field("threads", &self.0.len()).finish()
    }
}

/// A slice whose disjoint parts are written and read by several threads of one loop.
pub(super) struct Parts<'a, T> {
    data: *mut T,
    len: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts that the callers of `part` and `shared` keep disjoint from those that are written, so it
// is as good as `&mut [T]` split up.
unsafe impl<T: Send + Sync> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), slice: std::marker::PhantomData }
    }

    /// `len` values from `start`.
    ///
    /// # Safety
    /// While the part is in use, no other part that overlaps it is.
    ///
    /// # Panics
    /// When the range exceeds the slice.
    #[expect(clippy::mut_from_ref, reason = "parts are disjoint, as the caller vouches")]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part exceeds its slice");
        // SAFETY: the range lies in the slice, which is borrowed mutably for 'a; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }

    /// `len` values from `start`, to read.
    ///
    /// # Safety
    /// While the part is in use, none of [`Parts::part`] that overlaps it is.
    ///
    /// # Panics
    /// When the range exceeds the slice.
    pub(super) unsafe fn shared(&self, start: usize, len: usize) -> &[T] {
        assert!(start <= self.len && len <= self.len - start, "part exceeds its slice");
        // SAFETY: the range lies in the slice, which is borrowed mutably for 'a; nobody writes it, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.data.add(start), len) }
    }
}
