//! The registry's guarantees, on models that cost nothing to make. The numbers are those of the serving contract.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use model_core::artifact::Digest;
use model_core::config::ViTConfig;
use proptest::prelude::*;

use super::*;
use crate::metrics::Metrics;
use crate::pages::Included;
use crate::threads::Priority;

/// For what ends by itself; longer than any machine stands still.
pub(super) const WAIT: Duration = Duration::from_secs(60);

/// A source whose sets are numbers: their size. It counts loads and can be told to be slow or to fail.
#[derive(Default)]
pub(super) struct Fake {
    loads: AtomicUsize,
    backbone_loads: AtomicUsize,
    failing: Mutex<HashMap<String, String>>,
    /// Loads that take so long, or until the entry is removed.
    slow: Mutex<HashMap<String, Duration>>,
    /// What sets make the scratch grow by.
    growth: Mutex<HashMap<String, usize>>,
}

impl Fake {
    pub(super) fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }

    pub(super) fn backbone_loads(&self) -> usize {
        self.backbone_loads.load(Ordering::SeqCst)
    }
}

impl Source for Fake {
    type Backbone = ();
    type Set = usize;

    fn describe_set(&self, name: &str, version: u64, location: &Location) -> anyhow::Result<SetDescriptor> {
        let bytes = std::fs::read_to_string(location.to_string())?;
        let size = bytes.trim().parse().with_context(|| location.to_string())?;
        Ok(SetDescriptor { location: location.clone(), stamp: location.stamp().unwrap(), ..set(name, version, size) })
    }

    fn load_backbone(&self, descriptor: &BackboneDescriptor) -> anyhow::Result<Loaded<()>> {
        self.backbone_loads.fetch_add(1, Ordering::SeqCst);
        Ok(Loaded { value: (), bytes: descriptor.resident_bytes })
    }

    fn load_set(
        &self,
        descriptor: &SetDescriptor,
        _: &Arc<()>,
        lender: Option<&usize>,
    ) -> anyhow::Result<Loaded<usize>> {
        assert_eq!(lender.is_some(), descriptor.lender.is_some());
        self.loads.fetch_add(1, Ordering::SeqCst);
        let started = Instant::now();
        let waiting = |delay: &Duration| started.elapsed() < *delay;
        while self.slow.lock().unwrap().get(&descriptor.name).is_some_and(waiting) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Some(reason) = self.failing.lock().unwrap().get(&descriptor.name) {
            bail!("{reason}");
        }
        Ok(Loaded { value: descriptor.resident_bytes, bytes: descriptor.resident_bytes })
    }

    fn scratch(&self, (): &()) -> usize {
        10
    }

    fn scratch_growth(&self, set: &SetDescriptor, _: &BackboneDescriptor) -> usize {
        self.growth.lock().unwrap().get(&set.name).copied().unwrap_or(0)
    }

    fn shrink_scratch((): &()) {}
}

fn digest(of: &str) -> Digest {
    Digest::of(of, &[])
}

pub(super) fn set(name: &str, version: u64, resident_bytes: usize) -> SetDescriptor {
    SetDescriptor {
        name: name.to_owned(),
        version,
        digest: digest(&format!("{name} {version} {resident_bytes}")),
        backbone: digest("backbone"),
        lender: None,
        resident_bytes,
        loading_bytes: 0,
        file_bytes: 1,
        experts: ViTConfig::preset("tiny").unwrap().experts,
        num_classes: 1,
        location: Location::Embedded(Included::default()),
        stamp: None,
    }
}

fn backbone(name: &str) -> BackboneDescriptor {
    BackboneDescriptor {
        name: name.to_owned(),
        digest: digest(name),
        resident_bytes: 90,
        loading_bytes: 0,
        config: ViTConfig::preset("tiny").unwrap().backbone,
        location: Location::Embedded(Included::default()),
    }
}

/// A registry whose backbone and scratch take 100 bytes, with `room` bytes left for sets.
pub(super) fn registry(room: usize, adjust: impl FnOnce(&mut Settings)) -> Registry<Fake> {
    let mut settings = Settings {
        budget_bytes: 100 + room,
        room_wait: Duration::from_millis(200),
        protect_unused: Duration::from_millis(50),
        backoff: Duration::from_millis(50),
        ..Settings::default()
    };
    adjust(&mut settings);
    let loader = BlockingPool::start("load", 2, Priority::Normal).unwrap();
    let registry =
        Registry::new(Fake::default(), settings, loader, Metrics::new(false).unwrap().sets().clone()).unwrap();
    registry.register_backbone(backbone("backbone"));
    registry
}

