//! The bounded queue between requests and compute threads, and the rule by which a batch closes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much may wait, and how batches form.
#[derive(Debug, Clone, Copy)]
pub struct QueueSettings {
    /// Most images waiting.
    pub images: usize,
    /// Most bytes waiting.
    pub bytes: usize,
    /// Most images of one expert set waiting, so that one busy camera cannot fill the queue.
    pub images_per_set: usize,
    /// Most images in a batch.
    pub max_batch: usize,
    /// How long the oldest image may wait for company.
    pub max_wait: Duration,
}

/// Why nothing was queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// Too many images or bytes wait already.
    #[error("the queue is full")]
    Full,
    /// Too many images of this expert set wait already.
    #[error("the queue holds as many images of this expert set as it may")]
    SetFull,
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Closed,
}

/// What the queue needs to know of its entries.
pub trait Entry {
    /// What may share a batch.
    type Group: PartialEq;

    /// Entries of one group may share a batch.
    fn group(&self) -> Self::Group;
    /// Name of the expert set.
    fn set(&self) -> &str;
    /// Bytes held while waiting.
    fn bytes(&self) -> usize;
    /// When it began to wait.
    fn enqueued(&self) -> Instant;
    /// Whether nobody wants the answer any more.
    fn is_dead(&self, now: Instant) -> bool;
}

/// What a free compute thread should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing waits.
    Sleep,
    /// Wait for company until then.
    WaitUntil(Instant),
    /// Close the batch.
    Close,
}

/// The closing rule: a batch closes when it is full, when its oldest entry has waited long enough, or when no more
/// entries will come. With `max_wait` zero that is as soon as a compute thread is free.
pub fn decide(oldest: Option<Instant>, waiting: usize, closed: bool, settings: &QueueSettings, now: Instant) -> Decision {
    let Some(oldest) = oldest else { return Decision::Sleep };
    let due = oldest + settings.max_wait;
    if closed || waiting >= settings.max_batch || due <= now { Decision::Close } else { Decision::WaitUntil(due) }
}

struct State<E> {
    entries: VecDeque<E>,
    bytes: usize,
    per_set: HashMap<String, usize>,
    closed: bool,
}

/// A bounded first-in-first-out queue that hands out batches; clones share it.
pub struct Queue<E> {
    shared: Arc<(Mutex<State<E>>, Condvar)>,
    settings: QueueSettings,
}

impl<E> Clone for Queue<E> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), settings: self.settings }
    }
}

impl<E: Entry> Queue<E> {
    /// An empty queue.
    pub fn new(settings: QueueSettings) -> Self {
        let state = State { entries: VecDeque::new(), bytes: 0, per_set: HashMap::new(), closed: false };
        Self { shared: Arc::new((Mutex::new(state), Condvar::new())), settings }
    }

    /// Its bounds.
    pub fn settings(&self) -> &QueueSettings {
        &self.settings
    }

    /// Queues all of `entries`, which belong to one expert set, or none of them.
    ///
    /// # Errors
    /// [`Rejected`].
    pub fn push_all(&self, entries: Vec<E>) -> Result<(), Rejected> {
        let Some(first) = entries.first() else { return Ok(()) };
        let (count, bytes) = (entries.len(), entries.iter().map(E::bytes).sum::<usize>());
        let mut state = self.lock();
        if state.closed {
            return Err(Rejected::Closed);
        }
        if let Err(rejected) = self.check(&state, first.set(), count, bytes) {
            // Work for clients that have gone must not keep out work for those that wait.
            let now = Instant::now();
            state.retain(|entry| !entry.is_dead(now));
            self.check(&state, first.set(), count, bytes).map_err(|_| rejected)?;
        }
        for entry in entries {
            state.push(entry);
        }
        drop(state);
        self.shared.1.notify_one();
        Ok(())
    }

    fn check(&self, state: &State<E>, set: &str, count: usize, bytes: usize) -> Result<(), Rejected> {
        let QueueSettings { images, bytes: max_bytes, images_per_set, .. } = self.settings;
        if state.entries.len() + count > images || state.bytes.saturating_add(bytes) > max_bytes {
            return Err(Rejected::Full);
        }
        let of_set = state.per_set.get(set).copied().unwrap_or(0);
        if of_set + count > images_per_set { Err(Rejected::SetFull) } else { Ok(()) }
    }

