//! What the registry asks of threads and time, in one place, so that the tests can put a model checker there.

use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::threads::{BlockingPool, Panicked};

#[cfg(test)]
use super::schedules;

/// Locks `mutex`. Every change made under the registry's locks leaves the state consistent at each step, so one that a
/// panic poisoned is usable.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    #[cfg(test)]
    if schedules::is_running() {
        return schedules::lock(mutex);
    }
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a task of its own.
pub(super) fn spawn(task: impl Future<Output = ()> + Send + 'static) {
    #[cfg(test)]
    if schedules::is_running() {
        return drop(shuttle::future::spawn(task));
    }
    drop(tokio::spawn(task));
}

/// The future's outcome, unless `limit` passes first.
pub(super) async fn wait_at_most<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    #[cfg(test)]
    if schedules::is_running() {
        // Time never passes in the model: whoever waits there must be woken.
        return Some(future.await);
    }
    tokio::time::timeout(limit, future).await.ok()
}

/// Runs blocking work on `pool`.
pub(super) async fn run_blocking<T: Send + 'static>(
    pool: &BlockingPool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Panicked> {
    #[cfg(test)]
    if schedules::is_running() {
        shuttle::future::yield_now().await;
        return Ok(work());
    }
    pool.run(work).await
}