/// Uses a set as a batch would.
pub(super) async fn serve(registry: &Registry<Fake>, name: &str) -> Result<u64, SetError> {
    let lease = registry.acquire(name, None, WAIT).await?;
    lease.mark_served();
    Ok(lease.descriptor.version)
}

fn resident(registry: &Registry<Fake>, name: &str) -> bool {
    registry.status(name).unwrap().iter().any(|status| status.state == SetState::Resident)
}

#[tokio::test]
async fn guarantee_1_bytes_are_reserved_before_loading_and_never_exceed_the_budget() {
    let registry = registry(100, |_| ());
    for i in 0..10 {
        registry.register(set(&format!("s{i}"), 1, 30)).unwrap();
    }
    for i in 0..10 {
        serve(&registry, &format!("s{i}")).await.unwrap();
        assert!(registry.budget().total() <= 200);
    }
    assert_eq!(registry.totals().resident, 3);
}

#[tokio::test]
async fn guarantee_1_a_replacement_that_does_not_fit_beside_the_old_is_507_and_keeps_the_old() {
    let registry = registry(100, |_| ());
    registry.register(set("s", 1, 60)).unwrap();
    serve(&registry, "s").await.unwrap();
    registry.register(set("s", 2, 60)).unwrap();
    assert!(matches!(registry.load("s", None, WAIT).await, Err(SetError::TooLarge { .. })));
    assert_eq!(serve(&registry, "s").await, Ok(1));
}

#[tokio::test]
async fn guarantee_1_scratch_that_sets_make_grow_is_counted_once_and_comes_back() {
    let registry = registry(100, |_| ());
    for (name, growth) in [("usual", 0), ("wide", 30), ("wider", 40), ("too wide", 200)] {
        registry.register(set(name, 1, 10)).unwrap();
        registry.source().growth.lock().unwrap().insert(name.into(), growth);
    }
    let scratch = || registry.budget().used(Kind::Scratch);
    for (name, used) in [("usual", 10), ("wide", 40), ("wider", 50), ("wide", 50)] {
        serve(&registry, name).await.unwrap();
        assert_eq!(scratch(), used, "{name}");
    }
    let too_wide = set("too wide", 1, 10);
    assert!(matches!(registry.check_fits(&too_wide), Err(SetError::TooLarge { needed: 210, available: 100, .. })));
    assert!(matches!(serve(&registry, "too wide").await, Err(SetError::TooLarge { .. })));
    registry.unload("wider").unwrap();
    assert_eq!(scratch(), 40, "what the neediest that stays needs");
    let lease = registry.acquire("wide", None, WAIT).await.unwrap();
    registry.remove("wide", None).unwrap();
    assert_eq!(scratch(), 40, "its scratch stays as long as it is in use");
    drop(lease);
    assert_eq!(scratch(), 10);
}

#[tokio::test]
async fn guarantee_1_what_a_load_takes_for_a_while_is_inside_the_budget() {
    let registry = registry(100, |_| ());
    let loading =
        |name: &str, resident_bytes, loading_bytes| SetDescriptor { loading_bytes, ..set(name, 1, resident_bytes) };
    registry.register(set("old", 1, 50)).unwrap();
    registry.register(loading("new", 30, 40)).unwrap();
    registry.register(loading("never", 30, 80)).unwrap();
    serve(&registry, "old").await.unwrap();
    registry.source().slow.lock().unwrap().insert("new".into(), WAIT);
    assert!(registry.acquire("new", None, Duration::from_millis(10)).await.is_err());
    while registry.source().loads() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!((registry.budget().used(Kind::Loading), registry.budget().used(Kind::Sets)), (70, 0));
    registry.source().slow.lock().unwrap().clear();
    serve(&registry, "new").await.unwrap();
    assert_eq!((registry.budget().used(Kind::Loading), registry.budget().used(Kind::Sets)), (0, 30));
    assert!(matches!(registry.check_fits(&loading("never", 30, 80)), Err(SetError::TooLarge { needed: 110, .. })));
    assert!(matches!(serve(&registry, "never").await, Err(SetError::TooLarge { needed: 110, .. })));

    let reading = registry.reserve_reading(&loading("upload", 1, 100)).await.unwrap();
    assert_eq!((registry.budget().used(Kind::Loading), registry.totals().resident), (100, 0));
    drop(reading);
    assert_eq!(registry.budget().used(Kind::Loading), 0);
}

