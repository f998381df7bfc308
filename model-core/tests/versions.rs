//! Both versions of the format, against files that a recipe in Python wrote from `FORMAT.md`
//! (`fixtures/artifacts/make.py`): their digests, every value in them, and that nothing is lost when they are written again.

use std::path::Path;

use model_core::artifact::{
    ArtifactError, BackboneArtifact, CovarianceForm, ExpertSetArtifact, Header, read_backbone, read_expert_set,
};
use model_core::config::{Activation, FloatFormat, TernaryPacking};
use model_core::engine::{Backbone, ExpertSet};
use model_core::error::ModelError;
use model_core::familiarity::{self, Background, Familiarity};
use model_core::image::Fit;
use model_core::kernels::Isa;
use model_core::projection::Projection;
use model_core::random::SplitMix64;
use model_core::weights::{self, Covariance, Int4Rows, Matrix, Precision, Rows};
use serde_json::Value;

fn file(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/artifacts");
    std::fs::read(folder.join(name)).unwrap()
}

fn golden() -> Value {
    serde_json::from_slice(&file("golden.json")).unwrap()
}

fn integers(value: &Value) -> Vec<i64> {
    match value {
        Value::Array(values) => values.iter().flat_map(integers).collect(),
        value => vec![value.as_i64().unwrap()],
    }
}

fn backbone(version: u32) -> BackboneArtifact {
    read_backbone(&file(&format!("v{version}_backbone.safetensors"))).unwrap()
}

fn set(name: &str) -> ExpertSetArtifact {
    read_expert_set(&file(&format!("{name}.safetensors"))).unwrap()
}

#[test]
fn files_of_both_versions_keep_their_digests() {
    let golden = golden();
    for (name, digest) in golden["digests"].as_object().unwrap() {
        let header = Header::from_bytes(&file(&format!("{name}.safetensors"))).unwrap();
        assert_eq!(header.digest.to_string(), digest.as_str().unwrap(), "{name}");
    }
    // And those that ship.
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    for name in ["default-backbone", "cifar100"] {
        Header::read(&models.join(format!("{name}.safetensors"))).unwrap();
    }
}

#[test]
fn a_backbone_of_version_1_reads_as_it_always_did() {
    let (golden, artifact) = (golden(), backbone(1));
    let layers = &artifact.weights.config.stem;
    assert_eq!(layers[0].padding, [1; 4]);
    assert_eq!(layers.iter().map(|layer| layer.residual).collect::<Vec<_>>(), [None, Some(1), None]);
    assert_eq!(layers.iter().map(|layer| layer.groups).collect::<Vec<_>>(), [1; 3]);
    let activations = [Activation::Gelu, Activation::Gelu, Activation::None];
    assert_eq!(layers.iter().map(|layer| layer.activation).collect::<Vec<_>>(), activations);
    assert_eq!(artifact.preprocess.reduction, 8.0);
    assert_eq!((artifact.name.as_str(), &artifact.card), ("old é", &None));
    for (i, block) in artifact.weights.blocks.iter().enumerate() {
        for (site, matrix) in [("up", &block.up), ("down", &block.down)] {
            let codes: Vec<i64> = matrix.codes.iter().map(|&code| code.into()).collect();
            assert_eq!(codes, integers(&golden[format!("v1 blocks.{i}.moe.{site}")]));
        }
    }
    let set = set("v1_set");
    for (i, layer) in set.weights.layers.iter().enumerate() {
        let sites = [("in", &layer.rotation_in), ("hidden", &layer.rotation_hidden), ("out", &layer.rotation_out)];
        for (site, angles) in sites {
            let codes: Vec<i64> = angles.codes.iter().map(|&code| code.into()).collect();
            assert_eq!(codes, integers(&golden[format!("v1 blocks.{i}.moe.rotation_{site}")]));
        }
    }
    assert_eq!(set.weights.labels, ["a", "b \"c\"", "ü"]);
    set.check_backbone(&artifact.weights.config, artifact.digest).unwrap();
    // Version 1 repeats all of the backbone's configuration.
    let mut other = artifact.weights.config.clone();
    other.num_heads = 2;
    assert!(matches!(set.check_backbone(&other, artifact.digest), Err(ArtifactError::BackboneConfig)));
}

