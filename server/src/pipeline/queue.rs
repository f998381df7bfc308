//! The queue between requests and compute threads, and the rule by which a batch closes. How much it may hold is decided
//! before images are decoded, by [`crate::admission`].

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How batches form.
#[derive(Debug, Clone, Copy)]
pub struct QueueSettings {
    /// Most images in a batch.
    pub max_batch: usize,
    /// How long the oldest image may wait for company.
    pub max_wait: Duration,
    /// Threads that take batches.
    pub threads: usize,
}

/// The server is shutting down: nothing was queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server is shutting down")]
pub struct Closed;

/// What the queue needs to know of its entries.
pub trait Entry {
    /// What may share a batch.
    type Group: PartialEq;

    /// Entries of one group may share a batch.
    fn group(&self) -> Self::Group;
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

impl QueueSettings {
    /// How many of the `waiting` images a free thread takes: what fills a batch, but no more than its share when there
    /// are fewer than fill one for every thread. One thread with all of them would leave the others idle. Images that
    /// were made to wait for company stay together.
    pub fn batch_of(&self, waiting: usize) -> usize {
        let share = if self.max_wait.is_zero() { waiting.div_ceil(self.threads.max(1)) } else { waiting };
        share.clamp(1, self.max_batch.max(1))
    }
}

/// The closing rule: a batch closes when it is full, when its oldest entry has waited long enough, or when no more
/// entries will come. With `max_wait` zero that is as soon as a compute thread is free.
pub fn decide(
    oldest: Option<Instant>,
    waiting: usize,
    closed: bool,
    settings: &QueueSettings,
    now: Instant,
) -> Decision {
    let Some(oldest) = oldest else { return Decision::Sleep };
    let due = oldest + settings.max_wait;
    if closed || waiting >= settings.max_batch || due <= now { Decision::Close } else { Decision::WaitUntil(due) }
}

struct State<E> {
    entries: VecDeque<E>,
    closed: bool,
}

/// A first-in-first-out queue that hands out batches; clones share it.
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
        let state = State { entries: VecDeque::new(), closed: false };
        Self { shared: Arc::new((Mutex::new(state), Condvar::new())), settings }
    }

    /// Queues all of `entries` or none of them.
    ///
    /// # Errors
    /// [`Closed`].
    pub fn push_all(&self, entries: Vec<E>) -> Result<(), Closed> {
        let mut state = self.lock();
        if state.closed {
            return Err(Closed);
        }
        state.entries.extend(entries);
        drop(state);
        self.shared.1.notify_one();
        Ok(())
    }

    /// Drops entries that nobody waits for.
    pub fn drop_dead(&self) {
        let now = Instant::now();
        self.lock().entries.retain(|entry| !entry.is_dead(now));
    }

    /// Blocks until a batch closes: entries of one group, oldest first, dead ones dropped. `None` once the queue is
    /// closed and empty.
    pub fn next_batch(&self) -> Option<Vec<E>> {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let oldest = state.entries.front().map(E::enqueued);
            let group = state.entries.front().map(E::group);
            let waiting = state.entries.iter().filter(|entry| Some(entry.group()) == group).count();
            match decide(oldest, waiting, state.closed, &self.settings, now) {
                Decision::Close => {
                    let batch = state.take_batch(self.settings.batch_of(waiting), now);
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

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: Entry> State<E> {
    /// Up to `max` live entries of the oldest live entry's group; dead ones met on the way are dropped.
    fn take_batch(&mut self, max: usize, now: Instant) -> Vec<E> {
        let mut batch: Vec<E> = Vec::new();
        let mut rest = VecDeque::with_capacity(self.entries.len());
        while let Some(entry) = self.entries.pop_front() {
            if entry.is_dead(now) {
                drop(entry);
            } else if batch.len() < max && batch.first().is_none_or(|first| first.group() == entry.group()) {
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
        backbone: u8,
        dead: bool,
        enqueued: Instant,
    }

    impl Entry for Image {
        type Group = u8;
        fn group(&self) -> u8 {
            self.backbone
        }
        fn enqueued(&self) -> Instant {
            self.enqueued
        }
        fn is_dead(&self, _: Instant) -> bool {
            self.dead
        }
    }

    fn image(id: usize, backbone: u8) -> Image {
        Image { id, backbone, dead: false, enqueued: Instant::now() }
    }

    fn settings() -> QueueSettings {
        QueueSettings { max_batch: 3, max_wait: Duration::ZERO, threads: 1 }
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
    fn a_batch_is_of_one_backbone_oldest_first() {
        let queue = Queue::new(settings());
        for (id, backbone) in [(0, 1), (1, 2), (2, 1), (3, 1), (4, 1), (5, 2)] {
            queue.push_all(vec![image(id, backbone)]).unwrap();
        }
        assert_eq!(ids(queue.next_batch()), [0, 2, 3]);
        assert_eq!(ids(queue.next_batch()), [1, 5]);
        assert_eq!(ids(queue.next_batch()), [4]);
        assert!(queue.lock().entries.is_empty());
    }

    #[test]
    fn a_thread_takes_no_more_than_its_share() {
        let queue = Queue::new(QueueSettings { threads: 2, ..settings() });
        queue.push_all((0..9).map(|id| image(id, 1)).collect()).unwrap();
        let batches: Vec<_> = (0..4).map(|_| ids(queue.next_batch())).collect();
        assert_eq!(batches, [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7], vec![8]]);
        let patient = Queue::new(QueueSettings { max_wait: Duration::from_millis(1), ..queue.settings });
        patient.push_all(vec![image(0, 1), image(1, 1)]).unwrap();
        assert_eq!(ids(patient.next_batch()), [0, 1]);
    }

    #[test]
    fn the_dead_are_neither_run_nor_in_the_way() {
        let queue = Queue::new(settings());
        queue.push_all((0..6).map(|id| Image { dead: true, ..image(id, 1) }).collect()).unwrap();
        queue.push_all((6..9).map(|id| image(id, 1)).collect()).unwrap();
        queue.push_all(vec![Image { dead: true, ..image(9, 1) }, image(10, 1)]).unwrap();
        assert_eq!(ids(queue.next_batch()), [6, 7, 8]);
        assert_eq!(ids(queue.next_batch()), [10]);
    }

    #[test]
    fn a_closed_queue_drains() {
        let queue = Queue::new(settings());
        queue.push_all((0..4).map(|id| image(id, 1)).collect()).unwrap();
        queue.close();
        assert_eq!(queue.push_all(vec![image(9, 1)]), Err(Closed));
        assert_eq!(ids(queue.next_batch()), [0, 1, 2]);
        assert_eq!(ids(queue.next_batch()), [3]);
        assert!(queue.next_batch().is_none());
    }

    #[test]
    fn many_threads_lose_and_repeat_nothing() {
        let queue: Queue<Image> = Queue::new(settings());
        let takers: Vec<_> = (0..4)
            .map(|_| {
                let queue = queue.clone();
                std::thread::spawn(move || {
                    std::iter::from_fn(|| queue.next_batch()).flatten().map(|i| i.id).collect::<Vec<_>>()
                })
            })
            .collect();
        for id in 0..1000 {
            queue.push_all(vec![image(2 * id, 1), image(2 * id + 1, 2)]).unwrap();
        }
        queue.close();
        let mut seen: Vec<usize> = takers.into_iter().flat_map(|taker| taker.join().unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..2000).collect::<Vec<_>>());
    }
}