#[tokio::test]
async fn guarantee_1_a_backbone_that_cannot_fit_with_its_scratch_is_507() {
    let registry = registry(0, |settings| settings.budget_bytes = 95);
    registry.register(set("s", 1, 1)).unwrap();
    assert!(matches!(
        registry.acquire("s", None, WAIT).await,
        Err(SetError::TooLarge { needed: 10, available: 5, .. })
    ));
    assert_eq!(registry.budget().total(), 0);
}

#[tokio::test]
async fn guarantee_2_a_lease_outlives_unload_and_holds_its_bytes() {
    let registry = registry(100, |_| ());
    registry.register(set("s", 1, 60)).unwrap();
    let lease = registry.acquire("s", None, WAIT).await.unwrap();
    registry.unload("s").unwrap();
    assert_eq!((lease.value, registry.budget().used(Kind::Sets)), (60, 60));
    drop(lease);
    assert_eq!(registry.budget().used(Kind::Sets), 0);
}

#[tokio::test]
async fn guarantee_3_pinned_and_used_sets_are_not_evicted_and_waiting_is_bounded() {
    let full = |room_wait| async move {
        let registry = registry(100, |settings| settings.room_wait = room_wait);
        for name in ["pinned", "used", "other"] {
            registry.register(set(name, 1, 50)).unwrap();
        }
        registry.pin("pinned", WAIT).await.unwrap();
        let used = registry.acquire("used", None, WAIT).await.unwrap();
        (registry, used)
    };
    let (registry, _used) = full(Duration::from_millis(50)).await;
    assert_eq!(serve(&registry, "other").await, Err(SetError::NoRoom { name: "other".into() }));
    assert!(resident(&registry, "pinned") && resident(&registry, "used"));
    // A request that waits gets its room as soon as a lease ends.
    let (registry, used) = full(WAIT).await;
    let waiting = tokio::spawn({
        let registry = registry.clone();
        async move { serve(&registry, "other").await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(used);
    assert_eq!(waiting.await.unwrap(), Ok(1));
    assert!(matches!(registry.unload("pinned"), Err(SetError::Conflict(_))));
}

#[tokio::test]
async fn guarantee_3_two_sets_that_do_not_fit_together_both_get_answers() {
    let registry = registry(60, |settings| settings.room_wait = WAIT);
    registry.register(set("a", 1, 50)).unwrap();
    registry.register(set("b", 1, 50)).unwrap();
    let rounds = |name: &'static str| {
        let registry = registry.clone();
        tokio::spawn(async move {
            for _ in 0..20 {
                serve(&registry, name).await.unwrap();
            }
        })
    };
    let both = async { tokio::join!(rounds("a"), rounds("b")) };
    let (a, b) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("no livelock");
    a.unwrap();
    b.unwrap();
}

#[tokio::test]
async fn guarantee_4_many_requests_for_a_cold_set_cause_one_load() {
    let registry = registry(100, |_| ());
    registry.register(set("s", 1, 10)).unwrap();
    registry.source().slow.lock().unwrap().insert("s".into(), Duration::from_millis(30));
    let requests: Vec<_> = (0..50)
        .map(|_| {
            let registry = registry.clone();
            tokio::spawn(async move { serve(&registry, "s").await })
        })
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap(), Ok(1));
    }
    assert_eq!(registry.source().loads(), 1);
}

#[tokio::test]
async fn guarantee_5_a_slow_load_blocks_no_other() {
    let registry = registry(100, |_| ());
    for name in ["slow", "quick", "hot"] {
        registry.register(set(name, 1, 10)).unwrap();
    }
    serve(&registry, "hot").await.unwrap();
    registry.source().slow.lock().unwrap().insert("slow".into(), WAIT);
    let slow = registry.acquire("slow", None, Duration::from_millis(10)).await;
    assert_eq!(slow.err(), Some(SetError::StillLoading { name: "slow".into() }));
    serve(&registry, "hot").await.unwrap();
    serve(&registry, "quick").await.unwrap();
    assert!(!resident(&registry, "slow"), "the others did not wait for it");
    registry.source().slow.lock().unwrap().clear();
    serve(&registry, "slow").await.unwrap();
}