#[test]
fn a_backbone_of_version_2_has_everything_that_the_recipe_wrote() {
    let (golden, BackboneArtifact { weights, preprocess, card, .. }) = (golden(), backbone(2));
    let substrates = weights.config.substrates;
    assert!(substrates.shared && substrates.packing == TernaryPacking::FiveTrits);
    assert_eq!(substrates.scales, FloatFormat::F16);
    for block in &weights.blocks {
        for (site, matrix) in [("up", &block.up), ("down", &block.down)] {
            let codes: Vec<i64> = matrix.codes.iter().map(|&code| code.into()).collect();
            assert_eq!(codes, integers(&golden[format!("v2 {site}")]));
        }
        assert_eq!(block.qkv.weight.precision(), Precision::F16);
    }
    assert_ne!(weights.blocks[0].up.scale, weights.blocks[1].up.scale);
    let precisions = weights.stem.iter().map(|layer| layer.conv.weight.precision());
    assert!(precisions.eq([Precision::F32, Precision::Int8, Precision::Int8, Precision::F16, Precision::Int8]));
    assert!(weights.stem.iter().map(|layer| layer.step.is_some()).eq([true, true, true, false, false]));
    let layer = weights.config.stem[2];
    assert_eq!((layer.padding, layer.groups, layer.activation), ([2, 1, 2, 3], 12, Activation::Relu6));
    assert_eq!(weights.config.stem[3].residual, Some(1));
    assert_eq!(preprocess.reduction, 1.5);
    assert_eq!(card.unwrap().licence, "CC0-1.0");
    let background = weights.background.unwrap();
    assert!(matches!(&background.covariance, Covariance::Packed(values) if values.len() == 78));
    assert_eq!(background.images, 1000);
    assert_eq!(background.source, "random numbers\nof this recipe");
}

#[test]
fn expert_sets_of_version_2_have_everything_that_the_recipe_wrote() {
    let golden = golden();
    let learned = set("v2_set");
    assert_eq!((learned.weights.temperature, learned.view.fit), (1.5, Fit::Crop));
    assert_eq!(learned.report["top1"], 0.5);
    let familiarity = learned.weights.familiarity.as_ref().unwrap();
    assert!(matches!(&familiarity.covariance, Covariance::Packed(values) if values.len() == 78));
    assert_eq!((familiarity.threshold, familiarity.pass_share, familiarity.relative), (3.5, 0.05, true));
    let header = Header::from_bytes(&file("v2_borrower.safetensors")).unwrap();
    let model_core::artifact::Contents::ExpertSet(header) = header.contents else { panic!("an expert set") };
    let form = CovarianceForm::Background { scale: 0.75, rank: 2 };
    assert_eq!(header.familiarity.unwrap().covariance, form);

    let borrower = set("v2_borrower");
    assert_eq!(borrower.borrowed_experts, Some(learned.digest));
    assert!(borrower.weights.layers.is_empty());
    assert_eq!(borrower.weights.head.weight.precision(), Precision::F16);

    let seeded = set("v2_seeded");
    for (i, layer) in seeded.weights.layers.iter().enumerate() {
        assert!(layer.rotation_in.codes.is_empty() && layer.rotation_hidden.codes.is_empty());
        let router: Vec<i64> = layer.router.iter().map(|&code| code.into()).collect();
        assert_eq!(router, integers(&golden[format!("v2 blocks.{i}.moe.router")]));
    }
    for (site, stages, pairs) in [(0, 2, 6), (1, 1, 7), (2, 1, 6)] {
        let codes = seeded.weights.config.seeded_angles(1, site).unwrap().codes(5, stages, pairs);
        let codes: Vec<i64> = codes.into_iter().map(i64::from).collect();
        assert_eq!(codes, integers(&golden[format!("v2 seeded codes of block 1, site {site}")]));
    }
}

#[test]
fn what_is_read_is_written_again_without_loss_as_version_2() {
    for version in [1, 2] {
        let artifact = backbone(version);
        let again = read_backbone(&artifact.to_bytes().unwrap()).unwrap();
        assert_eq!(again.weights, artifact.weights);
        assert_eq!((&again.preprocess, &again.card), (&artifact.preprocess, &artifact.card));
    }
    for name in ["v1_set", "v2_set", "v2_borrower", "v2_seeded"] {
        let artifact = set(name);
        let mut again = read_expert_set(&artifact.to_bytes().unwrap()).unwrap();
        again.digest = artifact.digest;
        // Version 2 does not repeat it.
        again.backbone_config.clone_from(&artifact.backbone_config);
        assert_eq!(again, artifact, "{name}");
    }
}