    /// Blocks until a batch closes: entries of one group, oldest first, dead ones dropped. `None` once the queue is
    /// closed and empty.
    pub fn next_batch(&self) -> Option<Vec<E>> {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let oldest = state.entries.front().map(E::enqueued);
            let group = state.entries.front().map(E::group);
            let company = state.entries.iter().filter(|entry| Some(entry.group()) == group);
            let waiting = company.take(self.settings.max_batch).count();
            match decide(oldest, waiting, state.closed, &self.settings, now) {
                Decision::Close => {
                    let batch = state.take_batch(self.settings.max_batch, now);
                    // One wake-up per push is not enough when a push brought more than one batch.
                    if !state.entries.is_empty() {
                        self.shared.1.notify_one();
                    }
                    if !batch.is_empty() {
                        return Some(batch);
                    }
                }
                Decision::Sleep if state.closed => return None,
                Decision::Sleep => state = self.shared.1.wait(state).unwrap_or_else(PoisonError::into_inner),
                Decision::WaitUntil(due) => {
                    let wait = due.saturating_duration_since(now);
                    state = self.shared.1.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Refuses new entries; what waits is still handed out.
    pub fn close(&self) {
        self.lock().closed = true;
        self.shared.1.notify_all();
    }

    /// Images and bytes waiting.
    pub fn depth(&self) -> (usize, usize) {
        let state = self.lock();
        (state.entries.len(), state.bytes)
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: Entry> State<E> {
    fn push(&mut self, entry: E) {
        self.bytes += entry.bytes();
        *self.per_set.entry(entry.set().to_owned()).or_default() += 1;
        self.entries.push_back(entry);
    }

    /// Takes an entry out of the books.
    fn forget(&mut self, entry: &E) {
        self.bytes -= entry.bytes();
        if let Some(count) = self.per_set.get_mut(entry.set()) {
            *count -= 1;
            if *count == 0 {
                self.per_set.remove(entry.set());
            }
        }
    }

    fn retain(&mut self, keep: impl Fn(&E) -> bool) {
        for entry in std::mem::take(&mut self.entries) {
            if keep(&entry) {
                self.entries.push_back(entry);
            } else {
                self.forget(&entry);
            }
        }
    }

    /// Up to `max` live entries of the oldest live entry's group; dead ones met on the way are dropped.
    fn take_batch(&mut self, max: usize, now: Instant) -> Vec<E> {
        let mut batch: Vec<E> = Vec::new();
        let mut rest = VecDeque::with_capacity(self.entries.len());
        while let Some(entry) = self.entries.pop_front() {
            if entry.is_dead(now) {
                self.forget(&entry);
            } else if batch.len() < max && batch.first().is_none_or(|first| first.group() == entry.group()) {
                self.forget(&entry);
                batch.push(entry);
            } else {
                rest.push_back(entry);
                if batch.len() == max {
                    break;
                }
            }
        }
        rest.append(&mut self.entries);
        self.entries = rest;
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Image {
        id: usize,
        set: &'static str,
        backbone: u8,
        dead: bool,
        enqueued: Instant,
    }

    impl Entry for Image {
        type Group = u8;
        fn group(&self) -> u8 {
            self.backbone
        }
        fn set(&self) -> &str {
            self.set
        }
        fn bytes(&self) -> usize {
            10
        }
        fn enqueued(&self) -> Instant {
            self.enqueued
        }
        fn is_dead(&self, _: Instant) -> bool {
            self.dead
        }
    }

    fn image(id: usize, set: &'static str, backbone: u8) -> Image {
        Image { id, set, backbone, dead: false, enqueued: Instant::now() }
    }

    fn settings() -> QueueSettings {
        QueueSettings { images: 8, bytes: 1000, images_per_set: 6, max_batch: 3, max_wait: Duration::ZERO }
    }

    fn ids(batch: Option<Vec<Image>>) -> Vec<usize> {
        batch.unwrap().iter().map(|image| image.id).collect()
    }

    #[test]
    fn the_closing_rule() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        let patient = QueueSettings { max_wait: ms(10), ..settings() };
        let cases = [
            ("nothing waits", None, 0, false, Duration::ZERO, Decision::Sleep),
            ("no added delay by default", Some(now), 1, false, Duration::ZERO, Decision::Close),
            ("company may still come", Some(now), 1, false, ms(10), Decision::WaitUntil(now + ms(10))),
            ("full", Some(now), 3, false, ms(10), Decision::Close),
            ("waited long enough", Some(now - ms(10)), 1, false, ms(10), Decision::Close),
            ("nobody else will come", Some(now), 1, true, ms(10), Decision::Close),
        ];
        for (what, oldest, waiting, closed, max_wait, expected) in cases {
            let settings = QueueSettings { max_wait, ..patient };
            assert_eq!(decide(oldest, waiting, closed, &settings, now), expected, "{what}");
        }
    }

    #[test]
    fn a_batch_mixes_sets_of_one_backbone_oldest_first() {
        let queue = Queue::new(settings());
        for (id, set, backbone) in [(0, "a", 1), (1, "x", 2), (2, "b", 1), (3, "c", 1), (4, "a", 1), (5, "x", 2)] {
            queue.push_all(vec![image(id, set, backbone)]).unwrap();
        }
        assert_eq!(ids(queue.next_batch()), [0, 2, 3]);
        assert_eq!(ids(queue.next_batch()), [1, 5]);
        assert_eq!(ids(queue.next_batch()), [4]);
        assert_eq!(queue.depth(), (0, 0));
    }

    #[test]
    fn guarantee_11_one_set_cannot_fill_the_queue() {
        let queue = Queue::new(settings());
        queue.push_all((0..6).map(|id| image(id, "hot", 1)).collect()).unwrap();
        assert_eq!(queue.push_all(vec![image(6, "hot", 1)]), Err(Rejected::SetFull));
        queue.push_all(vec![image(7, "other", 1)]).unwrap();
    }

    #[test]
    fn guarantee_12_limits_count_images_and_take_all_or_none() {
        let queue = Queue::new(settings());
        queue.push_all((0..5).map(|id| image(id, "a", 1)).collect()).unwrap();
        assert_eq!(queue.push_all((5..9).map(|id| image(id, "b", 1)).collect()), Err(Rejected::Full));
        assert_eq!(queue.depth(), (5, 50));
        let small = Queue::new(QueueSettings { bytes: 25, ..settings() });
        assert_eq!(small.push_all((0..3).map(|id| image(id, "a", 1)).collect()), Err(Rejected::Full));
        assert_eq!(small.push_all(vec![]), Ok(()));
    }

    #[test]
    fn the_dead_are_neither_run_nor_in_the_way() {
        let queue = Queue::new(settings());
        queue.push_all((0..6).map(|id| Image { dead: true, ..image(id, "a", 1) }).collect()).unwrap();
        queue.push_all((6..9).map(|id| image(id, "a", 1)).collect()).unwrap();
        queue.push_all(vec![Image { dead: true, ..image(9, "b", 1) }, image(10, "b", 1)]).unwrap();
        assert_eq!(ids(queue.next_batch()), [6, 7, 8]);
        assert_eq!(ids(queue.next_batch()), [10]);
    }

    #[test]
    fn a_closed_queue_drains() {
        let queue = Queue::new(settings());
        queue.push_all((0..4).map(|id| image(id, "a", 1)).collect()).unwrap();
        queue.close();
        assert_eq!(queue.push_all(vec![image(9, "a", 1)]), Err(Rejected::Closed));
        assert_eq!(ids(queue.next_batch()), [0, 1, 2]);
        assert_eq!(ids(queue.next_batch()), [3]);
        assert!(queue.next_batch().is_none());
    }

    #[test]
    fn many_threads_lose_and_repeat_nothing() {
        let queue = Queue::new(QueueSettings { images: 10_000, bytes: usize::MAX, images_per_set: 10_000, ..settings() });
        let takers: Vec<_> = (0..4)
            .map(|_| {
                let queue = queue.clone();
                std::thread::spawn(move || std::iter::from_fn(|| queue.next_batch()).flatten().map(|i| i.id).collect::<Vec<_>>())
            })
            .collect();
        for id in 0..1000 {
            queue.push_all(vec![image(2 * id, "a", 1), image(2 * id + 1, "b", 2)]).unwrap();
        }
        queue.close();
        let mut seen: Vec<usize> = takers.into_iter().flat_map(|taker| taker.join().unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..2000).collect::<Vec<_>>());
    }
}
