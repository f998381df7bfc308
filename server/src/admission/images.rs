//! Images from admission to answer, and how many of them wait when more come than can be served.
//!
//! A queue helps against bursts. While more arrives than the cores can do, it is never empty, and its length is only
//! added to every answer's latency. The two look alike until an image has to be refused. So all of the queue is there
//! for a burst, and from the first refusal on just enough of it to keep the compute threads busy, until the load is one
//! that can be served: [`Overload`] says when. All of this holds for the server and for each expert set by itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::shares::Share;

/// How long requests are counted before an overload is judged anew.
const WINDOW: Duration = Duration::from_secs(1);
/// At most one request of so many is refused in a window: the full queue can serve that load. Random arrivals at nine
/// tenths of what can be served overflow a short queue about that often.
const SERVABLE: u64 = 10;
/// With nothing to do for so long, there is no overload. Between two arrivals of one it is much shorter.
const IDLE: Duration = Duration::from_millis(20);

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

/// Why images got no places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// Too many images or bytes are on their way already.
    #[error("the queue is full; try again later")]
    Full,
    /// Too many images of this expert set are on their way already.
    #[error("the queue holds as many images of this expert set as it may; try again later")]
    SetFull,
    /// They would not fit into an empty queue either.
    #[error("{count} images of this expert set's size are more than the queue can ever hold; send at most {most}")]
    TooMany {
        /// Images of the request.
        count: usize,
        most: usize,
    },
}

/// The images on their way; clones share them.
#[derive(Debug, Clone)]
pub struct Images {
    books: Arc<Mutex<Books>>,
    limits: ImageLimits,
}

#[derive(Debug, Default)]
struct Books {
    bytes: usize,
    all: Count,
    per_set: HashMap<Arc<str>, Count>,
}

/// Images on their way, of the server or of one set.
#[derive(Debug, Default)]
struct Count {
    images: usize,
    /// When the last one left.
    emptied: Option<Instant>,
    overload: Option<Overload>,
}

/// Begins with a refusal. Ends when nothing has been on its way for [`IDLE`], or after a [`WINDOW`] in which at most one
/// of [`SERVABLE`] requests was refused: the few that a short queue refuses must not keep it short.
#[derive(Debug)]
struct Overload {
    window_began: Instant,
    admitted: u64,
    refused: u64,
}

/// One image's place, until dropped.
#[derive(Debug)]
pub struct ImagePermit {
    books: Arc<Mutex<Books>>,
    set: Arc<str>,
    bytes: usize,
    /// What its client holds with all images of the request.
    share: Option<Arc<Share>>,
}

impl ImagePermit {
    /// The place, and its client's share with it.
    #[must_use]
    pub fn with(mut self, share: Arc<Share>) -> Self {
        self.share = Some(share);
        self
    }
}

impl Images {
    /// None on their way.
    pub fn new(limits: ImageLimits) -> Self {
        Self { books: Arc::default(), limits }
    }

    /// Lets `count` images of `bytes_each` preprocessed bytes for one expert set in, all or none. When they do not fit
    /// at first, `make_room` is called, which may drop permits of clients that have gone.
    pub fn admit(
        &self,
        set: &str,
        count: usize,
        bytes_each: usize,
        make_room: impl FnOnce(),
    ) -> Result<Vec<ImagePermit>, NoPlace> {
        self.admit_at(Instant::now(), set, count, bytes_each, make_room)
    }

    /// Images and preprocessed bytes on their way.
    pub fn held(&self) -> (usize, usize) {
        let books = lock(&self.books);
        (books.all.images, books.bytes)
    }