#[tokio::test]
async fn guarantee_6_a_failed_load_keeps_the_old_version_and_is_remembered() {
    // Long enough that a busy machine does not let it pass between two calls.
    const BACKOFF: Duration = Duration::from_secs(1);
    let registry = registry(100, |settings| settings.backoff = BACKOFF);
    registry.register(set("s", 1, 10)).unwrap();
    serve(&registry, "s").await.unwrap();
    registry.register(set("s", 2, 10)).unwrap();
    registry.source().failing.lock().unwrap().insert("s".into(), "torn".into());
    assert!(matches!(registry.load("s", None, WAIT).await, Err(SetError::Failed { .. })));
    assert_eq!(serve(&registry, "s").await, Ok(1));
    let status = registry.status("s").unwrap();
    assert_eq!(status[1].reason.as_deref(), Some("torn"));
    assert!(status[0].ready);

    registry.register(set("cold", 1, 10)).unwrap();
    registry.source().failing.lock().unwrap().insert("cold".into(), "torn".into());
    assert!(serve(&registry, "cold").await.is_err());
    let before = registry.source().loads();
    assert!(serve(&registry, "cold").await.is_err(), "refused at once");
    assert_eq!(registry.source().loads(), before);
    registry.source().failing.lock().unwrap().clear();
    tokio::time::sleep(BACKOFF).await;
    assert_eq!(serve(&registry, "cold").await, Ok(1), "tried again after the delay");
}

#[tokio::test]
async fn guarantee_6_a_changed_file_clears_the_delay() {
    let registry = registry(100, |settings| settings.backoff = Duration::from_secs(3600));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "10").unwrap();
    let location = Location::File(file.path().to_owned());
    registry.register(registry.source().describe_set("s", 1, &location).unwrap()).unwrap();
    std::fs::write(file.path(), "broken").unwrap();
    assert!(serve(&registry, "s").await.is_err());
    assert!(serve(&registry, "s").await.is_err());
    std::fs::write(file.path(), "20").unwrap();
    assert_eq!(serve(&registry, "s").await, Ok(1));
    assert_eq!(registry.budget().used(Kind::Sets), 20);
}

#[tokio::test]
async fn guarantee_8_no_request_after_a_load_gets_an_older_generation() {
    let registry = registry(40, |_| ());
    registry.register(set("s", 1, 10)).unwrap();
    serve(&registry, "s").await.unwrap();
    registry.register(set("s", 2, 10)).unwrap();
    let loaded = registry.load("s", None, WAIT).await.unwrap();
    assert_eq!(loaded.descriptor.generation(), format!("s:2:{}", set("s", 2, 10).digest.short()));
    drop(loaded);
    assert_eq!(serve(&registry, "s").await, Ok(2));
    // Neither an explicit request for the old version nor eviction of the new one brings the old one back.
    registry.acquire("s", Some(1), WAIT).await.unwrap().mark_served();
    registry.unload("s").unwrap();
    registry.acquire("s", Some(1), WAIT).await.unwrap().mark_served();
    assert_eq!(serve(&registry, "s").await, Ok(2));
}

#[tokio::test]
async fn guarantee_9_registering_loads_nothing_and_foreign_sets_are_refused() {
    let registry = registry(100, |_| ());
    for i in 0..1000 {
        registry.register(set(&format!("s{i}"), 1, 10)).unwrap();
    }
    assert_eq!((registry.totals().registered, registry.budget().total()), (1000, 0));
    let foreign = SetDescriptor { backbone: digest("elsewhere"), ..set("f", 1, 10) };
    assert!(matches!(registry.register(foreign), Err(SetError::NoBackbone { .. })));
}

