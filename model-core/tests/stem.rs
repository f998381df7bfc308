//! A calibrated stem: the same bits on every instruction set, in every batch and on any number of threads, and the numbers
//! that its formulas give.

mod common;

use std::sync::Arc;

use common::{calibrated_config, calibrated_weights, files};
use model_core::artifact::Digest;
use model_core::config::{Activation, StemLayer};
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::Preprocess;
use model_core::kernels::Isa;
use model_core::weights::{BackboneWeights, ExpertSetWeights, Matrix};

const PREPROCESS: Preprocess = Preprocess {
    resize: model_core::image::Resize::CenterCropBilinear,
    mean: [127.0 / 255.0; 3],
    std: [128.0 / 255.0; 3],
    reduction: 2.0,
};

fn engine(weights: &(BackboneWeights, ExpertSetWeights), isa: Isa) -> (Arc<Backbone>, ExpertSet) {
    let digest = Digest::of("backbone", &[]);
    let backbone = Backbone::from_weights("b".into(), &weights.0, PREPROCESS, digest, isa).unwrap();
    let set = ExpertSet::from_weights("s".into(), weights.1.clone(), digest, &backbone).unwrap();
    (Arc::new(backbone), set)
}

/// Samples of a picture, and what the model sees of it.
fn image(seed: usize) -> (Vec<u8>, Vec<f32>) {
    let samples: Vec<u8> = (0..18 * 18 * 3).map(|i| (i * 37 + seed * 101 + i * i / 7) as u8).collect();
    let pixels = PREPROCESS.normalize(&samples);
    (samples, pixels)
}

fn logits(session: &mut Session, set: &ExpertSet, images: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut logits = vec![vec![f32::NAN; set.labels().len()]; images.len()];
    let rows = images.iter().zip(&mut logits);
    let mut rows: Vec<_> =
        rows.map(|(pixels, logits)| Row { set, pixels, logits, routing: None, features: None }).collect();
    session.forward(&mut rows).unwrap();
    logits
}

/// The stem in double precision with every output rounded to its step, written out from `FORMAT.md`: pooled features.
fn definition(weights: &BackboneWeights, samples: &[u8]) -> Vec<f64> {
    let mut inputs: Vec<Vec<f64>> = vec![samples.iter().map(|&v| (f64::from(v) - 127.0) / 128.0).collect()];
    for (i, (layer, side, channels)) in weights.config.stem_inputs().enumerate() {
        let StemLayer { kernel, stride, padding: [top, left, ..], groups, .. } = layer;
        let Matrix::Int8 { codes, scale } = &weights.stem[i].conv.weight else { panic!("int8 weights") };
        let (out_side, own) = (layer.output_side(side).unwrap(), channels / groups);
        let mut out = vec![0.0; out_side * out_side * layer.channels];
        for (at, y) in out.iter_mut().enumerate() {
            let (row, col, o) = (at / layer.channels / out_side, at / layer.channels % out_side, at % layer.channels);
            for tap in 0..kernel * kernel * own {
                let (ky, kx, n) = (tap / own / kernel, tap / own % kernel, tap % own);
                let (y_in, x_in) = ((row * stride + ky).wrapping_sub(top), (col * stride + kx).wrapping_sub(left));
                if y_in < side && x_in < side {
                    let channel = o / (layer.channels / groups) * own + n;
                    let value = inputs[i][(y_in * side + x_in) * channels + channel];
                    *y += f64::from(codes[o * kernel * kernel * own + tap]) * f64::from(scale[o]) * value;
                }
            }
            *y += f64::from(weights.stem[i].conv.bias[o]);
            if layer.activation == Activation::Relu6 {
                *y = y.clamp(0.0, 6.0);
            }
            *y += layer.residual.map_or(0.0, |from| inputs[from][at]);
            let step = f64::from(weights.stem[i].step.unwrap());
            let positive = layer.activation == Activation::Relu6 && layer.residual.is_none();
            let (low, high) = if positive { (0.0, 255.0) } else { (-128.0, 127.0) };
            *y = (*y / step).round_ties_even().clamp(low, high) * step;
        }
        inputs.push(out);
    }
    let (d_model, last) = (weights.config.d_model, inputs.last().unwrap());
    let tokens = last.len() / d_model;
    (0..d_model).map(|c| last.iter().skip(c).step_by(d_model).sum::<f64>() / tokens as f64).collect()
}