    fn admit_at(
        &self,
        now: Instant,
        set: &str,
        count: usize,
        bytes_each: usize,
        make_room: impl FnOnce(),
    ) -> Result<Vec<ImagePermit>, NoPlace> {
        let ImageLimits { images, bytes, images_per_set, .. } = self.limits;
        let most = images.min(images_per_set).min(bytes.checked_div(bytes_each).unwrap_or(usize::MAX));
        if count > most {
            return Err(NoPlace::TooMany { count, most });
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        let mut books = lock(&self.books);
        if books.check(&self.limits, now, set, count, bytes_each).is_err() {
            drop(books);
            make_room();
            books = lock(&self.books);
            if let Err(refused) = books.check(&self.limits, now, set, count, bytes_each) {
                let of_set = books.per_set.get_mut(set);
                // A client that takes more than its share must not make the server refuse the others.
                match of_set.filter(|_| refused == NoPlace::SetFull) {
                    Some(of_set) => of_set.refuse(now),
                    None => books.all.refuse(now),
                }
                return Err(refused);
            }
        }
        let name = books.per_set.get_key_value(set).map_or_else(|| Arc::from(set), |(name, _)| Arc::clone(name));
        books.bytes += count * bytes_each;
        books.all.admit(count);
        books.per_set.entry(Arc::clone(&name)).or_default().admit(count);
        let permit =
            || ImagePermit { books: Arc::clone(&self.books), set: Arc::clone(&name), bytes: bytes_each, share: None };
        Ok(std::iter::repeat_with(permit).take(count).collect())
    }
}

impl Books {
    /// Whether `count` images fit, none of which is too many by itself.
    fn check(
        &mut self,
        limits: &ImageLimits,
        now: Instant,
        set: &str,
        count: usize,
        bytes_each: usize,
    ) -> Result<(), NoPlace> {
        let of_set = self.per_set.get(set).map_or(0, |of_set| of_set.images);
        if self.all.images + count > limits.images || self.bytes + count * bytes_each > limits.bytes {
            return Err(NoPlace::Full);
        }
        if of_set + count > limits.images_per_set {
            return Err(NoPlace::SetFull);
        }
        // Counted before this request's own images, so that one of many images is not refused for ever; and however
        // many images a set has, the other sets keep their share of the places.
        let share = limits.per_set_when_busy();
        let busy = self.all.is_overloaded(now);
        let set_busy = self.per_set.get_mut(set).is_some_and(|of_set| of_set.is_overloaded(now));
        if (busy || set_busy) && of_set >= share {
            return Err(NoPlace::SetFull);
        }
        let within_shares = || self.per_set.values().map(|of_set| of_set.images.min(share)).sum::<usize>();
        if busy && within_shares() >= limits.images_when_busy { Err(NoPlace::Full) } else { Ok(()) }
    }
}

impl Count {
    fn admit(&mut self, images: usize) {
        self.images += images;
        if let Some(overload) = &mut self.overload {
            overload.admitted += 1;
        }
    }

    fn refuse(&mut self, now: Instant) {
        let begun = Overload { window_began: now, admitted: 0, refused: 0 };
        self.overload.get_or_insert(begun).refused += 1;
    }

    fn leave(&mut self) {
        self.images -= 1;
        if self.images == 0 {
            self.emptied = Some(Instant::now());
        }
    }

