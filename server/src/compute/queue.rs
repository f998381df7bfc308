//! The queue between requests and compute threads, and the rule by which a batch closes. How much it may hold is decided
//! before images are decoded, by [`crate::admission`].

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    /// Whether the client has gone.
    fn is_dead(&self, now: Instant) -> bool;
}

/// What a free compute thread should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing waits.
    Sleep,
    /// Wait for company until then.
    WaitUntil(Instant),
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

/// What a thread is to do next.
#[derive(Debug)]
pub enum Work<'a, E> {
    /// Run these entries, of one group.
    Batch {
        /// Oldest first.
        entries: Vec<E>,
        /// To be dropped when they have run.
        running: Running<'a, E>,
    },
    /// Nothing waits, and others run batches that can be helped with.
    Help,
}

/// A batch that runs, until dropped.
pub struct Running<'a, E> {
    queue: &'a Queue<E>,
    wants_help: bool,
}

impl<E> Running<'_, E> {
    /// Whether there are threads that nothing waits for. They are told to help until this is dropped.
    pub fn wants_help(&self) -> bool {
        self.wants_help
    }
}

impl<E> Drop for Running<'_, E> {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.running -= 1;
        state.want_help -= usize::from(self.wants_help);
    }
}

impl<E> std::fmt::Debug for Running<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("wants_help", &self.wants_help).finish()
    }
}

struct State<E> {
    entries: VecDeque<E>,
    /// Batches that threads are running.
    running: usize,
    /// Those of them that want help.
    want_help: usize,
    closed: bool,
}

struct Shared<E> {
    state: Mutex<State<E>>,
    changed: Condvar,
    /// Number of entries, for those who look without the lock.
    waiting: AtomicUsize,
}

/// A first-in-first-out queue that hands out batches, and sends threads that would sleep otherwise to help; clones
/// share it.
pub struct Queue<E> {
    shared: Arc<Shared<E>>,
    settings: QueueSettings,
}

impl<E> Clone for Queue<E> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), settings: self.settings }
    }
}

