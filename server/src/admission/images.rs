//! Images from admission to answer, and how many of them wait when more come than can be served.
//!
//! A queue helps against bursts. While more arrives than the cores can do, it is never empty, and its length is only
//! added to every answer's latency. The two look alike until an image has to be refused. So all of the queue is there
//! for a burst, and from the first refusal on just enough of it to keep the compute threads busy, until nothing has
//! been refused for [`CALM`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// After so long without a refusal the load counts as one that can be served.
const CALM: Duration = Duration::from_secs(1);

/// How many images may be on their way at once.
#[derive(Debug, Clone, Copy)]
pub struct ImageLimits {
    /// Images, in all.
    pub images: usize,
    /// Preprocessed bytes, in all.
    pub bytes: usize,
    /// Images of one expert set, so that one busy camera cannot take every place.
    pub images_per_set: usize,
    /// Images, in all, while more come than can be served.
    pub images_when_busy: usize,
}

impl ImageLimits {
    /// The share of one expert set is the same at all times.
    fn per_set_when_busy(&self) -> usize {
        let share = self.images_when_busy as u128 * self.images_per_set as u128 / self.images.max(1) as u128;
        usize::try_from(share).unwrap_or(usize::MAX).max(1)
    }
}

/// Why images were not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many images or bytes are on their way already.
    #[error("the queue is full")]
    Full,
    /// Too many images of this expert set are on their way already.
    #[error("the queue holds as many images of this expert set as it may")]
    SetFull,
}

/// The images on their way; clones share them.
#[derive(Debug, Clone)]
pub struct Images {
    books: Arc<Mutex<Books>>,
    limits: ImageLimits,
}

#[derive(Debug, Default)]
struct Books {
    images: usize,
    bytes: usize,
    per_set: HashMap<Arc<str>, usize>,
    refused: Option<Instant>,
}

/// One image's place, until dropped.
#[derive(Debug)]
pub struct ImagePermit {
    books: Arc<Mutex<Books>>,
    set: Arc<str>,
    bytes: usize,
}

impl Images {
    /// None on their way.
    pub fn new(limits: ImageLimits) -> Self {
        Self { books: Arc::default(), limits }
    }

    /// Lets `count` images of `bytes_each` preprocessed bytes for one expert set in, all or none. When they do not fit
    /// at first, `make_room` is called, which may drop permits that nobody needs any more.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn admit(
        &self,
        set: &str,
        count: usize,
        bytes_each: usize,
        make_room: impl FnOnce(),
    ) -> Result<Vec<ImagePermit>, Refused> {
        self.admit_at(Instant::now(), set, count, bytes_each, make_room)
    }

    fn admit_at(
        &self,
        now: Instant,
        set: &str,
        count: usize,
        bytes_each: usize,
        make_room: impl FnOnce(),
    ) -> Result<Vec<ImagePermit>, Refused> {
        let mut books = lock(&self.books);
        if self.check(&books, now, set, count, bytes_each).is_err() {
            drop(books);
            make_room();
            books = lock(&self.books);
            if let Err(refused) = self.check(&books, now, set, count, bytes_each) {
                books.refused = Some(now);
                return Err(refused);
            }
        }
        let name = books.per_set.get_key_value(set).map_or_else(|| Arc::from(set), |(name, _)| Arc::clone(name));
        books.images += count;
        books.bytes += count * bytes_each;
        if count > 0 {
            *books.per_set.entry(Arc::clone(&name)).or_default() += count;
        }
        let permit = || ImagePermit { books: Arc::clone(&self.books), set: Arc::clone(&name), bytes: bytes_each };
        Ok(std::iter::repeat_with(permit).take(count).collect())
    }

    fn check(&self, books: &Books, now: Instant, set: &str, count: usize, bytes_each: usize) -> Result<(), Refused> {
        let ImageLimits { images, bytes, images_per_set, images_when_busy } = self.limits;
        let of_set = books.per_set.get(set).copied().unwrap_or(0);
        let fits = |held: usize, more: usize, limit: usize| held.checked_add(more).is_some_and(|sum| sum <= limit);
        if !fits(books.images, count, images) || !fits(books.bytes, count.saturating_mul(bytes_each), bytes) {
            return Err(Refused::Full);
        }
        if !fits(of_set, count, images_per_set) {
            return Err(Refused::SetFull);
        }
        if books.refused.is_some_and(|last| now.saturating_duration_since(last) < CALM) {
            // Counted before this request's own images, so that one of many images is not refused for ever; and however
            // many images a set has, the other sets keep their share of the places.
            let share = self.limits.per_set_when_busy();
            if of_set >= share {
                return Err(Refused::SetFull);
            }
            if books.per_set.values().map(|&images| images.min(share)).sum::<usize>() >= images_when_busy {
                return Err(Refused::Full);
            }
        }
        Ok(())
    }
}

