//! The integer engine as a whole: between instruction sets, batches and threads.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{expert_configs, minute_config, packed_config, relative_error};
use model_core::artifact::{Digest, ExpertSetArtifact};
use model_core::config::{ExpertConfig, ViTConfig};
use model_core::engine::{Backbone, Crew, ExpertSet, Row, Session, SessionGroup};
use model_core::error::ModelError;
use model_core::image::{Preprocess, View};
use model_core::kernels::Isa;
use model_core::random::SplitMix64;
use model_core::random_weights::{backbone_weights, expert_set_weights};
use model_core::weights::{BackboneWeights, ExpertSetWeights};
use serde_json::Value;

fn weights(config: &ViTConfig, seed: u64) -> (BackboneWeights, ExpertSetWeights) {
    let mut random = SplitMix64::at(seed, 0);
    (backbone_weights(&config.backbone, &mut random), expert_set_weights(config, &mut random))
}

fn backbone(weights: &BackboneWeights, isa: Isa) -> Arc<Backbone> {
    let digest = Digest::of("backbone", &[]);
    Arc::new(Backbone::from_weights("test".into(), weights, Preprocess::default(), digest, isa).unwrap())
}

fn expert_set(weights: &ExpertSetWeights, backbone: &Backbone) -> ExpertSet {
    ExpertSet::from_weights("test".into(), weights.clone(), Digest::of("set", &[]), backbone).unwrap()
}

fn pixels(config: &ViTConfig, seed: usize) -> Vec<f32> {
    let len = config.backbone.image_size.pow(2) * 3;
    (0..len).map(|i| ((i * 31 + seed * 977) % 255) as f32 / 64.0 - 2.0).collect()
}

/// Logits and routing of every (set, image), as one batch.
fn run(session: &mut Session, batch: &[(&ExpertSet, &[f32])]) -> Vec<(Vec<f32>, Vec<u16>)> {
    let backbone = Arc::clone(session.backbone());
    answers(&backbone, batch, |rows| session.forward(rows).unwrap())
}