#[test]
fn distances_for_unknown_images_are_those_of_the_recipe() {
    let golden = golden();
    let background = Background::new(&backbone(2).weights.background.unwrap()).unwrap();
    for name in ["v2_set", "v2_borrower", "v2_seeded"] {
        let answer = &golden[format!("answer of {name}")];
        let features: Vec<f32> = serde_json::from_value(answer["features"].clone()).unwrap();
        let statistics = set(name).weights.familiarity.unwrap();
        let familiarity = Familiarity::new(&statistics, Some(&background)).unwrap();
        let (got, expected) =
            (familiarity.distance(&features, Some(&background)), answer["distance"].as_f64().unwrap());
        // Statistics and features are kept in single precision, which the covariances here, of condition numbers below
        // a thousand, make at most a thousand times as large.
        let allowed = 1e3 * f64::from(f32::EPSILON) * (1.0 + expected.abs());
        assert!((got - expected).abs() < allowed, "{name}: {got} is not {expected}");
        assert_eq!(familiarity.is_unknown(got), expected > f64::from(statistics.threshold));

        // All but the borrower are relative to the background, and the borrower's covariance rests on it.
        let error = Familiarity::new(&statistics, None).unwrap_err().to_string();
        assert!(error.contains("needs a background"), "{error}");
    }
}

/// A background of low rank measures the distances that the same covariance measures when it is written out.
#[test]
fn a_background_of_low_rank_is_its_covariance() {
    let d_model = 12;
    let mut random = SplitMix64::at(4, 0);
    let diagonal: Vec<f32> = random.uniforms(d_model, 0.4).iter().map(|v| v + 0.5).collect();
    for rank in [0, 1, 5, 12] {
        let factor = random.uniforms(rank * d_model, 2.0);
        let full = |r: usize, c: usize| {
            let dot: f32 = (0..rank).map(|k| factor[k * d_model + r] * factor[k * d_model + c]).sum();
            dot + if r == c { diagonal[r] } else { 0.0 }
        };
        let triangle = (0..d_model).flat_map(|r| (0..=r).map(move |c| (r, c))).map(|(r, c)| full(r, c)).collect();
        let mean = random.uniforms(d_model, 1.0);
        let background = |covariance| {
            let weights = weights::Background { mean: mean.clone(), covariance, source: String::new(), images: 1 };
            Background::new(&weights).unwrap()
        };
        let packed = background(Covariance::Packed(triangle));
        let low_rank = background(Covariance::Diagonal { diagonal: diagonal.clone(), factor: factor.clone() });
        let features = random.uniforms(d_model, 3.0);
        let (a, b) = (packed.distance(&features), low_rank.distance(&features));
        // Single precision, and condition numbers below a thousand.
        assert!((a - b).abs() < 1e-3 * a, "rank {rank}: {a} and {b}");
    }
}

/// A set of four-bit statistics on the backbone of the recipe.
fn even_set() -> ExpertSetArtifact {
    let mut artifact = set("v2_set");
    let d_model = artifact.backbone.d_model;
    let mut random = SplitMix64::at(5, 0);
    let means = Int4Rows::encode(&random.uniforms(3 * d_model, 2.0), d_model);
    let factor = Int4Rows::encode(&random.uniforms(2 * d_model, 1.0), d_model);
    artifact.weights.familiarity = Some(weights::Familiarity {
        format: FloatFormat::F32,
        relative: false,
        means: Rows::Int4(means),
        covariance: Covariance::Even { scale: 0.25, factor },
        threshold: 40.0,
        pass_share: 0.0,
    });
    artifact
}