impl<E> Queue<E> {
    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: Entry> Queue<E> {
    pub fn new(settings: QueueSettings) -> Self {
        let state = State { entries: VecDeque::new(), running: 0, want_help: 0, closed: false };
        let shared = Shared { state: Mutex::new(state), changed: Condvar::new(), waiting: AtomicUsize::new(0) };
        Self { shared: Arc::new(shared), settings }
    }

    /// Whether entries wait: a thread that helps should come back.
    pub fn has_waiting(&self) -> bool {
        self.shared.waiting.load(Ordering::Relaxed) > 0
    }

    /// For those who look without the lock.
    fn count(&self, state: &State<E>) {
        self.shared.waiting.store(state.entries.len(), Ordering::Relaxed);
    }

    /// Queues all of `entries` or none of them.
    pub fn push_all(&self, entries: Vec<E>) -> Result<(), Closed> {
        let mut state = self.lock();
        if state.closed {
            return Err(Closed);
        }
        state.entries.extend(entries);
        self.count(&state);
        drop(state);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Drops entries that nobody waits for.
    pub fn drop_dead(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        let (dead, live): (VecDeque<E>, _) =
            std::mem::take(&mut state.entries).into_iter().partition(|e| e.is_dead(now));
        state.entries = live;
        self.count(&state);
        drop(state);
        // Without the lock: what they hold may take a while to free.
        drop(dead);
    }

    /// Blocks until a batch closes (entries of one group, oldest first, dead ones dropped) or, while nothing
    /// waits, a batch wants help. `None` once the queue is closed and empty. While an image waits for
    /// company ([`QueueSettings::max_wait`]), nobody helps.
    pub fn next(&self) -> Option<Work<'_, E>> {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let oldest = state.entries.front().map(E::enqueued);
            let group = state.entries.front().map(E::group);
            let waiting = state.entries.iter().filter(|entry| Some(entry.group()) == group).count();
            match decide(oldest, waiting, state.closed, &self.settings, now) {
                Decision::Close => {
                    let (entries, dead) = state.take_batch(self.settings.batch_of(waiting), now);
                    self.count(&state);
                    // One wake-up per push is not enough when a push brought more than one batch.
                    if !state.entries.is_empty() {
                        self.shared.changed.notify_one();
                    }
                    let running = (!entries.is_empty()).then(|| self.run(&mut state, entries.len()));
                    drop(state);
                    // Without the lock: what they hold may take a while to free.
                    drop(dead);
                    if let Some(running) = running {
                        return Some(Work::Batch { entries, running });
                    }
                    state = self.lock();
                }
                Decision::Sleep if state.closed => return None,
                Decision::Sleep => {
                    if state.want_help > 0 {
                        return Some(Work::Help);
                    }
                    state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Decision::WaitUntil(due) => {
                    let wait = due.saturating_duration_since(now);
                    state = self.shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Counts a batch of `len` entries that begins to run, and wakes the others when it wants help.
    fn run(&self, state: &mut State<E>, len: usize) -> Running<'_, E> {
        state.running += 1;
        // More than one means that there is work for the others, or that images wait for company.
        let wants_help = state.entries.is_empty() && len == 1 && state.running < self.settings.threads;
        if wants_help {
            state.want_help += 1;
            self.shared.changed.notify_all();
        }
        Running { queue: self, wants_help }
    }

    /// Refuses new entries; what waits is still handed out.
    pub fn close(&self) {
        self.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl<E: Entry> State<E> {
    /// Up to `max` live entries of the oldest live entry's group, and the dead ones met on the way.
    fn take_batch(&mut self, max: usize, now: Instant) -> (Vec<E>, Vec<E>) {
        let (mut batch, mut dead): (Vec<E>, Vec<E>) = (Vec::new(), Vec::new());
        let mut rest = VecDeque::with_capacity(self.entries.len());
        while let Some(entry) = self.entries.pop_front() {
            if entry.is_dead(now) {
                dead.push(entry);
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
        (batch, dead)
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

    type TestQueue = Queue<Image>;

    fn entries(work: Work<'_, Image>) -> Vec<Image> {
        match work {
            Work::Batch { entries, .. } => entries,
            Work::Help => panic!("asked to help"),
        }
    }

    fn ids(work: Option<Work<'_, Image>>) -> Vec<usize> {
        entries(work.unwrap()).iter().map(|image| image.id).collect()
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
        let queue = TestQueue::new(settings());
        for (id, backbone) in [(0, 1), (1, 2), (2, 1), (3, 1), (4, 1), (5, 2)] {
            queue.push_all(vec![image(id, backbone)]).unwrap();
        }
        assert_eq!(ids(queue.next()), [0, 2, 3]);
        assert_eq!(ids(queue.next()), [1, 5]);
        assert_eq!(ids(queue.next()), [4]);
        assert!(queue.lock().entries.is_empty());
    }

    #[test]
    fn a_thread_takes_no_more_than_its_share() {
        let queue = TestQueue::new(QueueSettings { threads: 2, ..settings() });
        queue.push_all((0..9).map(|id| image(id, 1)).collect()).unwrap();
        let batches: Vec<_> = (0..4).map(|_| ids(queue.next())).collect();
        assert_eq!(batches, [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7], vec![8]]);
        let patient = TestQueue::new(QueueSettings { max_wait: Duration::from_millis(1), ..queue.settings });
        patient.push_all(vec![image(0, 1), image(1, 1)]).unwrap();
        assert_eq!(ids(patient.next()), [0, 1]);
    }

    #[test]
    fn the_dead_are_neither_run_nor_in_the_way() {
        let queue = TestQueue::new(settings());
        queue.push_all((0..6).map(|id| Image { dead: true, ..image(id, 1) }).collect()).unwrap();
        queue.push_all((6..9).map(|id| image(id, 1)).collect()).unwrap();
        queue.push_all(vec![Image { dead: true, ..image(9, 1) }, image(10, 1)]).unwrap();
        assert_eq!(ids(queue.next()), [6, 7, 8]);
        assert_eq!(ids(queue.next()), [10]);
    }

    #[test]
    fn a_closed_queue_drains() {
        let queue = TestQueue::new(settings());
        queue.push_all((0..4).map(|id| image(id, 1)).collect()).unwrap();
        queue.close();
        assert_eq!(queue.push_all(vec![image(9, 1)]), Err(Closed));
        assert_eq!(ids(queue.next()), [0, 1, 2]);
        assert_eq!(ids(queue.next()), [3]);
        assert!(queue.next().is_none());
    }

    #[test]
    fn idle_threads_help_while_a_batch_wants_it_and_entries_go_first() {
        let queue = TestQueue::new(QueueSettings { threads: 3, ..settings() });
        let take = |id| {
            queue.push_all(vec![image(id, 1)]).unwrap();
            match queue.next() {
                Some(Work::Batch { running, .. }) => running,
                other => panic!("{other:?}"),
            }
        };
        let is_help = || matches!(queue.next(), Some(Work::Help));
        let (first, second) = (take(0), take(1));
        assert!(first.wants_help() && second.wants_help());
        let third = take(2);
        assert!(!third.wants_help(), "every thread has a batch");
        drop(third);
        assert!(is_help());
        drop(first);
        assert!(is_help());
        assert!(!queue.has_waiting());
        queue.push_all(vec![image(3, 1)]).unwrap();
        assert!(queue.has_waiting());
        assert_eq!(ids(queue.next()), [3]);
        assert!(!queue.has_waiting());
        queue.push_all(vec![Image { dead: true, ..image(4, 1) }]).unwrap();
        queue.drop_dead();
        assert!(!queue.has_waiting());
        queue.close();
        assert!(queue.next().is_none(), "nobody helps in a server that ends");
        drop(second);
    }

    #[test]
    fn a_batch_wants_help_only_from_threads_with_nothing_to_run() {
        let queue = TestQueue::new(QueueSettings { max_batch: 1, threads: 2, ..settings() });
        let take = || match queue.next() {
            Some(Work::Batch { running, .. }) => running,
            other => panic!("{other:?}"),
        };
        queue.push_all((0..2).map(|id| image(id, 1)).collect()).unwrap();
        let (first, second) = (take(), take());
        assert!(!first.wants_help(), "the other thread has an image to run");
        assert!(!second.wants_help(), "the other thread runs one");
        drop(first);
        drop(second);
        queue.push_all(vec![image(2, 1)]).unwrap();
        assert!(take().wants_help());
    }

    #[test]
    fn many_threads_lose_and_repeat_nothing() {
        let queue = TestQueue::new(settings());
        let takers: Vec<_> = (0..4)
            .map(|_| {
                let queue = queue.clone();
                std::thread::spawn(move || {
                    std::iter::from_fn(|| queue.next()).flat_map(entries).map(|i| i.id).collect::<Vec<_>>()
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