/// What `forward` writes for every (set, image).
fn answers(
    backbone: &Backbone,
    batch: &[(&ExpertSet, &[f32])],
    forward: impl FnOnce(&mut [Row<'_>]),
) -> Vec<(Vec<f32>, Vec<u16>)> {
    let config = backbone.config();
    let routing = |set: &ExpertSet| config.num_layers * config.num_tokens() * set.config().top_k;
    let mut out: Vec<_> =
        batch.iter().map(|(set, _)| (vec![f32::NAN; set.labels().len()], vec![u16::MAX; routing(set)])).collect();
    let rows = batch.iter().zip(&mut out);
    let mut rows: Vec<_> = rows
        .map(|((set, pixels), (logits, routing))| Row { set, pixels, logits, routing: Some(routing), features: None })
        .collect();
    forward(&mut rows);
    out
}

/// Integer products are the same bits everywhere. Float sums run in another order, which flips int8 codes at rounding
/// ties; each flip is one step in 127, so that logits agree to a few percent of their norm. A wrong order, scale or sign
/// would be off by all of it.
#[test]
fn logits_agree_between_instruction_sets() {
    let configs =
        expert_configs().into_iter().map(|experts| ViTConfig { experts, ..ViTConfig::preset("tiny").unwrap() });
    // And one whose features fill no vector of any instruction set.
    for (seed, config) in configs.chain([minute_config(), packed_config(true)]).enumerate() {
        let (backbone_weights, set_weights) = weights(&config, seed as u64);
        let images: Vec<_> = (0..3).map(|i| pixels(&config, i)).collect();
        let answers = |isa: Isa| {
            let backbone = backbone(&backbone_weights, isa);
            let set = expert_set(&set_weights, &backbone);
            let batch: Vec<_> = images.iter().map(|pixels| (&set, &pixels[..])).collect();
            run(&mut Session::new(&backbone, 3, 1), &batch)
        };
        let expected = answers(Isa::SCALAR);
        for isa in Isa::available() {
            for ((logits, _), (expected, _)) in answers(isa).iter().zip(&expected) {
                let error = relative_error(logits, expected);
                println!("{isa}, configuration {seed}: {error:.4}");
                assert!(error < 0.05, "{isa}, configuration {seed}: {logits:?} is not {expected:?}");
            }
        }
    }
}

/// Sets of every shape in one batch, in any order, on any number of threads: each answer is what it is alone.
#[test]
fn batched_answers_are_bit_identical_to_single_ones() {
    let config = ViTConfig::preset("tiny").unwrap();
    let (backbone_weights, _) = weights(&config, 1);
    for isa in Isa::available() {
        let backbone = backbone(&backbone_weights, isa);
        let sets: Vec<_> = expert_configs()
            .into_iter()
            .enumerate()
            .map(|(i, experts)| {
                let config = ViTConfig { experts, num_classes: 3 + i, ..config.clone() };
                expert_set(&weights(&config, i as u64).1, &backbone)
            })
            .collect();
        let images: Vec<_> = (0..12).map(|i| pixels(&config, i)).collect();
        let batch: Vec<_> = images.iter().enumerate().map(|(i, p)| (&sets[i * 7 % sets.len()], &p[..])).collect();
        let mut single = Session::new(&backbone, 1, 1);
        let alone: Vec<_> = batch.iter().flat_map(|row| run(&mut single, std::slice::from_ref(row))).collect();
        for threads in [1, 2, 3] {
            let mut session = Session::new(&backbone, 12, threads);
            assert!(run(&mut session, &batch) == alone, "{isa}, {threads} threads");
            assert!(run(&mut session, &batch[5..9]) == alone[5..9], "{isa}, {threads} threads, four rows");
        }
        // And with other members of a crew as helpers, who come and go.
        let (crew, mut members) = Crew::new(3);
        let mut caller = members.remove(1);
        let (group, done) = (SessionGroup::new(&backbone, 12, &crew), AtomicBool::new(false));
        /// Ends the helpers even when an assertion fails.
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        std::thread::scope(|scope| {
            let _done = Done(&done);
            for helper in &mut members {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        let asked = AtomicUsize::new(0);
                        helper.help(|| asked.fetch_add(1, Ordering::Relaxed) > 1000);
                        std::thread::yield_now();
                    }
                });
            }
            let repeated = (0..20).map(|i| {
                let _invitation = caller.invite();
                if i % 2 == 0 {
                    answers(&backbone, &batch, |rows| group.forward(&mut caller, rows).unwrap()) == alone
                } else {
                    answers(&backbone, &batch[5..9], |rows| group.forward(&mut caller, rows).unwrap()) == alone[5..9]
                }
            });
            let right = repeated.filter(|&right| right).count();
            assert_eq!(right, 20, "{isa}, with helpers");
        });
    }
}