#[tokio::test]
async fn guarantee_10_one_sweep_does_not_flush_the_hot_sets() {
    let registry = registry(200, |_| ());
    for i in 0..300 {
        registry.register(set(&format!("s{i}"), 1, 10)).unwrap();
    }
    for _ in 0..3 {
        for hot in 0..10 {
            serve(&registry, &format!("s{hot}")).await.unwrap();
        }
    }
    for cold in 10..300 {
        serve(&registry, &format!("s{cold}")).await.unwrap();
    }
    let kept = (0..10).filter(|hot| resident(&registry, &format!("s{hot}"))).count();
    assert_eq!(kept, 10);
    let metrics = &registry.inner.metrics;
    assert_eq!((metrics.hits.get(), metrics.misses.get()), (20, 300));
    assert_eq!(metrics.evictions.with_label_values(&["budget"]).get(), 280);
}

#[tokio::test]
async fn backbones_leave_with_their_last_set_when_asked_and_make_room_when_idle() {
    let dropping = registry(100, |settings| settings.drop_idle_backbones = true);
    dropping.register(set("s", 1, 10)).unwrap();
    serve(&dropping, "s").await.unwrap();
    dropping.unload("s").unwrap();
    assert_eq!(dropping.budget().total(), 0);

    let keeping = registry(50, |_| ());
    keeping.register_backbone(backbone("second"));
    keeping.register(set("a", 1, 10)).unwrap();
    keeping.register(SetDescriptor { backbone: digest("second"), ..set("b", 1, 10) }).unwrap();
    for name in ["a", "b", "a", "b"] {
        serve(&keeping, name).await.unwrap();
        assert!(keeping.budget().total() <= 150);
    }
}

/// A set that borrows the experts of another.
fn borrower(name: &str, of: &SetDescriptor) -> SetDescriptor {
    SetDescriptor { lender: Some(of.digest), ..set(name, 1, 5) }
}

/// A registry with a lender of 60 bytes and so many sets of 5 bytes, `b0` and so on, that borrow its experts.
fn lending(room: usize, borrowers: usize) -> (Registry<Fake>, SetDescriptor) {
    let (registry, base) = (registry(room, |_| ()), set("base", 1, 60));
    registry.register(base.clone()).unwrap();
    for i in 0..borrowers {
        registry.register(borrower(&format!("b{i}"), &base)).unwrap();
    }
    (registry, base)
}

#[tokio::test]
async fn lenders_are_in_memory_once_and_counted_once() {
    let (registry, _) = lending(100, 8);
    registry.source().slow.lock().unwrap().insert("base".into(), Duration::from_millis(30));
    let requests: Vec<_> = (0..8)
        .map(|i| {
            let registry = registry.clone();
            tokio::spawn(async move { serve(&registry, &format!("b{i}")).await })
        })
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap(), Ok(1));
    }
    assert_eq!((registry.source().loads(), registry.budget().used(Kind::Sets)), (9, 100), "one load of each");
    assert_eq!(registry.status("b3").unwrap()[0].base, Some(set("base", 1, 60).generation()));
    // What a borrower keeps in memory is not loaded again, whoever asks for it.
    registry.unload("base").unwrap();
    registry.unload("b0").unwrap();
    serve(&registry, "b0").await.unwrap();
    serve(&registry, "base").await.unwrap();
    assert_eq!((registry.source().loads(), registry.budget().used(Kind::Sets)), (10, 100));
    for name in registry.names() {
        registry.unload(&name).unwrap();
    }
    assert_eq!(registry.budget().used(Kind::Sets), 0, "the lender goes with the last that holds it");
}

#[tokio::test]
async fn eviction_takes_no_lender_from_under_its_borrowers() {
    let (registry, _) = lending(100, 2);
    registry.register(set("other", 1, 40)).unwrap();
    registry.register(set("large", 1, 90)).unwrap();
    let held = registry.acquire("b0", None, WAIT).await.unwrap();
    held.mark_served();
    serve(&registry, "b1").await.unwrap();
    // The oldest is the lender, but its borrowers go first, and it stays as long as one of them is in use.
    assert_eq!(serve(&registry, "other").await, Err(SetError::NoRoom { name: "other".into() }));
    assert!(resident(&registry, "base") && resident(&registry, "b0"));
    drop(held);
    serve(&registry, "large").await.unwrap();
    assert_eq!((registry.totals().resident, registry.budget().used(Kind::Sets)), (1, 90), "then all may go");

    let (registry, _) = lending(100, 1);
    registry.register(set("large", 1, 60)).unwrap();
    registry.pin("b0", WAIT).await.unwrap();
    assert!(matches!(serve(&registry, "large").await, Err(SetError::TooLarge { available: 35, .. })));
    registry.unload("base").unwrap();
    assert!(matches!(registry.load("large", None, WAIT).await, Err(SetError::TooLarge { available: 35, .. })));
    registry.unpin("b0").unwrap();
    registry.load("large", None, WAIT).await.unwrap();
    assert_eq!(registry.budget().used(Kind::Sets), 60, "a lender that was unloaded goes as well");
}

