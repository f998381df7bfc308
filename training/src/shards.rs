//! The loop over shards: threads take items in turn, and results come back in the order of the items.

use std::sync::Mutex;

/// What `work` makes of every item, in the order of the items, on `threads` threads that take them in turn.
///
/// # Errors
/// The first error in the order of the items, once every item is done.
pub fn in_turn<T: Send, R: Send, E: Send>(
    threads: usize,
    items: Vec<T>,
    work: impl Fn(T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    const WHOLE: &str = "no thread panics while it holds the lock";
    let results: Vec<Mutex<Option<Result<R, E>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let todo = Mutex::new(items.into_iter().zip(&results));
    let work = || {
        loop {
            let taken = todo.lock().expect(WHOLE).next();
            let Some((item, result)) = taken else { break };
            let done = work(item);
            *result.lock().expect(WHOLE) = Some(done);
        }
    };
    std::thread::scope(|scope| {
        (0..threads.clamp(1, results.len().max(1))).for_each(|_| drop(scope.spawn(work)));
    });
    drop(todo);
    results.into_iter().filter_map(|result| result.into_inner().expect(WHOLE)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items_and_the_first_error_wins() {
        for threads in [0, 1, 3, 20] {
            let squares = in_turn(threads, (0..10).collect(), |i: u32| Ok::<_, ()>(i * i));
            assert_eq!(squares, Ok((0..10).map(|i| i * i).collect()));
            let failed = in_turn(threads, (0..10).collect(), |i: u32| if i % 4 == 3 { Err(i) } else { Ok(()) });
            assert_eq!(failed, Err(3));
        }
        assert_eq!(in_turn(2, Vec::new(), |(): ()| Ok::<(), ()>(())), Ok(Vec::new()));
    }
}