#[test]
fn scratch_grows_by_no_more_than_foretold() {
    let config = ViTConfig::preset("tiny").unwrap();
    let backbone = backbone(&weights(&config, 1).0, Isa::best());
    let base = config.experts.clone();
    let many = ExpertConfig { num_experts: 300, top_k: 70, stages_out: 1, ..base.clone() };
    let usual = ExpertConfig { stages_out: 0, ..base };
    assert_eq!(Session::growth(backbone.config(), 4, &usual), 0);
    for experts in expert_configs().into_iter().chain([many, usual]) {
        let set = expert_set(&weights(&ViTConfig { experts, ..config.clone() }, 1).1, &backbone);
        let image = pixels(&config, 0);
        let mut session = Session::new(&backbone, 4, 1);
        let before = session.resident_bytes();
        run(&mut session, &[(&set, &image[..]); 4]);
        let (grown, foretold) =
            (session.resident_bytes() - before, Session::growth(backbone.config(), 4, set.config()));
        assert!(grown <= foretold, "{:?}: {grown} is more than {foretold}", set.config());
        assert!(foretold <= grown + grown / 4, "{:?}: {grown} is far less than {foretold}", set.config());
        let answers = run(&mut session, &[(&set, &image[..])]);
        session.shrink();
        assert_eq!(session.resident_bytes(), before, "{:?}", set.config());
        assert_eq!(run(&mut session, &[(&set, &image[..])]), answers);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_computed() {
    let config = ViTConfig::preset("tiny").unwrap();
    let (backbone_weights, set_weights) = weights(&config, 1);
    let backbone = backbone(&backbone_weights, Isa::best());
    let set = expert_set(&set_weights, &backbone);
    let mut session = Session::new(&backbone, 1, 1);
    let image = pixels(&config, 0);
    let mut forward = |pixels: &[f32], classes: usize, routing: Option<usize>, rows: usize| {
        let (mut logits, mut routing) = (vec![vec![0.0; classes]; rows], routing.map(|len| vec![0; len]));
        let mut rows: Vec<_> =
            logits.iter_mut().map(|l| Row { set: &set, pixels, logits: l, routing: None, features: None }).collect();
        if let Some(row) = rows.first_mut() {
            row.routing = routing.as_deref_mut();
        }
        session.forward(&mut rows)
    };
    assert!(matches!(forward(&image[1..], 5, None, 1), Err(ModelError::Length { what: "pixels", .. })));
    assert!(matches!(forward(&image, 4, None, 1), Err(ModelError::Length { what: "logits", .. })));
    assert!(matches!(forward(&image, 5, Some(1), 1), Err(ModelError::Length { what: "routing", .. })));
    assert!(matches!(forward(&image, 5, None, 2), Err(ModelError::BatchTooLarge { rows: 2, max_batch: 1 })));
    assert!(forward(&image, 5, None, 1).is_ok());
    assert!(forward(&image, 5, None, 0).is_ok());

    let other = Digest::of("another backbone", &[]);
    let other =
        Backbone::from_weights("other".into(), &backbone_weights, Preprocess::default(), other, Isa::best()).unwrap();
    let mut session = Session::new(&Arc::new(other), 1, 1);
    let mut logits = [0.0; 5];
    let mut rows = [Row { set: &set, pixels: &image, logits: &mut logits, routing: None, features: None }];
    assert!(matches!(session.forward(&mut rows), Err(ModelError::ForeignSet { .. })));
}

/// Rows of sets on the same experts share their segments, and each has the answer of its own head.
#[test]
fn borrowers_answer_as_if_they_had_the_experts_themselves() {
    let config = ViTConfig::preset("tiny").unwrap();
    let (backbone_weights, lender_weights) = weights(&config, 3);
    let backbone = backbone(&backbone_weights, Isa::best());
    let artifact = |name: &str, weights: ExpertSetWeights, borrowed_experts| ExpertSetArtifact {
        name: name.to_owned(),
        backbone: config.backbone.shape(),
        backbone_config: None,
        backbone_digest: backbone.digest(),
        borrowed_experts,
        view: View::default(),
        report: Value::Null,
        card: None,
        training: Value::Null,
        digest: Digest::of(name, &[]),
        weights,
    };
    let lender = ExpertSet::from_artifact(artifact("lender", lender_weights.clone(), None), &backbone, None).unwrap();
    let mut own = weights(&config, 4).1;
    own.layers.clone_from(&lender_weights.layers);
    own.temperature = 0.5;
    let owner = ExpertSet::from_artifact(artifact("owner", own.clone(), None), &backbone, None).unwrap();
    own.layers.clear();
    let borrower = artifact("borrower", own, Some(lender.digest()));
    let borrower = ExpertSet::from_artifact(borrower, &backbone, Some(&lender)).unwrap();

    let images: Vec<_> = (0..5).map(|i| pixels(&config, i)).collect();
    let mut session = Session::new(&backbone, 5, 2);
    let mixed: Vec<(&ExpertSet, &[f32])> = images
        .iter()
        .enumerate()
        .map(|(i, image)| (if i % 2 == 0 { &borrower } else { &lender }, &image[..]))
        .collect();
    for ((i, image), got) in images.iter().enumerate().zip(run(&mut session, &mixed)) {
        let alone = if i % 2 == 0 { &owner } else { &lender };
        assert_eq!(got, run(&mut session, &[(alone, image)])[0], "image {i}");
    }
}