impl Drop for ImagePermit {
    fn drop(&mut self) {
        let mut books = lock(&self.books);
        books.images -= 1;
        books.bytes -= self.bytes;
        if let Some(count) = books.per_set.get_mut(&self.set) {
            *count -= 1;
            if *count == 0 {
                books.per_set.remove(&self.set);
            }
        }
    }
}

fn lock(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ImageLimits = ImageLimits { images: 8, bytes: 1000, images_per_set: 6, images_when_busy: 4 };

    fn held(images: &Images) -> (usize, usize, usize) {
        let books = lock(&images.books);
        (books.images, books.bytes, books.per_set.len())
    }

    #[test]
    fn guarantee_11_one_set_cannot_fill_the_queue() {
        let images = Images::new(LIMITS);
        let hot = images.admit("hot", 6, 10, || ()).unwrap();
        assert_eq!(images.admit("hot", 1, 10, || ()).unwrap_err(), Refused::SetFull);
        let other = images.admit("other", 1, 10, || ()).unwrap();
        drop((hot, other));
        assert_eq!(held(&images), (0, 0, 0));
    }

    #[test]
    fn guarantee_12_limits_count_images_and_bytes_and_take_all_or_none() {
        let images = Images::new(LIMITS);
        let five = images.admit("a", 5, 10, || ()).unwrap();
        assert_eq!(images.admit("b", 4, 10, || ()).unwrap_err(), Refused::Full);
        assert_eq!(images.admit("b", usize::MAX, usize::MAX, || ()).unwrap_err(), Refused::Full);
        assert_eq!(images.admit("b", 1, 951, || ()).unwrap_err(), Refused::Full, "bytes count too");
        assert_eq!(held(&images), (5, 50, 1));
        assert!(images.admit("none", 0, 10, || ()).unwrap().is_empty());
        assert_eq!(held(&images), (5, 50, 1));
        drop(five);
    }

    #[test]
    fn a_burst_gets_the_whole_queue_and_an_overload_what_keeps_the_threads_busy() {
        let images = Images::new(LIMITS);
        let start = Instant::now();
        let later = |ms| start + Duration::from_millis(ms);
        let admit = |at, set, count| images.admit_at(at, set, count, 10, || ());

        let burst = (admit(start, "a", 6).unwrap(), admit(start, "b", 2).unwrap());
        assert_eq!(admit(later(100), "b", 1).unwrap_err(), Refused::Full, "the ninth");
        drop(burst);
        let mut waiting = admit(later(200), "a", 2).unwrap();
        waiting.extend(admit(later(200), "a", 1).unwrap());
        assert_eq!(admit(later(300), "a", 1).unwrap_err(), Refused::SetFull, "three quarters of four");
        waiting.extend(admit(later(400), "b", 1).unwrap());
        assert_eq!(admit(later(500), "b", 1).unwrap_err(), Refused::Full, "four");
        waiting.pop();
        waiting.extend(admit(later(600), "b", 4).unwrap());
        assert_eq!(held(&images), (7, 70, 2), "a large request is let in whole");
        assert_eq!(admit(later(1499), "c", 1).unwrap_err(), Refused::Full, "within a second of the last refusal");
        assert_eq!(admit(later(2498), "c", 1).unwrap_err(), Refused::Full);
        assert!(admit(later(3498), "c", 1).is_ok(), "a second without one");
    }

    #[test]
    fn what_nobody_waits_for_makes_room_and_is_no_overload() {
        let images = Images::new(LIMITS);
        let gone = images.admit("a", 6, 10, || ()).unwrap();
        let rest = images.admit("a", 6, 10, || drop(gone)).expect("room for six");
        assert_eq!(rest.len(), 6);
        assert!(lock(&images.books).refused.is_none());
    }

    #[test]
    fn in_an_overload_too_one_set_leaves_places_to_others() {
        let images = Images::new(LIMITS);
        let hot = images.admit("hot", 6, 10, || ()).unwrap();
        assert_eq!(images.admit("hot", 1, 10, || ()).unwrap_err(), Refused::SetFull);
        let other = images.admit("other", 1, 10, || ()).expect("six hot images count as the three of their share");
        assert_eq!(images.admit("third", 1, 10, || ()).unwrap_err(), Refused::Full);
        drop((hot, other));
    }
}