#[tokio::test]
async fn lenders_stay_while_their_experts_are_borrowed() {
    let (registry, base) = lending(200, 7);
    let conflict = |result: Result<(), SetError>| match result {
        Err(SetError::Conflict(message)) => message,
        other => panic!("{other:?}"),
    };
    let named = "the experts of `base/1` are borrowed by `b0/1`, `b1/1`, `b2/1`, `b3/1`, `b4/1` and 2 more";
    assert_eq!(conflict(registry.remove("base", None).map(drop)), named);
    assert_eq!(conflict(registry.remove("base", Some(1)).map(drop)), named);
    assert_eq!(conflict(registry.register(set("base", 1, 61))), named);
    assert_eq!(conflict(registry.check_place(&set("base", 1, 61))), named);
    registry.register(base.clone()).unwrap();

    // A new version beside it is no replacement; the old one answers its borrowers.
    registry.register(set("base", 2, 70)).unwrap();
    assert_eq!(serve(&registry, "base").await, Ok(2));
    serve(&registry, "b0").await.unwrap();
    assert_eq!(registry.budget().used(Kind::Sets), 70 + 60 + 5);
    registry.remove("base", Some(2)).unwrap();

    // The same experts under another name are as good.
    registry.register(SetDescriptor { name: "copy".into(), ..base.clone() }).unwrap();
    registry.remove("base", None).unwrap();
    serve(&registry, "b1").await.unwrap();
    assert!(matches!(registry.remove("copy", None), Err(SetError::Conflict(_))));
    for i in 0..7 {
        registry.remove(&format!("b{i}"), None).unwrap();
    }
    registry.remove("copy", None).unwrap();
    assert_eq!(registry.totals().registered, 0);
    assert_eq!(registry.budget().used(Kind::Sets), 0);
}

#[tokio::test]
async fn versions_of_one_name_may_borrow_from_each_other_and_go_together() {
    let (registry, base) = lending(200, 0);
    registry.register(SetDescriptor { version: 2, ..borrower("base", &base) }).unwrap();
    assert_eq!(serve(&registry, "base").await, Ok(2));
    assert!(matches!(registry.remove("base", Some(1)), Err(SetError::Conflict(_))));
    assert_eq!(registry.remove("base", None).unwrap().len(), 2);
    assert_eq!(registry.budget().used(Kind::Sets), 0);
}

#[tokio::test]
async fn borrowers_without_a_fitting_lender_are_refused() {
    let (registry, base) = lending(100, 1);
    let refused = |set: SetDescriptor| registry.register(set).unwrap_err().to_string();
    let missing = SetDescriptor { lender: Some(digest("elsewhere")), ..set("b", 1, 5) };
    assert!(refused(missing).contains("which is not here"));
    let chain = borrower("b", &borrower("b0", &base));
    assert!(refused(chain).contains("which is not here"), "a borrower lends nothing");
    let mut other = borrower("b", &base);
    other.experts.num_experts += 1;
    assert!(refused(other).contains("another shape"));
    assert!(refused(SetDescriptor { version: 1, ..borrower("base", &base) }).contains("replaces"));
    registry.register_backbone(backbone("second"));
    let foreign = SetDescriptor { backbone: digest("second"), ..borrower("b", &base) };
    assert!(refused(foreign).contains("another backbone"));
    assert!(matches!(
        registry.check_fits(&SetDescriptor { resident_bytes: 51, ..borrower("b", &base) }),
        Err(SetError::TooLarge { needed: 51, available: 50, .. })
    ));
}

