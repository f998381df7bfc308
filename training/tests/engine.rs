//! The integer engine against its float reference.

#[path = "../../model-core/tests/common/mod.rs"]
mod common;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use common::{expert_configs, minute_config, packed_config, relative_error};
use model_core::artifact::Digest;
use model_core::config::{Activation, ViTConfig};
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::Preprocess;
use model_core::kernels::Isa;
use training::ops::Activations;
use training::parameters::Quantizers;
use training::vit::ViT;

/// The candle model quantises the same activations except those of qkv and projection, and sums in another order. Codes
/// flip at rounding ties, and int8 attention weights are off by up to half a step in 127, so that logits agree to a few
/// percent of their norm; a wrong order, scale or sign would be off by all of it.
#[test]
fn logits_agree_with_the_candle_model() {
    let configs =
        expert_configs().into_iter().map(|experts| ViTConfig { experts, ..ViTConfig::preset("tiny").unwrap() });
    // And one whose features fill no vector of any instruction set.
    for (seed, config) in configs.chain([minute_config(), packed_config(false)]).enumerate() {
        let labels: Vec<_> = (0..config.num_classes).map(|i| format!("class {i}")).collect();
        let (backbone_weights, set_weights) = ViT::init(&config, seed as u64).unwrap().to_weights(&labels).unwrap();
        let side = config.backbone.image_size;
        let pixels: Vec<_> = (0..3 * side * side * 3).map(|i| (i * 31 % 255) as f32 / 64.0 - 2.0).collect();
        let input = Tensor::from_vec(pixels.clone(), (3, side, side, 3), &Device::Cpu).unwrap();
        let quantizers = Quantizers { activations: Activations::Int8, ..Quantizers::NONE };
        let vit = ViT::from_weights(&backbone_weights, &set_weights).unwrap();
        let expected = vit.forward(&input, quantizers).unwrap().logits.to_vec2::<f32>().unwrap();
        for isa in Isa::available() {
            let (name, digest) = ("test".to_owned(), Digest::of("backbone", &[]));
            let backbone =
                Backbone::from_weights(name.clone(), &backbone_weights, Preprocess::default(), digest, isa).unwrap();
            let set = ExpertSet::from_weights(name, set_weights.clone(), digest, &backbone).unwrap();
            let mut logits = vec![vec![f32::NAN; config.num_classes]; 3];
            let mut rows: Vec<_> = pixels
                .chunks_exact(side * side * 3)
                .zip(&mut logits)
                .map(|(pixels, logits)| Row { set: &set, pixels, logits, routing: None, features: None })
                .collect();
            Session::new(&Arc::new(backbone), 3, 1).forward(&mut rows).unwrap();
            for (logits, expected) in logits.iter().zip(&expected) {
                let error = relative_error(logits, expected);
                println!("{isa}, configuration {seed}: {error:.4}");
                assert!(error < 0.05, "{isa}, configuration {seed}: {logits:?} is not {expected:?}");
            }
        }
    }
}

/// A calibrated stem rounds every output to 255 or 127 steps and clips what lies beyond them; its float path does not.
#[test]
fn a_calibrated_stem_agrees_with_the_candle_model() {
    let (mut weights, set_weights) = common::calibrated_weights(2);
    let side = weights.config.image_size;
    let preprocess = Preprocess::default();
    let samples: Vec<u8> = (0..side * side * 3).map(|i| (i * 37 + i * i / 7) as u8).collect();
    let pixels = preprocess.normalize(&samples);
    let input = Tensor::from_vec(pixels.clone(), (1, side, side, 3), &Device::Cpu).unwrap();
    let vit = ViT::from_weights(&weights, &set_weights).unwrap();
    let mut largest = vec![0f32; weights.stem.len()];
    let visit = |i: usize, y: &Tensor| {
        largest[i] = y.abs()?.flatten_all()?.max(0)?.to_scalar()?;
        Ok(())
    };
    vit.stem().forward_each(&input, visit).unwrap();
    for ((layer, weights), largest) in weights.config.stem.iter().zip(&mut weights.stem).zip(largest) {
        let positive = layer.activation == Activation::Relu6 && layer.residual.is_none();
        weights.step = Some(largest / if positive { 255.0 } else { 127.0 });
    }
    let expected = vit.forward(&input, Quantizers::NONE).unwrap().logits.flatten_all().unwrap().to_vec1().unwrap();
    let digest = Digest::of("backbone", &[]);
    let backbone = Backbone::from_weights("b".into(), &weights, preprocess, digest, Isa::best()).unwrap();
    let set = ExpertSet::from_weights("s".into(), set_weights, digest, &backbone).unwrap();
    let mut logits = vec![f32::NAN; set.labels().len()];
    let mut rows = [Row { set: &set, pixels: &pixels, logits: &mut logits, routing: None, features: None }];
    Session::new(&Arc::new(backbone), 1, 1).forward(&mut rows).unwrap();
    let error = relative_error(&logits, &expected);
    println!("a calibrated stem: {error:.4}");
    assert!(error < 0.05, "{logits:?} is not {expected:?}");
}