    fn is_overloaded(&mut self, now: Instant) -> bool {
        let Some(Overload { window_began, admitted, refused }) = self.overload else { return false };
        let idle = self.emptied.is_some_and(|emptied| now.saturating_duration_since(emptied) >= IDLE);
        if self.images == 0 && idle {
            self.overload = None;
        } else if now.saturating_duration_since(window_began) >= WINDOW {
            let servable = refused * SERVABLE <= admitted + refused;
            self.overload = (!servable).then_some(Overload { window_began: now, admitted: 0, refused: 0 });
        }
        self.overload.is_some()
    }
}

impl Drop for ImagePermit {
    fn drop(&mut self) {
        let mut books = lock(&self.books);
        books.bytes -= self.bytes;
        books.all.leave();
        if let Some(of_set) = books.per_set.get_mut(&self.set) {
            of_set.leave();
            // Overloaded sets stay remembered; there are no more of them than sets.
            if of_set.images == 0 && of_set.overload.is_none() {
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
    use std::sync::LazyLock;

    const LIMITS: ImageLimits = ImageLimits { images: 8, bytes: 1000, images_per_set: 6, images_when_busy: 4 };

    fn admit(images: &Images, ms: u64, set: &str, count: usize) -> Result<Vec<ImagePermit>, NoPlace> {
        // Before the last image left, whatever the clock says, so that no pause of the machine is taken for idleness.
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        images.admit_at(*START + Duration::from_millis(ms), set, count, 10, || ())
    }

    #[test]
    fn guarantee_11_one_set_cannot_fill_the_queue() {
        let images = Images::new(LIMITS);
        let hot = admit(&images, 0, "hot", 6).unwrap();
        assert_eq!(admit(&images, 0, "hot", 1).unwrap_err(), NoPlace::SetFull);
        let other = admit(&images, 0, "other", 2).expect("it took more than its share, so only it is kept short");
        assert_eq!(images.held(), (8, 80));
        drop((hot, other));
        assert_eq!(images.held(), (0, 0));
    }

    #[test]
    fn guarantee_12_limits_count_images_and_bytes_and_take_all_or_none() {
        let images = Images::new(LIMITS);
        let five = admit(&images, 0, "a", 5).unwrap();
        assert_eq!(admit(&images, 0, "b", 4).unwrap_err(), NoPlace::Full);
        assert_eq!(images.admit("b", 1, 951, || ()).unwrap_err(), NoPlace::Full, "bytes count too");
        assert_eq!(images.held(), (5, 50));
        assert!(admit(&images, 0, "none", 0).unwrap().is_empty());
        assert_eq!(images.held(), (5, 50));
        drop(five);
    }

    #[test]
    fn what_never_fits_is_no_overload() {
        let images = Images::new(LIMITS);
        let refusals = [
            (images.admit("a", 7, 1, || ()), NoPlace::TooMany { count: 7, most: 6 }),
            (images.admit("a", 3, 400, || ()), NoPlace::TooMany { count: 3, most: 2 }),
            (images.admit("a", usize::MAX, usize::MAX, || ()), NoPlace::TooMany { count: usize::MAX, most: 0 }),
        ];
        refusals.into_iter().for_each(|(got, expected)| assert_eq!(got.unwrap_err(), expected));
        assert!(lock(&images.books).all.overload.is_none());
    }

    #[test]
    fn a_burst_gets_the_whole_queue_and_an_overload_what_keeps_the_threads_busy() {
        let images = Images::new(LIMITS);
        let mut a = admit(&images, 0, "a", 6).unwrap();
        let mut b = admit(&images, 0, "b", 2).unwrap();
        assert_eq!(admit(&images, 0, "c", 1).unwrap_err(), NoPlace::Full, "the ninth");
        a.truncate(3);
        b.truncate(1);
        assert_eq!(admit(&images, 0, "a", 1).unwrap_err(), NoPlace::SetFull, "three quarters of four");
        assert_eq!(admit(&images, 0, "b", 1).unwrap_err(), NoPlace::Full, "four");
        drop(b);
        let large = admit(&images, 0, "b", 5).expect("a large request is let in whole");
        assert_eq!(images.held(), (8, 80));
        drop(large);
        let d = admit(&images, 0, "d", 1).unwrap();
        assert_eq!(admit(&images, 0, "c", 1).unwrap_err(), NoPlace::Full);
        drop((a, d));
    }

    #[test]
    fn in_an_overload_too_one_set_leaves_places_to_others() {
        let images = Images::new(LIMITS);
        let (hot, cold) = (admit(&images, 0, "hot", 6).unwrap(), admit(&images, 0, "cold", 2).unwrap());
        assert_eq!(admit(&images, 0, "other", 1).unwrap_err(), NoPlace::Full);
        drop(cold);
        let other = admit(&images, 0, "other", 1).expect("six hot images count as the three of their share");
        assert_eq!(admit(&images, 0, "third", 1).unwrap_err(), NoPlace::Full);
        drop((hot, other));
    }

    #[test]
    fn an_overload_ends_when_the_load_can_be_served() {
        // One image stays on its way, so that it is not idleness that ends it.
        for (refused, ends) in [(1, true), (2, false)] {
            let images = Images::new(LIMITS);
            let _rest = admit(&images, 0, "a", 1).unwrap();
            let full = (admit(&images, 0, "b", 5).unwrap(), admit(&images, 0, "c", 2).unwrap());
            for _ in 0..refused {
                assert_eq!(admit(&images, 0, "d", 1).unwrap_err(), NoPlace::Full);
            }
            drop(full);
            for _ in 0..9 {
                drop(admit(&images, 900, "d", 1).unwrap());
            }
            let _busy = (admit(&images, 1100, "b", 3), admit(&images, 1100, "c", 1));
            assert_eq!(admit(&images, 1200, "d", 1).is_ok(), ends, "{refused} of {} refused", refused + 9);
        }
    }

    #[test]
    fn an_overload_ends_when_there_is_nothing_to_do() {
        let images = Images::new(LIMITS);
        let full = (admit(&images, 0, "a", 6).unwrap(), admit(&images, 0, "b", 2).unwrap());
        assert_eq!(admit(&images, 0, "a", 1).unwrap_err(), NoPlace::Full);
        drop(full);
        assert!(images.admit_at(Instant::now() + IDLE, "a", 6, 10, || ()).is_ok());
        assert!(lock(&images.books).all.overload.is_none());
    }

    #[test]
    fn what_nobody_waits_for_makes_room_and_is_no_overload() {
        let images = Images::new(LIMITS);
        let gone = images.admit("a", 6, 10, || ()).unwrap();
        let rest = images.admit("a", 6, 10, || drop(gone)).expect("room for six");
        assert_eq!(rest.len(), 6);
        assert!(lock(&images.books).all.overload.is_none());
    }
}
