//! Blocking work on threads of its own, away from the async ones.

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use tokio::sync::oneshot;

/// Added to the niceness of background threads. Beside busy compute threads they get about a quarter of a core: loads
/// go on, and those who wait for answers of resident sets hardly notice.
const BACKGROUND_NICENESS: i32 = 5;

/// The work panicked: a bug, but one that must not take the server down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the blocking task panicked")]
pub struct Panicked;

/// How a pool's threads stand to the rest of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// A request waits for the outcome, and nothing but it does.
    Normal,
    /// Gives way to other threads.
    Background,
}

type Work = Box<dyn FnOnce() + Send>;

/// Runs closures on a fixed number of threads, in the order in which they come. Each kind of work has its own pool, so
/// that a slow load holds up no decoding and the other way round. The threads live as long as the pool, and number
/// few: the C library's allocator keeps a heap per thread, and heaps that large buffers have passed through stay large.
#[derive(Debug, Clone)]
pub struct BlockingPool {
    queue: mpsc::Sender<Work>,
}

impl BlockingPool {
    /// Starts `threads` threads, at least one, named after `kind`.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(kind: &str, threads: usize, priority: Priority) -> io::Result<Self> {
        let (queue, work) = mpsc::channel::<Work>();
        let work = Arc::new(Mutex::new(work));
        for index in 0..threads.max(1) {
            let work = Arc::clone(&work);
            let run = move || {
                if priority == Priority::Background {
                    // Where it is not allowed, loads only disturb more.
                    let _ = rustix::process::nice(BACKGROUND_NICENESS);
                }
                // The lock is held while waiting, and given up before the work is done.
                let next = || work.lock().unwrap_or_else(PoisonError::into_inner).recv();
                while let Ok(work) = next() {
                    work();
                }
            };
            std::thread::Builder::new().name(format!("bvit-{kind}-{index}")).spawn(run)?;
        }
        Ok(Self { queue })
    }

    /// Runs `work` once a thread is free. Work that has begun goes on to its end when the caller goes away; work that
    /// has not is dropped.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
        self.run_watched(|_| work()).await
    }

    /// As [`run`](Self::run), with work that can ask whether its caller has gone, as one does whose deadline has passed.
    pub async fn run_watched<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Fn() -> bool) -> T + Send + 'static,
    ) -> Result<T, Panicked> {
        let (reply, answer) = oneshot::channel();
        let guarded = move || {
            if !reply.is_closed() {
                let result = std::panic::catch_unwind(AssertUnwindSafe(|| work(&|| reply.is_closed())));
                // A caller that has gone meanwhile is no error.
                let _ = reply.send(result);
            }
        };
        self.queue.send(Box::new(guarded)).map_err(|_| Panicked)?;
        answer.await.map_err(|_| Panicked)?.map_err(|_| Panicked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn no_more_than_its_threads_run_at_once() {
        let pool = BlockingPool::start("test", 2, Priority::Normal).unwrap();
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        // Nobody goes on alone.
        let both = Arc::new(Barrier::new(2));
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let (pool, running, most, both) =
                    (pool.clone(), Arc::clone(&running), Arc::clone(&most), Arc::clone(&both));
                tokio::spawn(async move {
                    let work = move || {
                        most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        both.wait();
                        running.fetch_sub(1, Ordering::SeqCst);
                    };
                    pool.run(work).await
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_frees_the_thread() {
        let pool = BlockingPool::start("test", 1, Priority::Background).unwrap();
        assert_eq!(pool.run(|| panic!("on purpose")).await, Err::<(), _>(Panicked));
        assert_eq!(pool.run(|| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_any_more_is_not_begun() {
        let pool = BlockingPool::start("test", 1, Priority::Normal).unwrap();
        let (begun, blocked) = (Arc::new(AtomicUsize::new(0)), Arc::new(std::sync::Barrier::new(2)));
        let first = tokio::spawn({
            let (pool, blocked) = (pool.clone(), Arc::clone(&blocked));
            async move { pool.run(move || blocked.wait()).await }
        });
        let second = tokio::spawn({
            let (pool, begun) = (pool.clone(), Arc::clone(&begun));
            async move { pool.run(move || begun.fetch_add(1, Ordering::SeqCst)).await }
        });
        tokio::task::yield_now().await;
        second.abort();
        assert!(second.await.is_err());
        blocked.wait();
        first.await.unwrap().unwrap();
        pool.run(|| ()).await.unwrap();
        assert_eq!(begun.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn work_learns_that_its_caller_has_gone() {
        let pool = BlockingPool::start("test", 1, Priority::Normal).unwrap();
        let begun = Arc::new(Barrier::new(2));
        let task = tokio::spawn({
            let (pool, begun) = (pool.clone(), Arc::clone(&begun));
            async move {
                let work = move |gone: &dyn Fn() -> bool| {
                    begun.wait();
                    while !gone() {
                        std::thread::yield_now();
                    }
                };
                pool.run_watched(work).await
            }
        });
        tokio::task::spawn_blocking(move || begun.wait()).await.unwrap();
        task.abort();
        assert!(task.await.is_err());
        // The thread is free again.
        pool.run(|| ()).await.unwrap();
    }
}
