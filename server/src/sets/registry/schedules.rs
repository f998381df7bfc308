//! The registry under a model checker: shuttle runs its tasks on one thread, decides at every lock and every `await`
//! who goes on, and tries many such schedules. Time stands still, so whoever is not woken waits for ever, which shuttle
//! reports as a deadlock.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};

use super::tests::{Fake, WAIT, registry, serve, set};
use super::{Kind, Registry, SetError};
use crate::sets::descriptor::SetDescriptor;

thread_local! {
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread runs a schedule of the checker.
pub(super) fn is_running() -> bool {
    RUNNING.get()
}

/// Locks `mutex`, letting others go first if the schedule has it so.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    loop {
        // While a panic unwinds, the schedule is over.
        if !std::thread::panicking() {
            shuttle::thread::yield_now();
        }
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(poisoned)) => return PoisonError::into_inner(poisoned),
            Err(TryLockError::WouldBlock) => {}
        }
    }
}

/// Runs `task` under so many random schedules.
fn check<F: Future<Output = ()> + 'static>(schedules: usize, task: impl Fn() -> F + Send + Sync + 'static) {
    struct Running;
    impl Drop for Running {
        fn drop(&mut self) {
            RUNNING.set(false);
        }
    }
    RUNNING.set(true);
    let _running = Running;
    shuttle::check_random(move || shuttle::future::block_on(task()), schedules);
}

/// A registry in which only events make room, never time.
fn timeless(room: usize) -> Registry<Fake> {
    registry(room, |settings| {
        settings.room_wait = Duration::from_secs(3600);
        settings.protect_unused = Duration::ZERO;
        settings.backoff = Duration::ZERO;
    })
}

fn within_budget(registry: &Registry<Fake>) {
    let budget = registry.budget();
    assert!(budget.total() <= budget.limit(), "{budget:?}");
}

/// The checker itself: a wait that nothing ends is found.
#[test]
#[should_panic(expected = "deadlock")]
fn whoever_is_never_woken_is_reported() {
    check(1, || async {
        let registry = timeless(50);
        for name in ["a", "b"] {
            registry.register(set(name, 1, 40)).unwrap();
        }
        let _held = registry.acquire("a", None, WAIT).await.unwrap();
        let _ = registry.acquire("b", None, WAIT).await;
    });
}