#[test]
fn an_even_covariance_measures_the_same_as_a_diagonal_of_equal_values() {
    let statistics = even_set().weights.familiarity.unwrap();
    let Covariance::Even { scale, factor } = &statistics.covariance else { panic!("an even covariance") };
    let d_model = factor.codes.len() / 2;
    let diagonal = weights::Familiarity {
        means: statistics.means.to_f32().into_owned().into(),
        covariance: Covariance::Diagonal { diagonal: vec![*scale; d_model], factor: factor.to_f32() },
        ..statistics.clone()
    };
    let [even, diagonal] = [&statistics, &diagonal].map(|statistics| Familiarity::new(statistics, None).unwrap());
    let features = SplitMix64::at(6, 0).uniforms(d_model, 30.0);
    let scaled: Vec<f32> = familiarity::scaled(&features).map(|value| value as f32).collect();
    let square = scaled.iter().map(|value| value * value).sum::<f32>() / d_model as f32;
    assert!((square - 1.0).abs() < 1e-5, "{square}");
    let (got, expected) = (even.distance(&features, None), diagonal.distance(&scaled, None));
    assert!((got - expected).abs() < 1e-4 * expected, "{got} and {expected}");
    // The length of features says nothing.
    let longer: Vec<f32> = features.iter().map(|value| 2.0 * value).collect();
    assert!((even.distance(&longer, None) - got).abs() < 1e-4 * got);
    assert!(even.distance(&vec![0.0; d_model], None).is_finite());
    assert!(even.heap_bytes() < diagonal.heap_bytes() / 2, "{} and {}", even.heap_bytes(), diagonal.heap_bytes());
}

#[test]
fn four_bit_statistics_are_read_as_they_were_written() {
    let artifact = even_set();
    let bytes = artifact.to_bytes().unwrap();
    let got = read_expert_set(&bytes).unwrap();
    assert_eq!(got.weights.familiarity, artifact.weights.familiarity);
    assert_eq!(got.to_bytes().unwrap(), bytes);

    let refused = |change: fn(&mut weights::Familiarity)| {
        let mut artifact = even_set();
        change(artifact.weights.familiarity.as_mut().unwrap());
        artifact.to_bytes().unwrap_err().to_string()
    };
    let error = refused(|statistics| statistics.means = statistics.means.to_f32().into_owned().into());
    assert!(error.contains("`int4` goes with"), "{error}");
    assert!(refused(|statistics| statistics.relative = true).contains("familiarity.relative"));
    let error = refused(|statistics| {
        let Rows::Int4(means) = &mut statistics.means else { unreachable!() };
        means.codes[3] = -8;
    });
    assert!(error.contains("`familiarity.means.codes`") && error.contains("out of range"), "{error}");
    let error = refused(|statistics| {
        let Covariance::Even { factor, .. } = &mut statistics.covariance else { unreachable!() };
        factor.scale[1] = 0.0;
    });
    assert!(error.contains("`familiarity.factor.scale`") && error.contains("positive"), "{error}");

    // Finite each, but not their products.
    let mut huge = even_set().weights.familiarity.unwrap();
    let Rows::Int4(means) = &mut huge.means else { unreachable!() };
    means.scale[0] = f32::MAX;
    assert!(Familiarity::new(&huge, None).unwrap_err().to_string().contains("familiarity.factor"));
}

#[test]
fn a_projection_is_read_as_it_was_written_and_measured_on() {
    let mut artifact = even_set();
    let (d_model, features) = (artifact.backbone.d_model, 5);
    let projection = Projection::Folded { features };
    let mut random = SplitMix64::at(9, 0);
    let classes = artifact.weights.labels.len();
    let head = random.uniforms(classes * features, 1.0);
    artifact.weights.head.weight = Matrix::encode(&head, classes, Precision::Int8);
    artifact.weights.projection = Some(projection);
    let Some(statistics) = &mut artifact.weights.familiarity else { unreachable!() };
    statistics.means = Rows::Int4(Int4Rows::encode(&random.uniforms(3 * features, 2.0), features));
    let factor = Int4Rows::encode(&random.uniforms(2 * features, 1.0), features);
    statistics.covariance = Covariance::Even { scale: 0.25, factor };
    let bytes = artifact.to_bytes().unwrap();
    let got = read_expert_set(&bytes).unwrap();
    assert_eq!((&got.weights, got.to_bytes().unwrap()), (&artifact.weights, bytes));

    let x = random.uniforms(d_model, 3.0);
    let mut z = vec![0.0; features];
    projection.apply(&x, &mut z);
    let plain = Familiarity::new(got.weights.familiarity.as_ref().unwrap(), None).unwrap();
    let expected = plain.distance(&z, None);
    assert_eq!(plain.of_projected(Some(projection)).distance(&x, None), expected);

    // Not fewer features than there are, and no statistics of all of them.
    for features in [0, d_model, usize::MAX] {
        let mut wide = artifact.clone();
        wide.weights.projection = Some(Projection::Folded { features });
        let error = wide.to_bytes().unwrap_err().to_string();
        assert!(error.contains("projection.features"), "{error}");
    }
    let mut diagonal = artifact;
    let statistics = diagonal.weights.familiarity.as_mut().unwrap();
    statistics.means = statistics.means.to_f32().into_owned().into();
    statistics.covariance = Covariance::Diagonal { diagonal: vec![1.0; features], factor: Vec::new() };
    let error = diagonal.to_bytes().unwrap_err().to_string();
    assert!(error.contains("`projection`") && error.contains("`even`"), "{error}");
}