#[test]
fn every_isa_batch_and_team_gives_the_same_bits() {
    for seed in 0..3 {
        let weights = calibrated_weights(seed);
        let images: Vec<_> = (0..4).map(|i| image(i).1).collect();
        let (backbone, set) = engine(&weights, Isa::SCALAR);
        let expected = logits(&mut Session::new(&backbone, 4, 1), &set, &images);
        for isa in Isa::available() {
            let (backbone, set) = engine(&weights, isa);
            // The head is f32, whose sums run in another order: features are compared through it, closely.
            let alone: Vec<_> = images
                .iter()
                .flat_map(|image| logits(&mut Session::new(&backbone, 1, 1), &set, std::slice::from_ref(image)))
                .collect();
            for (got, expected) in alone.iter().flatten().zip(expected.iter().flatten()) {
                assert!((got - expected).abs() < 1e-5, "{isa}: {got} is not {expected}");
            }
            for threads in 1..4 {
                assert_eq!(logits(&mut Session::new(&backbone, 4, threads), &set, &images), alone, "{isa}, {threads}");
            }
        }
    }
}

/// Codes flip where f32 and f64 round apart, at ties only; a flip is a step of one of 81 or 25 pixels.
#[test]
fn features_are_those_of_the_formulas() {
    for seed in 0..3 {
        let mut weights = calibrated_weights(seed);
        let d_model = weights.0.config.d_model;
        // A head that hands the features on.
        let identity: Vec<f32> =
            (0..d_model * d_model).map(|i| if i % (d_model + 1) == 0 { 1.0 } else { 0.0 }).collect();
        weights.1.head.weight = identity.into();
        weights.1.head.bias = vec![0.0; d_model];
        weights.1.labels = (0..d_model).map(|i| i.to_string()).collect();
        let (samples, pixels) = image(seed as usize);
        let expected = definition(&weights.0, &samples);
        assert!(expected.iter().any(|&v| v > 0.1), "nothing comes through: {expected:?}");
        for isa in Isa::available() {
            let (backbone, set) = engine(&weights, isa);
            let got = &logits(&mut Session::new(&backbone, 1, 1), &set, std::slice::from_ref(&pixels))[0];
            for (got, expected) in got.iter().zip(&expected) {
                assert!((f64::from(*got) - expected).abs() < 2e-3, "{isa}, {seed}: {got} is not {expected}");
            }
        }
    }
}

#[test]
fn a_calibrated_stem_survives_its_file() {
    let weights = calibrated_weights(1);
    let bytes = model_core::artifact::write_backbone("b", &weights.0, &PREPROCESS, &serde_json::Value::Null).unwrap();
    assert_eq!(model_core::artifact::read_backbone(&bytes).unwrap().weights, weights.0);
    // And a stem alone without steps, of layers that are rounded tile by tile.
    let mut config = calibrated_config();
    config.backbone.stem = vec![StemLayer::conv3(10, 2), StemLayer::patch(33, 1)];
    let files = files(&config, 3);
    let backbone = Backbone::from_bytes(&files.backbone).unwrap();
    ExpertSet::from_bytes(&files.expert_set, &backbone).unwrap();
}

#[test]
fn what_codes_cannot_do_is_named() {
    let refused = |edit: fn(&mut BackboneWeights)| {
        let mut weights = calibrated_weights(1).0;
        edit(&mut weights);
        let digest = Digest::of("backbone", &[]);
        Backbone::from_weights("b".into(), &weights, PREPROCESS, digest, Isa::SCALAR).unwrap_err().to_string()
    };
    let error = refused(|weights| weights.stem[3].step = None);
    assert!(error.contains("layer 1: the integer path has no grouped convolutions"), "{error}");
    let error = refused(|weights| {
        weights.config.stem[6].groups = 7;
        weights.config.stem[6].channels = 21;
        weights.config.stem.truncate(7);
        weights.config.d_model = 21;
        weights.stem.truncate(7);
        weights.stem[6].conv.bias.push(0.0);
        let codes = vec![1; 21 * 9];
        weights.stem[6].conv.weight = Matrix::Int8 { codes, scale: vec![0.1; 21] };
    });
    assert!(error.contains("layer 6: the integer path has no grouped convolutions"), "{error}");
    let error = refused(|weights| weights.stem[2].conv.bias.truncate(3));
    assert!(error.contains("stem"), "{error}");
}