#[tokio::test]
async fn a_lender_that_fails_fails_its_borrowers_with_the_reason() {
    let (registry, _) = lending(100, 1);
    registry.source().failing.lock().unwrap().insert("base".into(), "torn".into());
    let error = serve(&registry, "b0").await.unwrap_err().to_string();
    assert!(error.contains("`b0`") && error.contains("`base`") && error.contains("torn"), "{error}");
    registry.source().failing.lock().unwrap().clear();
    registry.load("b0", None, WAIT).await.unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Serve(usize),
    Hold(usize),
    LetGo,
    Load(usize),
    Unload(usize),
    Pin(usize),
    Unpin(usize),
    Replace(usize, usize),
    Borrow(usize, usize),
    Delete(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0usize..6;
    let step = prop_oneof![
        4 => name.clone().prop_map(Step::Serve),
        1 => name.clone().prop_map(Step::Hold),
        1 => Just(Step::LetGo),
        1 => name.clone().prop_map(Step::Load),
        1 => name.clone().prop_map(Step::Unload),
        1 => name.clone().prop_map(Step::Pin),
        1 => name.clone().prop_map(Step::Unpin),
        1 => (name.clone(), 1usize..120).prop_map(|(name, size)| Step::Replace(name, size)),
        2 => (name.clone(), name.clone()).prop_map(|(name, of)| Step::Borrow(name, of)),
        1 => name.prop_map(Step::Delete),
    ];
    prop::collection::vec(step, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_calls_exceeds_the_budget_or_gets_stuck(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let quick = Duration::from_millis(5);
            let registry = registry(150, |settings| {
                (settings.room_wait, settings.protect_unused, settings.backoff) = (quick, quick, quick);
            });
            let mut held = Vec::new();
            let mut version = 1;
            for step in steps {
                let name = |i: usize| format!("s{i}");
                let run = async {
                    match step {
                        Step::Serve(i) => drop(serve(&registry, &name(i)).await),
                        Step::Hold(i) => held.extend(registry.acquire(&name(i), None, WAIT).await.ok()),
                        Step::LetGo => drop(held.pop()),
                        Step::Load(i) => drop(registry.load(&name(i), None, WAIT).await),
                        Step::Unload(i) => drop(registry.unload(&name(i))),
                        Step::Pin(i) => drop(registry.pin(&name(i), WAIT).await),
                        Step::Unpin(i) => drop(registry.unpin(&name(i))),
                        Step::Delete(i) => drop(registry.remove(&name(i), None)),
                        Step::Replace(i, size) => {
                            version += 1;
                            registry.register(set(&name(i), version, size)).unwrap();
                        }
                        Step::Borrow(i, of) => {
                            version += 1;
                            let lender = registry.lookup(&name(of), None).ok().map(|found| found.set.digest);
                            let set = SetDescriptor { lender, ..set(&name(i), version, 7) };
                            // Refused when that one borrows its experts itself.
                            drop(registry.register(set));
                        }
                    }
                };
                tokio::time::timeout(WAIT, run).await.expect("no call may get stuck");
                let budget = registry.budget();
                assert!(budget.total() <= budget.limit());
            }
            drop(held);
            // Lenders only go after those that borrow from them; nothing borrows from a borrower.
            for _ in 0..2 {
                for status in registry.list() {
                    let name = &status.descriptor.name;
                    let _ = registry.unpin(name);
                    let _ = registry.remove(name, Some(status.descriptor.version));
                }
            }
            assert_eq!(registry.totals().registered, 0);
            // Loads of deleted sets may still be ending.
            let ended = async {
                while registry.budget().used(Kind::Sets) > 0 {
                    tokio::time::sleep(quick).await;
                }
            };
            tokio::time::timeout(WAIT, ended).await.expect("every byte comes back");
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_tasks_at_once_keep_the_budget_and_finish() {
    let registry = registry(100, |settings| settings.room_wait = Duration::from_millis(50));
    for i in 0..20 {
        registry.register(set(&format!("s{i}"), 1, 5 + i)).unwrap();
    }
    let tasks: Vec<_> = (0..16usize)
        .map(|task| {
            let registry = registry.clone();
            tokio::spawn(async move {
                for round in 0..200 {
                    let name = format!("s{}", (task * 7 + round * 3) % 20);
                    let _ = serve(&registry, &name).await;
                    if round % 17 == task % 17 {
                        let _ = registry.unload(&name);
                    }
                    let budget = registry.budget();
                    assert!(budget.total() <= budget.limit());
                }
            })
        })
        .collect();
    for task in tasks {
        tokio::time::timeout(Duration::from_secs(30), task).await.expect("no deadlock").unwrap();
    }
}