#[test]
fn a_covariance_that_is_not_positive_definite_is_refused() {
    let mut weights = backbone(2).weights.background.unwrap();
    let background = Background::new(&weights).unwrap();
    let Covariance::Packed(triangle) = &mut weights.covariance else { panic!("a packed covariance") };
    triangle[2] = -1.0;
    let error = Background::new(&weights).unwrap_err().to_string();
    assert!(error.contains("`background.covariance`") && error.contains("not positive definite"), "{error}");
    let mut statistics = set("v2_set").weights.familiarity.unwrap();
    let Covariance::Packed(triangle) = &mut statistics.covariance else { panic!("a packed covariance") };
    triangle[0] = 0.0;
    let error = Familiarity::new(&statistics, Some(&background)).unwrap_err().to_string();
    assert!(error.contains("`familiarity.covariance`") && error.contains("not positive definite"), "{error}");
}

#[test]
fn experts_are_lent_by_the_set_that_is_named_and_by_no_other() {
    let artifact = set("v2_set");
    // The engine has no stem like the one of the recipe: the sets are bound to one that it has.
    let mut weights = backbone(2).weights;
    weights.config.stem = vec![model_core::config::StemLayer::patch(12, 4)];
    weights.stem = vec![model_core::weights::StemWeights {
        conv: model_core::weights::Linear { weight: vec![0.1; 12 * 48].into(), bias: vec![0.0; 12] },
        ..Default::default()
    }];
    let digest = artifact.backbone_digest;
    let backbone = Backbone::from_weights("b".into(), &weights, Default::default(), digest, Isa::best()).unwrap();
    let learned = ExpertSet::from_artifact(artifact.clone(), &backbone, None).unwrap();
    let borrower = ExpertSet::from_artifact(set("v2_borrower"), &backbone, Some(&learned)).unwrap();
    assert_eq!(borrower.borrowed_experts(), Some(learned.digest()));
    assert!(borrower.resident_bytes() < learned.resident_bytes());

    let refused = |edit: fn(&mut ExpertSetArtifact), lender: Option<&ExpertSet>| {
        let mut artifact = set("v2_borrower");
        edit(&mut artifact);
        let error = ExpertSet::from_artifact(artifact, &backbone, lender).unwrap_err();
        assert!(matches!(error, ModelError::Artifact(ArtifactError::Lender { .. })), "{error}");
        error.to_string()
    };
    assert!(refused(|_| {}, None).contains("it is not there"));
    let mut part = set("v2_set");
    part.view.fit = Fit::Pad;
    assert_eq!(ExpertSet::from_artifact(part, &backbone, None).unwrap().view().fit, Fit::Pad);
    assert!(refused(|b| b.borrowed_experts = Some(b.digest), Some(&learned)).contains("it is the set itself"));
    assert!(refused(|b| b.weights.config.top_k = 1, Some(&learned)).contains("another shape"));
    let seeded = ExpertSet::from_artifact(set("v2_seeded"), &backbone, None).unwrap();
    assert!(refused(|_| {}, Some(&seeded)).contains("another set was found"));
    let mut chained = set("v2_borrower");
    chained.borrowed_experts = Some(borrower.digest());
    chained.digest = learned.digest();
    let error = ExpertSet::from_artifact(chained, &backbone, Some(&borrower)).unwrap_err().to_string();
    assert!(error.contains("it borrows its experts itself"), "{error}");
}
