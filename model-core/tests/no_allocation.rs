//! A forward allocates nothing once its session is warm. Alone in its process, without a test harness, because the
//! allocator counts for the process and a harness has a thread that allocates when it likes.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use model_core::artifact::Digest;
use model_core::config::{ExpertConfig, ViTConfig};
use model_core::engine::{Backbone, Crew, ExpertSet, Row, Session, SessionGroup};
use model_core::image::Preprocess;
use model_core::kernels::Isa;
use model_core::random::SplitMix64;
use model_core::random_weights::{backbone_weights, expert_set_weights};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs batches of all sizes, none of which but the first may allocate.
fn check(backbone: &Backbone, mut forward: impl FnMut(&mut [Row<'_>]), sets: &[ExpertSet], what: &str) {
    let pixels = vec![0.5; backbone.pixels_len()];
    let mut logits = [[0.0; 5]; 4];
    let mut rows: Vec<_> = logits
        .iter_mut()
        .zip(sets.iter().cycle())
        .map(|(logits, set)| Row { set, pixels: &pixels, logits, routing: None, features: None })
        .collect();
    forward(&mut rows);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for count in [4, 1, 3, 4] {
        forward(&mut rows[..count]);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "{what}");
}

fn main() {
    let config = ViTConfig::preset("tiny").unwrap();
    let build = |experts: ExpertConfig| {
        let config = ViTConfig { experts, ..config.clone() };
        expert_set_weights(&config, &mut SplitMix64::at(1, 0))
    };
    let without_out = ExpertConfig { stages_out: 0, num_experts: 100, top_k: 5, ..config.experts.clone() };
    let weights = backbone_weights(&config.backbone, &mut SplitMix64::at(1, 0));
    let (set, other) = (build(config.experts.clone()), build(without_out));
    let digest = Digest::of("", &[]);
    for isa in Isa::available() {
        let backbone = Backbone::from_weights("b".into(), &weights, Preprocess::default(), digest, isa).unwrap();
        let backbone = Arc::new(backbone);
        let sets =
            [&set, &other].map(|set| ExpertSet::from_weights("s".into(), set.clone(), digest, &backbone).unwrap());
        for threads in [1, 2] {
            let mut session = Session::new(&backbone, 4, threads);
            let forward = |rows: &mut [Row<'_>]| session.forward(rows).unwrap();
            check(&backbone, forward, &sets, &format!("{isa}, {threads} threads"));
        }

        let (crew, mut members) = Crew::new(2);
        let (mut helper, mut caller) = (members.remove(1), members.remove(0));
        let (group, inside) = (SessionGroup::new(&backbone, 4, &crew), AtomicBool::new(false));
        let invitation = caller.invite();
        // Asked whether to leave, the thread has made what it needs for itself.
        let stay = || {
            inside.store(true, Ordering::Relaxed);
            false
        };
        std::thread::scope(|scope| {
            scope.spawn(|| helper.help(stay));
            while !inside.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            let forward = |rows: &mut [Row<'_>]| group.forward(&mut caller, rows).unwrap();
            check(&backbone, forward, &sets, &format!("{isa}, with a helper"));
            drop(invitation);
        });
    }
    let (weights, set) = common::calibrated_weights(1);
    for isa in Isa::available() {
        let backbone = Backbone::from_weights("b".into(), &weights, Preprocess::default(), digest, isa).unwrap();
        let backbone = Arc::new(backbone);
        let sets = [ExpertSet::from_weights("s".into(), set.clone(), digest, &backbone).unwrap()];
        let mut session = Session::new(&backbone, 4, 2);
        check(&backbone, |rows| session.forward(rows).unwrap(), &sets, &format!("{isa}, a calibrated stem"));
    }
    println!("a warm forward allocates nothing: ok");
}