#[test]
fn guarantees_1_to_3_hold_in_every_schedule_of_calls() {
    check(1500, || async {
        // Room for two or three of the five sets at a time, so that most loads must evict or wait.
        let registry = timeless(100);
        for i in 0..5 {
            registry.register(set(&format!("s{i}"), 1, 30 + i)).unwrap();
        }
        let tasks: Vec<_> = (0..4)
            .map(|_| {
                let registry = registry.clone();
                shuttle::future::spawn(async move {
                    for _ in 0..3 {
                        let (i, action) = (thread_rng().gen_range(0..5), thread_rng().gen_range(0..10));
                        act(&registry, i, action).await;
                        within_budget(&registry);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        for name in registry.names() {
            registry.remove(&name, None).unwrap();
        }
        // Loads of sets that were deleted meanwhile may still be ending.
        while registry.budget().used(Kind::Sets) > 0 {
            shuttle::future::yield_now().await;
        }
    });
}

#[test]
fn lenders_are_loaded_once_and_outlive_their_borrowers_in_every_schedule() {
    check(500, || async {
        // Room for the lender with two of its four borrowers, or for the large set alone.
        let (registry, lender) = (timeless(60), set("lender", 1, 40));
        registry.register(lender.clone()).unwrap();
        for i in 0..4 {
            registry.register(SetDescriptor { lender: Some(lender.digest), ..set(&format!("b{i}"), 1, 10) }).unwrap();
        }
        registry.register(set("large", 1, 60)).unwrap();
        let tasks: Vec<_> = (0..4)
            .map(|_| {
                let registry = registry.clone();
                shuttle::future::spawn(async move {
                    for _ in 0..3 {
                        let name = ["b0", "b1", "b2", "b3", "lender", "large"][thread_rng().gen_range(0..6)];
                        match thread_rng().gen_range(0..6) {
                            0 => registry.unload(name).unwrap(),
                            1 => assert!(matches!(registry.remove("lender", None), Err(SetError::Conflict(_)))),
                            _ => drop(serve(&registry, name).await.unwrap()),
                        }
                        within_budget(&registry);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        for name in ["b0", "b1", "b2", "b3", "large", "lender"] {
            registry.remove(name, None).unwrap();
        }
        while registry.budget().used(Kind::Sets) > 0 {
            shuttle::future::yield_now().await;
        }
    });
}

/// One call; any outcome that the state allows will do.
async fn act(registry: &Registry<Fake>, i: usize, action: u32) {
    let name = format!("s{i}");
    match action {
        0..4 => match serve(registry, &name).await {
            // Deleted, or larger than what pins leave.
            Ok(_) | Err(SetError::Unknown { .. } | SetError::TooLarge { .. }) => {}
            Err(error) => panic!("{error}"),
        },
        4 => drop(registry.load(&name, None, WAIT).await),
        5 => drop(registry.unload(&name)),
        6 => {
            if registry.pin(&name, WAIT).await.is_ok() {
                within_budget(registry);
                // Deleted meanwhile only if it was not pinned at that moment; it is unknown then.
                let _ = registry.unpin(&name);
            }
        }
        7 => {
            let version = thread_rng().gen_range(2..5);
            registry.register(set(&name, version, 20 + i)).unwrap();
        }
        8 => drop(registry.remove(&name, None)),
        _ => {
            // A batch at work: what it holds stays accounted, whatever happens meanwhile.
            if let Ok(lease) = registry.acquire(&name, None, WAIT).await {
                shuttle::future::yield_now().await;
                assert!(registry.budget().used(Kind::Sets) >= lease.value);
                lease.mark_served();
            }
        }
    }
}

#[test]
fn guarantee_3_those_who_wait_for_room_are_woken_in_every_schedule() {
    check(1500, || async {
        // Only one set fits at a time.
        let registry = timeless(50);
        for i in 0..3 {
            registry.register(set(&format!("s{i}"), 1, 40)).unwrap();
        }
        let tasks: Vec<_> = (0..3)
            .map(|i| {
                let registry = registry.clone();
                shuttle::future::spawn(async move {
                    for _ in 0..2 {
                        assert_eq!(serve(&registry, &format!("s{i}")).await, Ok(1));
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn guarantee_4_every_schedule_of_requests_loads_cold_sets_and_their_backbone_once() {
    check(1000, || async {
        let registry = timeless(100);
        let names = ["a", "b", "a", "b"];
        for name in &names[..2] {
            registry.register(set(name, 1, 10)).unwrap();
        }
        let tasks: Vec<_> = names
            .into_iter()
            .map(|name| {
                let registry = registry.clone();
                shuttle::future::spawn(async move { serve(&registry, name).await })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap(), Ok(1));
        }
        assert_eq!((registry.source().loads(), registry.source().backbone_loads()), (2, 1));
    });
}

#[test]
fn guarantee_8_no_schedule_gives_an_older_generation_after_a_load() {
    check(1000, || async {
        let registry = timeless(60);
        registry.register(set("s", 1, 10)).unwrap();
        let clients: Vec<_> = (0..2)
            .map(|_| {
                let registry = registry.clone();
                shuttle::future::spawn(async move {
                    let mut newest = 0;
                    for _ in 0..4 {
                        let version = serve(&registry, "s").await.unwrap();
                        assert!(version >= newest, "version {version} after {newest}");
                        newest = version;
                    }
                })
            })
            .collect();
        for version in 2..4 {
            registry.register(set("s", version, 10)).unwrap();
            let loaded = registry.load("s", None, WAIT).await.unwrap().descriptor.version;
            assert_eq!(loaded, version);
            assert!(serve(&registry, "s").await.unwrap() >= version);
        }
        for client in clients {
            client.await.unwrap();
        }
        assert_eq!(registry.lookup("s", None).unwrap().set.version, 3);
    });
}
